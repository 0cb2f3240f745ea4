// SPDX-License-Identifier: Apache-2.0
//
// Runs of normals: Philox4x32-10 on one counter per vector lane, then Box-Muller. Definition: common/philox.h.
#pragma once

#include "common/philox.h"
#include "vec.h"

namespace sdxl_fast {
namespace SDXL_FAST_ISA {
namespace {

// ---- Philox on vectors ----

// High and low halves of a * b, lane by lane.
inline void multiply_wide(RawU a, uint32_t b, RawU& high, RawU& low) {
#if defined(__AVX512F__)
    const __m512i m = _mm512_set1_epi32(static_cast<int>(b)), v = (__m512i)a;
    const __m512i even = _mm512_mul_epu32(v, m), odd = _mm512_mul_epu32(_mm512_srli_epi64(v, 32), m);
    high = (RawU)_mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd);
    low = (RawU)_mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32));
#elif defined(__AVX2__)
    const __m256i m = _mm256_set1_epi32(static_cast<int>(b)), v = (__m256i)a;
    const __m256i even = _mm256_mul_epu32(v, m), odd = _mm256_mul_epu32(_mm256_srli_epi64(v, 32), m);
    high = (RawU)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
    low = (RawU)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
#else
    for (int i = 0; i < kWidth; ++i) {
        const uint64_t product = static_cast<uint64_t>(a[i]) * b;
        high[i] = static_cast<uint32_t>(product >> 32);
        low[i] = static_cast<uint32_t>(product);
    }
#endif
}

// The four words of blocks first, first + 1, ..., one block per lane.
inline void philox_words(uint64_t seed, uint64_t stream, uint64_t first, RawU (&words)[4]) {
    RawU c0, c1, c2 = RawU{} + static_cast<uint32_t>(stream), c3 = RawU{} + static_cast<uint32_t>(stream >> 32);
    for (int i = 0; i < kWidth; ++i) {
        const uint64_t block = first + static_cast<uint64_t>(i);
        c0[i] = static_cast<uint32_t>(block);
        c1[i] = static_cast<uint32_t>(block >> 32);
    }
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < kPhiloxRounds; ++round) {
        RawU high0, low0, high1, low1;
        multiply_wide(c0, kPhiloxM0, high0, low0);
        multiply_wide(c2, kPhiloxM1, high1, low1);
        c0 = high1 ^ c1 ^ key0;
        c2 = high0 ^ c3 ^ key1;
        c1 = low1;
        c3 = low0;
        key0 += kPhiloxW0;
        key1 += kPhiloxW1;
    }
    words[0] = c0;
    words[1] = c1;
    words[2] = c2;
    words[3] = c3;
}

// ---- Box-Muller on vectors ----

inline VecF to_float(RawU word) {
#if defined(__AVX512F__)
    return _mm512_cvtepu32_ps((__m512i)word);
#else
    // Both halves convert exactly, so the one addition rounds as a direct conversion would.
    VecF high, low;
#if defined(__AVX2__)
    high = _mm256_cvtepi32_ps((__m256i)(word >> 16));
    low = _mm256_cvtepi32_ps((__m256i)(word & 0xffffu));
#else
    for (int i = 0; i < kWidth; ++i) {
        high.v[i] = static_cast<float>(word[i] >> 16);
        low.v[i] = static_cast<float>(word[i] & 0xffffu);
    }
#endif
    return high * VecF(65536.0f) + low;
#endif
}

// Minimax coefficients, highest power first; relative error of ln 1e-9, of sine and cosine below 4e-9.
constexpr int kLogTerms = 9, kSineTerms = 3, kCosineTerms = 3;
constexpr float kLog[kLogTerms] = {0.06746612229483784f,  -0.11675659939216981f, 0.11888179942439336f,
                                   -0.12405588930482156f, 0.14219549915874963f,  -0.16667995760290527f,
                                   0.20002118780149716f,  -0.2500000960278884f,  0.33333312602173976f};
constexpr float kSine[kSineTerms] = {-0.0001951723360881199f, 0.00833217767653213f, -0.16666654936483508f};
constexpr float kCosine[kCosineTerms] = {2.4438377563084196e-05f, -0.0013887366890954543f, 0.04166664685414545f};

