// SPDX-License-Identifier: Apache-2.0
//
// What the kernels of layer_norm share. See layer_norm.cu.
#pragma once

#include "device.cuh"

namespace sdxl_fast {
namespace cuda {
namespace {

constexpr int kWideThreads = 256;

// Every thread of the block ends with the block's sums, added up in a fixed order. s_part may be used again at once: a
// second barrier keeps the next sums from overwriting what a slow warp still reads.
template <int COUNT, int WARPS, int ROOM>
__device__ __forceinline__ void block_sums(float (&part)[ROOM], float (&s_part)[ROOM][WARPS]) {
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const int warps = static_cast<int>(blockDim.x) / 32;
#pragma unroll
    for (int q = 0; q < COUNT; ++q) {
        part[q] = warp_sum(part[q]);
        if (lane == 0) s_part[q][warp] = part[q];
    }
    __syncthreads();
#pragma unroll
    for (int q = 0; q < COUNT; ++q) {
        part[q] = 0.0f;
        for (int w = 0; w < warps; ++w) part[q] += s_part[q][w];
    }
    __syncthreads();
}

}  // namespace
}  // namespace cuda
}  // namespace sdxl_fast
