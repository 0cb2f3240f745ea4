// SPDX-License-Identifier: Apache-2.0
//
// forward_diffusion: x_t = sqrt(ab_t) x0 + sqrt(1 - ab_t) noise, x_t = noise where t == pure_noise_at.
//
// Formula    noise of logical element i = (c H + h) W + w from Philox4x32-10 (common/philox.h): one call makes the four
//            words of i / 4, two Box-Muller pairs of normals. Backward: dx0 = sqrt(ab_t) dx_t, zero at pure_noise_at.
// Grid       x: blocks of 256 threads over one sample, y: samples (strided). A thread owns the four elements of one
// call;
//            channels-last with C and H W multiples of four gives it four calls, a 4 pixel by 4 channel square, so that
//            its stores are four runs of four channels instead of sixteen single elements.
// Registers  words and normals of the calls; the two coefficients.
// Bytes      with seeds 1 read and 2 writes per element, with given noise 2 reads and 1 write, backward 1 and 1.
// Wrong      nowhere known; wide ragged channels-last tensors store element by element.
//
// A timestep outside [0, num_timesteps) makes its sample NaN: reading it back to report it would synchronise.
#include "noising.cuh"

namespace sdxl_fast {
namespace cuda {
namespace {

struct Schedule {
    const float* alphas_cumprod;
    const int64_t* timesteps;
    int64_t num_timesteps, pure_noise_at;
};

struct Coefficients {
    float signal, sigma;
    bool pure;
};

__device__ __forceinline__ Coefficients coefficients(const Schedule& schedule, int64_t sample) {
    const int64_t t = schedule.timesteps[sample];
    const Level level = level_at(schedule.alphas_cumprod, t, schedule.num_timesteps);
    return {level.signal, level.sigma, t >= 0 && t < schedule.num_timesteps && t == schedule.pure_noise_at};
}

template <class T>
__device__ __forceinline__ T mix(const Coefficients& k, T x0, T noise) {
    return k.pure ? noise : from_float<T>(k.signal * to_float(x0) + k.sigma * to_float(noise));
}

// One call per thread. VECTOR: memory order is logical order and a group of four is one aligned access.
template <class T, bool NHWC, bool VECTOR>
__global__ void __launch_bounds__(kThreads, 2)
    forward_diffusion_seeded_kernel(const T* __restrict__ x0, T* __restrict__ x_t, T* __restrict__ noise,
                                    Schedule schedule, Draw draw) {
    const int64_t elements = draw.channels * draw.hw;
    const int64_t first = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * 4;
    if (first >= elements) return;
    for (int64_t sample = blockIdx.y; sample < draw.n; sample += gridDim.y) {
        const Coefficients k = coefficients(schedule, sample);
        const Vec<T, 4> eps = normals<T>(draw.seeds[sample], static_cast<uint64_t>(first) / 4, draw.stream);
        const int64_t base = sample * elements;
        if (VECTOR) {
            const Vec<T, 4> from = load<4>(x0 + base + first);
            Vec<T, 4> to;
#pragma unroll
            for (int i = 0; i < 4; ++i) to.at[i] = mix(k, from.at[i], eps.at[i]);
            store<4>(noise + base + first, eps);
            store<4>(x_t + base + first, to);
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int64_t e = first + i;
                if (e < elements) {
                    const int64_t at = base + (NHWC ? (e % draw.hw) * draw.channels + e / draw.hw : e);
                    noise[at] = eps.at[i];
                    x_t[at] = mix(k, x0[at], eps.at[i]);
                }
            }
        }
    }
}

// Four calls per thread: channels c .. c + 3 of pixels p .. p + 3, channel quads running fastest over the threads.
template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    forward_diffusion_seeded_nhwc_kernel(const T* __restrict__ x0, T* __restrict__ x_t, T* __restrict__ noise,
                                         Schedule schedule, Draw draw) {
    const int64_t elements = draw.channels * draw.hw;
    const int64_t quads = draw.channels / 4;
    const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    const int64_t pixel = index / quads * 4, channel = index % quads * 4;
    if (pixel >= draw.hw) return;
    for (int64_t sample = blockIdx.y; sample < draw.n; sample += gridDim.y) {
        const Coefficients k = coefficients(schedule, sample);
        Vec<T, 4> by_channel[4];
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            const int64_t element = (channel + c) * draw.hw + pixel;
            by_channel[c] = normals<T>(draw.seeds[sample], static_cast<uint64_t>(element) / 4, draw.stream);
        }
#pragma unroll
        for (int p = 0; p < 4; ++p) {
            const int64_t at = sample * elements + (pixel + p) * draw.channels + channel;
            const Vec<T, 4> from = load<4>(x0 + at);
            Vec<T, 4> eps, to;
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                eps.at[c] = by_channel[c].at[p];
                to.at[c] = mix(k, from.at[c], eps.at[c]);
            }
            store<4>(noise + at, eps);
            store<4>(x_t + at, to);
        }
    }
}

