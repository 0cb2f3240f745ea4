/* SPDX-License-Identifier: Apache-2.0
 *
 * The whole C ABI of libsdxl_fast. No Python, no torch: raw pointers, 64-bit sizes, plain integers.
 *
 * Contract of every sdxl_fast_<op>_<fwd|bwd>_<cpu|cuda> function
 *   - const pointers first, then written pointers, sizes, scalars, codes, and last `stream` (a cudaStream_t) or
 *     `num_threads` (how many threads may work on the call; the numbers never depend on it);
 *   - returns a status (below), never throws, allocates no device memory, never waits, may be captured in a graph;
 *   - "or null" pointers may be null, all others must be valid unless a size is zero; no alignment beyond that of the
 *     element type is required (but for the products below); outputs must not overlap inputs;
 *   - a workspace is uninitialised scratch of at least the bytes that its query names, aligned to 64;
 *   - a size of zero is fine: status 0, and every output that has elements is defined.
 *
 * Any change to a prototype or to the meaning of an argument bumps SDXL_FAST_ABI.
 */
#ifndef SDXL_FAST_H
#define SDXL_FAST_H

#include <stdint.h>

#define SDXL_FAST_ABI 12

#if defined(__GNUC__)
#define SDXL_FAST_API __attribute__((visibility("default")))
#else
#define SDXL_FAST_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Element types. */
enum { SDXL_FAST_F32 = 0, SDXL_FAST_F64 = 1, SDXL_FAST_BF16 = 2, SDXL_FAST_F16 = 3, SDXL_FAST_F8E4M3 = 4 };
/* Memory order of an N,C,H,W image: NHWC is PyTorch's channels_last, NCHW its contiguous. */
enum { SDXL_FAST_NHWC = 0, SDXL_FAST_NCHW = 1 };
enum { SDXL_FAST_ACT_NONE = 0, SDXL_FAST_ACT_SILU = 1 };
enum { SDXL_FAST_GELU_NONE = 0, SDXL_FAST_GELU_TANH = 1 };
/* Losses of a logit that is to become large (s = 1) or small (s = -1): softplus(-s logit), max(0, 1 - s logit),
 * -s logit. */
enum { SDXL_FAST_LOSS_NON_SATURATING = 0, SDXL_FAST_LOSS_HINGE = 1, SDXL_FAST_LOSS_LINEAR = 2 };
/* What a network predicts. */
enum { SDXL_FAST_EPSILON = 0, SDXL_FAST_SAMPLE = 1, SDXL_FAST_V_PREDICTION = 2 };

/* Status codes; SDXL_FAST_CUDA_ERROR + e carries the cudaError e. */
enum {
    SDXL_FAST_OK = 0,
    SDXL_FAST_INVALID_ARGUMENT = 1,
    SDXL_FAST_UNSUPPORTED_DTYPE = 2,
    SDXL_FAST_NO_CUDA = 3,
    SDXL_FAST_NOT_BUILT = 4,
    SDXL_FAST_CUDA_ERROR = 1000
};

/* ---- library ---- */

SDXL_FAST_API int32_t sdxl_fast_abi(void);
/* JSON object: version, compiler, cuda (version or null), cuda_archs, cutlass (version, or null without the matrix
 * kernels), isas (vector paths compiled in). */
SDXL_FAST_API const char* sdxl_fast_build_info(void);
/* Vector path in use: "baseline", "avx2", "avx512" or "avx512_bf16". */
SDXL_FAST_API const char* sdxl_fast_cpu_isa(void);
/* Forces a path (a test's tool; "auto" goes back to the best). SDXL_FAST_INVALID_ARGUMENT if this CPU or build lacks
 * it. */
SDXL_FAST_API int32_t sdxl_fast_set_cpu_isa(const char* name);
/* Where the threads of the C++ backend come from: "openmp" (the runtime already in the process) or "pool". */
SDXL_FAST_API const char* sdxl_fast_cpu_threading(void);
/* Text of a status; valid until the process ends. */
SDXL_FAST_API const char* sdxl_fast_status_text(int32_t status);

