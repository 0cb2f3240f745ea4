// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace sdxl_fast {

// What this CPU and its operating system offer.
bool cpu_has_avx2();         // AVX2, FMA, F16C
bool cpu_has_avx512();       // the above and AVX-512 F, BW, DQ, VL
bool cpu_has_avx512_bf16();  // the above and AVX512_BF16

}  // namespace sdxl_fast
