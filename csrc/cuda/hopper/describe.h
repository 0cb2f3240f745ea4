// SPDX-License-Identifier: Apache-2.0
//
// From a convolution to its plan and to what the kernel is told: everything about a launch but the tensor maps.
#pragma once

#include "job.h"
#include "product.h"

namespace sdxl_fast {
namespace hopper {

struct Description {
    Problem problem;
    Plan plan;
    Job job;
    int depth;        // channels in a slice
    int weight_rows;  // in one load
    bool fits;        // into the numbers of the job
};

inline Description describe(const Convolution& convolution, int multiprocessors) {
    Description d{};
    d.depth = kSliceBytes / (convolution.float8 ? 1 : 2);
    const int64_t slices = ceil_of(convolution.c_in, d.depth);
    d.problem.images = convolution.images;
    d.problem.height = convolution.y_height;
    d.problem.width = convolution.y_width;
    d.problem.columns = convolution.c_out;
    d.problem.slices = slices * convolution.taps_h * convolution.taps_w;
    d.problem.phases = convolution.upsampled ? kPhases : 1;
    d.problem.gated = convolution.gated;
    d.problem.float8 = convolution.float8;
    d.plan = plan_product(d.problem, multiprocessors);
    const Plan& plan = d.plan;
    d.weight_rows = convolution.gated ? kGatedColumns : static_cast<int>(plan.width);

    Job& job = d.job;
    job.bias = static_cast<const cuda::bf16*>(convolution.bias);
    job.residual = static_cast<const cuda::bf16*>(convolution.residual);
    job.scale_x = convolution.scale_x;
    job.scale_w = convolution.scale_w;
    job.scale_y = convolution.scale_y;
    job.y = convolution.y;
    job.output = dense_output(convolution.y_height, convolution.y_width, convolution.c_out, convolution.upsampled);
    job.c_out = static_cast<int>(convolution.c_out);
    const int64_t tiles = plan.tiles_m * plan.tiles_n * d.problem.phases;
    d.fits = tiles <= INT32_MAX;
    job.tiles = static_cast<int>(tiles);
    job.schedule.tiles_h = static_cast<int>(plan.tiles_h);
    job.schedule.tiles_w = static_cast<int>(plan.tiles_w);
    job.schedule.tiles_m = static_cast<int>(plan.tiles_m);
    job.schedule.tiles_n = static_cast<int>(plan.tiles_n);
    job.schedule.tile_h = plan.tile_h;
    job.schedule.tile_w = plan.tile_w;
    job.schedule.columns = d.weight_rows;
    job.schedule.phases = d.problem.phases;
    job.taps = {convolution.taps_h, convolution.taps_w, convolution.padding, static_cast<int>(slices),
                convolution.upsampled};
    job.tanh = convolution.approximate == SDXL_FAST_GELU_TANH;
    return d;
}

}  // namespace hopper
}  // namespace sdxl_fast
