// SPDX-License-Identifier: Apache-2.0
//
// ddim_move: x_next = alpha' x0 + sigma' epsilon, what x_t and the model's output say of x0 and epsilon, and x_next
// noised anew for the discriminator: x_renoised = sqrt(ab_r) x_next + sqrt(1 - ab_r) noise.
//
// Formula    both steps are linear: x_next = a x_t + b output with a and b of the sample's two levels. Backward:
//            dx_t = a g, doutput = b g with g = dx_next + sqrt(ab_r) dx_renoised. An input whose coefficient is 0 is
//            left out, so that the step from t to t is the identity whatever the model said.
// Grid       x: blocks of 256 threads over one sample, y: samples (strided). Without noise a thread owns 16 bytes of
//            x_t; with it the four elements of a Philox call, or in channels-last a 4 pixel by 4 channel square.
// Registers  the coefficients (computed by every thread: some fifty instructions on two cached loads), one vector of
//            each operand, words and normals of the calls.
// Bytes      reads 2 and writes 1 element per element, 2 with the noised copy; backward reads 1 (2) and writes 2.
// Wrong      nowhere known; wide ragged channels-last tensors are noised element by element.
//
// A timestep outside the schedule makes its sample NaN: reading it back to report it would synchronise.
#include "ddim_move_device.cuh"

