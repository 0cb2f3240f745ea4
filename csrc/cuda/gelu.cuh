// SPDX-License-Identifier: Apache-2.0
//
// GELU with its derivative, sharing one exponential. float follows common/math.h to the last bits; results kept in 16
// bits take a shorter form, because erfc at 50 instructions an element would make geglu compute-bound on an H100.
#pragma once

#include "../common/math.h"
#include "device.cuh"

namespace sdxl_fast {
namespace cuda {

struct Gelu {
    float value, derivative;
};

// Phi(x) from gaussian = exp(-x^2 / 2), to 5e-6 of its own size for any x: Phi(-|x|) / gaussian is a polynomial in
// t = 1 / (1 + 0.31 |x|), a minimax fit of the relative error on |x| <= 14.
__device__ __forceinline__ float normal_cdf_16bit(float x, float gaussian) {
    const float t = __fdividef(1.0f, 1.0f + 0.31f * fabsf(x));
    float p = -0.07392895f;
    p = p * t + 0.18044958f;
    p = p * t + 0.01574603f;
    p = p * t + 0.13342868f;
    p = p * t + 0.12044170f;
    p = p * t + 0.12386064f;
    const float tail = p * t * gaussian;
    return x < 0.0f ? tail : 1.0f - tail;
}

template <class T, bool TANH>
__device__ __forceinline__ Gelu gelu_for(float x) {
    if (TANH) {
        // (1 + tanh u) / 2 = sigmoid(2u). From |x| = 20 on that is exactly 0 or 1; cutting x^2 there keeps 0 * inf out.
        const float x2 = fminf(x * x, 400.0f);
        const float u2 = static_cast<float>(2 * kSqrt2OverPi) * x * (1.0f + static_cast<float>(kGeluCubic) * x2);
        const float e = sizeof(T) == 2 ? __expf(-fabsf(u2)) : expf(-fabsf(u2));
        const float s = 1.0f / (1.0f + e);  // sigmoid(|2u|); e s is its complement, without cancellation
        const float cdf = x < 0.0f ? e * s : s;
        const float slope = static_cast<float>(2 * kSqrt2OverPi) * (1.0f + static_cast<float>(3 * kGeluCubic) * x2);
        return {x * cdf, cdf + x * (e * s * s) * slope};
    }
    if (sizeof(T) == 2) {
        const float gaussian = __expf(-0.5f * x * x);
        const float cdf = normal_cdf_16bit(x, gaussian);
        return {x * cdf, cdf + x * static_cast<float>(kInvSqrt2Pi) * gaussian};
    }
    return {gelu(x), gelu_derivative(x)};  // of which the compiler keeps what is used
}

}  // namespace cuda
}  // namespace sdxl_fast
