// SPDX-License-Identifier: Apache-2.0
//
// forward_diffusion: x_t = sqrt(ab_t) x0 + sqrt(1 - ab_t) noise, with the counter-based noise of common/philox.h.
// A chunk is a run of pixels of a sample: the noise of each channel's run is drawn into a buffer on the stack in
// logical order, put into memory order, rounded to the element type and mixed in. Reads x0, writes x_t and the noise.
#include "kernels.h"
#include "loops.h"
#include "normal.h"

namespace sdxl_fast {
namespace SDXL_FAST_ISA {
namespace {

constexpr int64_t kDrawPixels = 256;  // pixels of one channel drawn together
constexpr int64_t kChunk = 8192;      // elements in an item of work, about

// What a timestep does to its sample: x_t = signal * x0 + sigma * noise, or the noise alone.
template <class A>
struct Mix {
    A signal, sigma;
    bool pure;
};

template <class A>
Mix<A> mix_of(const void* alphas_cumprod, int64_t timestep, int64_t num_timesteps, int64_t pure_noise_at) {
    if (timestep == pure_noise_at) return {A(0), A(1), true};
    if (timestep < 0 || timestep >= num_timesteps) return {A(NAN), A(NAN), false};
    const A ab = static_cast<const A*>(alphas_cumprod)[timestep];
    if constexpr (sizeof(A) == sizeof(double)) {
        return {__builtin_sqrt(ab), __builtin_sqrt(A(1) - ab), false};
    } else {
        return {__builtin_sqrtf(ab), __builtin_sqrtf(A(1) - ab), false};
    }
}

// x_t from stored noise: the noise was rounded to T before it is used.
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

template <class T>
struct Diffusion {
    using V = typename VecOf<T>::Type;
    using A = typename V::Scalar;
    const DiffusionForward& call;
    const T* x0;
    const T* given;
    T *x_t, *drawn;

    explicit Diffusion(const DiffusionForward& c)
        : call(c),
          x0(static_cast<const T*>(c.x0)),
          given(static_cast<const T*>(c.noise_in)),
          x_t(static_cast<T*>(c.x_t)),
          drawn(static_cast<T*>(c.noise_out)) {}

    Mix<A> mix(int64_t sample) const {
        return mix_of<A>(call.alphas_cumprod, call.timesteps[sample], call.num_timesteps, call.pure_noise_at);
    }

    // Elements [begin, end) of a sample in memory order, when that is the logical order or no noise is drawn.
    void straight(int64_t sample, int64_t begin, int64_t end) const {
        const int64_t base = sample * call.c * call.hw;
        if (given != nullptr) {
            blend(x0 + base + begin, given + base + begin, x_t + base + begin, end - begin, mix(sample));
            return;
        }
        A buffer[kDrawPixels + kDrawSlack];
        for (int64_t at = begin; at < end; at += kDrawPixels) {
            const int64_t count = smaller(kDrawPixels, end - at);
            const A* const normals = draw(call.seeds[sample], call.draw_stream, at, count, buffer);
            for (int64_t i = 0; i < count; ++i) put(drawn + base + at + i, normals[i]);
        }
        blend(x0 + base + begin, drawn + base + begin, x_t + base + begin, end - begin, mix(sample));
    }

    // Pixels [begin, end) of an NHWC sample, noise drawn.
    void interleaved(int64_t sample, int64_t begin, int64_t end) const {
        const int64_t c = call.c, base = sample * c * call.hw;
        A buffer[kDrawPixels + kDrawSlack];
        for (int64_t pixel = begin; pixel < end; pixel += kDrawPixels) {
            const int64_t count = smaller(kDrawPixels, end - pixel);
            T* const to = drawn + base + pixel * c;
            for (int64_t channel = 0; channel < c; ++channel) {
                const int64_t first = channel * call.hw + pixel;
                const A* const normals = draw(call.seeds[sample], call.draw_stream, first, count, buffer);
                for (int64_t i = 0; i < count; ++i) put(to + i * c + channel, normals[i]);
            }
        }
        const int64_t at = base + begin * c;
        blend(x0 + at, drawn + at, x_t + at, (end - begin) * c, mix(sample));
    }

    void run() const {
        const int64_t elements = call.c * call.hw;
        const int32_t threads = threads_for(call.n * elements, call.num_threads);
        const bool pixels = call.nhwc && given == nullptr && call.c > 1;
        // Whole Philox blocks per item, so that no block is computed twice.
        const int64_t units = pixels ? call.hw : elements;
        const int64_t size = pixels ? larger(kChunk / call.c & ~int64_t{3}, 64) : kChunk;
        const int64_t items = chunks_of(units, size);
        parallel(call.n * items, threads, [&](int64_t i) {
            const int64_t begin = i % items * size, end = smaller(begin + size, units);
            if (pixels) {
                interleaved(i / items, begin, end);
            } else {
                straight(i / items, begin, end);
            }
        });
    }
};

}  // namespace

void forward_diffusion_fwd(const DiffusionForward& call) {
    with_dtype(call.dtype, [&](auto tag) { Diffusion<typename decltype(tag)::Type>(call).run(); });
}

void forward_diffusion_bwd(const DiffusionBackward& call) {
    with_dtype(call.dtype, [&](auto tag) {
        using T = typename decltype(tag)::Type;
        using V = typename VecOf<T>::Type;
        const int64_t items = chunks_of(call.elements, kChunk);
        parallel(call.n * items, threads_for(call.n * call.elements, call.num_threads), [&](int64_t item) {
            const int64_t sample = item / items, begin = item % items * kChunk;
            const int64_t count = smaller(kChunk, call.elements - begin);
            const V signal(mix_of<typename V::Scalar>(call.alphas_cumprod, call.timesteps[sample], call.num_timesteps,
                                                      call.pure_noise_at)
                               .signal);
            const T* const from = static_cast<const T*>(call.dx_t) + sample * call.elements + begin;
            T* const to = static_cast<T*>(call.dx0) + sample * call.elements + begin;
            int64_t i = 0;
            for (; i + V::W <= count; i += V::W) store(to + i, signal * load(from + i));
            if (i < count) store_some(to + i, signal * load_some(from + i, count - i), count - i);
        });
    });
}

}  // namespace SDXL_FAST_ISA
}  // namespace sdxl_fast
