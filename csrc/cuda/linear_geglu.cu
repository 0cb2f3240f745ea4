// SPDX-License-Identifier: Apache-2.0
//
// linear_geglu: value * GELU(gate) of x W^T + bias, whose halves are two tiles of the same weight; in e4m3 where
// there is a scale_y. The kernel: hopper/product.cuh.
#include "matrix.h"

using namespace sdxl_fast;

extern "C" int32_t sdxl_fast_linear_geglu_fwd_cuda(const void* x, const void* weight, const void* bias,
                                                   const float* scale_x, const float* scale_w, const float* scale_y,
                                                   void* y, int64_t rows, int64_t c_in, int64_t c_out,
                                                   int32_t approximate, int32_t dtype, void* stream) {
    if (approximate != SDXL_FAST_GELU_NONE && approximate != SDXL_FAST_GELU_TANH) return SDXL_FAST_INVALID_ARGUMENT;
    hopper::Convolution c{};
    c.x = x;
    c.weight = weight;
    c.bias = bias;
    c.scale_x = scale_x;
    c.scale_w = scale_w;
    c.scale_y = scale_y;
    c.y = y;
    c.images = c.x_height = c.y_height = c.taps_h = c.taps_w = 1;
    c.weight_taps = 1;
    c.x_width = c.y_width = rows;
    c.c_in = c_in;
    c.c_out = c_out;
    c.gated = true;
    c.approximate = approximate;
    return cuda::run_matrix(c, dtype, stream);
}