/* ---- group_norm_silu: y = act(GroupNorm(x + shift)) ----
 * x, y, dy, dx: n*c*hw elements of `dtype` in `layout`; shift, dshift: [n, c] of `dtype`; weight, bias (both or
 * neither), dweight, dbias: [c] of `param_dtype`; mean, rstd: [n, groups] of f32 (f64 for f64).
 * `param_dtype` is `dtype` or f32 (f64 with f64). mean is that of x + shift.
 * fwd: a skip holds the last c_skip of the c channels and x the others (NHWC, multiples of 16); else null and 0.
 * bwd: a null dx, dweight, dbias or dshift is not computed.
 * e4m3_fwd: x of bf16; y is that of fwd divided by scale_y, f32 of one element on the device, in e4m3 (a byte an
 * element), rounded to nearest even, at most 448 in magnitude. So in geglu and layer_norm. */

SDXL_FAST_API int64_t sdxl_fast_group_norm_silu_workspace_cpu(int64_t n, int64_t c, int64_t hw, int64_t groups,
                                                              int32_t layout, int32_t backward);
SDXL_FAST_API int64_t sdxl_fast_group_norm_silu_workspace_cuda(int64_t n, int64_t c, int64_t hw, int64_t groups,
                                                               int32_t layout, int32_t backward);
SDXL_FAST_API int32_t sdxl_fast_group_norm_silu_fwd_cpu(const void* x, const void* skip_or_null,
                                                        const void* weight_or_null, const void* bias_or_null,
                                                        const void* shift_or_null, void* y, void* mean, void* rstd,
                                                        void* workspace, int64_t n, int64_t c, int64_t c_skip,
                                                        int64_t hw, int64_t groups, double eps, int32_t layout,
                                                        int32_t activation, int32_t dtype, int32_t param_dtype,
                                                        int32_t num_threads);
SDXL_FAST_API int32_t sdxl_fast_group_norm_silu_fwd_cuda(const void* x, const void* skip_or_null,
                                                         const void* weight_or_null, const void* bias_or_null,
                                                         const void* shift_or_null, void* y, void* mean, void* rstd,
                                                         void* workspace, int64_t n, int64_t c, int64_t c_skip,
                                                         int64_t hw, int64_t groups, double eps, int32_t layout,
                                                         int32_t activation, int32_t dtype, int32_t param_dtype,
                                                         void* stream);
SDXL_FAST_API int32_t sdxl_fast_group_norm_silu_e4m3_fwd_cuda(const void* x, const void* skip_or_null,
                                                              const void* weight_or_null, const void* bias_or_null,
                                                              const void* shift_or_null, const float* scale_y, void* y,
                                                              void* mean, void* rstd, void* workspace, int64_t n,
                                                              int64_t c, int64_t c_skip, int64_t hw, int64_t groups,
                                                              double eps, int32_t layout, int32_t activation,
                                                              int32_t dtype, int32_t param_dtype, void* stream);

SDXL_FAST_API int32_t sdxl_fast_group_norm_silu_bwd_cpu(const void* dy, const void* x, const void* weight_or_null,
                                                        const void* bias_or_null, const void* shift_or_null,
                                                        const void* mean, const void* rstd, void* dx_or_null,
                                                        void* dweight_or_null, void* dbias_or_null,
                                                        void* dshift_or_null, void* workspace, int64_t n, int64_t c,
                                                        int64_t hw, int64_t groups, int32_t layout, int32_t activation,
                                                        int32_t dtype, int32_t param_dtype, int32_t num_threads);
SDXL_FAST_API int32_t sdxl_fast_group_norm_silu_bwd_cuda(const void* dy, const void* x, const void* weight_or_null,
                                                         const void* bias_or_null, const void* shift_or_null,
                                                         const void* mean, const void* rstd, void* dx_or_null,
                                                         void* dweight_or_null, void* dbias_or_null,
                                                         void* dshift_or_null, void* workspace, int64_t n, int64_t c,
                                                         int64_t hw, int64_t groups, int32_t layout, int32_t activation,
                                                         int32_t dtype, int32_t param_dtype, void* stream);

/* ---- geglu: y = value * GELU(gate) ----
 * x, dx: [rows, 2*cols], value = the first cols of a row, gate = the rest; y, dy: [rows, cols]. */

