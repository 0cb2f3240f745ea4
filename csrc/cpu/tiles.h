// SPDX-License-Identifier: Apache-2.0
//
// The inner loop of matrix products on a CPU: a tile of sums in registers. What attention and packed_conv2d share.
#pragma once

#include "loops.h"

namespace sdxl_fast {
namespace SDXL_FAST_ISA {
namespace {

// With two vectors of columns the sums are 16 or 8 registers, and enough to hide the latency of a multiply-add.
#if defined(__AVX512F__)
constexpr int kTileRows = 8;
#else
constexpr int kTileRows = 4;
#endif

template <class V, int U>
using Tile = V[kTileRows][U];

// sum[r][u] += sum over k < depth of a[r][k * a_step] b[k * b_row + column], columns in vectors u.
template <class V, int U, class A = typename V::Scalar>
inline void accumulate(Tile<V, U>& sum, const A* const (&a)[kTileRows], int64_t a_step, const A* b, int64_t b_row,
                       int64_t depth) {
    for (int64_t k = 0; k < depth; ++k) {
        V line[U];
        for (int u = 0; u < U; ++u) line[u] = load(b + k * b_row + u * V::W);
        for (int r = 0; r < kTileRows; ++r) {
            const V factor(a[r][k * a_step]);
            for (int u = 0; u < U; ++u) sum[r][u] = fma(factor, line[u], sum[r][u]);
        }
    }
}

}  // namespace
}  // namespace SDXL_FAST_ISA
}  // namespace sdxl_fast
