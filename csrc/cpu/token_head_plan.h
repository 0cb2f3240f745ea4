// SPDX-License-Identifier: Apache-2.0
//
// Scratch memory and items of work of token_head.
#pragma once

#include <stdint.h>

#include "common/macros.h"

namespace sdxl_fast {

// Elements between the parts that two groups have in a sample's logits, which are read in whole vectors.
SDXL_HD int64_t token_head_padded(int64_t length) {
    return (length + 15) / 16 * 16;
}

// Groups of so many elements that one item of work takes, one after the other.
SDXL_HD int64_t token_head_chunk(int64_t elements) {
    return elements > 0 && elements < 4096 ? 4096 / elements : 1;
}

}  // namespace sdxl_fast
