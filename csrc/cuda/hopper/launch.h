// SPDX-License-Identifier: Apache-2.0
//
// The launchers: a file each, because each takes the compiler half a minute.
#pragma once

#include <cuda.h>

#include "job.h"

namespace sdxl_fast {
namespace hopper {

struct Maps {
    CUtensorMap x;       // [c, w, h, image], a box of one slice by one patch
    CUtensorMap weight;  // [c, tap, column], a box of one slice by one tile's columns
};

int32_t launch_bf16_128(const Maps& maps, const Job& job, int64_t ctas, void* stream);
int32_t launch_bf16_160(const Maps& maps, const Job& job, int64_t ctas, void* stream);
int32_t launch_bf16_160_split(const Maps& maps, const Job& job, int64_t ctas, void* stream);
int32_t launch_bf16_160_gated(const Maps& maps, const Job& job, int64_t ctas, void* stream);
int32_t launch_bf16_256(const Maps& maps, const Job& job, int64_t ctas, void* stream);
int32_t launch_e4m3_160(const Maps& maps, const Job& job, int64_t ctas, void* stream);
int32_t launch_e4m3_160_split(const Maps& maps, const Job& job, int64_t ctas, void* stream);
int32_t launch_e4m3_160_gated(const Maps& maps, const Job& job, int64_t ctas, void* stream);

}  // namespace hopper
}  // namespace sdxl_fast
