// SPDX-License-Identifier: Apache-2.0
//
// What the group_norm_silu kernels share: which elements a thread walks through, and the factors of its channels.
#pragma once

#include "../common/math.h"
#include "device.cuh"
#include "group_norm_geometry.h"

namespace sdxl_fast {
namespace cuda {

// One call, by value to every kernel.
struct GroupNormProblem {
    int64_t n, c, hw, groups;
    GroupNormGeometry g;
    const void *weight, *bias, *shift;
    int32_t dtype, param_dtype;
    int64_t c_skip = 0;  // how many of the channels, the last, a forward finds in a tensor of their own
};

// Mean and sum of squared deviations of one entry over one chunk; how many elements they cover follows from the
// geometry.
struct alignas(8) MeanM2 {
    float mean, m2;
};

struct alignas(8) MeanRstd {
    float mean, rstd;
};

// The vectors of one thread: `count` of them, `step` elements apart from element `first` on, all of the channel(s) from
// `channel` on. `active` threads own channels even when their count is zero.
struct Place {
    int64_t sample, chunk_index, rows;   // rows: positions in the chunk
    int64_t first_entry, num_entries;    // of the block
    int64_t first_channel, end_channel;  // of the block
    int64_t first, step, count, channel;
    int64_t row;     // NHWC: position of the first vector, over all samples
    int lane, line;  // NHWC: vector across the tile, row; NCHW: lane of the warp, warp
    bool active;
};

__device__ __forceinline__ int64_t smaller(int64_t a, int64_t b) {
    return a < b ? a : b;
}

__device__ __forceinline__ int64_t entry_channel(const GroupNormGeometry& g, int64_t entry) {
    return entry / g.subs * g.group_channels + entry % g.subs * g.sub_channels;
}

__device__ __forceinline__ int64_t entry_width(const GroupNormGeometry& g, int64_t sub) {
    return smaller(g.sub_channels, g.group_channels - sub * g.sub_channels);
}

// REVERSED: the passes over a map alternate their direction, so that a pass begins with what the one before it read
// last and may still be in L2.
template <bool NHWC, int VEC, bool REVERSED>
__device__ __forceinline__ Place place_of(const GroupNormProblem& p) {
    const GroupNormGeometry& g = p.g;
    const unsigned block = REVERSED ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
    const unsigned thread = threadIdx.x;
    Place at;
    if (NHWC) {
        const unsigned chunks = static_cast<unsigned>(g.chunks), tx = static_cast<unsigned>(g.tx);
        at.sample = block / chunks;
        at.chunk_index = block % chunks;
        at.rows = smaller(g.chunk, p.hw - at.chunk_index * g.chunk);
        at.first_entry = blockIdx.y * g.tile_entries;
        at.num_entries = smaller(g.tile_entries, g.entries - at.first_entry);
        const int64_t last = at.first_entry + at.num_entries - 1;
        at.first_channel = entry_channel(g, at.first_entry);
        at.end_channel = entry_channel(g, last) + entry_width(g, last % g.subs);
        at.lane = static_cast<int>(thread % tx);
        at.line = static_cast<int>(thread / tx);
        at.channel = at.first_channel + at.lane * VEC;
        at.active = at.line < g.ty && at.channel < at.end_channel;
        at.row = at.sample * p.hw + at.chunk_index * g.chunk + at.line;
        at.first = at.row * p.c + at.channel;
        at.step = g.ty * p.c;
        at.count = at.active && at.line < at.rows ? (at.rows - at.line + g.ty - 1) / g.ty : 0;
    } else {
        const unsigned tiles = static_cast<unsigned>(g.tiles), chunks = static_cast<unsigned>(g.chunks);
        at.lane = static_cast<int>(thread % 32);
        at.line = static_cast<int>(thread / 32);
        const unsigned unit = block % tiles * kGroupNormWarps + thread / 32;
        at.sample = block / tiles;
        at.active = unit < g.group_channels * g.chunks;
        at.first_channel = blockIdx.y * g.group_channels;
        at.channel = at.first_channel + unit / chunks;
        at.end_channel = at.first_channel + g.group_channels;
        at.chunk_index = unit % chunks;
        at.first_entry = at.first_channel;
        at.num_entries = g.group_channels;
        at.rows = smaller(g.chunk, p.hw - at.chunk_index * g.chunk);
        const int64_t offset = at.lane * VEC;
        at.first = (at.sample * p.c + at.channel) * p.hw + at.chunk_index * g.chunk + offset;
        at.step = 32 * VEC;
        at.count = at.active && offset < at.rows ? (at.rows - offset + at.step - 1) / at.step : 0;
    }
    return at;
}

// What a thread of a forward reads: its first vector and how far apart they are, in x or in skip. The vectors of a
// thread are all of the same channels, so of one of the two.
template <class T>
struct Source {
    const T* data;
    int64_t first, step;
};

template <bool TWO, class T>
__device__ __forceinline__ Source<T> source_of(const GroupNormProblem& p, const Place& at, const T* __restrict__ x,
                                               const T* __restrict__ skip) {
    if (!TWO || p.c_skip == 0) return {x, at.first, at.step};
    const int64_t c_x = p.c - p.c_skip;
    if (at.channel < c_x) return {x, at.row * c_x + at.channel, p.g.ty * c_x};
    return {skip, at.row * p.c_skip + (at.channel - c_x), p.g.ty * p.c_skip};
}

// Calls body(offset of a vector in the result, its elements) for all vectors of the thread, UNROLL loads in flight.
template <int UNROLL, int VEC, class T, class Body>
__device__ __forceinline__ void for_each_vector(const Place& at, const Source<T>& from, Body body) {
    int64_t i = 0;
    for (; i + UNROLL <= at.count; i += UNROLL) {
        Vec<T, VEC> values[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) values[u] = load<VEC>(from.data + from.first + (i + u) * from.step);
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) body(at.first + (i + u) * at.step, values[u]);
    }
    for (; i < at.count; ++i) body(at.first + i * at.step, load<VEC>(from.data + from.first + i * from.step));
}

// The same over two tensors of one shape.
template <int UNROLL, int VEC, class T, class Body>
__device__ __forceinline__ void for_each_pair(const Place& at, const T* __restrict__ a, const T* __restrict__ b,
                                              Body body) {
    int64_t i = 0;
    for (; i + UNROLL <= at.count; i += UNROLL) {
        Vec<T, VEC> values_a[UNROLL], values_b[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            values_a[u] = load<VEC>(a + at.first + (i + u) * at.step);
            values_b[u] = load<VEC>(b + at.first + (i + u) * at.step);
        }
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) body(at.first + (i + u) * at.step, values_a[u], values_b[u]);
    }
    for (; i < at.count; ++i) {
        const int64_t offset = at.first + i * at.step;
        body(offset, load<VEC>(a + offset), load<VEC>(b + offset));
    }
}

