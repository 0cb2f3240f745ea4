// SPDX-License-Identifier: Apache-2.0
//
// The CPU half of the C ABI: checks the arguments and calls the kernels of the best instruction set this CPU has.
#include <atomic>
#include <cstring>
#include <initializer_list>

#include "group_norm_plan.h"
#include "isa.h"
#include "kernels.h"
#include "parallel.h"
#include "sdxl_fast.h"

namespace sdxl_fast {
namespace {

struct KernelTable {
    const char* name;
    bool (*supported)();
    void (*group_norm_silu_fwd)(const GroupNormForward&);
    void (*group_norm_silu_bwd)(const GroupNormBackward&);
    void (*geglu_fwd)(const GegluCall&);
    void (*geglu_bwd)(const GegluCall&);
    void (*forward_diffusion_fwd)(const DiffusionForward&);
    void (*forward_diffusion_bwd)(const DiffusionBackward&);
    void (*ddim_move_fwd)(const MoveForward&);
    void (*ddim_move_bwd)(const MoveBackward&);
};

#define SDXL_FAST_TABLE(isa, supported) \
    {#isa,                              \
     supported,                         \
     isa::group_norm_silu_fwd,          \
     isa::group_norm_silu_bwd,          \
     isa::geglu_fwd,                    \
     isa::geglu_bwd,                    \
     isa::forward_diffusion_fwd,        \
     isa::forward_diffusion_bwd,        \
     isa::ddim_move_fwd,                \
     isa::ddim_move_bwd}

// The baseline first, the best last.
constexpr KernelTable kTables[] = {
    SDXL_FAST_TABLE(baseline, [] { return true; }),
#if defined(SDXL_FAST_HAVE_AVX2)
    SDXL_FAST_TABLE(avx2, cpu_has_avx2),
#endif
#if defined(SDXL_FAST_HAVE_AVX512)
    SDXL_FAST_TABLE(avx512, cpu_has_avx512),
#endif
#if defined(SDXL_FAST_HAVE_AVX512_BF16)
    SDXL_FAST_TABLE(avx512_bf16, cpu_has_avx512_bf16),
#endif
};

const KernelTable* best_table() {
    const KernelTable* best = kTables;
    for (const KernelTable& table : kTables) {
        if (table.supported()) best = &table;
    }
    return best;
}

std::atomic<const KernelTable*> forced{nullptr};

const KernelTable& chosen_table() {
    static const KernelTable* const best = best_table();
    const KernelTable* const chosen = forced.load(std::memory_order_relaxed);
    return chosen != nullptr ? *chosen : *best;
}

// Only the baseline has the fp64 kernels (loops.h).
const KernelTable& kernels(int32_t dtype) {
    return dtype == SDXL_FAST_F64 ? kTables[0] : chosen_table();
}

bool any_negative(std::initializer_list<int64_t> sizes) {
    for (const int64_t size : sizes) {
        if (size < 0) return true;
    }
    return false;
}

bool any_null(std::initializer_list<const void*> pointers) {
    for (const void* pointer : pointers) {
        if (pointer == nullptr) return true;
    }
    return false;
}

bool is_flag(int32_t code) {
    return code == 0 || code == 1;
}

bool known_dtype(int32_t dtype) {
    return dtype >= SDXL_FAST_F32 && dtype <= SDXL_FAST_F16;
}

// Parameters have the dtype of x, or are float32 beside a smaller one.
bool known_dtypes(int32_t dtype, int32_t param_dtype) {
    return known_dtype(dtype) && (param_dtype == dtype || (param_dtype == SDXL_FAST_F32 && dtype != SDXL_FAST_F64));
}

// The network's output has the dtype of x_t, or is a 16-bit one beside float32 (autocast).
bool known_output_dtype(int32_t dtype, int32_t output_dtype) {
    const bool narrower = dtype == SDXL_FAST_F32 && (output_dtype == SDXL_FAST_BF16 || output_dtype == SDXL_FAST_F16);
    return known_dtype(dtype) && (output_dtype == dtype || narrower);
}

bool known_prediction(int32_t prediction_type) {
    return prediction_type >= SDXL_FAST_EPSILON && prediction_type <= SDXL_FAST_V_PREDICTION;
}

bool bad_shape(int64_t n, int64_t c, int64_t hw, int64_t groups, int32_t layout) {
    return any_negative({n, c, hw}) || groups <= 0 || c % groups != 0 || !is_flag(layout);
}

}  // namespace

int64_t group_norm_silu_workspace(const GroupNormShape& shape, bool backward) {
    if (shape.n <= 0 || shape.c <= 0) return 0;
    const GroupNormPlan plan = plan_group_norm(shape);
    const int64_t record = backward ? kBackwardRecord : kForwardRecord;
    const int64_t tables = backward ? kBackwardTables + kBackwardTotals : kForwardTables;
    return shape.n * plan.padded * (plan.chunks * record + tables) * static_cast<int64_t>(sizeof(double));
}

}  // namespace sdxl_fast