// ln x for normal x > 0: x = m 2^e with m in [sqrt(1/2), sqrt 2), ln(1 + f) = f - f^2 / 2 + f^3 P(f).
inline VecF log_of(VecF x) {
    const RawU shifted = bits(x) - 0x3f3504f3u;
    const RawS exponent = (RawS)shifted >> 23;
    const VecF f = from_bits((shifted & 0x7fffffu) + 0x3f3504f3u) - VecF(1.0f);
    VecF e;
#if defined(__AVX512F__)
    e = _mm512_cvtepi32_ps((__m512i)exponent);
#elif defined(__AVX2__)
    e = _mm256_cvtepi32_ps((__m256i)exponent);
#else
    for (int i = 0; i < kWidth; ++i) e.v[i] = static_cast<float>(exponent[i]);
#endif
    VecF p = kLog[0];
    for (int k = 1; k < kLogTerms; ++k) p = fma(p, f, VecF(kLog[k]));
    const VecF f2 = f * f;
    VecF r = fma(e, VecF(-2.12194440e-4f), p * f2 * f);  // ln 2 in two parts, the first with few bits
    r = fma(VecF(-0.5f), f2, r);
    return fma(e, VecF(0.693359375f), f + r);
}

// cos and sin of 2 pi u for u in [0, 1]. The quarter turns are taken off exactly before anything is rounded.
inline void cos_sin_turns(VecF u, VecF& cosine, VecF& sine) {
    const VecF quarter = u * VecF(4.0f) + VecF(0x1.8p23f);  // the number of quarter turns in the low bits
    const RawU q = bits(quarter);
    const VecF f = u - (quarter - VecF(0x1.8p23f)) * VecF(0.25f);
    const VecF r = f * VecF(6.28318531f), r2 = r * r;
    VecF s = kSine[0], c = kCosine[0];
    for (int k = 1; k < kSineTerms; ++k) s = fma(s, r2, VecF(kSine[k]));
    for (int k = 1; k < kCosineTerms; ++k) c = fma(c, r2, VecF(kCosine[k]));
    s = fma(s * r2, r, r);
    c = fma(c * r2, r2, fma(VecF(-0.5f), r2, VecF(1.0f)));
    // q odd swaps the two; cos is negative in quarters 1 and 2, sin in 2 and 3.
    const VecF odd = from_bits(q << 31);
    cosine = from_bits(bits(select_negative(odd, s, c)) ^ (((q + 1u) & 2u) << 30));
    sine = from_bits(bits(select_negative(odd, c, s)) ^ ((q & 2u) << 30));
}

inline void box_muller(RawU a, RawU b, float* even, float* odd) {
    const VecF radius = sqrt(VecF(-2.0f) * log_of(to_float(a) * VecF(0x1p-32f) + VecF(0x1p-33f)));
    VecF cosine, sine;
    cos_sin_turns(to_float(b) * VecF(0x1p-32f), cosine, sine);
    store(even, radius * cosine);
    store(odd, radius * sine);
}

inline void box_muller(RawU a, RawU b, double* even, double* odd) {
    for (int i = 0; i < kWidth; ++i) {
        const double u1 = static_cast<double>(philox_u1(a[i])), u2 = static_cast<double>(philox_u2(b[i]));
        const double radius = ::sqrt(-2.0 * ::log(u1)), angle = 6.283185307179586476925 * u2;
        even[i] = radius * ::cos(angle);
        odd[i] = radius * ::sin(angle);
    }
}

// Room that draw() needs beyond the elements asked for: a run may begin inside a block, and whole vectors are written.
constexpr int64_t kDrawSlack = 4 + 4 * kWidth;

// Draws the normals of logical elements [first, first + count) into buffer (count + kDrawSlack entries) and returns
// where the first of them lies in it.
template <class A>
const A* draw(int64_t seed, int64_t stream, int64_t first, int64_t count, A* buffer) {
    const int64_t block = first >> 2, blocks = ((first + count + 3) >> 2) - block;
    for (int64_t b = 0; b < blocks; b += kWidth) {
        RawU words[4];
        philox_words(static_cast<uint64_t>(seed), static_cast<uint64_t>(stream), static_cast<uint64_t>(block + b),
                     words);
        A normals[4][kWidth];
        box_muller(words[0], words[1], normals[0], normals[1]);
        box_muller(words[2], words[3], normals[2], normals[3]);
        A* const to = buffer + 4 * b;
        for (int i = 0; i < kWidth; ++i) {
            for (int k = 0; k < 4; ++k) to[4 * i + k] = normals[k][i];
        }
    }
    return buffer + (first & 3);
}

}  // namespace
}  // namespace SDXL_FAST_ISA
}  // namespace sdxl_fast
