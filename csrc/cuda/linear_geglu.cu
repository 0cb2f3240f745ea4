// SPDX-License-Identifier: Apache-2.0
//
// linear_geglu: value * GELU(gate) of x W^T + bias, whose halves are two tiles of the same weight. The kernel:
// hopper/product.cuh.
#include "matrix.h"

using namespace sdxl_fast;

extern "C" int32_t sdxl_fast_linear_geglu_fwd_cuda(const void* x, const void* weight, const void* bias, void* y,
                                                   int64_t rows, int64_t c_in, int64_t c_out, int32_t approximate,
                                                   int32_t dtype, void* stream) {
    if (approximate != SDXL_FAST_GELU_NONE && approximate != SDXL_FAST_GELU_TANH) return SDXL_FAST_INVALID_ARGUMENT;
    if (dtype == SDXL_FAST_F8E4M3) return SDXL_FAST_UNSUPPORTED_DTYPE;
    hopper::Convolution c{};
    c.x = x;
    c.weight = weight;
    c.bias = bias;
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
