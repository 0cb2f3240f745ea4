// SPDX-License-Identifier: Apache-2.0
//
// forward_diffusion: x_t = sqrt(ab_t) x0 + sqrt(1 - ab_t) noise, with the counter-based noise of common/philox.h.
// A chunk is a run of pixels of a sample: the noise of each channel's run is drawn into a buffer on the stack in
// logical order, put into memory order, rounded to the element type and mixed in. Reads x0, writes x_t and the noise.
#include "kernels.h"
#include "noising.h"

namespace sdxl_fast {
namespace SDXL_FAST_ISA {
namespace {

template <class A, class Call>
Mix<A> level_of(const Call& call, int64_t sample) {
    const int64_t timestep = call.timesteps[sample];
    if (timestep == call.pure_noise_at) return {A(0), A(1), true};
    return mix_of<A>(call.alphas_cumprod, timestep, call.num_timesteps);
}

template <class T>
void forward(const DiffusionForward& call) {
    using A = typename VecOf<T>::Type::Scalar;
    const T* const x0 = static_cast<const T*>(call.x0);
    const T* const given = static_cast<const T*>(call.noise_in);
    T *const x_t = static_cast<T*>(call.x_t), *const drawn = static_cast<T*>(call.noise_out);
    const int64_t c = call.c, elements = c * call.hw;
    const bool pixels = call.nhwc && given == nullptr && c > 1;
    each_piece(call.n, c, call.hw, pixels, call.num_threads, [&](int64_t sample, int64_t begin, int64_t end) {
        const int64_t base = sample * elements, at = base + begin * (pixels ? c : 1);
        const int64_t count = (end - begin) * (pixels ? c : 1);
        if (pixels) {
            draw_interleaved(drawn + base, call.seeds[sample], call.draw_stream, c, call.hw, begin, end);
        } else if (given == nullptr) {
            draw_straight(drawn + base, call.seeds[sample], call.draw_stream, begin, end);
        }
        blend(x0 + at, (given != nullptr ? given : drawn) + at, x_t + at, count, level_of<A>(call, sample));
    });
}

}  // namespace

void forward_diffusion_fwd(const DiffusionForward& call) {
    with_dtype(call.dtype, [&](auto tag) { forward<typename decltype(tag)::Type>(call); });
}

void forward_diffusion_bwd(const DiffusionBackward& call) {
    with_dtype(call.dtype, [&](auto tag) {
        using T = typename decltype(tag)::Type;
        using V = typename VecOf<T>::Type;
        const int64_t items = chunks_of(call.elements, kChunk);
        parallel(call.n * items, threads_for(call.n * call.elements, call.num_threads), [&](int64_t item) {
            const int64_t sample = item / items, begin = item % items * kChunk;
            const int64_t count = smaller(kChunk, call.elements - begin);
            const V signal(level_of<typename V::Scalar>(call, sample).signal);
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
