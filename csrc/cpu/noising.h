// SPDX-License-Identifier: Apache-2.0
//
// What the ops that add noise share: the coefficients of a noise level, drawing noise into a tensor in its memory
// order, and the mix of the two. Internal linkage for the reason given in vec.h.
#pragma once

#include "loops.h"
#include "normal.h"

namespace sdxl_fast {
namespace SDXL_FAST_ISA {
namespace {

constexpr int64_t kDrawPixels = 256;  // pixels of one channel drawn together
constexpr int64_t kChunk = 8192;      // elements in an item of work, about

inline float root(float x) {
    return __builtin_sqrtf(x);
}
inline double root(double x) {
    return __builtin_sqrt(x);
}

// What a noise level does to its sample: x_t = signal * x0 + sigma * noise, or the noise alone.
template <class A>
struct Mix {
    A signal, sigma;
    bool pure;
};

// The mix at timestep t; NaN outside the schedule.
template <class A>
Mix<A> mix_of(const void* alphas_cumprod, int64_t timestep, int64_t num_timesteps) {
    if (timestep < 0 || timestep >= num_timesteps) return {A(NAN), A(NAN), false};
    const A ab = static_cast<const A*>(alphas_cumprod)[timestep];
    return {root(ab), root(A(1) - ab), false};
}

// x_t from stored noise, which was rounded to T before it is used. x_t may be the noise itself.
template <class T>
void blend(const T* x0, const T* noise, T* x_t, int64_t count, Mix<typename VecOf<T>::Type::Scalar> mix) {
    using V = typename VecOf<T>::Type;
    if (mix.pure) {
        memcpy(x_t, noise, static_cast<size_t>(count) * sizeof(T));
        return;
    }
    const V signal(mix.signal), sigma(mix.sigma);
    int64_t i = 0;
    for (; i + V::W <= count; i += V::W) store(x_t + i, fma(signal, load(x0 + i), sigma * load(noise + i)));
    if (i < count) {
        const int64_t rest = count - i;
        store_some(x_t + i, fma(signal, load_some(x0 + i, rest), sigma * load_some(noise + i, rest)), rest);
    }
}

// Draws the logical elements [begin, end) of a sample into `sample`, whose memory order is the logical one.
template <class T>
void draw_straight(T* sample, int64_t seed, int64_t stream, int64_t begin, int64_t end) {
    typename VecOf<T>::Type::Scalar buffer[kDrawPixels + kDrawSlack];
    for (int64_t at = begin; at < end; at += kDrawPixels) {
        const int64_t count = smaller(kDrawPixels, end - at);
        const auto* const normals = draw(seed, stream, at, count, buffer);
        for (int64_t i = 0; i < count; ++i) put(sample + at + i, normals[i]);
    }
}

// Draws pixels [begin, end) of an NHWC sample of c channels.
template <class T>
void draw_interleaved(T* sample, int64_t seed, int64_t stream, int64_t c, int64_t hw, int64_t begin, int64_t end) {
    typename VecOf<T>::Type::Scalar buffer[kDrawPixels + kDrawSlack];
    for (int64_t pixel = begin; pixel < end; pixel += kDrawPixels) {
        const int64_t count = smaller(kDrawPixels, end - pixel);
        T* const to = sample + pixel * c;
        for (int64_t channel = 0; channel < c; ++channel) {
            const auto* const normals = draw(seed, stream, channel * hw + pixel, count, buffer);
            for (int64_t i = 0; i < count; ++i) put(to + i * c + channel, normals[i]);
        }
    }
}

// Calls f(sample, begin, end) for pieces of all samples, in pixels where the memory order is to be interleaved, else in
// elements; whole Philox blocks in each, so that no block is computed twice.
template <class F>
void each_piece(int64_t n, int64_t c, int64_t hw, bool pixels, int32_t num_threads, F&& f) {
    const int64_t units = pixels ? hw : c * hw;
    const int64_t size = pixels ? larger(kChunk / c & ~int64_t{3}, 64) : kChunk;
    const int64_t items = chunks_of(units, size);
    parallel(n * items, threads_for(n * c * hw, num_threads), [&](int64_t i) {
        const int64_t begin = i % items * size;
        f(i / items, begin, smaller(begin + size, units));
    });
}

}  // namespace
}  // namespace SDXL_FAST_ISA
}  // namespace sdxl_fast
