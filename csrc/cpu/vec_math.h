// SPDX-License-Identifier: Apache-2.0
//
// exp, log, sin/cos and the activations on vectors. Each takes the element type T it serves: float gets polynomials
// good to an ulp or so; BF16 and F16, whose rounding is 2^-9 and 2^-12, cheaper ones with a relative error below
// 1e-4; double calls the C library. The polynomials are weighted minimax fits of the relative error.
#pragma once

#include "common/math.h"
#include "vec.h"

namespace sdxl_fast {
namespace SDXL_FAST_ISA {
namespace {

template <class T>
constexpr bool kCheap = sizeof(T) == 2;

// ---- 2^t ----

// Minimax on [0, 1), highest power first; relative error 7.5e-5, 2.6e-6, 1.9e-9.
template <class T>
struct Exp2 {
    static constexpr int n = 5;
    static constexpr float c[n] = {0.013534160504148084f, 0.05201147485238664f, 0.24144274847670472f,
                                   0.6930038360177254f, 1.0000025933284111f};
};
template <>
struct Exp2<BF16> {
    static constexpr int n = 4;
    static constexpr float c[n] = {0.07802445852284644f, 0.22606724668784944f, 0.6958335091571703f, 0.999925220036358f};
};
template <>
struct Exp2<float> {
    static constexpr int n = 7;
    static constexpr float c[n] = {0.0002170224909588534f, 0.0012439689685125948f, 0.009678840793970425f,
                                   0.055483342085112124f,  0.24022983625162142f,   0.6931469838424035f,
                                   1.0000000018557778f};
};

// What exp() must do with arguments whose power leaves the range of float. On AVX-512 it saturates by itself.
enum class Range { kSaturate, kClamp };

constexpr double kLog2E = 1.4426950408889634;

// factor * 2^t: an infinity and zero at the ends (kSaturate), or at most 2^126 and still finite (kClamp).
template <class T, Range range>
inline VecF power_of_two(VecF t, double factor) {
#if defined(__AVX512F__)
    if constexpr (range == Range::kClamp) t = min(VecF(126.0f), t);
#else
    t = min(VecF(126.0f), max(VecF(-126.0f), t));
#endif
    const VecF f = fraction(t);
    VecF p = static_cast<float>(factor * Exp2<T>::c[0]);
    for (int k = 1; k < Exp2<T>::n; ++k) p = fma(p, f, VecF(static_cast<float>(factor * Exp2<T>::c[k])));
    return scale(p, t);
}

// e^(factor x). The product is rounded once, which costs 1e-7 |t| relative error in the result: little where the result
// matters, since all functions here add it to 1 or multiply it by what has decayed.
template <class T, Range range>
inline VecF exp_scaled(VecF x, double factor) {
    return power_of_two<T, range>(x * VecF(static_cast<float>(factor * kLog2E)), 1.0);
}

// ---- SiLU ----

// 1 / (1 + e)
template <class T>
inline VecF logistic_of_exp(VecF e) {
    return reciprocal<kCheap<T>>(VecF(1.0f) + e);
}

// The exact reciprocal's Newton step cannot take an infinity.
template <class T>
constexpr Range kLogisticRange = kCheap<T> ? Range::kSaturate : Range::kClamp;

template <class T>
inline VecF silu(VecF x) {
    return x * logistic_of_exp<T>(exp_scaled<T, kLogisticRange<T>>(x, -1.0));
}
template <class T>
inline VecD silu(VecD x) {
    return sdxl_fast::silu(x.v);
}

// SiLU of x from t = kSiluScale x, for two-byte T: t / (kSiluScale (1 + 2^t)), the factor inside the polynomial. Where
// t comes out of a multiplication anyway this saves one, 2 to 4 % of group_norm_silu.
constexpr double kSiluScale = -kLog2E;
template <class T>
inline VecF silu_of_scaled(VecF t) {
    static_assert(kCheap<T>, "elsewhere the two roundings of the factor would show");
    const VecF power = power_of_two<T, Range::kSaturate>(t, kSiluScale);
    return t * reciprocal<true>(VecF(static_cast<float>(kSiluScale)) + power);
}

template <class T>
inline VecF silu_derivative(VecF x) {
    const VecF e = exp_scaled<T, Range::kClamp>(x, -1.0);
    const VecF s = logistic_of_exp<T>(e);
    return fma(x, e * s * s, s);  // s (1 + x (1 - s)), with 1 - s = e s
}
template <class T>
inline VecD silu_derivative(VecD x) {
    return sdxl_fast::silu_derivative(x.v);
}

// ---- GELU ----

template <class V>
struct ValueAndSlope {
    V value;       // GELU(x) / x: the gate's weight of x
    V derivative;  // of GELU at x; only set when asked for
};

// Phi(-a) e^(a^2 / 2) for a >= 0, a polynomial in t = 1 / (1 + 0.26 a): relative error 2.5e-8, cheap 8e-5.
template <class T>
inline VecF scaled_tail(VecF a) {
    const VecF t = reciprocal<kCheap<T>>(fma(a, VecF(0.26f), VecF(1.0f)));
    VecF p;
    if constexpr (kCheap<T>) {
        p = 0.17029475568236607f;
        p = fma(p, t, VecF(0.004921210026052223f));
        p = fma(p, t, VecF(0.11982368879879966f));
        p = fma(p, t, VecF(0.10125952069390094f));
        p = fma(p, t, VecF(0.10374055141887416f));
    } else {
        p = 0.030505654006752828f;
        p = fma(p, t, VecF(-0.15283236826413168f));
        p = fma(p, t, VecF(0.25149820343431734f));
        p = fma(p, t, VecF(-0.15095640496135213f));
        p = fma(p, t, VecF(0.1609526752321662f));
        p = fma(p, t, VecF(0.05102576241402148f));
        p = fma(p, t, VecF(0.1030307121272165f));
        p = fma(p, t, VecF(0.10301669053094006f));
        p = fma(p, t, VecF(0.10375906312018322f));
    }
    return p * t;
}

template <class T, bool derivative>
inline ValueAndSlope<VecF> gelu(VecF x) {
    const VecF density = exp_scaled<T, Range::kSaturate>(x * x, -0.5);
    const VecF tail = density * scaled_tail<T>(abs(x));
    const VecF cdf = select_negative(x, tail, VecF(1.0f) - tail);
    ValueAndSlope<VecF> result{cdf, cdf};
    if constexpr (derivative) result.derivative = fma(x * VecF(static_cast<float>(kInvSqrt2Pi)), density, cdf);
    return result;
}
template <class T, bool derivative>
inline ValueAndSlope<VecD> gelu(VecD x) {
    return {sdxl_fast::normal_cdf(x.v), derivative ? sdxl_fast::gelu_derivative(x.v) : 0.0};
}

template <class T, bool derivative>
inline ValueAndSlope<VecF> gelu_tanh(VecF x) {
    const VecF inner = x * fma(x * x, VecF(static_cast<float>(kGeluCubic)), VecF(1.0f));
    const VecF e = exp_scaled<T, derivative ? Range::kClamp : kLogisticRange<T>>(inner, -2 * kSqrt2OverPi);
    const VecF s = logistic_of_exp<T>(e);
    ValueAndSlope<VecF> result{s, s};
    if constexpr (derivative) {
        constexpr double k = 2 * kSqrt2OverPi;
        // s (1 - s) has long vanished at 30; beyond it x^2 could overflow and meet that zero.
        const VecF near = min(VecF(30.0f), max(VecF(-30.0f), x));
        const VecF slope = fma(near * near, VecF(static_cast<float>(3 * kGeluCubic * k)), VecF(static_cast<float>(k)));
        result.derivative = fma(near * (e * s * s), slope, s);
    }
    return result;
}
template <class T, bool derivative>
inline ValueAndSlope<VecD> gelu_tanh(VecD x) {
    const double k = 2 * kSqrt2OverPi;
    return {sdxl_fast::sigmoid(k * (x.v + kGeluCubic * x.v * x.v * x.v)),
            derivative ? sdxl_fast::gelu_tanh_derivative(x.v) : 0.0};
}

}  // namespace
}  // namespace SDXL_FAST_ISA
}  // namespace sdxl_fast
