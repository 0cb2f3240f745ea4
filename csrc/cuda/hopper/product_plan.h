// SPDX-License-Identifier: Apache-2.0
//
// How a product is cut for Hopper: plain host code without CUDA, tested over every shape of SDXL.
//
// Everything here is an image convolution, C_out channels of every position of a map from a window around it; a linear
// layer is one of 1x1 taps on a map of one row. A tile is 128 positions, a patch of the map, by `columns` channels. K
// is walked through tap by tap, 128 bytes of channels ("slice") at a time.
#pragma once

#include <stdint.h>

namespace sdxl_fast {
namespace hopper {

constexpr int kRows = 128;
constexpr int kSliceBytes = 128;
constexpr int kSplit = 2;          // CTAs that share a tile, each half of K, where one would leave SMs idle
constexpr int kPhases = 4;         // of an upsampled map
constexpr int kGatedColumns = 80;  // value and gate are tiles of this width each

// The widths a tile can have: 160 divides SDXL's channels, which are multiples of 320, 128 and 256 its VAE's.
enum class Width { k128 = 128, k160 = 160, k256 = 256 };

// Shared memory of a block: a ring of stages, a slice of x and one of W each, what the other block of a pair sends
// (half the rows, in fp32), and barriers. As many stages as fit, but no more than hide the latency of memory.
constexpr int kMostBytes = 227 * 1024;  // that a block can have
constexpr int kMostStages = 8;
constexpr int kTileAlignment = 1024;  // of a swizzled tile; dynamic shared memory by itself promises 16
constexpr int kBarrierBytes = 256;

constexpr int exchange_bytes(int columns, int split) {
    return split > 1 ? kRows / 2 * columns * 4 : 0;
}

constexpr int ring_stages(int columns, int split) {
    const int left = kMostBytes - kTileAlignment - kBarrierBytes - exchange_bytes(columns, split);
    const int fit = left / ((kRows + columns) * kSliceBytes);
    return fit < kMostStages ? fit : kMostStages;
}

constexpr int shared_bytes(int columns, int split) {
    return kTileAlignment + ring_stages(columns, split) * (kRows + columns) * kSliceBytes +
           exchange_bytes(columns, split) + kBarrierBytes;
}

struct Plan {
    Width width;
    int split;
    int tile_h, tile_w;  // of the patch; tile_w is a power of two
    int64_t tiles_h, tiles_w;
    int64_t tiles_m, tiles_n;
    int64_t ctas;  // in the grid
};

struct Problem {
    int64_t images, height, width;  // of the map the tiles cover (one phase of it)
    int64_t columns;                // channels out; for a gate those of the value alone
    int64_t slices;                 // of K: taps times ceil(C_in / slice)
    int phases;
    bool gated;
    bool float8;
};

constexpr int64_t ceil_of(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

// Patches of 8 x 16 positions reread the fewest neighbours; a longer one only where it leaves fewer positions idle.
inline void cut_map(const Problem& problem, Plan& plan) {
    int64_t fewest = -1;
    for (const int w : {16, 8, 32, 64, 128}) {
        const int h = kRows / w;
        const int64_t tiles = ceil_of(problem.height, h) * ceil_of(problem.width, w);
        if (fewest >= 0 && tiles >= fewest) continue;
        fewest = tiles;
        plan.tile_h = h;
        plan.tile_w = w;
    }
    plan.tiles_h = ceil_of(problem.height, plan.tile_h);
    plan.tiles_w = ceil_of(problem.width, plan.tile_w);
    plan.tiles_m = problem.images * plan.tiles_h * plan.tiles_w;
}

// What a tile takes, in the time one slice takes per column at the best rate. A wider tile reuses its rows more often;
// beside the products there is the way into and out of the tile, and with a split the exchange. Estimates, in the
// ratios of shared memory traffic and of the latencies of Hopper, until a GPU has been asked.
inline int64_t tile_cost(Width width, int split, int64_t slices) {
    const int64_t per_slice = width == Width::k256 ? 256 : width == Width::k160 ? 165 : 136;
    return ceil_of(slices, split) * per_slice + (split > 1 ? 550 : 400);
}

inline Plan plan_product(const Problem& problem, int multiprocessors) {
    Plan plan{};
    cut_map(problem, plan);
    int64_t best = -1;
    for (const Width width : {Width::k160, Width::k256, Width::k128}) {
        if ((problem.gated || problem.float8) && width != Width::k160) continue;
        for (int split = 1; split <= kSplit; ++split) {
            if (split > 1 && (problem.gated || width != Width::k160 || problem.slices < 2 * kSplit)) continue;
            const int64_t wide = problem.gated ? kGatedColumns : static_cast<int64_t>(width);
            const int64_t tiles_n = ceil_of(problem.columns, wide);
            const int64_t tiles = plan.tiles_m * tiles_n * problem.phases;
            // A split tile has both its CTAs at once or not at all: only while all of them fit.
            if (split > 1 && tiles * split > multiprocessors) continue;
            const int64_t cost = ceil_of(tiles * split, multiprocessors) * tile_cost(width, split, problem.slices);
            if (best >= 0 && cost >= best) continue;
            best = cost;
            plan.width = width;
            plan.split = split;
            plan.tiles_n = tiles_n;
            plan.ctas = split > 1 ? tiles * split : (tiles < multiprocessors ? tiles : multiprocessors);
        }
    }
    return plan;
}

// Where a tile lies. Neighbouring tiles run at the same time: the phases of one patch, which read the same inputs,
// then `kGroup` patches, then the next columns of those.
struct Place {
    int image, h, w;  // of the patch's first position
    int column;
    int phase;
};

constexpr int kGroup = 8;

// In 32 bits, as are tiles: a division of 64 takes a GPU dozens of instructions and registers.
struct Schedule {
    int tiles_h, tiles_w, tiles_m, tiles_n;
    int tile_h, tile_w, columns, phases;
};

#if defined(__CUDACC__)
#define SDXL_FAST_BOTH __host__ __device__ __forceinline__
#else
#define SDXL_FAST_BOTH inline
#endif

SDXL_FAST_BOTH Place place_of(const Schedule& s, int tile) {
    Place place;
    const int rest = tile / s.phases;
    place.phase = tile - rest * s.phases;
    const int group = rest / (kGroup * s.tiles_n);
    const int first = group * kGroup;
    const int rows = s.tiles_m - first < kGroup ? s.tiles_m - first : kGroup;
    const int within = rest - first * s.tiles_n;
    const int patch = first + within % rows;
    place.column = within / rows * s.columns;
    place.w = patch % s.tiles_w * s.tile_w;
    place.h = patch / s.tiles_w % s.tiles_h * s.tile_h;
    place.image = patch / (s.tiles_w * s.tiles_h);
    return place;
}

struct Taps {
    int h, w, padding;
    int slices;  // of K in one tap
    bool upsampled;
};

// What one slice of K reads: a patch of x from (h, w) on, which may begin before the map and end behind it, and one tap
// of the weight, both from channel c on.
struct Source {
    int c, h, w, tap;
};

// The slices of K that part `part` of `parts` multiplies.
SDXL_FAST_BOTH void slices_of_part(const Taps& taps, int parts, int part, int& begin, int& end) {
    const int all = taps.h * taps.w * taps.slices;
    const int half = parts > 1 ? (all + 1) / 2 : all;
    begin = part == 0 ? 0 : half;
    end = part == 0 ? half : all;
}

// Phase (i, j) of an upsampled map reads its tap (a, b) at row u + i - 1 + a, column v + j - 1 + b, and multiplies it
// with tap (3 - i - 2a, 3 - j - 2b) of the 4x4 kernel.
SDXL_FAST_BOTH Source source_of(const Taps& taps, const Place& place, int slice, int depth) {
    const int tap = slice / taps.slices;
    const int r = tap / taps.w, s = tap - r * taps.w;
    const int i = place.phase / 2, j = place.phase % 2;
    Source source;
    source.c = (slice - tap * taps.slices) * depth;
    source.h = place.h + r - taps.padding + i;
    source.w = place.w + s - taps.padding + j;
    source.tap = taps.upsampled ? 4 * (3 - i - 2 * r) + (3 - j - 2 * s) : tap;
    return source;
}

// Strides of y in elements: of the positions of one phase, and from a phase to the next.
struct Output {
    int64_t image, row, column, phase_h, phase_w;
    int64_t height, width;  // of one phase
};

// Where the channels of position `position` of a tile begin in y, or -1 behind the map.
SDXL_FAST_BOTH int64_t output_at(const Output& y, const Schedule& s, const Place& place, int position) {
    const int w = place.w + position % s.tile_w, h = place.h + position / s.tile_w;
    if (w >= y.width || h >= y.height) return -1;
    return place.image * y.image + h * y.row + w * y.column + place.phase / 2 * y.phase_h + place.phase % 2 * y.phase_w;
}

// y is dense, NHWC; a phase of an upsampled map takes every other row and column.
inline Output dense_output(int64_t height, int64_t width, int64_t channels, bool upsampled) {
    const int64_t up = upsampled ? 2 : 1;
    const int64_t row = up * width * channels;
    return {up * height * row, up * row, up * channels, row, channels, height, width};
}

// The sums of a thread: wgmma gives it rows r and r + 8 of the 16 of its warp, of every eight columns two neighbours.
SDXL_FAST_BOTH int first_row(int thread) {
    return thread / 32 * 16 + thread % 32 / 4;
}

SDXL_FAST_BOTH int first_column(int thread) {
    return thread % 4 * 2;
}

}  // namespace hopper
}  // namespace sdxl_fast