SDXL_FAST_API int32_t sdxl_fast_geglu_fwd_cpu(const void* x, void* y, int64_t rows, int64_t cols, int32_t approximate,
                                              int32_t dtype, int32_t num_threads);
SDXL_FAST_API int32_t sdxl_fast_geglu_fwd_cuda(const void* x, void* y, int64_t rows, int64_t cols, int32_t approximate,
                                               int32_t dtype, void* stream);
SDXL_FAST_API int32_t sdxl_fast_geglu_e4m3_fwd_cuda(const void* x, const float* scale_y, void* y, int64_t rows,
                                                    int64_t cols, int32_t approximate, int32_t dtype, void* stream);
SDXL_FAST_API int32_t sdxl_fast_geglu_bwd_cpu(const void* dy, const void* x, void* dx, int64_t rows, int64_t cols,
                                              int32_t approximate, int32_t dtype, int32_t num_threads);
SDXL_FAST_API int32_t sdxl_fast_geglu_bwd_cuda(const void* dy, const void* x, void* dx, int64_t rows, int64_t cols,
                                               int32_t approximate, int32_t dtype, void* stream);

/* ---- forward_diffusion: x_t = sqrt(ab_t) x0 + sqrt(1 - ab_t) noise, x_t = noise where t == pure_noise_at ----
 * x0, x_t, noise: [n, c, h, w] in `layout`; alphas_cumprod: [num_timesteps] of f32 (f64 with f64); timesteps: i64 [n];
 * pure_noise_at: a timestep, or -1 for none. Exactly one of seeds (i64 [n]) and noise_in is given; with seeds,
 * noise_out receives the drawn noise (rounded to `dtype`, and used so); with noise_in, noise_out must be null.
 * The draw: common/philox.h. A timestep outside [0, num_timesteps) makes that sample NaN. */

SDXL_FAST_API int32_t sdxl_fast_forward_diffusion_fwd_cpu(const void* x0, const void* alphas_cumprod,
                                                          const int64_t* timesteps, const int64_t* seeds_or_null,
                                                          const void* noise_in_or_null, void* x_t,
                                                          void* noise_out_or_null, int64_t n, int64_t c, int64_t h,
                                                          int64_t w, int64_t num_timesteps, int64_t draw_stream,
                                                          int64_t pure_noise_at, int32_t layout, int32_t dtype,
                                                          int32_t num_threads);
SDXL_FAST_API int32_t sdxl_fast_forward_diffusion_fwd_cuda(
    const void* x0, const void* alphas_cumprod, const int64_t* timesteps, const int64_t* seeds_or_null,
    const void* noise_in_or_null, void* x_t, void* noise_out_or_null, int64_t n, int64_t c, int64_t h, int64_t w,
    int64_t num_timesteps, int64_t draw_stream, int64_t pure_noise_at, int32_t layout, int32_t dtype, void* stream);

SDXL_FAST_API int32_t sdxl_fast_forward_diffusion_bwd_cpu(const void* dx_t, const void* alphas_cumprod,
                                                          const int64_t* timesteps, void* dx0, int64_t n,
                                                          int64_t elements_per_sample, int64_t num_timesteps,
                                                          int64_t pure_noise_at, int32_t dtype, int32_t num_threads);
SDXL_FAST_API int32_t sdxl_fast_forward_diffusion_bwd_cuda(const void* dx_t, const void* alphas_cumprod,
                                                           const int64_t* timesteps, void* dx0, int64_t n,
                                                           int64_t elements_per_sample, int64_t num_timesteps,
                                                           int64_t pure_noise_at, int32_t dtype, void* stream);

/* ---- ddim_move: the deterministic step from timesteps to next_timesteps, and the result noised anew ----
 * With the coefficients at the two levels, x_next = alpha' x0 + sigma' epsilon, x0 and epsilon being what model_output
 * (a `prediction_type`) and x_t say; x_renoised = sqrt(ab_r) x_next + sqrt(1 - ab_r) noise at renoise_timesteps, its
 * noise as forward_diffusion draws it. Timestep -1 is the clean latent (not for renoise_timesteps); a step from t to t
 * is the identity; a timestep outside the schedule makes that sample NaN.
 * x_t, x_next, x_renoised and their gradients: [n, c, h, w] of `dtype` in `layout`; model_output, dmodel_output: the
 * same of `output_dtype`, which is `dtype`, or bf16 or f16 with f32; alphas_cumprod: [num_timesteps] of f32 (f64 with
 * f64); the timesteps and seeds: i64 [n]. renoise_timesteps, seeds and x_renoised are all given or all null.
 * bwd: dx_next or dx_renoised (with its timesteps) may be null, not both; a null dx_t or dmodel_output is not computed.
 */

