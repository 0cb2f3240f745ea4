// SPDX-License-Identifier: Apache-2.0
//
// Which attention the C++ kernels run, and how their buffers are laid out: plain numbers, for the kernels and for the
// checks of the C ABI.
#pragma once

#include <stdint.h>

#include "common/macros.h"

namespace sdxl_fast {

constexpr int64_t kMostKeys = 256;
constexpr int64_t kMostChannels = 128;
// Keys times channels: both operands of a head wait on the stack.
constexpr int64_t kMostKeyElements = 16384;

// Queries whose scores are held at a time, and those that an item of work takes.
constexpr int64_t kQueryBlock = 32;
constexpr int64_t kQueriesPerItem = 128;

// Of the kernel that lets keys pass by: queries of an item of work, keys of a block, and the widest head.
constexpr int64_t kStreamedQueries = 48;
constexpr int64_t kStreamedKeys = 256;
constexpr int64_t kStreamedChannels = 512;

// Rows and columns of buffers are padded to this, the lanes of the widest vector.
constexpr int64_t kPadding = 16;

SDXL_HD constexpr int64_t padded_to(int64_t size, int64_t step) {
    return (size + step - 1) / step * step;
}

// The padded product is largest where one of the two is.
constexpr int64_t kKeyArea = padded_to(kMostKeyElements + kPadding * (kMostKeys + kMostChannels + kPadding), kPadding);

SDXL_HD constexpr bool attention_fits(int64_t keys, int64_t channels) {
    return keys <= kMostKeys && channels <= kMostChannels && keys * channels <= kMostKeyElements;
}

}  // namespace sdxl_fast
