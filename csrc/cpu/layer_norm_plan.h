// SPDX-License-Identifier: Apache-2.0
//
// How layer_norm cuts its rows, as a function of the shape alone: the cut decides the order of the sums over rows, so
// it must not know the threads.
#pragma once

#include <stdint.h>

#include "common/macros.h"

namespace sdxl_fast {

// Rows in an item of work: about 16,384 elements, few enough to balance threads, and so many that the partial sums of
// the parameters' gradients, one pair of rows per item, stay a few percent of the map.
SDXL_HD int64_t layer_norm_chunk_rows(int64_t rows, int64_t cols) {
    const int64_t by_size = cols > 0 ? 16384 / cols : rows;
    const int64_t least = 16;  // 1/8 of the traffic is then partial sums
    const int64_t by_count = rows / 64;
    const int64_t wanted = by_count > by_size ? by_count : by_size;
    return wanted < least ? least : wanted > 512 ? 512 : wanted;
}

// Columns of a row of partial sums, which are read in whole vectors. Rows never lie a multiple of 4 KiB apart: a load
// would wait for a store to the other row that has the same low address bits.
SDXL_HD int64_t layer_norm_padded(int64_t cols) {
    const int64_t whole = (cols + 15) / 16 * 16;
    return whole % 512 == 0 ? whole + 16 : whole;
}

}  // namespace sdxl_fast
