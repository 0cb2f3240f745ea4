// SPDX-License-Identifier: Apache-2.0
//
// The vector types of the C++ backend. This header is compiled once per instruction set (cmake/cpu.cmake), each time
// into its own namespace and with internal linkage: no function of it may be merged with that of another instruction
// set by the linker, or an old CPU could meet instructions it lacks. For the same reason kernel files use no inline
// function of the standard library.
//
//   VecF  W floats in one register, for float, BF16 and F16 elements
//   VecD  one double (fp64 serves gradient checks, not speed)
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__) || defined(__AVX2__) || defined(__SSE2__)
#include <immintrin.h>
#define SDXL_X86 1
#endif

#include "common/half.h"

#if !defined(SDXL_FAST_ISA)
#error "compile kernel files through cmake/cpu.cmake, which names the instruction set"
#endif

namespace sdxl_fast {
namespace SDXL_FAST_ISA {
namespace {

#if defined(__AVX512F__)
typedef __m512 RawF;
typedef __m512i RawI;
#elif defined(__AVX2__)
typedef __m256 RawF;
typedef __m256i RawI;
#else
typedef float RawF __attribute__((vector_size(16)));
typedef long long RawI __attribute__((vector_size(16)));
#endif
constexpr int kWidth = sizeof(RawF) / sizeof(float);
typedef uint32_t RawU __attribute__((vector_size(sizeof(RawF))));
typedef int32_t RawS __attribute__((vector_size(sizeof(RawF))));

struct VecF {
    using Scalar = float;
    static constexpr int W = kWidth;
    RawF v;

    VecF() = default;
    VecF(RawF raw) : v(raw) {}
#if defined(__AVX512F__)
    VecF(float s) : v(_mm512_set1_ps(s)) {}
#elif defined(__AVX2__)
    VecF(float s) : v(_mm256_set1_ps(s)) {}
#else
    VecF(float s) : v{s, s, s, s} {}
#endif

    friend VecF operator+(VecF a, VecF b) { return a.v + b.v; }
    friend VecF operator-(VecF a, VecF b) { return a.v - b.v; }
    friend VecF operator*(VecF a, VecF b) { return a.v * b.v; }
    friend VecF operator/(VecF a, VecF b) { return a.v / b.v; }
    friend VecF operator-(VecF a) { return -a.v; }
};

struct VecD {
    using Scalar = double;
    static constexpr int W = 1;
    double v;

    VecD() = default;
    VecD(double s) : v(s) {}

