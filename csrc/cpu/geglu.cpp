// SPDX-License-Identifier: Apache-2.0
#include "element.h"
#include "common/math.h"
#include "sdxl_fast.h"
using namespace sdxl_fast;
extern "C" {
int32_t sdxl_fast_geglu_fwd_cpu(const void* xv, void* yv, int64_t rows, int64_t cols, int32_t approximate, int32_t dtype, int32_t) {
    if (rows < 0 || cols < 0 || approximate < 0 || approximate > 1) return SDXL_FAST_INVALID_ARGUMENT;
    return with_dtype(dtype, [&](auto* tag) { (void)tag;
        using T = std::remove_pointer_t<decltype(tag)>;
        using A = typename ComputeOf<T>::type;
        const T* x = static_cast<const T*>(xv); T* y = static_cast<T*>(yv);
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t j = 0; j < cols; ++j) {
                const A v = to_compute(x[r * 2 * cols + j]), g = to_compute(x[r * 2 * cols + cols + j]);
                from_compute(A(v * (approximate ? gelu_tanh(g) : gelu(g))), y[r * cols + j]);
            }
    }) ? SDXL_FAST_OK : SDXL_FAST_UNSUPPORTED_DTYPE;
}
int32_t sdxl_fast_geglu_bwd_cpu(const void* dyv, const void* xv, void* dxv, int64_t rows, int64_t cols, int32_t approximate, int32_t dtype, int32_t) {
    if (rows < 0 || cols < 0 || approximate < 0 || approximate > 1) return SDXL_FAST_INVALID_ARGUMENT;
    return with_dtype(dtype, [&](auto* tag) { (void)tag;
        using T = std::remove_pointer_t<decltype(tag)>;
        using A = typename ComputeOf<T>::type;
        const T *x = static_cast<const T*>(xv), *dy = static_cast<const T*>(dyv); T* dx = static_cast<T*>(dxv);
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t j = 0; j < cols; ++j) {
                const int64_t i = r * 2 * cols + j;
                const A v = to_compute(x[i]), g = to_compute(x[i + cols]), d = to_compute(dy[r * cols + j]);
                from_compute(A(d * (approximate ? gelu_tanh(g) : gelu(g))), dx[i]);
                from_compute(A(d * v * (approximate ? gelu_tanh_derivative(g) : gelu_derivative(g))), dx[i + cols]);
            }
    }) ? SDXL_FAST_OK : SDXL_FAST_UNSUPPORTED_DTYPE;
}
}