using namespace sdxl_fast;

extern "C" {

const char* sdxl_fast_cpu_isa(void) {
    return chosen_table().name;
}

int32_t sdxl_fast_set_cpu_isa(const char* name) {
    if (name == nullptr) return SDXL_FAST_INVALID_ARGUMENT;
    if (std::strcmp(name, "auto") == 0) {
        forced.store(nullptr);
        return SDXL_FAST_OK;
    }
    for (const KernelTable& table : kTables) {
        if (std::strcmp(name, table.name) == 0 && table.supported()) {
            forced.store(&table);
            return SDXL_FAST_OK;
        }
    }
    return SDXL_FAST_INVALID_ARGUMENT;
}

const char* sdxl_fast_cpu_threading(void) {
    return threading_name();
}

int64_t sdxl_fast_group_norm_silu_workspace_cpu(int64_t n, int64_t c, int64_t hw, int64_t groups, int32_t layout,
                                                int32_t backward) {
    if (bad_shape(n, c, hw, groups, layout)) return 0;
    return group_norm_silu_workspace({n, c, hw, groups, layout == SDXL_FAST_NHWC}, backward != 0);
}

int32_t sdxl_fast_group_norm_silu_fwd_cpu(const void* x, const void* weight, const void* bias, const void* shift,
                                          void* y, void* mean, void* rstd, void* workspace, int64_t n, int64_t c,
                                          int64_t hw, int64_t groups, double eps, int32_t layout, int32_t activation,
                                          int32_t dtype, int32_t param_dtype, int32_t num_threads) {
    if (!known_dtypes(dtype, param_dtype)) return SDXL_FAST_UNSUPPORTED_DTYPE;
    if (bad_shape(n, c, hw, groups, layout) || !is_flag(activation) || !(eps >= 0) ||
        (weight == nullptr) != (bias == nullptr)) {
        return SDXL_FAST_INVALID_ARGUMENT;
    }
    if (n == 0) return SDXL_FAST_OK;
    if (any_null({mean, rstd}) || (c != 0 && workspace == nullptr) || (c * hw != 0 && any_null({x, y}))) {
        return SDXL_FAST_INVALID_ARGUMENT;
    }
    kernels(dtype).group_norm_silu_fwd({x,
                                        weight,
                                        bias,
                                        shift,
                                        y,
                                        mean,
                                        rstd,
                                        workspace,
                                        {n, c, hw, groups, layout == SDXL_FAST_NHWC},
                                        eps,
                                        activation == SDXL_FAST_ACT_SILU,
                                        dtype,
                                        param_dtype,
                                        num_threads});
    return SDXL_FAST_OK;
}

int32_t sdxl_fast_group_norm_silu_bwd_cpu(const void* dy, const void* x, const void* weight, const void* bias,
                                          const void* shift, const void* mean, const void* rstd, void* dx,
                                          void* dweight, void* dbias, void* dshift, void* workspace, int64_t n,
                                          int64_t c, int64_t hw, int64_t groups, int32_t layout, int32_t activation,
                                          int32_t dtype, int32_t param_dtype, int32_t num_threads) {
    if (!known_dtypes(dtype, param_dtype)) return SDXL_FAST_UNSUPPORTED_DTYPE;
    if (bad_shape(n, c, hw, groups, layout) || !is_flag(activation) || (weight == nullptr) != (bias == nullptr)) {
        return SDXL_FAST_INVALID_ARGUMENT;
    }
    if (c == 0) return SDXL_FAST_OK;
    if (n != 0 && (any_null({mean, rstd, workspace}) || (hw != 0 && any_null({dy, x})))) {
        return SDXL_FAST_INVALID_ARGUMENT;
    }
    kernels(dtype).group_norm_silu_bwd({dy,
                                        x,
                                        weight,
                                        bias,
                                        shift,
                                        mean,
                                        rstd,
                                        dx,
                                        dweight,
                                        dbias,
                                        dshift,
                                        workspace,
                                        {n, c, hw, groups, layout == SDXL_FAST_NHWC},
                                        activation == SDXL_FAST_ACT_SILU,
                                        dtype,
                                        param_dtype,
                                        num_threads});
    return SDXL_FAST_OK;
}

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

}  // extern "C"