SDXL_FAST_API int32_t sdxl_fast_ddim_move_fwd_cpu(const void* x_t, const void* model_output, const void* alphas_cumprod,
                                                  const int64_t* timesteps, const int64_t* next_timesteps,
                                                  const int64_t* renoise_timesteps_or_null,
                                                  const int64_t* seeds_or_null, void* x_next, void* x_renoised_or_null,
                                                  int64_t n, int64_t c, int64_t h, int64_t w, int64_t num_timesteps,
                                                  int64_t draw_stream, int32_t prediction_type, int32_t layout,
                                                  int32_t dtype, int32_t output_dtype, int32_t num_threads);
SDXL_FAST_API int32_t sdxl_fast_ddim_move_fwd_cuda(
    const void* x_t, const void* model_output, const void* alphas_cumprod, const int64_t* timesteps,
    const int64_t* next_timesteps, const int64_t* renoise_timesteps_or_null, const int64_t* seeds_or_null, void* x_next,
    void* x_renoised_or_null, int64_t n, int64_t c, int64_t h, int64_t w, int64_t num_timesteps, int64_t draw_stream,
    int32_t prediction_type, int32_t layout, int32_t dtype, int32_t output_dtype, void* stream);

SDXL_FAST_API int32_t sdxl_fast_ddim_move_bwd_cpu(const void* dx_next_or_null, const void* dx_renoised_or_null,
                                                  const void* alphas_cumprod, const int64_t* timesteps,
                                                  const int64_t* next_timesteps,
                                                  const int64_t* renoise_timesteps_or_null, void* dx_t_or_null,
                                                  void* dmodel_output_or_null, int64_t n, int64_t elements_per_sample,
                                                  int64_t num_timesteps, int32_t prediction_type, int32_t dtype,
                                                  int32_t output_dtype, int32_t num_threads);
SDXL_FAST_API int32_t sdxl_fast_ddim_move_bwd_cuda(const void* dx_next_or_null, const void* dx_renoised_or_null,
                                                   const void* alphas_cumprod, const int64_t* timesteps,
                                                   const int64_t* next_timesteps,
                                                   const int64_t* renoise_timesteps_or_null, void* dx_t_or_null,
                                                   void* dmodel_output_or_null, int64_t n, int64_t elements_per_sample,
                                                   int64_t num_timesteps, int32_t prediction_type, int32_t dtype,
                                                   int32_t output_dtype, void* stream);

/* ---- layer_norm: y = LayerNorm(x [+ residual]) over rows of `cols` ----
 * x, residual, y, sum, dy, dsum, dx: [rows, cols] of `dtype`; weight, bias (both or neither), dweight, dbias: [cols] of
 * `param_dtype`; mean, rstd: [rows] of f32 (f64 for f64). `param_dtype` is `dtype` or f32 (f64 with f64).
 * sum = x + residual, rounded to `dtype` and normalised as rounded; it is given just when residual is.
 * bwd: s is sum, or x without a residual; dx is the gradient of s, and so of x and of residual, and takes in dsum (or
 * null). A null dx, dweight or dbias is not computed; the workspace may be null without the last two. */

SDXL_FAST_API int64_t sdxl_fast_layer_norm_workspace_cpu(int64_t rows, int64_t cols);
SDXL_FAST_API int64_t sdxl_fast_layer_norm_workspace_cuda(int64_t rows, int64_t cols);
SDXL_FAST_API int32_t sdxl_fast_layer_norm_fwd_cpu(const void* x, const void* residual_or_null,
                                                   const void* weight_or_null, const void* bias_or_null, void* y,
                                                   void* sum_or_null, void* mean, void* rstd, int64_t rows,
                                                   int64_t cols, double eps, int32_t dtype, int32_t param_dtype,
                                                   int32_t num_threads);