namespace sdxl_fast {
namespace cuda {
namespace {

__device__ __forceinline__ float scaled_sum(const Move& move, float x, float output) {
    const float second = move.b == 0.0f ? 0.0f : move.b * output;
    return move.a == 0.0f ? second : move.a * x + second;
}

template <class T, class M, int VEC>
__global__ void __launch_bounds__(kThreads, 2)
    ddim_move_kernel(const T* __restrict__ x_t, const M* __restrict__ output, T* __restrict__ x_next, Route route,
                     int64_t n, int64_t elements) {
    const int64_t first = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * VEC;
    if (first >= elements) return;
    for (int64_t sample = blockIdx.y; sample < n; sample += gridDim.y) {
        const Move move = move_of(route, sample);
        const Vec<T, VEC> from = load<VEC>(x_t + sample * elements + first);
        const Vec<M, VEC> said = load<VEC>(output + sample * elements + first);
        Vec<T, VEC> to;
#pragma unroll
        for (int i = 0; i < VEC; ++i)
            to.at[i] = from_float<T>(scaled_sum(move, to_float(from.at[i]), to_float(said.at[i])));
        store<VEC>(x_next + sample * elements + first, to);
    }
}

template <class T, class M>
struct Tensors {
    const T* x_t;
    const M* output;
    T *x_next, *x_renoised;
};

// One element: x_next, rounded before it is noised, and x_renoised.
template <class T, class M>
__device__ __forceinline__ void move_and_noise(const Move& move, const Level& again, T x, M output, T noise, T& next,
                                               T& renoised) {
    next = from_float<T>(scaled_sum(move, to_float(x), to_float(output)));
    renoised = from_float<T>(again.signal * to_float(next) + again.sigma * to_float(noise));
}

// One call per thread. VECTOR: memory order is logical order and a group of four is one aligned access.
template <class T, class M, bool NHWC, bool VECTOR>
__global__ void __launch_bounds__(kThreads, 2) ddim_move_renoise_kernel(Tensors<T, M> tensors, Route route, Draw draw) {
    const int64_t elements = draw.channels * draw.hw;
    const int64_t first = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * 4;
    if (first >= elements) return;
    for (int64_t sample = blockIdx.y; sample < draw.n; sample += gridDim.y) {
        const Move move = move_of(route, sample);
        const Level again = level_at(route.alphas_cumprod, route.renoise_timesteps[sample], route.num_timesteps);
        const Vec<T, 4> eps = normals<T>(draw.seeds[sample], static_cast<uint64_t>(first) / 4, draw.stream);
        const int64_t base = sample * elements;
        if (VECTOR) {
            const Vec<T, 4> from = load<4>(tensors.x_t + base + first);
            const Vec<M, 4> said = load<4>(tensors.output + base + first);
            Vec<T, 4> next, renoised;
#pragma unroll
            for (int i = 0; i < 4; ++i)
                move_and_noise(move, again, from.at[i], said.at[i], eps.at[i], next.at[i], renoised.at[i]);
            store<4>(tensors.x_next + base + first, next);
            store<4>(tensors.x_renoised + base + first, renoised);
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int64_t e = first + i;
                if (e < elements) {
                    const int64_t at = base + (NHWC ? (e % draw.hw) * draw.channels + e / draw.hw : e);
                    T next, renoised;
                    move_and_noise(move, again, tensors.x_t[at], tensors.output[at], eps.at[i], next, renoised);
                    tensors.x_next[at] = next;
                    tensors.x_renoised[at] = renoised;
                }
            }
        }
    }
}

// Four calls per thread: channels c .. c + 3 of pixels p .. p + 3, channel quads running fastest over the threads.
template <class T, class M>
__global__ void __launch_bounds__(kThreads, 2)
    ddim_move_renoise_nhwc_kernel(Tensors<T, M> tensors, Route route, Draw draw) {
    const int64_t elements = draw.channels * draw.hw;
    const int64_t quads = draw.channels / 4;
    const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    const int64_t pixel = index / quads * 4, channel = index % quads * 4;
    if (pixel >= draw.hw) return;
    for (int64_t sample = blockIdx.y; sample < draw.n; sample += gridDim.y) {
        const Move move = move_of(route, sample);
        const Level again = level_at(route.alphas_cumprod, route.renoise_timesteps[sample], route.num_timesteps);
        Vec<T, 4> by_channel[4];
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            const int64_t element = (channel + c) * draw.hw + pixel;
            by_channel[c] = normals<T>(draw.seeds[sample], static_cast<uint64_t>(element) / 4, draw.stream);
        }
#pragma unroll
        for (int p = 0; p < 4; ++p) {
            const int64_t at = sample * elements + (pixel + p) * draw.channels + channel;
            const Vec<T, 4> from = load<4>(tensors.x_t + at);
            const Vec<M, 4> said = load<4>(tensors.output + at);
            Vec<T, 4> next, renoised;
#pragma unroll
            for (int c = 0; c < 4; ++c)
                move_and_noise(move, again, from.at[c], said.at[c], by_channel[c].at[p], next.at[c], renoised.at[c]);
            store<4>(tensors.x_next + at, next);
            store<4>(tensors.x_renoised + at, renoised);
        }
    }
}

template <class T, class M>
struct Gradients {
    const T *dx_next, *dx_renoised;  // one of them may be null
    T* dx_t;
    M* doutput;  // one of these may be null too
};

template <class T, class M, int VEC>
__global__ void __launch_bounds__(kThreads, 2)
    ddim_move_bwd_kernel(Gradients<T, M> gradients, Route route, int64_t n, int64_t elements) {
    const int64_t first = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * VEC;
    if (first >= elements) return;
    for (int64_t sample = blockIdx.y; sample < n; sample += gridDim.y) {
        const Move move = move_of(route, sample);
        const int64_t at = sample * elements + first;
        float sum[VEC] = {};
        if (gradients.dx_next != nullptr) {
            const Vec<T, VEC> direct = load<VEC>(gradients.dx_next + at);
#pragma unroll
            for (int i = 0; i < VEC; ++i) sum[i] = to_float(direct.at[i]);
        }
        if (gradients.dx_renoised != nullptr) {
            const Level again = level_at(route.alphas_cumprod, route.renoise_timesteps[sample], route.num_timesteps);
            const Vec<T, VEC> noised = load<VEC>(gradients.dx_renoised + at);
#pragma unroll
            for (int i = 0; i < VEC; ++i) sum[i] += again.signal * to_float(noised.at[i]);
        }
        if (gradients.dx_t != nullptr) {
            Vec<T, VEC> to;
#pragma unroll
            for (int i = 0; i < VEC; ++i) to.at[i] = from_float<T>(move.a == 0.0f ? 0.0f : move.a * sum[i]);
            store<VEC>(gradients.dx_t + at, to);
        }
        if (gradients.doutput != nullptr) {
            Vec<M, VEC> to;
#pragma unroll
            for (int i = 0; i < VEC; ++i) to.at[i] = from_float<M>(move.b == 0.0f ? 0.0f : move.b * sum[i]);
            store<VEC>(gradients.doutput + at, to);
        }
    }
}

template <class T, class M>
int32_t move_and_renoise(const Tensors<T, M>& t, const Route& route, const Draw& draw, bool nhwc, void* stream) {
    const int64_t elements = draw.channels * draw.hw;
    const dim3 grid = sample_grid(ceil_div(elements, 4), draw.n);
    const bool wide = all_aligned(4 * sizeof(T), t.x_t, t.x_next, t.x_renoised) && aligned(t.output, 4 * sizeof(M));
    if (nhwc && wide && draw.channels % 4 == 0 && draw.hw % 4 == 0)
        return launch(ddim_move_renoise_nhwc_kernel<T, M>, sample_grid(elements / 16, draw.n), kThreads, stream, t,
                      route, draw);
    if (nhwc) return launch(ddim_move_renoise_kernel<T, M, true, false>, grid, kThreads, stream, t, route, draw);
    if (wide && elements % 4 == 0)
        return launch(ddim_move_renoise_kernel<T, M, false, true>, grid, kThreads, stream, t, route, draw);
    return launch(ddim_move_renoise_kernel<T, M, false, false>, grid, kThreads, stream, t, route, draw);
}

bool known_prediction(int32_t prediction) {
    return prediction == SDXL_FAST_EPSILON || prediction == SDXL_FAST_SAMPLE || prediction == SDXL_FAST_V_PREDICTION;
}

// Calls f(T{}, M{}) for x_t's type and the model's, which is the same or a 16-bit one beside float.
template <class F>
int32_t with_dtypes(int32_t dtype, int32_t output_dtype, F f) {
    if (dtype == SDXL_FAST_F32 && output_dtype == SDXL_FAST_BF16) return f(float{}, bf16{});
    if (dtype == SDXL_FAST_F32 && output_dtype == SDXL_FAST_F16) return f(float{}, f16{});
    if (dtype != output_dtype) return SDXL_FAST_UNSUPPORTED_DTYPE;
    return with_dtype(dtype, [&](auto element) { return f(element, element); });
}

}  // namespace
}  // namespace cuda
}  // namespace sdxl_fast

