// SPDX-License-Identifier: Apache-2.0
//
// Products on Hopper's tensor cores, as the C functions of the matrix ops call them. Without CUTLASS at build time, or
// without sm_90a among the architectures, `run` says SDXL_FAST_NOT_BUILT.
#pragma once

#include <stdint.h>

#include "product_plan.h"

namespace sdxl_fast {
namespace hopper {

// y[n, P, Q, o] of `rows_of_taps` x `columns_of_taps` taps of x[n, h, w, c]; bf16, or e4m3 with scales and bf16 out,
// of a gate also e4m3.
struct Convolution {
    const void* x;         // [images, x_height, x_width, c_in]
    const void* weight;    // [c_out, weight_taps, c_in]; for a gate c_out rows of the value, then as many of the gate
    const void* bias;      // [c_out], twice that for a gate; or null
    const void* residual;  // like y; or null
    const float* scale_x;  // one element each, for e4m3; else null
    const float* scale_w;
    const float* scale_y;  // one element, of a gate in e4m3; else null
    void* y;
    int64_t images, x_height, x_width, c_in, c_out;
    int64_t y_height, y_width;  // of one phase
    int taps_h, taps_w, padding;
    int64_t weight_taps;
    bool upsampled;  // four phases of 2x2 taps, out of a 4x4 kernel, interleaved
    bool gated;
    int32_t approximate;  // of the gate's GELU
    bool float8;
};

int32_t run(const Convolution& convolution, void* stream);

}  // namespace hopper
}  // namespace sdxl_fast