SDXL_FAST_API int32_t sdxl_fast_layer_norm_fwd_cuda(const void* x, const void* residual_or_null,
                                                    const void* weight_or_null, const void* bias_or_null, void* y,
                                                    void* sum_or_null, void* mean, void* rstd, int64_t rows,
                                                    int64_t cols, double eps, int32_t dtype, int32_t param_dtype,
                                                    void* stream);
SDXL_FAST_API int32_t sdxl_fast_layer_norm_e4m3_fwd_cuda(const void* x, const void* residual_or_null,
                                                         const void* weight_or_null, const void* bias_or_null,
                                                         const float* scale_y, void* y, void* sum_or_null, void* mean,
                                                         void* rstd, int64_t rows, int64_t cols, double eps,
                                                         int32_t dtype, int32_t param_dtype, void* stream);
SDXL_FAST_API int32_t sdxl_fast_layer_norm_bwd_cpu(const void* dy, const void* dsum_or_null, const void* s,
                                                   const void* weight_or_null, const void* mean, const void* rstd,
                                                   void* dx_or_null, void* dweight_or_null, void* dbias_or_null,
                                                   void* workspace, int64_t rows, int64_t cols, int32_t dtype,
                                                   int32_t param_dtype, int32_t num_threads);
SDXL_FAST_API int32_t sdxl_fast_layer_norm_bwd_cuda(const void* dy, const void* dsum_or_null, const void* s,
                                                    const void* weight_or_null, const void* mean, const void* rstd,
                                                    void* dx_or_null, void* dweight_or_null, void* dbias_or_null,
                                                    void* workspace, int64_t rows, int64_t cols, int32_t dtype,
                                                    int32_t param_dtype, void* stream);

/* ---- to_uint8: pictures in -1..1 to bytes ----
 * x: [n, c, h, w] of `dtype` in `layout`; out: uint8 [n, h, w, c]. round(255 clamp(x / 2 + 1/2, 0, 1)), ties to even,
 * each step rounded to f32 (f64 for f64); NaN gives 0. */

SDXL_FAST_API int32_t sdxl_fast_to_uint8_fwd_cpu(const void* x, void* out, int64_t n, int64_t c, int64_t hw,
                                                 int32_t layout, int32_t dtype, int32_t num_threads);
SDXL_FAST_API int32_t sdxl_fast_to_uint8_fwd_cuda(const void* x, void* out, int64_t n, int64_t c, int64_t hw,
                                                  int32_t layout, int32_t dtype, void* stream);

/* ---- lora_merge: weight = base + scale * up * down, for any number of modules ----
 * weight, base: [rows, cols] of `dtype`, dense; base may be the weight itself. up: [rows, rank], down: [rank, cols] of
 * `factor_dtype`: any of f32, bf16 and f16, f64 with f64 alone. Sums in f32 (f64), rounded once. No weight may overlap
 * another memory of the call but its own base. */

typedef struct {
    void* weight;
    const void *base, *down, *up;
    int64_t rows, cols, rank;
    int64_t first_tile; /* set by sdxl_fast_lora_merge_plan_cuda; means nothing to the CPU */
    double scale;
} sdxl_fast_lora_module;

SDXL_FAST_API int32_t sdxl_fast_lora_merge_fwd_cpu(const sdxl_fast_lora_module* modules, int64_t count, int32_t dtype,
                                                   int32_t factor_dtype, int32_t num_threads);
/* Sets every first_tile of `modules`, which lie in host memory, and returns the number of tiles, -1 for sizes no grid
 * can hold. The table then goes to the device, where the function below reads it. */
SDXL_FAST_API int64_t sdxl_fast_lora_merge_plan_cuda(sdxl_fast_lora_module* modules, int64_t count);
SDXL_FAST_API int32_t sdxl_fast_lora_merge_fwd_cuda(const sdxl_fast_lora_module* modules, int64_t count, int64_t tiles,
                                                    int32_t dtype, int32_t factor_dtype, void* stream);

