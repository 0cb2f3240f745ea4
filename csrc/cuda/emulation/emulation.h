// SPDX-License-Identifier: Apache-2.0
//
// Enough of CUDA for the kernels of this folder to run as C++ on a CPU: tests execute the very device code that a GPU
// would, on a machine without one. Not a backend: it is slow, and built by tests only.
//
// Every thread of a block is a fiber; one runs until it reaches a barrier, a shuffle or its end, then the next. Blocks
// run one after the other, so what a kernel may not assume (an order of blocks) it may not test here, but what it must
// not forget shows: a missing __syncthreads() reads what a later thread has not written yet (the order of threads can
// be reversed), a barrier or shuffle that not all threads reach is reported instead of hanging.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <functional>

#include "../../common/half.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
// One copy that the blocks use in turn: what a block finds there is what the block before it left.
#define __shared__ static

// ---- index space ----

struct dim3 {
    unsigned x, y, z;
    constexpr explicit dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

inline dim3 gridDim, blockDim, blockIdx, threadIdx;

// ---- element types ----

struct __nv_bfloat16 {
    sdxl_fast::BF16 value;
};
struct __half {
    sdxl_fast::F16 value;
};

inline float __bfloat162float(__nv_bfloat16 x) {
    return sdxl_fast::bf16_to_float(x.value);
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
    return {sdxl_fast::float_to_bf16(x)};
}
inline float __half2float(__half x) {
    return sdxl_fast::f16_to_float(x.value);
}
inline __half __float2half_rn(float x) {
    return {sdxl_fast::float_to_f16(x)};
}

// ---- arithmetic ----

inline float __expf(float x) {
    return expf(x);
}
inline float __fdividef(float a, float b) {
    return a / b;
}
inline float __fmul_rn(float a, float b) {
    return a * b;
}
inline float rsqrtf(float x) {
    return 1.0f / sqrtf(x);
}
inline void sincospif(float x, float* sine, float* cosine) {
    const double angle = 3.14159265358979323846 * static_cast<double>(x);
    *sine = static_cast<float>(sin(angle));
    *cosine = static_cast<float>(cos(angle));
}

// ---- runtime ----

using cudaError_t = int;
using cudaStream_t = void*;
enum { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9, cudaErrorLaunchFailure = 719 };
enum { cudaDevAttrMultiProcessorCount = 16 };

namespace emulation {

extern int multiprocessors;

// Runs `body` once per thread of the grid; cudaSuccess or the error a GPU would give (or its hang).
cudaError_t run(dim3 grid, unsigned threads, const std::function<void()>& body);

void block_barrier();
float warp_exchange(float value, int distance);

// What every lane of the warp brings, for operations on registers of the whole warp.
using WarpWords = uint32_t[32][6];
const WarpWords& warp_gather(const uint32_t (&own)[6]);

template <class... P>
int32_t launch(void (*kernel)(P...), dim3 grid, unsigned threads, P... args) {
    const cudaError_t error = run(grid, threads, [&] { kernel(args...); });
    return error == cudaSuccess ? 0 : 1000 + error;
}

}  // namespace emulation

inline void __syncthreads() {
    emulation::block_barrier();
}

// Only full warps, which is all the kernels use.
inline float __shfl_xor_sync(unsigned, float value, int distance) {
    return emulation::warp_exchange(value, distance);
}

inline cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, int, int) {
    *value = emulation::multiprocessors;
    return cudaSuccess;
}
inline cudaError_t cudaGetLastError() {
    return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* pointer, int value, int64_t bytes, cudaStream_t) {
    memset(pointer, value, static_cast<size_t>(bytes));
    return cudaSuccess;
}
