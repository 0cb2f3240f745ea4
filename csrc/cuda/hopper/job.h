// SPDX-License-Identifier: Apache-2.0
//
// What the kernel is told beside its two tensor maps.
#pragma once

#include "../device.cuh"
#include "product_plan.h"

namespace sdxl_fast {
namespace hopper {

struct Job {
    const cuda::bf16* bias;
    const cuda::bf16* residual;
    const float* scale_x;
    const float* scale_w;
    const float* scale_y;  // y is e4m3 then
    void* y;               // else bf16
    Output output;
    int c_out;  // of the value alone, for a gate
    int tiles;
    Schedule schedule;
    Taps taps;
    bool tanh;
};

}  // namespace hopper
}  // namespace sdxl_fast
