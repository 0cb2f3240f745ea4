// SPDX-License-Identifier: Apache-2.0
//
// The tensor cores' product of 16-bit matrices: acc [16, 8] += a [16, 16] b [16, 8], over a warp, sums in float.
//
// With g = lane / 4 and t = lane % 4, pairs of neighbours along the shared dimension in one register:
//   a[0], a[1]  rows g, g + 8, columns 2t and 2t + 1      a[2], a[3]  the same rows, columns 2t + 8 and 2t + 9
//   b[0], b[1]  rows 2t and 2t + 1, 2t + 8 and 2t + 9, of column g
//   acc[0..1]   row g, columns 2t and 2t + 1              acc[2..3]   row g + 8
#pragma once

#include "device.cuh"

namespace sdxl_fast {
namespace cuda {

#if defined(SDXL_FAST_CUDA_EMULATION)
inline float half_of(bf16, uint32_t pair, int which) {
    return bf16_to_float({static_cast<uint16_t>(pair >> (16 * which))});
}
inline float half_of(f16, uint32_t pair, int which) {
    return f16_to_float({static_cast<uint16_t>(pair >> (16 * which))});
}

template <class T>
void mma_16x8x16(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    const uint32_t own[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
    const uint32_t (&all)[32][6] = emulation::warp_gather(own);
    const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
        const int upper = i / 2, column = 2 * t + i % 2;
        for (int k = 0; k < 16; ++k) {
            const int from = k % 8 / 2, later = k / 8;
            acc[i] += half_of(T{}, all[g * 4 + from][2 * later + upper], k % 2) *
                      half_of(T{}, all[column * 4 + from][4 + later], k % 2);
        }
    }
}
#else
template <class T>
__device__ __forceinline__ void mma_16x8x16(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
__device__ __forceinline__ void mma_16x8x16<bf16>(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ __forceinline__ void mma_16x8x16<f16>(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif

}  // namespace cuda
}  // namespace sdxl_fast
