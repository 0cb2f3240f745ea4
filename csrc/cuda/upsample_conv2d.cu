// SPDX-License-Identifier: Apache-2.0
//
// upsample_conv2d: the four phases of a map twice as large, each 2x2 taps of a 4x4 kernel. The kernel:
// hopper/product.cuh.
#include "matrix.h"

using namespace sdxl_fast;

extern "C" int32_t sdxl_fast_upsample_conv2d_fwd_cuda(const void* x, const void* phases, const void* bias, void* y,
                                                      int64_t n, int64_t c_in, int64_t h, int64_t w, int64_t c_out,
                                                      int32_t dtype, void* stream) {
    if (dtype == SDXL_FAST_F8E4M3) return SDXL_FAST_UNSUPPORTED_DTYPE;
    hopper::Convolution c{};
    c.x = x;
    c.weight = phases;
    c.bias = bias;
    c.y = y;
    c.images = n;
    c.x_height = c.y_height = h;
    c.x_width = c.y_width = w;
    c.c_in = c_in;
    c.c_out = c_out;
    c.taps_h = c.taps_w = 2;
    c.weight_taps = 16;
    c.padding = 1;
    c.upsampled = true;
    return cuda::run_matrix(c, dtype, stream);
}
