// SPDX-License-Identifier: Apache-2.0
//
// What every .cu file includes, and all it includes of CUDA: element types, vector access, launch and status. With
// SDXL_FAST_CUDA_EMULATION the same device code becomes plain C++ for a CPU (emulation/emulation.h).
#pragma once

#if defined(SDXL_FAST_CUDA_EMULATION)
#include "emulation/emulation.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include <stdint.h>
#include <string.h>

#include <type_traits>

#include "../common/half.h"
#include "../include/sdxl_fast.h"

namespace sdxl_fast {
namespace cuda {

using bf16 = __nv_bfloat16;
using f16 = __half;

__device__ __forceinline__ float to_float(float value) {
    return value;
}
__device__ __forceinline__ float to_float(bf16 value) {
    return __bfloat162float(value);
}
__device__ __forceinline__ float to_float(f16 value) {
    return __half2float(value);
}

template <class T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
    return value;
}
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float value) {
    return __float2bfloat16_rn(value);
}
template <>
__device__ __forceinline__ f16 from_float<f16>(float value) {
    return __float2half_rn(value);
}

// N elements moved by one access; at N * sizeof(T) == 16 that is the widest there is.
template <class T, int N>
struct alignas(N * sizeof(T)) Vec {
    T at[N];
};

template <class T>
constexpr int kVecWidth = 16 / static_cast<int>(sizeof(T));

template <int N, class T>
__device__ __forceinline__ Vec<T, N> load(const T* source) {
    return *reinterpret_cast<const Vec<T, N>*>(source);
}

// Into global memory. One instruction for 16 or 8 bytes, which the compiler would take apart again where the elements
// come out of branches.
template <int N, class T>
__device__ __forceinline__ void store(T* target, const Vec<T, N>& value) {
#if defined(__CUDA_ARCH__)
    constexpr int kWords = sizeof(value) / sizeof(uint32_t);
    if constexpr (kWords == 4 || kWords == 2) {
        const uint64_t at = __cvta_generic_to_global(target);
        uint32_t w[kWords];
        memcpy(w, &value, sizeof(value));
        if constexpr (kWords == 4) {
            asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(at), "r"(w[0]), "r"(w[1]), "r"(w[2]),
                         "r"(w[3])
                         : "memory");
        } else {
            asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(at), "r"(w[0]), "r"(w[1]) : "memory");
        }
        return;
    }
#endif
    *reinterpret_cast<Vec<T, N>*>(target) = value;
}

template <int N, class T>
__device__ __forceinline__ void store_shared(T* target, const Vec<T, N>& value) {
    *reinterpret_cast<Vec<T, N>*>(target) = value;
}

// Two values as float8 e4m3, the first in the lower byte: by one instruction where there is one, from sm_89 on.
__device__ __forceinline__ uint16_t e4m3_pair(float first, float second) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    uint16_t pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(second), "f"(first));
    return pair;
#else
    return static_cast<uint16_t>(float_to_e4m3(first).bits | float_to_e4m3(second).bits << 8);
#endif
}

// The reciprocal of the scale of a result of type OUT; 1 for one that has none.
template <class OUT>
__device__ __forceinline__ float reciprocal_of(const float* scale) {
    return std::is_same<OUT, E4M3>::value ? 1.0f / *scale : 1.0f;
}

// Stores y as it is, or as e4m3 of y * reciprocal.
template <class OUT, class T, int N>
__device__ __forceinline__ void store_result(OUT* target, const Vec<T, N>& y, float reciprocal) {
    if constexpr (!std::is_same<OUT, E4M3>::value) {
        store<N>(target, y);
    } else if constexpr (N == 1) {
        target->bits = static_cast<uint8_t>(e4m3_pair(to_float(y.at[0]) * reciprocal, 0.0f));
    } else {
        uint16_t pairs[N / 2];
#pragma unroll
        for (int i = 0; i < N; i += 2)
            pairs[i / 2] = e4m3_pair(to_float(y.at[i]) * reciprocal, to_float(y.at[i + 1]) * reciprocal);
        Vec<E4M3, N> out;
        memcpy(&out, pairs, sizeof(out));
        store<N>(target, out);
    }
}

