// SPDX-License-Identifier: Apache-2.0
//
// conv2d: 3x3 or 1x1 taps, stride 1, with bias and residual. The kernel: hopper/product.cuh.
#include "matrix.h"

using namespace sdxl_fast;

extern "C" int32_t sdxl_fast_conv2d_fwd_cuda(const void* x, const void* weight, const void* bias, const void* residual,
                                             const float* scale_x, const float* scale_w, void* y, int64_t n,
                                             int64_t c_in, int64_t h, int64_t w, int64_t c_out, int32_t kernel_size,
                                             int32_t padding, int32_t dtype, void* stream) {
    if ((kernel_size != 1 && kernel_size != 3) || padding < 0 || padding > 1) return SDXL_FAST_INVALID_ARGUMENT;
    hopper::Convolution c{};
    c.x = x;
    c.weight = weight;
    c.bias = bias;
    c.residual = residual;
    c.scale_x = scale_x;
    c.scale_w = scale_w;
    c.y = y;
    c.images = n;
    c.x_height = h;
    c.x_width = w;
    c.c_in = c_in;
    c.c_out = c_out;
    c.taps_h = c.taps_w = kernel_size;
    c.weight_taps = kernel_size * kernel_size;
    c.padding = padding;
    c.y_height = h + 2 * padding - kernel_size + 1;
    c.y_width = w + 2 * padding - kernel_size + 1;
    if (n > 0 && (c.y_height < 1 || c.y_width < 1)) return SDXL_FAST_INVALID_ARGUMENT;
    if (kernel_size == 1 && padding == 0 && n >= 0 && h >= 0 && w >= 0) {
        // Every position by itself: rows of a matrix, whatever the shape of the map.
        c.x_width = c.y_width = n * h * w;
        c.images = c.x_height = c.y_height = 1;
    }
    return cuda::run_matrix(c, dtype, stream);
}
