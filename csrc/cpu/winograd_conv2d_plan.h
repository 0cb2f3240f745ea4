// SPDX-License-Identifier: Apache-2.0
//
// How winograd_conv2d cuts its work: into blocks of tiles of 2 x 2 output positions.
#pragma once

#include <stdint.h>

#include "common/macros.h"
#include "packed_conv2d_plan.h"

namespace sdxl_fast {

constexpr int64_t kWinogradPoints = 16;     // of a tile once it has been transformed; of a doubled map 9 are not 0
constexpr int64_t kWinogradChannels = 512;  // the most that go in
constexpr int64_t kBlockValues = 4096;      // of a point: tiles of a block times channels
constexpr int64_t kMostBlockTiles = 64;

struct WinogradPlan {
    Panels weight;                 // a point in a tap's place
    int64_t p, q;                  // height and width of the output
    int64_t rows, columns, tiles;  // of a sample: rows and columns of tiles; of all samples: tiles
    int64_t padded;                // channels that go in, whole vectors
    int64_t block, blocks;
};

SDXL_HD WinogradPlan plan_winograd(const WinogradShape& s) {
    WinogradPlan plan{};
    plan.weight = {s.upsample ? 9 : kWinogradPoints, s.c_in, s.c_out};
    plan.p = s.upsample ? 2 * s.h : s.h;
    plan.q = s.upsample ? 2 * s.w : s.w;
    plan.rows = (plan.p + 1) / 2;
    plan.columns = (plan.q + 1) / 2;
    plan.tiles = s.n * plan.rows * plan.columns;
    plan.padded = (s.c_in + 15) / 16 * 16;
    // A dozen blocks, or more of them that still fit the cache; all tiles of a block meet the same rows of the weight.
    const int64_t fit = kBlockValues / plan.padded / 8 * 8, most = fit < kMostBlockTiles ? fit : kMostBlockTiles;
    const int64_t share = (plan.tiles / 12 + 7) / 8 * 8;
    plan.block = share < 8 ? 8 : share < most ? share : most;
    plan.blocks = (plan.tiles + plan.block - 1) / plan.block;
    return plan;
}

}  // namespace sdxl_fast
