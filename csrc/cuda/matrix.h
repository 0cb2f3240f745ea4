// SPDX-License-Identifier: Apache-2.0
//
// What the C functions of the matrix ops share: what their arguments must be, and the way to the kernel.
#pragma once

#include "device.cuh"
#include "hopper/product.h"

namespace sdxl_fast {
namespace cuda {

// Rows and columns move 16 bytes at a time, and so start at multiples of that.
constexpr int64_t kMatrixAlignment = 16;

inline int64_t matrix_multiple(bool float8) {
    return float8 ? 16 : 8;
}

// Sizes beyond these do not fit the coordinates of a tensor map or of a grid.
inline bool matrix_sizes_fit(const hopper::Convolution& c) {
    constexpr int64_t kMost = INT32_MAX / 4;
    for (const int64_t size : {c.images, c.x_height, c.x_width, c.c_in, c.c_out}) {
        if (size < 0 || size > kMost) return false;
    }
    return c.c_in > 0 && c.c_out > 0;
}

// Checks what every op asks, and runs what has positions.
inline int32_t run_matrix(hopper::Convolution& c, int32_t dtype, void* stream) {
    c.float8 = dtype == SDXL_FAST_F8E4M3;
    if (!matrix_sizes_fit(c)) return SDXL_FAST_INVALID_ARGUMENT;
    if (dtype != SDXL_FAST_BF16 && !c.float8) {
        return dtype < 0 || dtype > SDXL_FAST_F8E4M3 ? SDXL_FAST_INVALID_ARGUMENT : SDXL_FAST_UNSUPPORTED_DTYPE;
    }
    const int64_t multiple = matrix_multiple(c.float8);
    if (c.c_in % multiple != 0 || c.c_out % 8 != 0) return SDXL_FAST_INVALID_ARGUMENT;
    if (!all_aligned(kMatrixAlignment, c.x, c.weight, c.bias, c.residual, c.y)) return SDXL_FAST_INVALID_ARGUMENT;
    if (c.float8 != (c.scale_x != nullptr) || c.float8 != (c.scale_w != nullptr)) return SDXL_FAST_INVALID_ARGUMENT;
    if (c.images * c.y_height * c.y_width == 0) return SDXL_FAST_OK;
#if defined(SDXL_FAST_WITH_HOPPER)
    return hopper::run(c, stream);
#else
    (void)stream;
    return SDXL_FAST_NOT_BUILT;
#endif
}

}  // namespace cuda
}  // namespace sdxl_fast
