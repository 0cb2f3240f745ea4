// SPDX-License-Identifier: Apache-2.0
//
// The two coefficients of a DDIM step, x_next = a x_t + b output, exact to the last bit of a float but for rare ties.
//
// An error of a coefficient is shared by every element of its sample: no rounding averages it out, and float arithmetic
// makes b, a difference, wrong by several units. Doubles would do, but most GPUs have one double unit for 64 of float.
// So numbers are sums of two floats of which the second holds what the first had to round away.
#pragma once

#include "noising.cuh"

namespace sdxl_fast {
namespace cuda {
namespace {

struct Twofold {
    float high, low;
};

// The second part is exact enough for a float of the sum, not normalised: it may be a whole unit of the first.
__device__ __forceinline__ Twofold root(const Twofold& x) {
    const float r = sqrtf(x.high);
    if (!(r > 0.0f)) return {r, 0.0f};
    return {r, 0.5f * (fmaf(-r, r, x.high) + x.low) / r};
}

__device__ __forceinline__ Twofold quotient(const Twofold& x, const Twofold& y) {
    const float q = x.high / y.high;
    return {q, (fmaf(-q, y.high, x.high) + (x.low - q * y.low)) / y.high};
}

__device__ __forceinline__ Twofold negative(const Twofold& x) {
    return {-x.high, -x.low};
}

// p q + r s. The products must round where they stand: contracted into the sum they would lose their own remainder.
__device__ __forceinline__ float sum_of_products(const Twofold& p, const Twofold& q, const Twofold& r,
                                                 const Twofold& s) {
    const float first = __fmul_rn(p.high, q.high), second = __fmul_rn(r.high, s.high);
    const float first_rest = fmaf(p.high, q.high, -first) + (p.high * q.low + p.low * q.high);
    const float second_rest = fmaf(r.high, s.high, -second) + (r.high * s.low + r.low * s.high);
    const float sum = first + second, grown = sum - first;
    const float rest = (first - (sum - grown)) + (second - grown);
    return sum + (rest + (first_rest + second_rest));
}

struct ExactLevel {
    Twofold signal, sigma;
};

// sqrt(ab_t) and sqrt(1 - ab_t); 1 and 0 at -1, the clean latent.
__device__ __forceinline__ ExactLevel exact_level(const float* alphas_cumprod, int64_t t) {
    if (t < 0) return {{1.0f, 0.0f}, {0.0f, 0.0f}};
    const float ab = alphas_cumprod[t], rest = 1.0f - ab;
    return {root({ab, 0.0f}), root({rest, (1.0f - rest) - ab})};
}

struct Route {
    const float* alphas_cumprod;
    const int64_t *timesteps, *next_timesteps, *renoise_timesteps;
    int64_t num_timesteps;
    int32_t prediction;
};

struct Move {
    float a, b;
};

// NaN where a timestep is outside the schedule.
__device__ __forceinline__ Move move_of(const Route& route, int64_t sample) {
    const int64_t now = route.timesteps[sample], then = route.next_timesteps[sample], total = route.num_timesteps;
    if (now < -1 || then < -1 || now >= total || then >= total) return {nanf(""), nanf("")};
    if (now == then) return {1.0f, 0.0f};
    const ExactLevel from = exact_level(route.alphas_cumprod, now), to = exact_level(route.alphas_cumprod, then);
    const Twofold one = {1.0f, 0.0f}, zero = {0.0f, 0.0f};
    if (route.prediction == SDXL_FAST_EPSILON) {
        const Twofold a = quotient(to.signal, from.signal);
        return {a.high + a.low, sum_of_products(to.sigma, one, negative(a), from.sigma)};
    }
    if (route.prediction == SDXL_FAST_SAMPLE) {
        // Without noise there is none to carry over: the undefined epsilon counts as 0.
        const Twofold a = from.sigma.high > 0.0f ? quotient(to.sigma, from.sigma) : zero;
        return {a.high + a.low, sum_of_products(to.signal, one, negative(a), from.signal)};
    }
    return {sum_of_products(to.signal, from.signal, to.sigma, from.sigma),
            sum_of_products(to.sigma, from.signal, negative(to.signal), from.sigma)};
}

}  // namespace
}  // namespace cuda
}  // namespace sdxl_fast