// fp32 factors of a thread's channels; NCHW threads have one channel. xh = (x + center) rstd with center = shift -
// mean: folding the mean into the bias instead would lose |mean| / std digits.
template <int CHANNELS>
struct Factors {
    float center[CHANNELS], rstd[CHANNELS], weight[CHANNELS], bias[CHANNELS];
};

// The groups of a thread's channels, by one division.
template <int CHANNELS>
__device__ __forceinline__ void groups_of(unsigned (&group)[CHANNELS], const GroupNormProblem& p, const Place& at) {
    const unsigned width = static_cast<unsigned>(p.g.group_channels), channel = static_cast<unsigned>(at.channel);
    group[0] = channel / width;
    unsigned end = (group[0] + 1) * width;
#pragma unroll
    for (int i = 1; i < CHANNELS; ++i) {
        const bool is_next = channel + i == end;
        group[i] = group[i - 1] + (is_next ? 1 : 0);
        end += is_next ? width : 0;
    }
}

// All that does not depend on the statistics; center is the shift alone.
template <int CHANNELS>
__device__ __forceinline__ Factors<CHANNELS> params_of(const GroupNormProblem& p, const Place& at) {
    Factors<CHANNELS> f;
    load_params(f.center, p.shift, p.dtype, at.sample * p.c + at.channel, 0.0f);
    load_params(f.weight, p.weight, p.param_dtype, at.channel, 1.0f);
    load_params(f.bias, p.bias, p.param_dtype, at.channel, 0.0f);
    return f;
}

// Completes them; stats(group) yields its MeanRstd.
template <int CHANNELS, class Stats>
__device__ __forceinline__ void add_stats(Factors<CHANNELS>& f, const GroupNormProblem& p, const Place& at,
                                          Stats stats) {
    unsigned group[CHANNELS];
    groups_of(group, p, at);
#pragma unroll
    for (int i = 0; i < CHANNELS; ++i) {
        const MeanRstd s = stats(group[i]);
        f.center[i] -= s.mean;
        f.rstd[i] = s.rstd;
    }
}

// Results kept in 16 bits take the hardware exponential and a fast reciprocal; both saturate exactly.
template <class T>
__device__ __forceinline__ float sigmoid_for(float z) {
    return sizeof(T) == 2 ? __fdividef(1.0f, 1.0f + __expf(-z)) : sigmoid(z);
}

template <class T, bool SILU>
__device__ __forceinline__ float activate(float z) {
    return SILU ? z * sigmoid_for<T>(z) : z;
}

// dz = dy act'(z)
template <class T, bool SILU>
__device__ __forceinline__ float activate_grad(float dy, float z) {
    if (!SILU) return dy;
    const float s = sigmoid_for<T>(z);
    return dy * (s * (1.0f + z * (1.0f - s)));
}

}  // namespace cuda
}  // namespace sdxl_fast
