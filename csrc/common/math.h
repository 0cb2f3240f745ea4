// SPDX-License-Identifier: Apache-2.0
//
// Scalar activations and their derivatives in T = float or double: what the vector code of cpu/ and the device code of
// cuda/ must agree with. Each form keeps its relative accuracy in the negative tail, where the textbook form
// 0.5 x (1 + erf(x / sqrt 2)) cancels.
#pragma once

#include <math.h>

#include "macros.h"

namespace sdxl_fast {

constexpr double kSqrtHalf = 0.70710678118654752440;
constexpr double kInvSqrt2Pi = 0.39894228040143267794;
constexpr double kSqrt2OverPi = 0.79788456080286535588;
constexpr double kGeluCubic = 0.044715;

SDXL_HD float exp_of(float x) {
    return expf(x);
}
SDXL_HD double exp_of(double x) {
    return exp(x);
}
SDXL_HD float erfc_of(float x) {
    return erfcf(x);
}
SDXL_HD double erfc_of(double x) {
    return erfc(x);
}

template <class T>
SDXL_HD T sigmoid(T x) {
    return T(1) / (T(1) + exp_of(-x));
}

template <class T>
SDXL_HD T silu(T x) {
    return x * sigmoid(x);
}

template <class T>
SDXL_HD T silu_derivative(T x) {
    const T s = sigmoid(x);
    return s * (T(1) + x * (T(1) - s));
}

// Phi, the normal distribution function: GELU(x) = x Phi(x).
template <class T>
SDXL_HD T normal_cdf(T x) {
    return T(0.5) * erfc_of(-x * T(kSqrtHalf));
}

template <class T>
SDXL_HD T gelu(T x) {
    return x * normal_cdf(x);
}

template <class T>
SDXL_HD T gelu_derivative(T x) {
    return normal_cdf(x) + x * T(kInvSqrt2Pi) * exp_of(T(-0.5) * x * x);
}

// 0.5 (1 + tanh u) = sigmoid(2 u), with u = sqrt(2 / pi) (x + 0.044715 x^3).
template <class T>
SDXL_HD T gelu_tanh(T x) {
    return x * sigmoid(T(2 * kSqrt2OverPi) * (x + T(kGeluCubic) * x * x * x));
}

template <class T>
SDXL_HD T gelu_tanh_derivative(T x) {
    const T slope = T(2 * kSqrt2OverPi) * (T(1) + T(3 * kGeluCubic) * x * x);
    const T s = sigmoid(T(2 * kSqrt2OverPi) * (x + T(kGeluCubic) * x * x * x));
    const T tail = s * (T(1) - s);
    return s + (tail == T(0) ? T(0) : x * tail * slope);  // 0 * inf for huge |x|
}

}  // namespace sdxl_fast
