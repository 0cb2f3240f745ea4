// SPDX-License-Identifier: Apache-2.0
//
// linear: x W^T + bias + residual, a convolution of one tap on a map of one row. The kernel: hopper/product.cuh.
#include "matrix.h"

using namespace sdxl_fast;

extern "C" int32_t sdxl_fast_linear_fwd_cuda(const void* x, const void* weight, const void* bias, const void* residual,
                                             const float* scale_x, const float* scale_w, void* y, int64_t rows,
                                             int64_t c_in, int64_t c_out, int32_t dtype, void* stream) {
    hopper::Convolution c{};
    c.x = x;
    c.weight = weight;
    c.bias = bias;
    c.residual = residual;
    c.scale_x = scale_x;
    c.scale_w = scale_w;
    c.y = y;
    c.images = c.x_height = c.y_height = c.taps_h = c.taps_w = 1;
    c.weight_taps = 1;
    c.x_width = c.y_width = rows;
    c.c_in = c_in;
    c.c_out = c_out;
    return cuda::run_matrix(c, dtype, stream);
}