    friend VecD operator+(VecD a, VecD b) { return a.v + b.v; }
    friend VecD operator-(VecD a, VecD b) { return a.v - b.v; }
    friend VecD operator*(VecD a, VecD b) { return a.v * b.v; }
    friend VecD operator/(VecD a, VecD b) { return a.v / b.v; }
    friend VecD operator-(VecD a) { return -a.v; }
};

// The vector type that elements of T are computed in.
template <class T>
struct VecOf {
    using Type = VecF;
};
template <>
struct VecOf<double> {
    using Type = VecD;
};

// ---- arithmetic ----

// a * b + c, fused where the CPU can.
inline VecF fma(VecF a, VecF b, VecF c) {
#if defined(__AVX512F__)
    return _mm512_fmadd_ps(a.v, b.v, c.v);
#elif defined(__FMA__)
    return _mm256_fmadd_ps(a.v, b.v, c.v);
#else
    return a.v * b.v + c.v;
#endif
}
inline VecD fma(VecD a, VecD b, VecD c) {
    return a.v * b.v + c.v;
}

// The smaller, the larger; b where one of them is NaN.
inline VecF min(VecF a, VecF b) {
#if defined(__AVX512F__)
    return _mm512_min_ps(a.v, b.v);
#elif defined(__AVX2__)
    return _mm256_min_ps(a.v, b.v);
#else
    return a.v < b.v ? a.v : b.v;
#endif
}
inline VecF max(VecF a, VecF b) {
#if defined(__AVX512F__)
    return _mm512_max_ps(a.v, b.v);
#elif defined(__AVX2__)
    return _mm256_max_ps(a.v, b.v);
#else
    return a.v > b.v ? a.v : b.v;
#endif
}

inline RawU bits(VecF a) {
    return (RawU)a.v;
}
inline VecF from_bits(RawU b) {
    return (RawF)b;
}

inline VecF abs(VecF a) {
    return from_bits(bits(a) & 0x7fffffffu);
}

inline VecF sqrt(VecF a) {
#if defined(__AVX512F__)
    return _mm512_sqrt_ps(a.v);
#elif defined(__AVX2__)
    return _mm256_sqrt_ps(a.v);
#elif defined(SDXL_X86)
    return (RawF)_mm_sqrt_ps(a.v);
#else
    VecF r;
    for (int i = 0; i < kWidth; ++i) r.v[i] = __builtin_sqrtf(a.v[i]);
    return r;
#endif
}

// a where the sign bit of x is set (-0 too), else b
inline VecF select_negative(VecF x, VecF a, VecF b) {
#if defined(__AVX512F__)
    return _mm512_mask_blend_ps(_mm512_movepi32_mask(_mm512_castps_si512(x.v)), b.v, a.v);
#elif defined(__AVX2__)
    return _mm256_blendv_ps(b.v, a.v, x.v);
#else
    return (RawS)x.v < 0 ? a.v : b.v;
#endif
}

// 1 / a for finite a > 0: within an ulp or so; `approximate` to 14 bits where that is cheaper.
template <bool approximate>
inline VecF reciprocal(VecF a) {
#if defined(__AVX512F__)
    const RawF r = _mm512_rcp14_ps(a.v);
    if (approximate) return r;
    return _mm512_fmadd_ps(_mm512_fnmadd_ps(a.v, r, _mm512_set1_ps(1.0f)), r, r);
#else
    return VecF(1.0f) / a;
#endif
}

// ---- parts of 2^x ----

// a * 2^floor(t) for |a| in [1, 4); elsewhere than on AVX-512, t must lie in [-126, 127].
// And fraction(t) = t - floor(t).
#if defined(__AVX512F__)
inline VecF fraction(VecF t) {
    return _mm512_reduce_ps(t.v, 1);
}
inline VecF scale(VecF a, VecF t) {
    return _mm512_scalef_ps(a.v, t.v);
}
#else
inline VecF floor(VecF t) {
#if defined(__AVX2__)
    return _mm256_floor_ps(t.v);
#else
    // Adding 1.5 * 2^23 rounds to an integer; of the two that a tie may give, either will do here.
    const VecF magic = 0x1.8p23f;
    return ((t - VecF(0.5f)) + magic) - magic;
#endif
}
inline VecF fraction(VecF t) {
    return t - floor(t);
}
inline VecF scale(VecF a, VecF t) {
    // The same addition leaves the integer in the low bits, from where it goes to the exponent.
    return from_bits(bits(a) + (bits(floor(t) + VecF(0x1.8p23f)) << 23));
}
#endif

// ---- memory ----

inline VecF load(const float* p) {
    RawF r;
    memcpy(&r, p, sizeof(r));
    return r;
}
inline VecD load(const double* p) {
    return *p;
}

inline VecF load(const BF16* p) {
#if defined(__AVX512F__)
    const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
#elif defined(__AVX2__)
    const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
#else
    VecF r;
    for (int i = 0; i < kWidth; ++i) r.v[i] = bf16_to_float(p[i]);
    return r;
#endif
}

inline VecF load(const F16* p) {
#if defined(__AVX512F__)
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
    VecF r;
    for (int i = 0; i < kWidth; ++i) r.v[i] = f16_to_float(p[i]);
    return r;
#endif
}

#if defined(__AVX512F__)
// Round to nearest even; NaN stays NaN.
inline __m256i to_bf16(VecF a) {
#if defined(__AVX512BF16__)
    return (__m256i)_mm512_cvtneps_pbh(a.v);
#else
    const __m512i u = _mm512_castps_si512(a.v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
    const __m512i quiet = _mm512_or_si512(u, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_blend_epi32(nan, rounded, quiet), 16));
#endif
}
#elif defined(__AVX2__)
inline __m128i to_bf16(VecF a) {
    const __m256i u = _mm256_castps_si256(a.v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
    const __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
    const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}
#endif

inline void store(float* p, VecF a) {
    memcpy(p, &a.v, sizeof(a.v));
}
inline void store(double* p, VecD a) {
    *p = a.v;
}

inline void store(BF16* p, VecF a) {
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bf16(a));
#elif defined(__AVX2__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_bf16(a));
#else
    for (int i = 0; i < kWidth; ++i) p[i] = float_to_bf16(a.v[i]);
#endif
}

inline void store(F16* p, VecF a) {
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, 0));
#elif defined(__F16C__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.v, 0));
#else
    for (int i = 0; i < kWidth; ++i) p[i] = float_to_f16(a.v[i]);
#endif
}

// Stores past the caches; p must be aligned to the bytes written. stream_fence() orders them before what follows.
inline void stream(float* p, VecF a) {
#if defined(__AVX512F__)
    _mm512_stream_ps(p, a.v);
#elif defined(__AVX2__)
    _mm256_stream_ps(p, a.v);
#elif defined(SDXL_X86)
    _mm_stream_ps(p, a.v);
#else
    store(p, a);
#endif
}
inline void stream(double* p, VecD a) {
    store(p, a);
}
inline void stream(BF16* p, VecF a) {
#if defined(__AVX512F__)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), to_bf16(a));
#elif defined(__AVX2__)
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), to_bf16(a));
#else
    store(p, a);
#endif
}
inline void stream(F16* p, VecF a) {
#if defined(__AVX512F__)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, 0));
#elif defined(__F16C__)
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.v, 0));
#else
    store(p, a);
#endif
}
inline void stream_fence() {
#if defined(SDXL_X86)
    _mm_sfence();
#endif
}

// Asks for the cache line at p, which may lie outside the array.
inline void prefetch(const void* p) {
    __builtin_prefetch(p);
}
inline void prefetch_to_l2(const void* p) {
    __builtin_prefetch(p, 0, 2);
}

inline void put(float* p, float value) {
    *p = value;
}
inline void put(double* p, double value) {
    *p = value;
}
inline void put(BF16* p, float value) {
    *p = float_to_bf16(value);
}
inline void put(F16* p, float value) {
    *p = float_to_f16(value);
}
inline float get(const float* p) {
    return *p;
}
inline double get(const double* p) {
    return *p;
}
inline float get(const BF16* p) {
    return bf16_to_float(*p);
}
inline float get(const F16* p) {
    return f16_to_float(*p);
}

}  // namespace
}  // namespace SDXL_FAST_ISA
}  // namespace sdxl_fast
