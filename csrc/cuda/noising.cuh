// SPDX-License-Identifier: Apache-2.0
//
// What the ops that add noise share: the coefficients of a noise level, the normals of a Philox call, and the grid.
#pragma once

#include "../common/philox.h"
#include "device.cuh"

namespace sdxl_fast {
namespace cuda {
namespace {

constexpr int kThreads = 256;

struct Level {
    float signal, sigma;
};

// sqrt(ab_t) and sqrt(1 - ab_t); NaN outside the schedule.
__device__ __forceinline__ Level level_at(const float* alphas_cumprod, int64_t t, int64_t num_timesteps) {
    if (t < 0 || t >= num_timesteps) return {nanf(""), nanf("")};
    const float ab = alphas_cumprod[t];
    return {sqrtf(ab), sqrtf(1.0f - ab)};
}

// The four normals of elements 4 * block .. 4 * block + 3, rounded to T.
template <class T>
__device__ __forceinline__ Vec<T, 4> normals(int64_t seed, uint64_t block, uint64_t stream) {
    const uint64_t key = static_cast<uint64_t>(seed);
    const PhiloxWords words =
        philox4x32_10(static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32), block, stream);
    Vec<T, 4> out;
#pragma unroll
    for (int pair = 0; pair < 4; pair += 2) {
        const float radius = sqrtf(-2.0f * logf(philox_u1(words.w[pair])));
        float sine, cosine;
        sincospif(2.0f * philox_u2(words.w[pair + 1]), &sine, &cosine);
        out.at[pair] = from_float<T>(radius * cosine);
        out.at[pair + 1] = from_float<T>(radius * sine);
    }
    return out;
}

struct Draw {
    const int64_t* seeds;
    uint64_t stream;
    int64_t n, channels, hw;
};

// x: blocks over the threads one sample needs, y: samples, strided where there are more than CUDA allows.
inline dim3 sample_grid(int64_t threads, int64_t n) {
    return dim3(static_cast<unsigned>(ceil_div(threads, kThreads)), static_cast<unsigned>(n < 65535 ? n : 65535));
}

// Sizes whose grid CUDA cannot launch; 2^31 blocks of 256 threads is 2 TB of the smallest element.
inline bool grid_fits(int64_t elements) {
    return elements <= int64_t{0x7fffffff} * kThreads;
}

}  // namespace
}  // namespace cuda
}  // namespace sdxl_fast
