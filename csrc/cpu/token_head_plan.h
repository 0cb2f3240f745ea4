// SPDX-License-Identifier: Apache-2.0
//
// Scratch memory of token_head.
#pragma once

#include <stdint.h>

#include "common/macros.h"

namespace sdxl_fast {

// Elements between the parts that two groups have in a sample's logits, which are read in whole vectors.
SDXL_HD int64_t token_head_padded(int64_t length) {
    return (length + 15) / 16 * 16;
}

}  // namespace sdxl_fast
