// SPDX-License-Identifier: Apache-2.0
//
// How group_norm_silu cuts its work, as a function of the shape alone: the cut decides the order of the sums, so it
// must know neither the batch nor the threads.
//
// A sample is cut into `chunks`; a chunk leaves one record of partial sums per lane.
//   NHWC  a chunk is `chunk_rows` rows of `lanes` = fold * c elements, fold pixels side by side making up a row
//        (1 where the channels come from two tensors, whose pixels do not lie side by side)
//   NCHW  a chunk is `chunk_rows` elements of every channel, lanes = c; an item of work takes `channel_block` of them
#pragma once

#include <stdint.h>

#include "common/macros.h"
#include "kernels.h"

namespace sdxl_fast {

struct GroupNormPlan {
    GroupNormShape shape;
    int64_t per_group;  // channels in a group
    int64_t fold, lanes, padded, rows, chunk_rows, chunks, channel_block, blocks;

    // Records of chunk `i` of a sample stand for this many values per lane.
    SDXL_HD int64_t count(int64_t i) const {
        const int64_t left = rows - i * chunk_rows;
        return left < chunk_rows ? left : chunk_rows;
    }
    SDXL_HD int64_t items() const { return chunks * blocks; }
    SDXL_HD int64_t sample() const { return shape.c * shape.hw; }
};

constexpr int64_t kPadLanes = 16;  // tables and records are read in whole vectors

SDXL_HD GroupNormPlan plan_group_norm(const GroupNormShape& shape) {
    GroupNormPlan p{};
    p.shape = shape;
    p.per_group = shape.c / shape.groups;
    // Chunks that fit the L2 cache of a core, and yet enough of them to keep many threads busy.
    int64_t chunk = shape.c * shape.hw / 64;
    chunk = (chunk < 16384 ? 16384 : chunk > 131072 ? 131072 : chunk) & ~int64_t{63};
    p.fold = 1;
    p.blocks = 1;
    if (shape.nhwc) {
        // Not folded, a sample takes no more chunks, and so no more workspace.
        while (shape.c_skip == 0 && p.fold * 2 * shape.c <= 128 && shape.hw % (p.fold * 2) == 0 && shape.hw > 0)
            p.fold *= 2;
        p.lanes = p.fold * shape.c;
        p.rows = shape.hw / p.fold;
        p.chunk_rows = chunk / p.lanes < 32 ? 32 : chunk / p.lanes;
        p.channel_block = shape.c;
    } else {
        p.lanes = shape.c;
        p.rows = shape.hw;
        p.chunk_rows = chunk;
        p.channel_block = shape.hw > 0 && chunk > shape.hw ? chunk / shape.hw : 1;
        p.blocks = (shape.c + p.channel_block - 1) / p.channel_block;
    }
    p.padded = (p.lanes + kPadLanes - 1) / kPadLanes * kPadLanes;
    p.chunks = (p.rows + p.chunk_rows - 1) / p.chunk_rows;
    return p;
}

// Arrays of `padded` entries per record and per sample.
constexpr int kForwardRecord = 2;   // mean, m2
constexpr int kForwardTables = 3;   // centre, scale, bias
constexpr int kBackwardRecord = 3;  // sums of g, g * xhat, xhat
constexpr int kBackwardTables = 7;  // mean, shift, rstd, weight, bias, mean_g, mean_gx
constexpr int kBackwardTotals = 2;  // doubles: g, g * xhat per sample and channel

}  // namespace sdxl_fast
