// SPDX-License-Identifier: Apache-2.0
//
// ddim_move: x_next = a x_t + b model_output, with a and b of each sample from its two noise levels, and, when asked,
// x_renoised = sqrt(ab_r) x_next + sqrt(1 - ab_r) noise. Reads 2 elements, writes 1, or 2 with the noised copy: its
// noise is drawn to where the result will stand and mixed in place while the piece is in the cache.
// Backward: dx_t = a g and dmodel_output = b g with g = dx_next + sqrt(ab_r) dx_renoised.
#include "kernels.h"
#include "noising.h"

namespace sdxl_fast {
namespace SDXL_FAST_ISA {
namespace {

template <class A>
struct Move {
    A a, b;  // of x_t and of the model's output; an input whose coefficient is 0 is left out, whatever it holds
};

// In double and rounded once: an error here is shared by every element of the sample, and b is a difference.
inline Mix<double> level_of(double ab) {
    return {root(ab), root(1.0 - ab), false};
}

template <class A>
Move<A> move_of(const void* alphas_cumprod, int64_t now, int64_t then, int64_t num_timesteps, int32_t prediction) {
    if (now < -1 || then < -1 || now >= num_timesteps || then >= num_timesteps) return {A(NAN), A(NAN)};
    if (now == then) return {A(1), A(0)};
    const A* const table = static_cast<const A*>(alphas_cumprod);
    const Mix<double> from = level_of(now < 0 ? 1.0 : table[now]), to = level_of(then < 0 ? 1.0 : table[then]);
    double a, b;
    if (prediction == SDXL_FAST_EPSILON) {
        a = to.signal / from.signal;
        b = to.sigma - a * from.sigma;
    } else if (prediction == SDXL_FAST_SAMPLE) {
        // Without noise there is none to carry over: the undefined epsilon counts as 0.
        a = from.sigma > 0.0 ? to.sigma / from.sigma : 0.0;
        b = to.signal - a * from.signal;
    } else {
        a = to.signal * from.signal + to.sigma * from.sigma;
        b = to.sigma * from.signal - to.signal * from.sigma;
    }
    return {A(a), A(b)};
}

template <class V>
inline V scaled_sum(typename V::Scalar a, V x, typename V::Scalar b, V y) {
    if (b == 0) return V(a) * x;
    return a == 0 ? V(b) * y : fma(V(a), x, V(b) * y);
}

template <class T, class M>
void step(const T* x_t, const M* output, T* x_next, int64_t count, Move<typename VecOf<T>::Type::Scalar> move) {
    using V = typename VecOf<T>::Type;
    int64_t i = 0;
    for (; i + V::W <= count; i += V::W) {
        store(x_next + i, scaled_sum(move.a, load(x_t + i), move.b, load(output + i)));
    }
    if (i < count) {
        const int64_t rest = count - i;
        store_some(x_next + i, scaled_sum(move.a, load_some(x_t + i, rest), move.b, V(load_some(output + i, rest))),
                   rest);
    }
}

template <class T, class M>
void forward(const MoveForward& call) {
    using A = typename VecOf<T>::Type::Scalar;
    const T* const x_t = static_cast<const T*>(call.x_t);
    const M* const output = static_cast<const M*>(call.model_output);
    T *const x_next = static_cast<T*>(call.x_next), *const renoised = static_cast<T*>(call.x_renoised);
    const int64_t c = call.c, elements = c * call.hw;
    const bool pixels = call.nhwc && renoised != nullptr && c > 1;
    each_piece(call.n, c, call.hw, pixels, call.num_threads, [&](int64_t sample, int64_t begin, int64_t end) {
        const int64_t base = sample * elements, at = base + begin * (pixels ? c : 1);
        const int64_t count = (end - begin) * (pixels ? c : 1);
        step(x_t + at, output + at, x_next + at, count,
             move_of<A>(call.alphas_cumprod, call.timesteps[sample], call.next_timesteps[sample], call.num_timesteps,
                        call.prediction));
        if (renoised == nullptr) return;
        if (pixels) {
            draw_interleaved(renoised + base, call.seeds[sample], call.draw_stream, c, call.hw, begin, end);
        } else {
            draw_straight(renoised + base, call.seeds[sample], call.draw_stream, begin, end);
        }
        blend(x_next + at, renoised + at, renoised + at, count,
              mix_of<A>(call.alphas_cumprod, call.renoise_timesteps[sample], call.num_timesteps));
    });
}

// target = factor * (first + signal * second); either gradient may be absent.
template <class T, class M>
void scale_gradient(const T* first, const T* second, M* target, int64_t count, typename VecOf<T>::Type::Scalar factor,
                    typename VecOf<T>::Type::Scalar signal) {
    using V = typename VecOf<T>::Type;
    const auto both = [&](auto get_from, int64_t i) {
        const V g = first == nullptr    ? V(signal) * get_from(second + i)
                    : second == nullptr ? get_from(first + i)
                                        : fma(V(signal), get_from(second + i), get_from(first + i));
        return factor == 0 ? V(typename V::Scalar(0)) : V(factor) * g;
    };
    int64_t i = 0;
    for (; i + V::W <= count; i += V::W) store(target + i, both([](const T* p) { return load(p); }, i));
    if (i < count) {
        const int64_t rest = count - i;
        store_some(target + i, both([rest](const T* p) { return load_some(p, rest); }, i), rest);
    }
}

template <class T, class M>
void backward(const MoveBackward& call) {
    using A = typename VecOf<T>::Type::Scalar;
    const T* const dx_next = static_cast<const T*>(call.dx_next);
    const T* const dx_renoised = static_cast<const T*>(call.dx_renoised);
    each_piece(call.n, 1, call.elements, false, call.num_threads, [&](int64_t sample, int64_t begin, int64_t end) {
        const int64_t at = sample * call.elements + begin, count = end - begin;
        const Move<A> move = move_of<A>(call.alphas_cumprod, call.timesteps[sample], call.next_timesteps[sample],
                                        call.num_timesteps, call.prediction);
        const A signal =
            dx_renoised == nullptr
                ? A(0)
                : mix_of<A>(call.alphas_cumprod, call.renoise_timesteps[sample], call.num_timesteps).signal;
        const T* const first = dx_next == nullptr ? nullptr : dx_next + at;
        const T* const second = dx_renoised == nullptr ? nullptr : dx_renoised + at;
        if (call.dx_t != nullptr) scale_gradient(first, second, static_cast<T*>(call.dx_t) + at, count, move.a, signal);
        if (call.dmodel_output != nullptr)
            scale_gradient(first, second, static_cast<M*>(call.dmodel_output) + at, count, move.b, signal);
    });
}

// Calls f(Tag<T>, Tag<M>) for x_t's type and the model's, which is the same or a 16-bit one beside float.
template <class F>
void with_dtypes(int32_t dtype, int32_t output_dtype, F&& f) {
    with_dtype(dtype, [&](auto tag) {
        if (output_dtype == dtype) {
            f(tag, tag);
        } else if (output_dtype == SDXL_FAST_BF16) {
            f(Tag<float>{}, Tag<BF16>{});
        } else {
            f(Tag<float>{}, Tag<F16>{});
        }
    });
}

}  // namespace

void ddim_move_fwd(const MoveForward& call) {
    with_dtypes(call.dtype, call.output_dtype, [&](auto tag, auto output_tag) {
        forward<typename decltype(tag)::Type, typename decltype(output_tag)::Type>(call);
    });
}

void ddim_move_bwd(const MoveBackward& call) {
    with_dtypes(call.dtype, call.output_dtype, [&](auto tag, auto output_tag) {
        backward<typename decltype(tag)::Type, typename decltype(output_tag)::Type>(call);
    });
}

}  // namespace SDXL_FAST_ISA
}  // namespace sdxl_fast
