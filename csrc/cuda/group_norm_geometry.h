// SPDX-License-Identifier: Apache-2.0
//
// How group_norm_silu is cut into blocks: a pure function of shape, vector width and multiprocessors, plain C++ so that
// it is tested without a GPU.
//
// A map is cut along hw into `chunks` of `chunk` positions and along c into entries: an entry is the part of one group
// that one reduction covers, `sub_channels` wide (the last of a group may be narrower), `subs` of them a group.
//   NHWC  a block takes one chunk of one tile of channels. A tile is as many whole groups as kLanes vectors hold, so
//         that an entry is a group; groups wider than that are split (subs > 1) and a tile is one entry. A thread keeps
//         the same vector of channels (tx of them) and walks down the rows (ty apart).
//   NCHW  an entry is one channel; a warp takes one chunk of one channel, a block kWarps of them out of one group.
#pragma once

#include <math.h>
#include <stdint.h>

namespace sdxl_fast {
namespace cuda {

// Most vectors across a tile: 640 contiguous bytes, whole lines of DRAM. Narrow tiles keep the chunks few: what the
// second pass merges grows with their square.
constexpr int kGroupNormLanes = 40;
// Threads of a block. SDXL's widths are multiples of 64 and mostly of 320, their tiles 16, 30, 32 or 40 vectors wide,
// and 320 threads hold whole rows of each. Two such blocks leave every thread 96 registers, with which nothing spills.
constexpr int kGroupNormThreads = 320;
constexpr int kGroupNormWarps = 8;  // warps of an NCHW block
// The workspace is sized for this many multiprocessors, so that its size does not depend on the current device.
constexpr int kGroupNormMaxMultiprocessors = 256;

struct GroupNormGeometry {
    bool ok;  // false: this vector width does not divide the shape
    int64_t chunk, chunks;
    int64_t group_channels, sub_channels, subs, entries;  // entries: of one sample and chunk
    int64_t tile_entries, tiles;
    int tx, ty, threads;
};

inline int64_t group_norm_ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

inline int64_t group_norm_gcd(int64_t a, int64_t b) {
    return b == 0 ? a : group_norm_gcd(b, a % b);
}

// Blocks that a pass should have: one per multiprocessor while a thread has fewer than 16 vectors to walk through, two
// (as many as are resident) for larger maps.
inline int64_t group_norm_blocks(int64_t vectors, int64_t threads, int64_t multiprocessors) {
    const int64_t by_work = vectors / (threads * 16);
    if (by_work < multiprocessors) return multiprocessors;
    return by_work < 2 * multiprocessors ? by_work : 2 * multiprocessors;
}

// Cuts hw into about `wanted` chunks, each a multiple of `multiple`.
inline void group_norm_chunks(GroupNormGeometry& g, int64_t hw, int64_t wanted, int64_t multiple) {
    const int64_t most = group_norm_ceil_div(hw, multiple);
    const int64_t chunks = wanted < 1 ? 1 : (wanted < most ? wanted : most);
    g.chunk = group_norm_ceil_div(group_norm_ceil_div(hw, chunks), multiple) * multiple;
    g.chunks = group_norm_ceil_div(hw, g.chunk);
}

inline GroupNormGeometry group_norm_nchw(int64_t n, int64_t c, int64_t hw, int64_t groups, int vec,
                                         int64_t multiprocessors) {
    GroupNormGeometry g{};
    g.ok = hw % vec == 0;
    if (!g.ok) return g;
    g.group_channels = c / groups;
    g.sub_channels = 1;
    g.subs = g.group_channels;
    g.entries = c;
    g.threads = kGroupNormWarps * 32;
    const int64_t blocks = group_norm_blocks(n * c * hw / vec, g.threads, multiprocessors);
    // At least four vectors a lane; the block count follows from the chunks.
    group_norm_chunks(g, hw, blocks * kGroupNormWarps / (n * c), int64_t{32} * 4 * vec);
    g.tiles = group_norm_ceil_div(g.group_channels * g.chunks, kGroupNormWarps);  // blocks of one group
    g.tile_entries = 1;
    return g;
}

inline GroupNormGeometry group_norm_nhwc(int64_t n, int64_t c, int64_t hw, int64_t groups, int vec,
                                         int64_t multiprocessors) {
    GroupNormGeometry g{};
    g.group_channels = c / groups;
    const int64_t unit = vec / group_norm_gcd(g.group_channels, vec);  // groups whose channels fill whole vectors
    if (c % vec == 0 && unit * g.group_channels <= int64_t{kGroupNormLanes} * vec) {
        const int64_t most = kGroupNormLanes * vec / (unit * g.group_channels) * unit;
        g.tiles = group_norm_ceil_div(groups, most);
        g.tile_entries = group_norm_ceil_div(group_norm_ceil_div(groups, g.tiles), unit) * unit;
        if (g.tile_entries > groups) g.tile_entries = groups;
        g.tiles = group_norm_ceil_div(groups, g.tile_entries);
        g.sub_channels = g.group_channels;
        g.subs = 1;
        g.tx = static_cast<int>(g.tile_entries * g.group_channels / vec);
    } else if (g.group_channels % vec == 0) {
        const int64_t parts = group_norm_ceil_div(g.group_channels, int64_t{kGroupNormLanes} * vec);
        g.sub_channels = group_norm_ceil_div(group_norm_ceil_div(g.group_channels, parts), vec) * vec;
        g.subs = group_norm_ceil_div(g.group_channels, g.sub_channels);
        g.tile_entries = 1;
        g.tiles = groups * g.subs;
        g.tx = static_cast<int>(g.sub_channels / vec);
    } else {
        return g;
    }
    g.ok = true;
    g.entries = groups * g.subs;
    const int64_t lines = kGroupNormThreads / g.tx;
    g.ty = static_cast<int>(lines < 1 ? 1 : (lines < hw ? lines : hw));
    g.threads = (g.tx * g.ty + 31) / 32 * 32;
    const int64_t blocks = group_norm_blocks(n * c * hw / vec, g.threads, multiprocessors);
    // Merging reads entries * chunks^2 * 8 bytes a sample: at most two fifths of a 16-bit map. At least four rows a
    // thread.
    const int64_t most = static_cast<int64_t>(sqrt(0.1 * static_cast<double>(c / g.entries) * static_cast<double>(hw)));
    const int64_t wanted = blocks / (n * g.tiles);
    group_norm_chunks(g, hw, wanted < most ? wanted : most, int64_t{4} * g.ty);
    return g;
}

inline GroupNormGeometry group_norm_geometry(int64_t n, int64_t c, int64_t hw, int64_t groups, bool nhwc, int vec,
                                             int64_t multiprocessors) {
    if (multiprocessors > kGroupNormMaxMultiprocessors) multiprocessors = kGroupNormMaxMultiprocessors;
    return nhwc ? group_norm_nhwc(n, c, hw, groups, vec, multiprocessors)
                : group_norm_nchw(n, c, hw, groups, vec, multiprocessors);
}

// Workspace of the backward, in floats: three planes of sums per chunk and channel, then two sums per group, then (for
// dshift) three sums per sample and channel.
inline int64_t group_norm_bwd_floats(int64_t n, int64_t c, int64_t groups, int64_t chunks) {
    return 3 * n * chunks * c + 2 * n * groups + 3 * n * c;
}

// Enough for any vector width and any device.
inline int64_t group_norm_workspace(int64_t n, int64_t c, int64_t hw, int64_t groups, bool nhwc, bool backward) {
    int64_t bytes = 0;
    for (int vec = 1; vec <= 8; vec *= 2) {
        const GroupNormGeometry g = group_norm_geometry(n, c, hw, groups, nhwc, vec, kGroupNormMaxMultiprocessors);
        if (!g.ok) continue;
        const int64_t floats = backward ? group_norm_bwd_floats(n, c, groups, g.chunks) : 2 * n * g.chunks * g.entries;
        if (4 * floats > bytes) bytes = 4 * floats;
    }
    return bytes;
}

}  // namespace cuda
}  // namespace sdxl_fast
