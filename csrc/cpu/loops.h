// SPDX-License-Identifier: Apache-2.0
//
// What the kernel files share around their inner loops: element types, chunks, streaming. Internal linkage for the
// reason given in vec.h.
#pragma once

#include <stdint.h>

#include "kernels.h"
#include "parallel.h"
#include "vec.h"

namespace sdxl_fast {
namespace SDXL_FAST_ISA {
namespace {

inline int64_t smaller(int64_t a, int64_t b) {
    return a < b ? a : b;
}
inline int64_t larger(int64_t a, int64_t b) {
    return a > b ? a : b;
}
inline int64_t chunks_of(int64_t total, int64_t size) {
    return (total + size - 1) / size;
}

template <class T>
struct Tag {
    using Type = T;
};

template <bool v>
struct Bool {
    static constexpr bool value = v;
};

// Calls f(Tag<T>) for a dtype code, which dispatch.cpp has checked. Doubles are computed one by one whatever the
// instruction set, so only the baseline has them.
template <class F>
void with_dtype(int32_t dtype, F&& f) {
    switch (dtype) {
        case SDXL_FAST_F32:
            return f(Tag<float>{});
#if defined(SDXL_FAST_WITH_F64)
        case SDXL_FAST_F64:
            return f(Tag<double>{});
#endif
        case SDXL_FAST_BF16:
            return f(Tag<BF16>{});
        default:
            return f(Tag<F16>{});
    }
}

template <class F>
void with_bool(bool flag, F&& f) {
    if (flag) {
        f(Bool<true>{});
    } else {
        f(Bool<false>{});
    }
}

// body(i) for 0 <= i < chunks on at most num_threads threads.
template <class F>
void parallel(int64_t chunks, int32_t num_threads, F&& body) {
    run_chunks(
        chunks, num_threads, [](void* context, int64_t i) { (*static_cast<decltype(&body)>(context))(i); },
        const_cast<void*>(static_cast<const void*>(&body)));
}

// Waking a thread costs some microseconds, in which one core does about this many elements.
constexpr int64_t kAloneBelow = 16384;
inline int32_t threads_for(int64_t elements, int32_t num_threads) {
    return elements <= kAloneBelow ? 1 : num_threads;
}

// From this size on an output no longer fits beside its input in the last-level cache.
inline int64_t streaming_threshold() {
    return last_level_cache_bytes() / 2;
}

inline bool aligned_to_line(const void* p) {
    return reinterpret_cast<uintptr_t>(p) % 64 == 0;
}

template <bool streaming, class T>
inline void emit(T* p, typename VecOf<T>::Type value) {
    if constexpr (streaming) {
        stream(p, value);
    } else {
        store(p, value);
    }
}

// The first `count` < W elements; the rest reads as zero and is not written.
template <class T>
inline typename VecOf<T>::Type load_some(const T* p, int64_t count) {
    T buffer[VecOf<T>::Type::W] = {};
    for (int64_t i = 0; i < count; ++i) buffer[i] = p[i];
    return load(buffer);
}
template <class T>
inline void store_some(T* p, typename VecOf<T>::Type a, int64_t count) {
    T buffer[VecOf<T>::Type::W];
    store(buffer, a);
    for (int64_t i = 0; i < count; ++i) p[i] = buffer[i];
}

#if defined(__AVX512F__)
// By masks where the CPU has them: lanes that are masked touch no memory.
inline __mmask16 first_lanes(int64_t count) {
    return static_cast<__mmask16>((1u << count) - 1u);
}
inline VecF load_some(const float* p, int64_t count) {
    return _mm512_maskz_loadu_ps(first_lanes(count), p);
}
inline VecF load_some(const BF16* p, int64_t count) {
    const __m256i h = _mm256_maskz_loadu_epi16(first_lanes(count), p);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}
inline VecF load_some(const F16* p, int64_t count) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(count), p));
}
inline void store_some(float* p, VecF a, int64_t count) {
    _mm512_mask_storeu_ps(p, first_lanes(count), a.v);
}
inline void store_some(BF16* p, VecF a, int64_t count) {
    _mm256_mask_storeu_epi16(p, first_lanes(count), to_bf16(a));
}
inline void store_some(F16* p, VecF a, int64_t count) {
    _mm256_mask_storeu_epi16(p, first_lanes(count), _mm512_cvtps_ph(a.v, 0));
}
#endif

// A whole vector, or the `left` < W elements that are left of a row.
template <bool full, class T>
inline typename VecOf<T>::Type fetch(const T* p, int64_t left) {
    if constexpr (full) {
        (void)left;
        return load(p);
    } else {
        return load_some(p, left);
    }
}

template <bool full, bool streaming, class T>
inline void write(T* p, typename VecOf<T>::Type value, int64_t left) {
    if constexpr (full) {
        (void)left;
        emit<streaming>(p, value);
    } else {
        store_some(p, value, left);
    }
}

}  // namespace
}  // namespace SDXL_FAST_ISA
}  // namespace sdxl_fast
