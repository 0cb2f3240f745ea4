// SPDX-License-Identifier: Apache-2.0
//
// to_uint8: round(255 clamp(x / 2 + 1/2, 0, 1)), ties to even, written channels innermost.
//
// Formula    in float whatever the element type, rounded after every step as the steps of an image processor are: so
//            the product is __fmul_rn, which is never fused. NaN gives 0.
// Grid       x: blocks of 256 threads over one sample, y: samples (strided). A thread makes 16 bytes of a channels-last
//            tensor, or 16 pixels of three planes; any other number of channels, and ragged ones, go byte by byte.
// Registers  16 values of each plane, the bytes they become.
// Bytes      reads 1 element and writes 1 byte.
// Wrong      where the last convolution can do it in its epilogue.
#include "noising.cuh"

namespace sdxl_fast {
namespace cuda {
namespace {

constexpr int kBytes = 16;  // a store

__device__ __forceinline__ uint8_t byte_of(float x) {
    const float unit = fminf(fmaxf(x * 0.5f + 0.5f, 0.0f), 1.0f);  // fmaxf(NaN, 0) is 0
    return static_cast<uint8_t>(rintf(__fmul_rn(unit, 255.0f)));
}

// 16 values, in as many accesses as they take.
template <class T>
__device__ __forceinline__ void load_bytes(const T* from, uint8_t (&to)[kBytes]) {
    constexpr int kVec = kVecWidth<T>;
#pragma unroll
    for (int v = 0; v < kBytes / kVec; ++v) {
        const Vec<T, kVec> part = load<kVec>(from + v * kVec);
#pragma unroll
        for (int i = 0; i < kVec; ++i) to[v * kVec + i] = byte_of(to_float(part.at[i]));
    }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    to_uint8_straight_kernel(const T* __restrict__ x, uint8_t* __restrict__ out, int64_t groups) {
    const int64_t group = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (group >= groups) return;
    Vec<uint8_t, kBytes> bytes;
    load_bytes(x + group * kBytes, bytes.at);
    store<kBytes>(out + group * kBytes, bytes);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    to_uint8_planes_kernel(const T* __restrict__ x, uint8_t* __restrict__ out, int64_t n, int64_t hw) {
    const int64_t pixel = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kBytes;
    if (pixel >= hw) return;
    for (int64_t sample = blockIdx.y; sample < n; sample += gridDim.y) {
        uint8_t plane[3][kBytes];
#pragma unroll
        for (int c = 0; c < 3; ++c) load_bytes(x + (sample * 3 + c) * hw + pixel, plane[c]);
        uint8_t* to = out + (sample * hw + pixel) * 3;
#pragma unroll
        for (int third = 0; third < 3; ++third) {
            Vec<uint8_t, kBytes> bytes;
#pragma unroll
            for (int i = 0; i < kBytes; ++i) {
                const int at = third * kBytes + i;
                bytes.at[i] = plane[at % 3][at / 3];
            }
            store<kBytes>(to + third * kBytes, bytes);
        }
    }
}

template <class T, bool NHWC>
__global__ void __launch_bounds__(kThreads, 2)
    to_uint8_any_kernel(const T* __restrict__ x, uint8_t* __restrict__ out, int64_t n, int64_t channels, int64_t hw) {
    const int64_t elements = channels * hw;
    const int64_t e = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (e >= elements) return;
    const int64_t from = NHWC ? e : (e % channels) * hw + e / channels;
    for (int64_t sample = blockIdx.y; sample < n; sample += gridDim.y)
        out[sample * elements + e] = byte_of(to_float(x[sample * elements + from]));
}

template <class T>
int32_t convert(const T* x, uint8_t* out, int64_t n, int64_t c, int64_t hw, bool nhwc, void* stream) {
    const bool straight = nhwc || c == 1, wide = all_aligned(16, x, out);
    const int64_t total = n * c * hw;
    if (wide && straight && total % kBytes == 0 && grid_fits(total / kBytes))
        return launch(to_uint8_straight_kernel<T>, sample_grid(total / kBytes, 1), kThreads, stream, x, out,
                      total / kBytes);
    if (wide && c == 3 && !nhwc && hw % kBytes == 0)
        return launch(to_uint8_planes_kernel<T>, sample_grid(hw / kBytes, n), kThreads, stream, x, out, n, hw);
    return launch(straight ? to_uint8_any_kernel<T, true> : to_uint8_any_kernel<T, false>, sample_grid(c * hw, n),
                  kThreads, stream, x, out, n, c, hw);
}

}  // namespace
}  // namespace cuda
}  // namespace sdxl_fast

extern "C" {

int32_t sdxl_fast_to_uint8_fwd_cuda(const void* x, void* out, int64_t n, int64_t c, int64_t hw, int32_t layout,
                                    int32_t dtype, void* stream) {
    using namespace sdxl_fast::cuda;
    if (n < 0 || c < 0 || hw < 0 || (layout != SDXL_FAST_NHWC && layout != SDXL_FAST_NCHW) || !grid_fits(c * hw))
        return SDXL_FAST_INVALID_ARGUMENT;
    return with_dtype(dtype, [&](auto element) -> int32_t {
        using T = decltype(element);
        if (n == 0 || c == 0 || hw == 0) return SDXL_FAST_OK;
        return convert(static_cast<const T*>(x), static_cast<uint8_t*>(out), n, c, hw, layout == SDXL_FAST_NHWC,
                       stream);
    });
}

}  // extern "C"