// N neighbouring elements of a per-channel tensor that may be absent and may be float whatever the op's own type is.
// The type is asked once, so that all their loads are under way together.
template <int N>
__device__ __forceinline__ void load_params(float (&to)[N], const void* pointer, int32_t dtype, int64_t index,
                                            float absent) {
    const auto read = [&](auto* from) {
#pragma unroll
        for (int i = 0; i < N; ++i) to[i] = to_float(from[index + i]);
    };
    if (pointer == nullptr) {
#pragma unroll
        for (int i = 0; i < N; ++i) to[i] = absent;
    } else if (dtype == SDXL_FAST_F32) {
        read(static_cast<const float*>(pointer));
    } else if (dtype == SDXL_FAST_BF16) {
        read(static_cast<const bf16*>(pointer));
    } else {
        read(static_cast<const f16*>(pointer));
    }
}

__device__ __forceinline__ float load_param(const void* pointer, int32_t dtype, int64_t index, float absent) {
    float one[1];
    load_params(one, pointer, dtype, index, absent);
    return one[0];
}

__device__ __forceinline__ void store_param(void* pointer, int32_t dtype, int64_t index, float value) {
    if (dtype == SDXL_FAST_F32) {
        static_cast<float*>(pointer)[index] = value;
    } else if (dtype == SDXL_FAST_BF16) {
        static_cast<bf16*>(pointer)[index] = from_float<bf16>(value);
    } else {
        static_cast<f16*>(pointer)[index] = from_float<f16>(value);
    }
}

// Every lane of the warp ends with the sum over its part of the warp, LANES wide; the order of the additions is fixed.
template <int LANES = 32>
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
    for (int distance = LANES / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
    return value;
}

// ---- host side ----

inline bool aligned(const void* pointer, int64_t bytes) {
    return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

template <class... Pointers>
bool all_aligned(int64_t bytes, const Pointers*... pointers) {
    return (aligned(pointers, bytes) && ...);
}

inline int64_t ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

inline int32_t status_of(cudaError_t error) {
    return error == cudaSuccess ? SDXL_FAST_OK : SDXL_FAST_CUDA_ERROR + static_cast<int32_t>(error);
}

template <class T>
struct Same {
    using type = T;
};

// Launches without reading back anything that an earlier kernel may have left; a refused launch is not left behind as
// the context's "last error" for somebody else's check to find.
template <class... P>
int32_t launch(void (*kernel)(P...), dim3 grid, unsigned threads, void* stream, typename Same<P>::type... args) {
#if defined(SDXL_FAST_CUDA_EMULATION)
    (void)stream;
    return emulation::launch(kernel, grid, threads, args...);
#else
    void* pointers[] = {const_cast<void*>(static_cast<const void*>(&args))...};
    const cudaError_t error = cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, dim3(threads), pointers, 0,
                                               static_cast<cudaStream_t>(stream));
    if (error != cudaSuccess) (void)cudaGetLastError();
    return status_of(error);
#endif
}

// Multiprocessors of the current device; not a synchronising query, legal while a graph is captured.
inline int32_t multiprocessors(int& count) {
    int device = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    if (error != cudaSuccess) (void)cudaGetLastError();
    return status_of(error);
}

// Calls f(T{}) with the element type of `dtype`.
template <class F>
int32_t with_dtype(int32_t dtype, F f) {
    if (dtype == SDXL_FAST_F32) return f(float{});
    if (dtype == SDXL_FAST_BF16) return f(bf16{});
    if (dtype == SDXL_FAST_F16) return f(f16{});
    return dtype == SDXL_FAST_F64 ? SDXL_FAST_UNSUPPORTED_DTYPE : SDXL_FAST_INVALID_ARGUMENT;
}

}  // namespace cuda
}  // namespace sdxl_fast
