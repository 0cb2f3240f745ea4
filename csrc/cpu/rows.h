// SPDX-License-Identifier: Apache-2.0
//
// Rows of elements in one line of memory: steps of a vector, sums, mean and rstd. What layer_norm and token_head share.
#pragma once

#include "loops.h"

namespace sdxl_fast {
namespace SDXL_FAST_ISA {
namespace {

inline float root(float x) {
    return __builtin_sqrtf(x);
}
inline double root(double x) {
    return __builtin_sqrt(x);
}

// The halves are added, then their halves; in registers, as there are three such sums to a row.
inline float sum_of(VecF v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps(v.v);
#elif defined(__AVX2__)
    const __m128 four = _mm256_castps256_ps128(v.v) + _mm256_extractf128_ps(v.v, 1);
    const __m128 two = four + _mm_movehl_ps(four, four);
    return two[0] + two[1];
#else
    return (v.v[0] + v.v[2]) + (v.v[1] + v.v[3]);
#endif
}
inline double sum_of(VecD v) {
    return v.v;
}

constexpr int kSlots = 4;  // sums kept apart, so that an addition need not wait for the one before

template <int k>
struct Slot {
    static constexpr int value = k;
};

// Calls f(column, full, left, slot) over a row in steps of a vector.
template <class V, class F>
inline void each_vector(int64_t cols, F&& f) {
    int64_t c = 0;
    for (; c + kSlots * V::W <= cols; c += kSlots * V::W) {
        f(c, Bool<true>{}, V::W, Slot<0>{});
        f(c + V::W, Bool<true>{}, V::W, Slot<1>{});
        f(c + 2 * V::W, Bool<true>{}, V::W, Slot<2>{});
        f(c + 3 * V::W, Bool<true>{}, V::W, Slot<3>{});
    }
    for (; c + V::W <= cols; c += V::W) f(c, Bool<true>{}, V::W, Slot<0>{});
    if (c < cols) f(c, Bool<false>{}, cols - c, Slot<1>{});
}

// One sum per slot.
template <class V>
struct Sums {
    V part[kSlots] = {V(0), V(0), V(0), V(0)};

    typename V::Scalar total() const { return sum_of((part[0] + part[1]) + (part[2] + part[3])); }
};

// Keeps the lanes below `left` and zeroes the others, which must not count in a sum.
template <bool full, class V>
inline V only(V v, int64_t left) {
    if constexpr (full) {
        (void)left;
        return v;
    } else {
        typename V::Scalar parts[V::W];
        store(parts, v);
        return load_some(parts, left);
    }
}

// Mean and 1 / sqrt(variance + eps) of a row whose sum is known; at(column, full, left) gives its values.
template <class V, class At>
inline void finish_statistics(typename V::Scalar sum, int64_t cols, double eps, At&& at, typename V::Scalar& mean,
                              typename V::Scalar& rstd) {
    using A = typename V::Scalar;
    const A count = A(cols), first = sum / count;
    Sums<V> left_over, squares;
    each_vector<V>(cols, [&](int64_t c, auto full, int64_t left, auto slot) {
        const V d = only<full.value>(at(c, full, left) - V(first), left);
        left_over.part[slot.value] = left_over.part[slot.value] + d;
        squares.part[slot.value] = fma(d, d, squares.part[slot.value]);
    });
    const A rest = left_over.total(), share = rest / count;
    const A m2 = squares.total() - rest * share;
    mean = first + share;
    rstd = A(1) / root((m2 > A(0) ? m2 : m2 == m2 ? A(0) : m2) / count + A(eps));
}

// Calls f(Tag<T>, Tag<P>): parameters of the elements' type, or float beside 16 bits.
template <class F>
void with_dtypes(int32_t dtype, int32_t param_dtype, F&& f) {
    with_dtype(dtype, [&](auto tag) {
        if (param_dtype == dtype) {
            f(tag, tag);
        } else if constexpr (sizeof(typename decltype(tag)::Type) == 2) {
            f(tag, Tag<float>{});
        }
    });
}

}  // namespace
}  // namespace SDXL_FAST_ISA
}  // namespace sdxl_fast
