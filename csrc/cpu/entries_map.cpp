// SPDX-License-Identifier: Apache-2.0
//
// The CPU functions of the C ABI for the ops without statistics: they check the arguments and call the kernels.
#include "dispatch.h"
#include "sdxl_fast.h"

namespace sdxl_fast {
namespace {

// The network's output has the dtype of x_t, or is a 16-bit one beside float32 (autocast).
bool known_output_dtype(int32_t dtype, int32_t output_dtype) {
    const bool narrower = dtype == SDXL_FAST_F32 && (output_dtype == SDXL_FAST_BF16 || output_dtype == SDXL_FAST_F16);
    return known_dtype(dtype) && (output_dtype == dtype || narrower);
}

bool known_prediction(int32_t prediction_type) {
    return prediction_type >= SDXL_FAST_EPSILON && prediction_type <= SDXL_FAST_V_PREDICTION;
}

}  // namespace
}  // namespace sdxl_fast

using namespace sdxl_fast;

extern "C" {

int32_t sdxl_fast_geglu_fwd_cpu(const void* x, void* y, int64_t rows, int64_t cols, int32_t approximate, int32_t dtype,
                                int32_t num_threads) {
    if (!known_dtype(dtype)) return SDXL_FAST_UNSUPPORTED_DTYPE;
    if (any_negative({rows, cols}) || !is_flag(approximate)) return SDXL_FAST_INVALID_ARGUMENT;
    if (rows == 0 || cols == 0) return SDXL_FAST_OK;
    if (any_null({x, y})) return SDXL_FAST_INVALID_ARGUMENT;
    kernels(dtype).geglu_fwd({nullptr, x, y, rows, cols, approximate == SDXL_FAST_GELU_TANH, dtype, num_threads});
    return SDXL_FAST_OK;
}

int32_t sdxl_fast_geglu_bwd_cpu(const void* dy, const void* x, void* dx, int64_t rows, int64_t cols,
                                int32_t approximate, int32_t dtype, int32_t num_threads) {
    if (!known_dtype(dtype)) return SDXL_FAST_UNSUPPORTED_DTYPE;
    if (any_negative({rows, cols}) || !is_flag(approximate)) return SDXL_FAST_INVALID_ARGUMENT;
    if (rows == 0 || cols == 0) return SDXL_FAST_OK;
    if (any_null({dy, x, dx})) return SDXL_FAST_INVALID_ARGUMENT;
    kernels(dtype).geglu_bwd({dy, x, dx, rows, cols, approximate == SDXL_FAST_GELU_TANH, dtype, num_threads});
    return SDXL_FAST_OK;
}

int32_t sdxl_fast_forward_diffusion_fwd_cpu(const void* x0, const void* alphas_cumprod, const int64_t* timesteps,
                                            const int64_t* seeds, const void* noise_in, void* x_t, void* noise_out,
                                            int64_t n, int64_t c, int64_t h, int64_t w, int64_t num_timesteps,
                                            int64_t draw_stream, int64_t pure_noise_at, int32_t layout, int32_t dtype,
                                            int32_t num_threads) {
    if (!known_dtype(dtype)) return SDXL_FAST_UNSUPPORTED_DTYPE;
    if (any_negative({n, c, h, w, num_timesteps}) || pure_noise_at < -1 || !is_flag(layout)) {
        return SDXL_FAST_INVALID_ARGUMENT;
    }
    if (n == 0 || c == 0 || h == 0 || w == 0) return SDXL_FAST_OK;
    const bool drawing = seeds != nullptr;
    if (drawing != (noise_in == nullptr) || drawing != (noise_out != nullptr) ||
        any_null({x0, alphas_cumprod, timesteps, x_t})) {
        return SDXL_FAST_INVALID_ARGUMENT;
    }
    kernels(dtype).forward_diffusion_fwd({x0, alphas_cumprod, timesteps, seeds, noise_in, x_t, noise_out, n, c, h * w,
                                          num_timesteps, draw_stream, pure_noise_at, layout == SDXL_FAST_NHWC, dtype,
                                          num_threads});
    return SDXL_FAST_OK;
}

int32_t sdxl_fast_forward_diffusion_bwd_cpu(const void* dx_t, const void* alphas_cumprod, const int64_t* timesteps,
                                            void* dx0, int64_t n, int64_t elements_per_sample, int64_t num_timesteps,
                                            int64_t pure_noise_at, int32_t dtype, int32_t num_threads) {
    if (!known_dtype(dtype)) return SDXL_FAST_UNSUPPORTED_DTYPE;
    if (any_negative({n, elements_per_sample, num_timesteps}) || pure_noise_at < -1) return SDXL_FAST_INVALID_ARGUMENT;
    if (n == 0 || elements_per_sample == 0) return SDXL_FAST_OK;
    if (any_null({dx_t, alphas_cumprod, timesteps, dx0})) return SDXL_FAST_INVALID_ARGUMENT;
    kernels(dtype).forward_diffusion_bwd({dx_t, alphas_cumprod, timesteps, dx0, n, elements_per_sample, num_timesteps,
                                          pure_noise_at, dtype, num_threads});
    return SDXL_FAST_OK;
}

int32_t sdxl_fast_ddim_move_fwd_cpu(const void* x_t, const void* model_output, const void* alphas_cumprod,
                                    const int64_t* timesteps, const int64_t* next_timesteps,
                                    const int64_t* renoise_timesteps, const int64_t* seeds, void* x_next,
                                    void* x_renoised, int64_t n, int64_t c, int64_t h, int64_t w, int64_t num_timesteps,
                                    int64_t draw_stream, int32_t prediction_type, int32_t layout, int32_t dtype,
                                    int32_t output_dtype, int32_t num_threads) {
    if (!known_output_dtype(dtype, output_dtype)) return SDXL_FAST_UNSUPPORTED_DTYPE;
    if (any_negative({n, c, h, w, num_timesteps}) || !known_prediction(prediction_type) || !is_flag(layout)) {
        return SDXL_FAST_INVALID_ARGUMENT;
    }
    if (n == 0 || c == 0 || h == 0 || w == 0) return SDXL_FAST_OK;
    const bool renoises = x_renoised != nullptr;
    if (renoises != (seeds != nullptr) || renoises != (renoise_timesteps != nullptr) ||
        any_null({x_t, model_output, alphas_cumprod, timesteps, next_timesteps, x_next})) {
        return SDXL_FAST_INVALID_ARGUMENT;
    }
    kernels(dtype).ddim_move_fwd({x_t, model_output, alphas_cumprod, timesteps, next_timesteps, renoise_timesteps,
                                  seeds, x_next, x_renoised, n, c, h * w, num_timesteps, draw_stream, prediction_type,
                                  layout == SDXL_FAST_NHWC, dtype, output_dtype, num_threads});
    return SDXL_FAST_OK;
}

int32_t sdxl_fast_ddim_move_bwd_cpu(const void* dx_next, const void* dx_renoised, const void* alphas_cumprod,
                                    const int64_t* timesteps, const int64_t* next_timesteps,
                                    const int64_t* renoise_timesteps, void* dx_t, void* dmodel_output, int64_t n,
                                    int64_t elements_per_sample, int64_t num_timesteps, int32_t prediction_type,
                                    int32_t dtype, int32_t output_dtype, int32_t num_threads) {
    if (!known_output_dtype(dtype, output_dtype)) return SDXL_FAST_UNSUPPORTED_DTYPE;
    if (any_negative({n, elements_per_sample, num_timesteps}) || !known_prediction(prediction_type)) {
        return SDXL_FAST_INVALID_ARGUMENT;
    }
    if (n == 0 || elements_per_sample == 0) return SDXL_FAST_OK;
    if ((dx_next == nullptr && dx_renoised == nullptr) || (dx_renoised != nullptr && renoise_timesteps == nullptr) ||
        any_null({alphas_cumprod, timesteps, next_timesteps})) {
        return SDXL_FAST_INVALID_ARGUMENT;
    }
    kernels(dtype).ddim_move_bwd({dx_next, dx_renoised, alphas_cumprod, timesteps, next_timesteps, renoise_timesteps,
                                  dx_t, dmodel_output, n, elements_per_sample, num_timesteps, prediction_type, dtype,
                                  output_dtype, num_threads});
    return SDXL_FAST_OK;
}

int32_t sdxl_fast_to_uint8_fwd_cpu(const void* x, void* out, int64_t n, int64_t c, int64_t hw, int32_t layout,
                                   int32_t dtype, int32_t num_threads) {
    if (!known_dtype(dtype)) return SDXL_FAST_UNSUPPORTED_DTYPE;
    if (any_negative({n, c, hw}) || !is_flag(layout)) return SDXL_FAST_INVALID_ARGUMENT;
    if (n == 0 || c == 0 || hw == 0) return SDXL_FAST_OK;
    if (any_null({x, out})) return SDXL_FAST_INVALID_ARGUMENT;
    kernels(dtype).to_uint8_fwd({x, out, n, c, hw, layout == SDXL_FAST_NHWC, dtype, num_threads});
    return SDXL_FAST_OK;
}

int32_t sdxl_fast_lora_merge_fwd_cpu(const sdxl_fast_lora_module* modules, int64_t count, int32_t dtype,
                                     int32_t factor_dtype, int32_t num_threads) {
    const bool exact = dtype == SDXL_FAST_F64, factors_exact = factor_dtype == SDXL_FAST_F64;
    if (!known_dtype(dtype) || !known_dtype(factor_dtype) || exact != factors_exact) {
        return SDXL_FAST_UNSUPPORTED_DTYPE;
    }
    if (count < 0 || (count > 0 && modules == nullptr)) return SDXL_FAST_INVALID_ARGUMENT;
    for (int64_t i = 0; i < count; ++i) {
        const sdxl_fast_lora_module& m = modules[i];
        if (any_negative({m.rows, m.cols, m.rank})) return SDXL_FAST_INVALID_ARGUMENT;
        if (m.rows == 0 || m.cols == 0) continue;
        if (any_null({m.weight, m.base}) || (m.rank > 0 && any_null({m.down, m.up}))) return SDXL_FAST_INVALID_ARGUMENT;
    }
    kernels(dtype).lora_merge_fwd({modules, count, dtype, factor_dtype, num_threads});
    return SDXL_FAST_OK;
}

}  // extern "C"