/* ---- products: linear, linear_geglu, conv2d, upsample_conv2d ----
 * For sm_90a, built where CUTLASS's headers are; else SDXL_FAST_NOT_BUILT. x and weight of `dtype` bf16, or but in
 * upsample_conv2d of e4m3; then scale_x and scale_w are their factors, f32 of one element on the device, else null. The
 * others of bf16. All pointers but the scales are multiples of 16 bytes; c_in is a multiple of 8 (of 16 for e4m3),
 * c_out of 8. Sums in f32, rounded once. Their derivatives are products too, which the caller takes from a library.
 *
 * linear: y = x W^T + bias + residual; x: [rows, c_in], weight: [c_out, c_in]; bias: [c_out], residual and y:
 * [rows, c_out]. linear_geglu: y = value * GELU(gate), value = x V^T + a, gate = x G^T + b; weight: V above G,
 * [2 * c_out, c_in]; bias: a before b, [2 * c_out]; y: [rows, c_out], of e4m3 where there is a scale_y, as in geglu.
 * conv2d: stride 1; x: [n, h, w, c_in], weight: [c_out, k, k, c_in] with k = kernel_size 1 or 3, padding 0 or 1; y and
 * residual: [n, h + 2 padding - k + 1, w + 2 padding - k + 1, c_out]. upsample_conv2d: x twice as large by nearest
 * neighbours, convolved 3x3 with padding 1, as the transposed convolution of stride 2 with the kernel `phases`: [c_out,
 * 4, 4, c_in]; y: [n, 2h, 2w, c_out]. */

SDXL_FAST_API int32_t sdxl_fast_linear_fwd_cuda(const void* x, const void* weight, const void* bias_or_null,
                                                const void* residual_or_null, const float* scale_x_or_null,
                                                const float* scale_w_or_null, void* y, int64_t rows, int64_t c_in,
                                                int64_t c_out, int32_t dtype, void* stream);
SDXL_FAST_API int32_t sdxl_fast_linear_geglu_fwd_cuda(const void* x, const void* weight, const void* bias_or_null,
                                                      const float* scale_x_or_null, const float* scale_w_or_null,
                                                      const float* scale_y_or_null, void* y, int64_t rows, int64_t c_in,
                                                      int64_t c_out, int32_t approximate, int32_t dtype, void* stream);
SDXL_FAST_API int32_t sdxl_fast_conv2d_fwd_cuda(const void* x, const void* weight, const void* bias_or_null,
                                                const void* residual_or_null, const float* scale_x_or_null,
                                                const float* scale_w_or_null, void* y, int64_t n, int64_t c_in,
                                                int64_t h, int64_t w, int64_t c_out, int32_t kernel_size,
                                                int32_t padding, int32_t dtype, void* stream);
SDXL_FAST_API int32_t sdxl_fast_upsample_conv2d_fwd_cuda(const void* x, const void* phases, const void* bias_or_null,
                                                         void* y, int64_t n, int64_t c_in, int64_t h, int64_t w,
                                                         int64_t c_out, int32_t dtype, void* stream);

/* ---- disc_head: logit = mean over hw of projection . SiLU(GroupNorm(x)) + offset, and its loss ----
 * x, dx: n*c*hw elements of `dtype` in `layout`, hw at least 1; weight, bias, projection: [c], offset: [1] and their
 * gradients of `param_dtype`, which is `dtype` or f32; logits, losses, dlogits, dlosses: [n], pooled: [n, c], mean,
 * rstd: [n, groups], all of f32. `real`: whether the logit is to become large.
 * bwd: pooled, mean, rstd and logits are those of fwd; a null dx, dweight, dbias, dprojection or doffset is not
 * computed. */

SDXL_FAST_API int64_t sdxl_fast_disc_head_workspace_cuda(int64_t n, int64_t c);
SDXL_FAST_API int32_t sdxl_fast_disc_head_fwd_cuda(const void* x, const void* weight, const void* bias,
                                                   const void* projection, const void* offset, float* logits,
                                                   float* losses, float* pooled, float* mean, float* rstd, int64_t n,
                                                   int64_t c, int64_t hw, int64_t groups, double eps, int32_t loss,
                                                   int32_t real, int32_t layout, int32_t dtype, int32_t param_dtype,
                                                   void* stream);
