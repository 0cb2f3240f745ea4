// SPDX-License-Identifier: Apache-2.0
//
// What the forwards of group_norm_silu ask of channels that come from a tensor of their own.
#pragma once

#include <stdint.h>

#include "../include/sdxl_fast.h"
#include "macros.h"

namespace sdxl_fast {

// Of so many channels at a time a kernel reads one of the two tensors: as many as the longest vector holds.
constexpr int64_t kSkipMultiple = 16;

// Whether the tensor of the last c_skip of c channels is missing or superfluous, or one that the kernels cannot read
// beside x: they read NHWC in whole vectors, each of one tensor.
SDXL_HD bool bad_skip(const void* skip, int64_t c, int64_t c_skip, int32_t layout) {
    if (c_skip == 0) return skip != nullptr;
    return skip == nullptr || c_skip < 0 || c_skip >= c || layout != SDXL_FAST_NHWC || c_skip % kSkipMultiple != 0 ||
           c % kSkipMultiple != 0;
}

}  // namespace sdxl_fast
