// SPDX-License-Identifier: Apache-2.0
//
// Kernels of the backward of group_norm_silu: sums of every chunk, sums of every group with the parameter gradients,
// dx. See group_norm_silu.cu.
#pragma once

#include "group_norm_device.cuh"

namespace sdxl_fast {
namespace cuda {

constexpr int kFinalizeWarps = 16;

// What the backward reads beside the map, and where its sums go.
struct GroupNormGradients {
    const float *mean, *rstd;
    float* sums;        // [3][n][chunks][c]: sum dz, sum dz xh, sum xh
    float* group_sums;  // [n][groups][2]: S1, S2
    float* totals;      // [n][c][3], for dshift
    void *dweight, *dbias, *dshift;
};

template <int CHANNELS>
__device__ __forceinline__ Factors<CHANNELS> saved_factors(const GroupNormProblem& p, const Place& at,
                                                           const GroupNormGradients& k) {
    Factors<CHANNELS> f = params_of<CHANNELS>(p, at);
    add_stats(f, p, at, [&](unsigned group) {
        const int64_t i = at.sample * p.groups + group;
        return MeanRstd{k.mean[i], k.rstd[i]};
    });
    return f;
}

template <class T, bool NHWC, int VEC, bool SILU>
__global__ void __launch_bounds__(kGroupNormThreads, 1)
    group_norm_silu_bwd_sums_kernel(const T* __restrict__ dy, const T* __restrict__ x, GroupNormGradients k,
                                    GroupNormProblem p) {
    constexpr int kChannels = NHWC ? VEC : 1;
    const Place at = place_of<NHWC, VEC, false>(p);
    float sums[3][VEC] = {};
    if (at.active) {
        const Factors<kChannels> f = saved_factors<kChannels>(p, at, k);
        for_each_pair<2, VEC>(at, dy, x, [&](int64_t, const Vec<T, VEC>& grad, const Vec<T, VEC>& v) {
#pragma unroll
            for (int i = 0; i < VEC; ++i) {
                const int j = NHWC ? i : 0;
                const float xh = (to_float(v.at[i]) + f.center[j]) * f.rstd[j];
                const float dz = activate_grad<T, SILU>(to_float(grad.at[i]), xh * f.weight[j] + f.bias[j]);
                sums[0][i] += dz;
                sums[1][i] += dz * xh;
                sums[2][i] += xh;
            }
        });
    }

    const int64_t plane = p.n * p.g.chunks * p.c;
    float* out = k.sums + (at.sample * p.g.chunks + at.chunk_index) * p.c;
    if (!NHWC) {
        if (!at.active) return;  // the whole warp
#pragma unroll
        for (int q = 0; q < 3; ++q) {
            float sum = 0.0f;
#pragma unroll
            for (int i = 0; i < VEC; ++i) sum += sums[q][i];
            sum = warp_sum(sum);
            if (at.lane == 0) out[q * plane + at.channel] = sum;
        }
        return;
    }
    __shared__ float s_sums[kGroupNormThreads * VEC];
    const unsigned width = static_cast<unsigned>(p.g.tx) * VEC;
    const unsigned channels = static_cast<unsigned>(at.end_channel - at.first_channel);
#pragma unroll
    for (int q = 0; q < 3; ++q) {
        if (at.active) {
#pragma unroll
            for (int i = 0; i < VEC; ++i) s_sums[at.line * width + at.lane * VEC + i] = sums[q][i];
        }
        __syncthreads();
        for (unsigned c = threadIdx.x; c < channels; c += blockDim.x) {
            float sum = 0.0f;
            for (int line = 0; line < p.g.ty; ++line) sum += s_sums[line * width + c];
            out[q * plane + at.first_channel + c] = sum;
        }
        __syncthreads();
    }
}

struct FinalizeShape {
    int width;    // channels side by side in a warp: a power of two <= 32
    int samples;  // samples side by side in a block: a power of two <= kFinalizeWarps
};

// One block per group. A warp sums the chunks of `width` channels of one sample, kFinalizeWarps / samples warps share a
// sample; the first of them adds its peers and goes on alone. Nothing depends on the order in which blocks run.
__global__ void __launch_bounds__(kFinalizeWarps * 32)
    group_norm_silu_bwd_finalize_kernel(GroupNormGradients k, GroupNormProblem p, FinalizeShape shape) {
    __shared__ float s_part[kFinalizeWarps][3][32];
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const int column = lane % shape.width, row = lane / shape.width, rows = 32 / shape.width;
    const int peers = kFinalizeWarps / shape.samples, peer = warp % peers;
    const int64_t group = blockIdx.x, plane = p.n * p.g.chunks * p.c, cg = p.g.group_channels;
    const float inverse_count = 1.0f / (static_cast<float>(cg) * static_cast<float>(p.hw));

    for (int64_t base = 0; base < cg; base += shape.width) {
        const bool inside = base + column < cg;
        const int64_t channel = group * cg + base + column;
        const float weight = inside ? load_param(p.weight, p.param_dtype, channel, 1.0f) : 0.0f;
        float dbias = 0.0f, dweight = 0.0f;
        for (int64_t first = 0; first < p.n; first += shape.samples) {
            const int64_t sample = first + warp / peers;
            float sum[3] = {};
            if (inside && sample < p.n) {
                for (int64_t chunk = peer * rows + row; chunk < p.g.chunks; chunk += peers * rows) {
                    const float* from = k.sums + (sample * p.g.chunks + chunk) * p.c + channel;
#pragma unroll
                    for (int q = 0; q < 3; ++q) sum[q] += from[q * plane];
                }
            }
#pragma unroll
            for (int q = 0; q < 3; ++q) {
                for (int distance = shape.width; distance < 32; distance *= 2)
                    sum[q] += __shfl_xor_sync(0xffffffffu, sum[q], distance);
                if (row == 0) s_part[warp][q][column] = sum[q];
            }
            __syncthreads();
            if (peer == 0 && sample < p.n) {  // the whole warp
                for (int other = 1; other < peers; ++other)
#pragma unroll
                    for (int q = 0; q < 3; ++q) sum[q] += s_part[warp + other][q][column];
                dbias += sum[0];
                dweight += sum[1];
                const bool owner = inside && row == 0;
                const float s1 = warp_sum(owner ? weight * sum[0] : 0.0f) * inverse_count;
                const float s2 = warp_sum(owner ? weight * sum[1] : 0.0f) * inverse_count;
                float* of_group = k.group_sums + 2 * (sample * p.groups + group);
                if (lane < 2) of_group[lane] = (base == 0 ? 0.0f : of_group[lane]) + (lane == 0 ? s1 : s2);
                if (owner && k.dshift != nullptr)
#pragma unroll
                    for (int q = 0; q < 3; ++q) k.totals[3 * (sample * p.c + channel) + q] = sum[q];
            }
            __syncthreads();
        }
        if (peer == 0 && row == 0) {
            s_part[warp][0][column] = dbias;
            s_part[warp][1][column] = dweight;
        }
        __syncthreads();
        if (warp == 0 && row == 0 && inside) {
            for (int other = peers; other < kFinalizeWarps; other += peers) {
                dbias += s_part[other][0][column];
                dweight += s_part[other][1][column];
            }
            if (k.dbias != nullptr) store_param(k.dbias, p.param_dtype, channel, dbias);
            if (k.dweight != nullptr) store_param(k.dweight, p.param_dtype, channel, dweight);
        }
        __syncthreads();
    }

    if (k.dshift == nullptr) return;
    for (int64_t i = threadIdx.x; i < p.n * cg; i += kFinalizeWarps * 32) {
        const int64_t sample = i / cg, channel = group * cg + i % cg;
        const float* total = k.totals + 3 * (sample * p.c + channel);
        const float* of_group = k.group_sums + 2 * (sample * p.groups + group);
        const float weight = load_param(p.weight, p.param_dtype, channel, 1.0f);
        const float dshift = k.rstd[sample * p.groups + group] *
                             (weight * total[0] - static_cast<float>(p.hw) * of_group[0] - of_group[1] * total[2]);
        store_param(k.dshift, p.dtype, sample * p.c + channel, dshift);
    }
}

template <class T, bool NHWC, int VEC, bool SILU>
__global__ void __launch_bounds__(kGroupNormThreads, 2)
    group_norm_silu_dx_kernel(const T* __restrict__ dy, const T* __restrict__ x, T* __restrict__ dx,
                              GroupNormGradients k, GroupNormProblem p) {
    constexpr int kChannels = NHWC ? VEC : 1;
    const Place at = place_of<NHWC, VEC, true>(p);
    if (!at.active) return;
    const Factors<kChannels> f = saved_factors<kChannels>(p, at, k);
    unsigned group[kChannels];
    groups_of(group, p, at);
    float s1[kChannels], s2[kChannels];
#pragma unroll
    for (int i = 0; i < kChannels; ++i) {
        const float* of_group = k.group_sums + 2 * (at.sample * p.groups + group[i]);
        s1[i] = of_group[0];
        s2[i] = of_group[1];
    }
    for_each_pair<2, VEC>(at, dy, x, [&](int64_t offset, const Vec<T, VEC>& grad, const Vec<T, VEC>& v) {
        Vec<T, VEC> out;
#pragma unroll
        for (int i = 0; i < VEC; ++i) {
            const int j = NHWC ? i : 0;
            const float xh = (to_float(v.at[i]) + f.center[j]) * f.rstd[j];
            const float dz = activate_grad<T, SILU>(to_float(grad.at[i]), xh * f.weight[j] + f.bias[j]);
            out.at[i] = from_float<T>(f.rstd[j] * (f.weight[j] * dz - s1[j] - xh * s2[j]));
        }
        store<VEC>(dx + offset, out);
    });
}

}  // namespace cuda
}  // namespace sdxl_fast