SDXL_FAST_API int32_t sdxl_fast_disc_head_bwd_cuda(
    const void* x, const void* weight, const void* bias, const void* projection, const float* dlogits_or_null,
    const float* dlosses_or_null, const float* logits, const float* pooled, const float* mean, const float* rstd,
    void* dx_or_null, void* dweight_or_null, void* dbias_or_null, void* dprojection_or_null, void* doffset_or_null,
    void* workspace, int64_t n, int64_t c, int64_t hw, int64_t groups, int32_t loss, int32_t real, int32_t layout,
    int32_t dtype, int32_t param_dtype, void* stream);

/* ---- token_head: logit[l] = sum over c of direction (residual + LeakyReLU(GroupNorm(hidden))) + offset ----
 * hidden, residual, dhidden, dresidual: [n, c, length] of `dtype`, length at least 1; weight, bias: [c], direction:
 * [n, c], offset: [n] and their gradients of `param_dtype`, which is `dtype` or f32; logits, dlogits: [n, length],
 * mean, rstd: [n, groups], all of f32 (f64 for f64). The ReLU's slope: 0.2. bwd: mean and rstd are those of fwd; a null
 * gradient is not computed. */

SDXL_FAST_API int64_t sdxl_fast_token_head_workspace_cpu(int64_t n, int64_t c, int64_t length, int64_t groups,
                                                         int32_t backward);
SDXL_FAST_API int32_t sdxl_fast_token_head_fwd_cpu(const void* hidden, const void* residual, const void* weight,
                                                   const void* bias, const void* direction, const void* offset,
                                                   void* logits, void* mean, void* rstd, void* workspace, int64_t n,
                                                   int64_t c, int64_t length, int64_t groups, double eps, int32_t dtype,
                                                   int32_t param_dtype, int32_t num_threads);
SDXL_FAST_API int32_t sdxl_fast_token_head_bwd_cpu(const void* hidden, const void* residual, const void* weight,
                                                   const void* bias, const void* direction, const void* dlogits,
                                                   const void* mean, const void* rstd, void* dhidden_or_null,
                                                   void* dresidual_or_null, void* dweight_or_null, void* dbias_or_null,
                                                   void* ddirection_or_null, void* doffset_or_null, void* workspace,
                                                   int64_t n, int64_t c, int64_t length, int64_t groups, int32_t dtype,
                                                   int32_t param_dtype, int32_t num_threads);
SDXL_FAST_API int64_t sdxl_fast_token_head_workspace_cuda(int64_t n, int64_t c, int64_t length, int64_t groups,
                                                          int32_t backward);
SDXL_FAST_API int32_t sdxl_fast_token_head_fwd_cuda(const void* hidden, const void* residual, const void* weight,
                                                    const void* bias, const void* direction, const void* offset,
                                                    float* logits, float* mean, float* rstd, void* workspace, int64_t n,
                                                    int64_t c, int64_t length, int64_t groups, double eps,
                                                    int32_t dtype, int32_t param_dtype, void* stream);
SDXL_FAST_API int32_t sdxl_fast_token_head_bwd_cuda(const void* hidden, const void* residual, const void* weight,
                                                    const void* bias, const void* direction, const float* dlogits,
                                                    const float* mean, const float* rstd, void* dhidden_or_null,
                                                    void* dresidual_or_null, void* dweight_or_null, void* dbias_or_null,
                                                    void* ddirection_or_null, void* doffset_or_null, void* workspace,
                                                    int64_t n, int64_t c, int64_t length, int64_t groups, int32_t dtype,
                                                    int32_t param_dtype, void* stream);

/* ---- attention: out = softmax(scale q k^T) v per sample and head; self_attention, cross_attention, vae_attention ----
 * q, dout: [n, s, h, d], k, v: [n, t, h, d] of `dtype`, each with its strides in elements of samples, tokens and heads;
 * the channels of a head lie side by side. out, dq: [n, s, h, d], dk, dv: [n, t, h, d], contiguous. lse: [n, h, s] of
 * f32 (f64 for f64), the log-sum-exp of each query's scaled scores. 1 <= t <= 256, d <= 128, t d <= 16384, or the
 * status is SDXL_FAST_INVALID_ARGUMENT. bwd: a null gradient is not computed. */