template <class T, int VEC>
__global__ void __launch_bounds__(kThreads, 2)
    forward_diffusion_mix_kernel(const T* __restrict__ x0, const T* __restrict__ noise, T* __restrict__ x_t,
                                 Schedule schedule, int64_t n, int64_t elements) {
    const int64_t first = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * VEC;
    if (first >= elements) return;
    for (int64_t sample = blockIdx.y; sample < n; sample += gridDim.y) {
        const Coefficients k = coefficients(schedule, sample);
        const Vec<T, VEC> from = load<VEC>(x0 + sample * elements + first);
        const Vec<T, VEC> eps = load<VEC>(noise + sample * elements + first);
        Vec<T, VEC> to;
#pragma unroll
        for (int i = 0; i < VEC; ++i) to.at[i] = mix(k, from.at[i], eps.at[i]);
        store<VEC>(x_t + sample * elements + first, to);
    }
}

template <class T, int VEC>
__global__ void __launch_bounds__(kThreads, 2)
    forward_diffusion_bwd_kernel(const T* __restrict__ dx_t, T* __restrict__ dx0, Schedule schedule, int64_t n,
                                 int64_t elements) {
    const int64_t first = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * VEC;
    if (first >= elements) return;
    for (int64_t sample = blockIdx.y; sample < n; sample += gridDim.y) {
        const Coefficients k = coefficients(schedule, sample);
        const Vec<T, VEC> from = load<VEC>(dx_t + sample * elements + first);
        Vec<T, VEC> to;
#pragma unroll
        for (int i = 0; i < VEC; ++i) to.at[i] = from_float<T>(k.pure ? 0.0f : k.signal * to_float(from.at[i]));
        store<VEC>(dx0 + sample * elements + first, to);
    }
}

template <class T>
int32_t draw_and_mix(const T* x0, T* x_t, T* noise, const Schedule& schedule, const Draw& draw, bool nhwc,
                     void* stream) {
    const int64_t elements = draw.channels * draw.hw;
    const dim3 grid = sample_grid(ceil_div(elements, 4), draw.n);
    const bool wide = all_aligned(4 * sizeof(T), x0, x_t, noise);
    if (nhwc && wide && draw.channels % 4 == 0 && draw.hw % 4 == 0)
        return launch(forward_diffusion_seeded_nhwc_kernel<T>, sample_grid(elements / 16, draw.n), kThreads, stream, x0,
                      x_t, noise, schedule, draw);
    if (nhwc)
        return launch(forward_diffusion_seeded_kernel<T, true, false>, grid, kThreads, stream, x0, x_t, noise, schedule,
                      draw);
    if (wide && elements % 4 == 0)
        return launch(forward_diffusion_seeded_kernel<T, false, true>, grid, kThreads, stream, x0, x_t, noise, schedule,
                      draw);
    return launch(forward_diffusion_seeded_kernel<T, false, false>, grid, kThreads, stream, x0, x_t, noise, schedule,
                  draw);
}

}  // namespace
}  // namespace cuda
}  // namespace sdxl_fast

