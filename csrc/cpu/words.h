// SPDX-License-Identifier: Apache-2.0
//
// A product of matrices whose second factor has been put in order: what lora_merge and streamed attention share. A word
// holds what is multiplied at once: one element, widened, or where the CPU can multiply pairs of bfloat16, two that
// follow one another in the sum. The second factor comes in strips of columns, in each a row per word.
#pragma once

#include "loops.h"

namespace sdxl_fast {
namespace SDXL_FAST_ISA {
namespace {

constexpr int kRows = 6;                        // of the first factor, whose sums are in registers
constexpr int kVectors = kWidth >= 16 ? 4 : 2;  // of columns beside them: a strip

// An element a word; V is the vector that is summed in.
template <class V, class T>
struct Singles {
    using Word = typename V::Scalar;
    static constexpr int64_t kStep = 1;  // elements in a word
    static constexpr int64_t kStrip = kVectors * V::W;

    // `count` elements that follow one another in the sum.
    static void of_row(Word* to, const T* from, int64_t count) {
        for (int64_t c = 0; c < count; c += V::W) {
            const V v = c + V::W <= count ? V(load(from + c)) : V(load_some(from + c, count - c));
            store_some(to + c, v, smaller(V::W, count - c));
        }
    }
    // A strip of the kStep rows from `from` on, `stride` apart: `rows` of them and `count` columns exist.
    static void of_rows(Word* to, const T* from, int64_t, int64_t, int64_t count) {
        for (int64_t c = 0; c < kStrip; c += V::W) {
            store(to + c, c + V::W <= count ? V(load(from + c)) : V(load_some(from + c, larger(count - c, 0))));
        }
    }
    static V sum(V so_far, Word a, const Word* b) { return fma(V(a), load(b), so_far); }
};

#if defined(__AVX512BF16__)
// Two elements a word, the first in its lower half.
struct Pairs {
    using Word = uint32_t;
    static constexpr int64_t kStep = 2;
    static constexpr int64_t kStrip = kVectors * VecF::W;

    static void of_row(Word* to, const BF16* from, int64_t count) {
        to[(count - 1) / 2] = 0;
        memcpy(to, from, static_cast<size_t>(count) * sizeof(BF16));
    }
    static void of_rows(Word* to, const BF16* from, int64_t stride, int64_t rows, int64_t count) {
        for (int64_t c = 0; c < kStrip; c += VecF::W) {
            const __mmask16 mask = first_lanes(smaller(VecF::W, larger(count - c, 0)));
            const __m512i first = wide(mask, from + c);
            const __m512i second = rows > 1 ? wide(mask, from + stride + c) : _mm512_setzero_si512();
            _mm512_storeu_si512(to + c, _mm512_or_si512(first, _mm512_slli_epi32(second, 16)));
        }
    }
    static VecF sum(VecF so_far, Word a, const Word* b) {
        const __m512i pairs = _mm512_set1_epi32(static_cast<int>(a));
        return _mm512_dpbf16_ps(so_far.v, (__m512bh)pairs, (__m512bh)_mm512_loadu_si512(b));
    }

    static __m512i wide(__mmask16 mask, const BF16* from) {
        return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from));
    }
};
#endif

template <class V, class T>
struct FormOf {
    using Type = Singles<V, T>;
};
#if defined(__AVX512BF16__)
template <>
struct FormOf<VecF, BF16> {
    using Type = Pairs;
};
#endif

// sum[r][columns] += sum over words k of a[r * a_row + k] b[k][columns], b being a strip.
template <class Form, class V>
inline void multiply(V (&sum)[kRows][kVectors], const typename Form::Word* a, int64_t a_row,
                     const typename Form::Word* b, int64_t words) {
    for (int64_t k = 0; k < words; ++k) {
        for (int r = 0; r < kRows; ++r) {
            for (int v = 0; v < kVectors; ++v) {
                sum[r][v] = Form::sum(sum[r][v], a[r * a_row + k], b + k * Form::kStrip + v * V::W);
            }
        }
    }
}

}  // namespace
}  // namespace SDXL_FAST_ISA
}  // namespace sdxl_fast