extern "C" {

int32_t sdxl_fast_ddim_move_fwd_cuda(const void* x_t, const void* model_output, const void* alphas_cumprod,
                                     const int64_t* timesteps, const int64_t* next_timesteps,
                                     const int64_t* renoise_timesteps_or_null, const int64_t* seeds_or_null,
                                     void* x_next, void* x_renoised_or_null, int64_t n, int64_t c, int64_t h, int64_t w,
                                     int64_t num_timesteps, int64_t draw_stream, int32_t prediction_type,
                                     int32_t layout, int32_t dtype, int32_t output_dtype, void* stream) {
    using namespace sdxl_fast::cuda;
    const bool renoises = x_renoised_or_null != nullptr;
    const int64_t elements = c * h * w;
    if (n < 0 || c < 0 || h < 0 || w < 0 || (layout != SDXL_FAST_NHWC && layout != SDXL_FAST_NCHW) ||
        !known_prediction(prediction_type))
        return SDXL_FAST_INVALID_ARGUMENT;
    if (n != 0 && elements != 0) {
        const bool all_or_none =
            renoises == (seeds_or_null != nullptr) && renoises == (renoise_timesteps_or_null != nullptr);
        if (!all_or_none || !grid_fits(elements)) return SDXL_FAST_INVALID_ARGUMENT;
    }
    return with_dtypes(dtype, output_dtype, [&](auto element, auto output_element) -> int32_t {
        using T = decltype(element);
        using M = decltype(output_element);
        if (n == 0 || elements == 0) return SDXL_FAST_OK;
        const Route route{static_cast<const float*>(alphas_cumprod),
                          timesteps,
                          next_timesteps,
                          renoise_timesteps_or_null,
                          num_timesteps,
                          prediction_type};
        const Tensors<T, M> t{static_cast<const T*>(x_t), static_cast<const M*>(model_output), static_cast<T*>(x_next),
                              static_cast<T*>(x_renoised_or_null)};
        if (renoises) {
            const Draw draw{seeds_or_null, static_cast<uint64_t>(draw_stream), n, c, h * w};
            return move_and_renoise(t, route, draw, layout == SDXL_FAST_NHWC, stream);
        }
        constexpr int kVec = kVecWidth<T>;
        const bool wide = elements % kVec == 0 && all_aligned(16, x_t, x_next) && aligned(t.output, kVec * sizeof(M));
        return launch(wide ? ddim_move_kernel<T, M, kVec> : ddim_move_kernel<T, M, 1>,
                      sample_grid(wide ? elements / kVec : elements, n), kThreads, stream, t.x_t, t.output, t.x_next,
                      route, n, elements);
    });
}

int32_t sdxl_fast_ddim_move_bwd_cuda(const void* dx_next_or_null, const void* dx_renoised_or_null,
                                     const void* alphas_cumprod, const int64_t* timesteps,
                                     const int64_t* next_timesteps, const int64_t* renoise_timesteps_or_null,
                                     void* dx_t_or_null, void* dmodel_output_or_null, int64_t n,
                                     int64_t elements_per_sample, int64_t num_timesteps, int32_t prediction_type,
                                     int32_t dtype, int32_t output_dtype, void* stream) {
    using namespace sdxl_fast::cuda;
    const int64_t elements = elements_per_sample;
    if (n < 0 || elements < 0 || !grid_fits(elements) || !known_prediction(prediction_type))
        return SDXL_FAST_INVALID_ARGUMENT;
    const bool some = n != 0 && elements != 0;
    if (some && ((dx_next_or_null == nullptr && dx_renoised_or_null == nullptr) ||
                 (dx_renoised_or_null != nullptr && renoise_timesteps_or_null == nullptr)))
        return SDXL_FAST_INVALID_ARGUMENT;
    return with_dtypes(dtype, output_dtype, [&](auto element, auto output_element) -> int32_t {
        using T = decltype(element);
        using M = decltype(output_element);
        if (!some) return SDXL_FAST_OK;
        const Route route{static_cast<const float*>(alphas_cumprod),
                          timesteps,
                          next_timesteps,
                          renoise_timesteps_or_null,
                          num_timesteps,
                          prediction_type};
        const Gradients<T, M> gradients{static_cast<const T*>(dx_next_or_null),
                                        static_cast<const T*>(dx_renoised_or_null), static_cast<T*>(dx_t_or_null),
                                        static_cast<M*>(dmodel_output_or_null)};
        constexpr int kVec = kVecWidth<T>;
        const bool wide = elements % kVec == 0 && all_aligned(16, dx_next_or_null, dx_renoised_or_null, dx_t_or_null) &&
                          aligned(dmodel_output_or_null, kVec * sizeof(M));
        return launch(wide ? ddim_move_bwd_kernel<T, M, kVec> : ddim_move_bwd_kernel<T, M, 1>,
                      sample_grid(wide ? elements / kVec : elements, n), kThreads, stream, gradients, route, n,
                      elements);
    });
}

}  // extern "C"
