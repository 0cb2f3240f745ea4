// SPDX-License-Identifier: Apache-2.0
//
// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) and the package's way from its
// words to normals. This file is the definition that every backend follows:
//   key     = (lo32(seed), hi32(seed))
//   counter = (lo32(i / 4), hi32(i / 4), lo32(stream), hi32(stream)),  i = (channel * H + row) * W + column
//   element i takes word i % 4; words (0, 1) and (2, 3) are Box-Muller pairs, the first gets the cosine.
#pragma once

#include <stdint.h>

#include "macros.h"

namespace sdxl_fast {

constexpr uint32_t kPhiloxM0 = 0xD2511F53u;
constexpr uint32_t kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u;
constexpr uint32_t kPhiloxW1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

struct PhiloxWords {
    uint32_t w[4];
};

SDXL_HD PhiloxWords philox4x32_10(uint32_t key0, uint32_t key1, uint64_t block, uint64_t stream) {
    uint32_t c0 = static_cast<uint32_t>(block), c1 = static_cast<uint32_t>(block >> 32);
    uint32_t c2 = static_cast<uint32_t>(stream), c3 = static_cast<uint32_t>(stream >> 32);
    for (int round = 0; round < kPhiloxRounds; ++round) {
        const uint64_t p0 = static_cast<uint64_t>(kPhiloxM0) * c0;
        const uint64_t p1 = static_cast<uint64_t>(kPhiloxM1) * c2;
        const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ key0;
        const uint32_t n2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ key1;
        c1 = static_cast<uint32_t>(p1);
        c3 = static_cast<uint32_t>(p0);
        c0 = n0;
        c2 = n2;
        key0 += kPhiloxW0;
        key1 += kPhiloxW1;
    }
    return {{c0, c1, c2, c3}};
}

// u1 in (0, 1] (so that its logarithm is finite) and u2 in [0, 1], as float32 values.
SDXL_HD float philox_u1(uint32_t word) {
    return static_cast<float>(word) * 0x1p-32f + 0x1p-33f;
}
SDXL_HD float philox_u2(uint32_t word) {
    return static_cast<float>(word) * 0x1p-32f;
}

}  // namespace sdxl_fast
