// SPDX-License-Identifier: Apache-2.0
//
// Inner loops of group_norm_silu. All see a block of memory as `rows` rows of `lanes` elements, `stride` apart; what
// belongs to a lane (statistics, scale, bias) stays the same over the rows.
//   NHWC  a lane is a channel and a row a pixel (or several pixels side by side when there are few channels)
//   NCHW  all lanes of a block belong to one channel: `kOne` tables hold one entry, not one per lane
// Memory is walked in one line: taking several rows side by side would fetch the tables of a lane less often, but costs
// a third of the bandwidth in the memory's own prefetching (measured on Zen 4).
#pragma once

#include "loops.h"
#include "vec_math.h"

namespace sdxl_fast {
namespace SDXL_FAST_ISA {
namespace {

constexpr int64_t kLaneTile = 1024;  // lanes whose running sums stay in the L1 cache together
constexpr int64_t kEstimateRows = 32;
constexpr int64_t kBlockRows = 64;
// Elements between the arrays of running sums: a tile, and so much more that arrays do not lie 4 KiB apart. A load
// waits for a store to another array that has the same low address bits.
constexpr int64_t kApart = kLaneTile + 368;

template <class T>
using Acc = typename VecOf<T>::Type::Scalar;

// How far ahead to ask for memory in the backward and in passes that write. The latter gain a tenth, and want to look
// further ahead (Zen 4); the forward's moments, one stream of reads, are as fast without.
constexpr int64_t kAheadReading = 1024, kAheadWriting = 4096;
template <int64_t bytes, class T>
inline void prefetch_after(const T* p) {
    prefetch(reinterpret_cast<const char*>(p) + bytes);
}

template <bool kOne, class V>
inline V entry(const typename V::Scalar* table, int64_t lane) {
    if constexpr (kOne) {
        (void)lane;
        return V(*table);
    } else {
        return load(table + lane);
    }
}

// Calls f(lane, full) over [0, lanes) in steps of a vector; full tells whether a whole vector is left.
template <class V, class F>
inline void each_vector(int64_t lanes, F&& f) {
    int64_t l = 0;
    for (; l + V::W <= lanes; l += V::W) f(l, Bool<true>{});
    if (l < lanes) f(l, Bool<false>{});
}

// ---- forward ----

// Rounded to T: what is then subtracted leaves differences on the grid of T, and their sums are nearly exact.
template <class T>
inline typename VecOf<T>::Type on_grid(typename VecOf<T>::Type v) {
    if constexpr (sizeof(T) == 2) {
        T buffer[kWidth];
        store(buffer, v);
        return load(buffer);
    } else {
        return v;
    }
}

// Mean and sum of squared deviations of each lane of one tile. The values are summed after taking off an estimate, the
// mean of the first rows, so that nothing cancels: with R rows the error of m2 is at most about R / kEstimateRows
// roundings, however large the mean or an outlier. Sums go by blocks of rows, then over the blocks.
template <class T>
void moments_tile(const T* x, int64_t rows, int64_t lanes, int64_t stride, Acc<T>* mean, Acc<T>* m2) {
    using V = typename VecOf<T>::Type;
    using A = Acc<T>;
    alignas(64) A arrays[5][kApart];
    A *const estimate = arrays[0], *const sum[2] = {arrays[1], arrays[3]}, *const square[2] = {arrays[2], arrays[4]};
    const int64_t first = smaller(rows, kEstimateRows);
    each_vector<V>(lanes, [&](int64_t l, auto full) {
        V s = V(A(0));
        for (int64_t r = 0; r < first; ++r) s = s + fetch<full.value>(x + r * stride + l, lanes - l);
        store(estimate + l, on_grid<T>(s * V(A(1) / A(first))));
        for (int k = 0; k < 2; ++k) store(sum[k] + l, V(A(0)));
        for (int k = 0; k < 2; ++k) store(square[k] + l, V(A(0)));
    });
    for (int64_t block = 0; block < rows; block += kBlockRows) {
        const int64_t end = smaller(block + kBlockRows, rows);
        for (int64_t r = block; r < end; ++r) {
            const T* const p = x + r * stride;
            each_vector<V>(lanes, [&](int64_t l, auto full) {
                const V d = fetch<full.value>(p + l, lanes - l) - load(estimate + l);
                store(sum[0] + l, load(sum[0] + l) + d);
                store(square[0] + l, fma(d, d, load(square[0] + l)));
            });
        }
        each_vector<V>(lanes, [&](int64_t l, auto) {
            store(sum[1] + l, load(sum[1] + l) + load(sum[0] + l));
            store(square[1] + l, load(square[1] + l) + load(square[0] + l));
            store(sum[0] + l, V(A(0)));
            store(square[0] + l, V(A(0)));
        });
    }
    for (int64_t l = 0; l < lanes; ++l) {
        const A delta = sum[1][l] / A(rows);
        const A left = square[1][l] - sum[1][l] * delta;
        mean[l] = estimate[l] + delta;
        m2[l] = left < A(0) ? A(0) : left;
    }
}

template <class T>
void lane_moments(const T* x, int64_t rows, int64_t lanes, int64_t stride, Acc<T>* mean, Acc<T>* m2) {
    for (int64_t l = 0; l < lanes; l += kLaneTile) {
        moments_tile(x + l, rows, smaller(kLaneTile, lanes - l), stride, mean + l, m2 + l);
    }
}

// What normalising a lane takes: z = (x - centre) * scale + bias. For two-byte elements `bias` has the centre in it,
// z = x * scale + bias: what that form rounds away is far below their own rounding.
template <class T>
constexpr bool kFoldedCentre = sizeof(T) == 2;

// The tables give z, or for two-byte elements ahead of SiLU kSiluScale * z.
template <class T, class V>
inline V activated(V z) {
    if constexpr (kFoldedCentre<T>) {
        return silu_of_scaled<T>(z);
    } else {
        return silu<T>(z);
    }
}

template <class A>
struct ApplyTables {
    const A *centre, *scale, *bias;
};

template <class T, bool silu_on, bool kOne, bool streaming>
void lane_apply(const T* x, int64_t x_stride, T* y, int64_t y_stride, int64_t rows, int64_t lanes,
                ApplyTables<Acc<T>> t) {
    using V = typename VecOf<T>::Type;
    for (int64_t r = 0; r < rows; ++r) {
        const T* const from = x + r * x_stride;
        T* const to = y + r * y_stride;
        each_vector<V>(lanes, [&](int64_t l, auto full) {
            prefetch_after<kAheadWriting>(from + l);
            V z = fetch<full.value>(from + l, lanes - l);
            if constexpr (!kFoldedCentre<T>) z = z - entry<kOne, V>(t.centre, l);
            z = fma(z, entry<kOne, V>(t.scale, l), entry<kOne, V>(t.bias, l));
            if constexpr (silu_on) z = activated<T>(z);
            write<full.value, streaming>(to + l, z, lanes - l);
        });
    }
}

// ---- backward ----

// xhat = ((x + shift) - mean) * rstd, z = xhat * weight + bias, g = dy * act'(z)
// dx = ((g * weight - mean_g) - xhat * mean_gx) * rstd
// The order of these is that of the reference, unfused: what cancels there to zero (a group of equal elements) does so
// here, instead of leaving a rounding error multiplied by 1 / sqrt(eps).
template <class A>
struct GradientTables {
    const A *mean, *shift, *rstd, *weight, *bias, *mean_g, *mean_gx;
};

template <class T, bool kOne, class V>
inline V normalised(V x, GradientTables<Acc<T>> t, int64_t l) {
    return ((x + entry<kOne, V>(t.shift, l)) - entry<kOne, V>(t.mean, l)) * entry<kOne, V>(t.rstd, l);
}

// M is the type whose accuracy the derivative needs: T, or float where the sums become float32 gradients.
template <class M, bool silu_on, class V>
inline V gradient_of(V dy, V z) {
    if constexpr (silu_on) {
        return dy * silu_derivative<M>(z);
    } else {
        (void)z;
        return dy;
    }
}

// Sums over the rows of g, g * xhat and xhat, added to the three arrays.
template <class T, class M, bool silu_on, bool kOne>
void lane_gradient_sums(const T* dy, const T* x, int64_t rows, int64_t lanes, int64_t stride, GradientTables<Acc<T>> t,
                        Acc<T>* sum_g, Acc<T>* sum_gx, Acc<T>* sum_x) {
    using V = typename VecOf<T>::Type;
    for (int64_t r = 0; r < rows; ++r) {
        each_vector<V>(lanes, [&](int64_t l, auto full) {
            const int64_t at = r * stride + l;
            prefetch_after<kAheadReading>(x + at);
            prefetch_after<kAheadReading>(dy + at);
            const V h = normalised<T, kOne>(fetch<full.value>(x + at, lanes - l), t, l);
            const V z = fma(h, entry<kOne, V>(t.weight, l), entry<kOne, V>(t.bias, l));
            const V g = gradient_of<M, silu_on>(fetch<full.value>(dy + at, lanes - l), z);
            store(sum_g + l, load(sum_g + l) + g);
            store(sum_gx + l, fma(g, h, load(sum_gx + l)));
            store(sum_x + l, load(sum_x + l) + h);
        });
    }
}

template <class T, bool silu_on, bool kOne, bool streaming>
void lane_gradient(const T* dy, const T* x, T* dx, int64_t rows, int64_t lanes, int64_t stride,
                   GradientTables<Acc<T>> t) {
    using V = typename VecOf<T>::Type;
    for (int64_t r = 0; r < rows; ++r) {
        each_vector<V>(lanes, [&](int64_t l, auto full) {
            const int64_t at = r * stride + l;
            prefetch_after<kAheadWriting>(x + at);
            prefetch_after<kAheadWriting>(dy + at);
            const V h = normalised<T, kOne>(fetch<full.value>(x + at, lanes - l), t, l);
            const V z = fma(h, entry<kOne, V>(t.weight, l), entry<kOne, V>(t.bias, l));
            const V g = gradient_of<T, silu_on>(fetch<full.value>(dy + at, lanes - l), z);
            const V centred = g * entry<kOne, V>(t.weight, l) - entry<kOne, V>(t.mean_g, l);
            const V gradient = fma(-h, entry<kOne, V>(t.mean_gx, l), centred) * entry<kOne, V>(t.rstd, l);
            write<full.value, streaming>(dx + at, gradient, lanes - l);
        });
    }
}

}  // namespace
}  // namespace SDXL_FAST_ISA
}  // namespace sdxl_fast