extern "C" {

int32_t sdxl_fast_forward_diffusion_fwd_cuda(const void* x0, const void* alphas_cumprod, const int64_t* timesteps,
                                             const int64_t* seeds_or_null, const void* noise_in_or_null, void* x_t,
                                             void* noise_out_or_null, int64_t n, int64_t c, int64_t h, int64_t w,
                                             int64_t num_timesteps, int64_t draw_stream, int64_t pure_noise_at,
                                             int32_t layout, int32_t dtype, void* stream) {
    using namespace sdxl_fast::cuda;
    const bool draws = seeds_or_null != nullptr;
    const int64_t elements = c * h * w;
    if (n < 0 || c < 0 || h < 0 || w < 0 || (layout != SDXL_FAST_NHWC && layout != SDXL_FAST_NCHW))
        return SDXL_FAST_INVALID_ARGUMENT;
    if (n != 0 && elements != 0) {
        const bool one_source = draws != (noise_in_or_null != nullptr) && draws == (noise_out_or_null != nullptr);
        if (!one_source || !grid_fits(elements)) return SDXL_FAST_INVALID_ARGUMENT;
    }
    return with_dtype(dtype, [&](auto element) -> int32_t {
        using T = decltype(element);
        if (n == 0 || elements == 0) return SDXL_FAST_OK;
        const Schedule schedule{static_cast<const float*>(alphas_cumprod), timesteps, num_timesteps, pure_noise_at};
        const T* from = static_cast<const T*>(x0);
        T* to = static_cast<T*>(x_t);
        if (draws) {
            const Draw draw{seeds_or_null, static_cast<uint64_t>(draw_stream), n, c, h * w};
            return draw_and_mix(from, to, static_cast<T*>(noise_out_or_null), schedule, draw, layout == SDXL_FAST_NHWC,
                                stream);
        }
        constexpr int kVec = kVecWidth<T>;
        const T* noise = static_cast<const T*>(noise_in_or_null);
        const bool wide = elements % kVec == 0 && all_aligned(16, x0, x_t, noise);
        return launch(wide ? forward_diffusion_mix_kernel<T, kVec> : forward_diffusion_mix_kernel<T, 1>,
                      sample_grid(wide ? elements / kVec : elements, n), kThreads, stream, from, noise, to, schedule, n,
                      elements);
    });
}

int32_t sdxl_fast_forward_diffusion_bwd_cuda(const void* dx_t, const void* alphas_cumprod, const int64_t* timesteps,
                                             void* dx0, int64_t n, int64_t elements_per_sample, int64_t num_timesteps,
                                             int64_t pure_noise_at, int32_t dtype, void* stream) {
    using namespace sdxl_fast::cuda;
    const int64_t elements = elements_per_sample;
    if (n < 0 || elements < 0 || !grid_fits(elements)) return SDXL_FAST_INVALID_ARGUMENT;
    return with_dtype(dtype, [&](auto element) -> int32_t {
        using T = decltype(element);
        if (n == 0 || elements == 0) return SDXL_FAST_OK;
        const Schedule schedule{static_cast<const float*>(alphas_cumprod), timesteps, num_timesteps, pure_noise_at};
        constexpr int kVec = kVecWidth<T>;
        const bool wide = elements % kVec == 0 && all_aligned(16, dx_t, dx0);
        return launch(wide ? forward_diffusion_bwd_kernel<T, kVec> : forward_diffusion_bwd_kernel<T, 1>,
                      sample_grid(wide ? elements / kVec : elements, n), kThreads, stream, static_cast<const T*>(dx_t),
                      static_cast<T*>(dx0), schedule, n, elements);
    });
}

}  // extern "C"
