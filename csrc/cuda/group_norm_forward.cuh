// SPDX-License-Identifier: Apache-2.0
//
// Kernels of the forward of group_norm_silu: moments of every chunk, then merge and apply. See group_norm_silu.cu.
#pragma once

#include "group_norm_device.cuh"

namespace sdxl_fast {
namespace cuda {

// Mean and sum of squared deviations over `items` parts, by LANES lanes of a warp in two passes; part(i, count, mean,
// m2) yields them. Each of these lanes ends with the result.
template <int LANES, class Part>
__device__ __forceinline__ MeanM2 warp_merge(unsigned items, float total, Part part) {
    constexpr unsigned kBatch = 4;  // parts read ahead of the first use, without a branch between their loads
    const auto for_each_part = [&](auto use) {
        for (unsigned first = threadIdx.x % LANES; first < items; first += kBatch * LANES) {
            float count[kBatch], mean[kBatch], m2[kBatch];
#pragma unroll
            for (unsigned u = 0; u < kBatch; ++u) {
                const unsigned i = first + u * LANES;
                part(i < items ? i : items - 1, count[u], mean[u], m2[u]);
            }
#pragma unroll
            for (unsigned u = 0; u < kBatch; ++u)
                if (first + u * LANES < items) use(count[u], mean[u], m2[u]);
        }
    };
    float sum = 0.0f, squares = 0.0f;
    for_each_part([&](float count, float mean, float) { sum += count * mean; });
    const float merged = warp_sum<LANES>(sum) / total;
    for_each_part(
        [&](float count, float mean, float m2) { squares += m2 + count * (mean - merged) * (mean - merged); });
    return {merged, warp_sum<LANES>(squares)};
}

template <class T, bool NHWC, int VEC>
__global__ void __launch_bounds__(kGroupNormThreads, 2)
    group_norm_silu_moments_kernel(const T* __restrict__ x, const T* __restrict__ skip, MeanM2* __restrict__ partials,
                                   GroupNormProblem p) {
    constexpr int kChannels = NHWC ? VEC : 1;
    const Place at = place_of<NHWC, VEC, false>(p);
    float shift[kChannels] = {}, count = 0.0f, mean[VEC] = {}, m2[VEC] = {};
    if (at.active) load_params(shift, p.shift, p.dtype, at.sample * p.c + at.channel, 0.0f);

    // Welford's update on every element of the vector by itself: safe however large the mean, and VEC chains to
    // overlap.
    for_each_vector<4, VEC>(at, source_of<NHWC>(p, at, x, skip), [&](int64_t, const Vec<T, VEC>& v) {
        count += 1.0f;
        const float share = 1.0f / count;
#pragma unroll
        for (int i = 0; i < VEC; ++i) {
            const float value = to_float(v.at[i]) + shift[NHWC ? i : 0];
            const float delta = value - mean[i];
            mean[i] += delta * share;
            m2[i] += delta * (value - mean[i]);
        }
    });

    MeanM2* out = partials + (at.sample * p.g.chunks + at.chunk_index) * p.g.entries;
    if (!NHWC) {
        if (!at.active) return;  // the whole warp
        const MeanM2 merged =
            warp_merge<32>(32, static_cast<float>(at.rows), [&](unsigned, float& n, float& m, float& s) {
                float sum = 0.0f, squares = 0.0f;
#pragma unroll
                for (int i = 0; i < VEC; ++i) sum += mean[i];
                m = sum / VEC;
#pragma unroll
                for (int i = 0; i < VEC; ++i) squares += m2[i] + count * (mean[i] - m) * (mean[i] - m);
                n = count * VEC;
                s = squares;
            });
        if (at.lane == 0) out[at.channel] = merged;
        return;
    }

    __shared__ float s_mean[kGroupNormThreads * VEC], s_m2[kGroupNormThreads * VEC];
    const unsigned width = static_cast<unsigned>(p.g.tx) * VEC;
    if (at.active) {
#pragma unroll
        for (int i = 0; i < VEC; ++i) {
            s_mean[at.line * width + at.lane * VEC + i] = mean[i];
            s_m2[at.line * width + at.lane * VEC + i] = m2[i];
        }
    }
    __syncthreads();
    const unsigned lines = static_cast<unsigned>(p.g.ty), rows = static_cast<unsigned>(at.rows);
    for (unsigned e = threadIdx.x / 32; e < at.num_entries; e += blockDim.x / 32) {
        const int64_t entry = at.first_entry + e;
        const unsigned begin = static_cast<unsigned>(entry_channel(p.g, entry) - at.first_channel);
        const unsigned channels = static_cast<unsigned>(entry_width(p.g, entry % p.g.subs));
        const float total = static_cast<float>(rows) * channels;
        const MeanM2 merged = warp_merge<32>(lines * channels, total, [&](unsigned i, float& n, float& m, float& s) {
            const unsigned line = i / channels, slot = line * width + begin + i % channels;
            n = line < rows ? static_cast<float>((rows - line + lines - 1) / lines) : 0.0f;
            m = s_mean[slot];
            s = s_m2[slot];
        });
        if (threadIdx.x % 32 == 0) out[entry] = merged;
    }
}

// Statistics of one group from the moments of its chunks and entries, by LANES lanes of a warp.
template <int LANES>
__device__ __forceinline__ MeanRstd merged_stats(const MeanM2* __restrict__ partials, const GroupNormProblem& p,
                                                 int64_t sample, int64_t group, float eps) {
    const GroupNormGeometry& g = p.g;
    const unsigned subs = static_cast<unsigned>(g.subs), entries = static_cast<unsigned>(g.entries);
    const MeanM2* of_group = partials + sample * g.chunks * g.entries + group * g.subs;
    const float total = static_cast<float>(g.group_channels) * static_cast<float>(p.hw);
    // Only the last chunk and the last entry of a group may be smaller than the others.
    const unsigned last_chunk = static_cast<unsigned>(g.chunks) - 1;
    const float rows = static_cast<float>(g.chunk), last_rows = static_cast<float>(p.hw - last_chunk * g.chunk);
    const float width = static_cast<float>(g.sub_channels);
    const float last_width = static_cast<float>(entry_width(g, subs - 1));
    const MeanM2 merged =
        warp_merge<LANES>((last_chunk + 1) * subs, total, [&](unsigned i, float& n, float& m, float& s) {
            const unsigned chunk = i / subs, sub = i - chunk * subs;
            const MeanM2 one = of_group[chunk * entries + sub];
            n = (chunk < last_chunk ? rows : last_rows) * (sub + 1 < subs ? width : last_width);
            m = one.mean;
            s = one.m2;
        });
    return {merged.mean, 1.0f / sqrtf(merged.m2 / total + eps)};
}

// TWO: the channels come from x and skip. Where they are read and written are then two things to keep, for which two
// of four loads in flight make room: with all four it spills on sm_120.
template <class T, class OUT, bool NHWC, int VEC, bool SILU, bool TWO>
__global__ void __launch_bounds__(kGroupNormThreads, 2)
    group_norm_silu_apply_kernel(const T* __restrict__ x, const T* __restrict__ skip,
                                 const MeanM2* __restrict__ partials, const float* __restrict__ scale_y,
                                 OUT* __restrict__ y, float* __restrict__ mean, float* __restrict__ rstd, float eps,
                                 GroupNormProblem p) {
    constexpr int kChannels = NHWC ? VEC : 1;
    __shared__ MeanRstd s_stats[NHWC ? kGroupNormLanes * VEC : 1];
    const Place at = place_of<NHWC, VEC, true>(p);
    Factors<kChannels> f{};
    if (at.active) f = params_of<kChannels>(p, at);  // under way while the statistics are merged

    // Every block merges the chunks of its own groups (a few thousand values out of L2), which saves a launch between
    // the two passes; the first block of a group also reports them.
    const int64_t first_group = at.first_channel / p.g.group_channels;
    const unsigned groups = static_cast<unsigned>((at.end_channel - 1) / p.g.group_channels - first_group + 1);
    const bool reports = NHWC ? at.chunk_index == 0 && at.first_entry % p.g.subs == 0 : blockIdx.x % p.g.tiles == 0;
    // The moments of neighbouring NHWC groups lie side by side: four of them share a warp, and its accesses.
    constexpr int kLanes = NHWC ? 8 : 32, kAtOnce = 32 / kLanes;
    for (unsigned first = threadIdx.x / 32 * kAtOnce; first < groups; first += blockDim.x / kLanes) {
        const unsigned mine = first + threadIdx.x % 32 / kLanes, i = mine < groups ? mine : groups - 1;
        const MeanRstd stats = merged_stats<kLanes>(partials, p, at.sample, first_group + i, eps);
        if (threadIdx.x % kLanes == 0 && mine < groups) {
            s_stats[i] = stats;
            if (reports) {
                mean[at.sample * p.groups + first_group + i] = stats.mean;
                rstd[at.sample * p.groups + first_group + i] = stats.rstd;
            }
        }
    }
    __syncthreads();
    if (!at.active) return;

    add_stats(f, p, at, [&](unsigned group) { return s_stats[group - first_group]; });
    const float reciprocal = reciprocal_of<OUT>(scale_y);
    for_each_vector<TWO ? 2 : 4, VEC>(at, source_of<TWO>(p, at, x, skip), [&](int64_t offset, const Vec<T, VEC>& v) {
        Vec<T, VEC> out;
#pragma unroll
        for (int i = 0; i < VEC; ++i) {
            const int k = NHWC ? i : 0;
            const float z = (to_float(v.at[i]) + f.center[k]) * (f.rstd[k] * f.weight[k]) + f.bias[k];
            out.at[i] = from_float<T>(activate<T, SILU>(z));
        }
        store_result(y + offset, out, reciprocal);
    });
}

}  // namespace cuda
}  // namespace sdxl_fast