SDXL_FAST_API int32_t sdxl_fast_attention_fwd_cpu(const void* q, const void* k, const void* v, void* out,
                                                  void* lse_or_null, int64_t n, int64_t s, int64_t t, int64_t h,
                                                  int64_t d, int64_t q_sample, int64_t q_token, int64_t q_head,
                                                  int64_t k_sample, int64_t k_token, int64_t k_head, int64_t v_sample,
                                                  int64_t v_token, int64_t v_head, double scale, int32_t dtype,
                                                  int32_t num_threads);
SDXL_FAST_API int32_t sdxl_fast_attention_bwd_cpu(const void* dout, const void* q, const void* k, const void* v,
                                                  const void* lse, void* dq_or_null, void* dk_or_null, void* dv_or_null,
                                                  int64_t n, int64_t s, int64_t t, int64_t h, int64_t d,
                                                  int64_t dout_sample, int64_t dout_token, int64_t dout_head,
                                                  int64_t q_sample, int64_t q_token, int64_t q_head, int64_t k_sample,
                                                  int64_t k_token, int64_t k_head, int64_t v_sample, int64_t v_token,
                                                  int64_t v_head, double scale, int32_t dtype, int32_t num_threads);

/* The forward for any number of keys, d <= 512, not of f64. workspace: as many bytes as its function says. */

SDXL_FAST_API int64_t sdxl_fast_streamed_attention_workspace_cpu(int64_t n, int64_t s, int64_t t, int64_t h, int64_t d,
                                                                 int32_t dtype);
SDXL_FAST_API int32_t sdxl_fast_streamed_attention_fwd_cpu(const void* q, const void* k, const void* v, void* out,
                                                           void* lse_or_null, void* workspace, int64_t n, int64_t s,
                                                           int64_t t, int64_t h, int64_t d, int64_t q_sample,
                                                           int64_t q_token, int64_t q_head, int64_t k_sample,
                                                           int64_t k_token, int64_t k_head, int64_t v_sample,
                                                           int64_t v_token, int64_t v_head, double scale, int32_t dtype,
                                                           int32_t num_threads);

/* ---- packed_conv2d: y = conv2d(x, weight) + bias, its weight in the order of the kernel; for small maps ----
 * x: [n, h, w, c_in], y: [n, p, q, c_out] in memory, bias: [c_out], all of f32. kernel is 1 or 3, stride 1 or 2,
 * padding 0 or 1. The weight: output channels padded to a multiple of 32, or 16 if that is enough, then cut to panels
 * of 32 (the last 16 or 32), each [kernel * kernel, c_in, channels of the panel], and behind the last c_in zeros. */

SDXL_FAST_API int32_t sdxl_fast_packed_conv2d_fwd_cpu(const float* x, const float* weight, const float* bias_or_null,
                                                      float* y, int64_t n, int64_t h, int64_t w, int64_t c_in,
                                                      int64_t c_out, int64_t kernel, int64_t stride, int64_t padding,
                                                      int32_t num_threads);

/* ---- winograd_conv2d: y = conv2d(x, weight, stride 1, padding 1) + bias by Winograd's F(2x2, 3x3) ----
 * x: [n, h, w, c_in], y: [n, h, w, c_out] in memory, bias: [c_out], all of f32; c_in is at most 512. The weight: of
 * every 3x3 kernel g the 4x4 of G g G^T, row by row in place of the 9 taps, cut to panels and followed by zeros as
 * above. With upsample, y: [n, 2 h, 2 w, c_out] is the convolution of the map doubled by nearest neighbours, and the
 * weight has rows and columns 0, 1 and 3 of each 4x4. An input that is not finite spoils two positions around it. */

SDXL_FAST_API int32_t sdxl_fast_winograd_conv2d_fwd_cpu(const float* x, const float* weight, const float* bias_or_null,
                                                        float* y, int64_t n, int64_t h, int64_t w, int64_t c_in,
                                                        int64_t c_out, int32_t upsample, int32_t num_threads);

#ifdef __cplusplus
}
#endif
#endif
