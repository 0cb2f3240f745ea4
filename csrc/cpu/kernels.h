// SPDX-License-Identifier: Apache-2.0
//
// What dispatch.cpp and the kernel files agree on: one table of functions per instruction set. The signatures are
// those of the C ABI, which dispatch.cpp has checked the arguments for.
#pragma once

#include <stdint.h>

#include "sdxl_fast.h"

namespace sdxl_fast {

struct GroupNormShape {
    int64_t n, c, hw, groups;
    bool nhwc;
    int64_t c_skip = 0;  // of the c channels, how many at their end lie in a tensor of their own
};

struct GroupNormForward {
    const void *x, *skip, *weight, *bias, *shift;
    void *y, *mean, *rstd, *workspace;
    GroupNormShape shape;
    double eps;
    bool silu;
    int32_t dtype, param_dtype, num_threads;
};

struct GroupNormBackward {
    const void *dy, *x, *weight, *bias, *shift, *mean, *rstd;
    void *dx, *dweight, *dbias, *dshift, *workspace;
    GroupNormShape shape;
    bool silu;
    int32_t dtype, param_dtype, num_threads;
};

struct GegluCall {
    const void *dy, *x;
    void* out;
    int64_t rows, cols;
    bool tanh;
    int32_t dtype, num_threads;
};

struct DiffusionForward {
    const void *x0, *alphas_cumprod;
    const int64_t *timesteps, *seeds;
    const void* noise_in;
    void *x_t, *noise_out;
    int64_t n, c, hw, num_timesteps, draw_stream, pure_noise_at;
    bool nhwc;
    int32_t dtype, num_threads;
};

struct DiffusionBackward {
    const void *dx_t, *alphas_cumprod;
    const int64_t* timesteps;
    void* dx0;
    int64_t n, elements, num_timesteps, pure_noise_at;
    int32_t dtype, num_threads;
};

struct MoveForward {
    const void *x_t, *model_output, *alphas_cumprod;
    const int64_t *timesteps, *next_timesteps, *renoise_timesteps, *seeds;
    void *x_next, *x_renoised;
    int64_t n, c, hw, num_timesteps, draw_stream;
    int32_t prediction;
    bool nhwc;
    int32_t dtype, output_dtype, num_threads;
};

struct MoveBackward {
    const void *dx_next, *dx_renoised, *alphas_cumprod;
    const int64_t *timesteps, *next_timesteps, *renoise_timesteps;
    void *dx_t, *dmodel_output;
    int64_t n, elements, num_timesteps;
    int32_t prediction, dtype, output_dtype, num_threads;
};

struct LayerNormForward {
    const void *x, *residual, *weight, *bias;
    void *y, *sum, *mean, *rstd;
    int64_t rows, cols;
    double eps;
    int32_t dtype, param_dtype, num_threads;
};

struct LayerNormBackward {
    const void *dy, *dsum, *s, *weight, *mean, *rstd;
    void *dx, *dweight, *dbias, *workspace;
    int64_t rows, cols;
    int32_t dtype, param_dtype, num_threads;
};

struct TokenHeadForward {
    const void *hidden, *residual, *weight, *bias, *direction, *offset;
    void *logits, *mean, *rstd, *workspace;
    int64_t n, c, length, groups;
    double eps;
    int32_t dtype, param_dtype, num_threads;
};

struct TokenHeadBackward {
    const void *hidden, *residual, *weight, *bias, *direction, *dlogits, *mean, *rstd;
    void *dhidden, *dresidual, *dweight, *dbias, *ddirection, *doffset, *workspace;
    int64_t n, c, length, groups;
    int32_t dtype, param_dtype, num_threads;
};

struct AttentionShape {
    int64_t n, s, t, h, d;
};

// [n, tokens, h, d] of any strides but the last, which is 1.
struct AttentionTokens {
    const void* data;
    int64_t sample, token, head;
};

struct AttentionForward {
    AttentionTokens q, k, v;
    void *out, *lse, *workspace;  // the last for streamed_attention alone
    AttentionShape shape;
    double scale;
    int32_t dtype, num_threads;
};

struct AttentionBackward {
    AttentionTokens dout, q, k, v;
    const void* lse;
    void *dq, *dk, *dv;
    AttentionShape shape;
    double scale;
    int32_t dtype, num_threads;
};

struct PackedConv2dShape {
    int64_t n, h, w, c_in, c_out, kernel, stride, padding;
};

struct PackedConv2dCall {
    const float *x, *weight, *zeros, *bias;
    float* y;
    PackedConv2dShape shape;
    int32_t num_threads;
};

// A 3x3 convolution of stride 1 and padding 1, with `upsample` of the map doubled.
struct WinogradShape {
    int64_t n, h, w, c_in, c_out;
    bool upsample;
};

struct WinogradCall {
    const float *x, *weight, *zeros, *bias;
    float* y;
    WinogradShape shape;
    int32_t num_threads;
};

struct ToUint8Call {
    const void* x;
    void* out;
    int64_t n, c, hw;
    bool nhwc;
    int32_t dtype, num_threads;
};

struct LoraMergeCall {
    const sdxl_fast_lora_module* modules;
    int64_t count;
    int32_t dtype, factor_dtype, num_threads;
};

// Declares the kernels compiled for one instruction set.
#define SDXL_FAST_DECLARE_KERNELS(isa)                                  \
    namespace isa {                                                     \
    void group_norm_silu_fwd(const GroupNormForward& call);             \
    void group_norm_silu_bwd(const GroupNormBackward& call);            \
    void geglu_fwd(const GegluCall& call);                              \
    void geglu_bwd(const GegluCall& call);                              \
    void forward_diffusion_fwd(const DiffusionForward& call);           \
    void forward_diffusion_bwd(const DiffusionBackward& call);          \
    void ddim_move_fwd(const MoveForward& call);                        \
    void ddim_move_bwd(const MoveBackward& call);                       \
    void layer_norm_fwd(const LayerNormForward& call);                  \
    void layer_norm_bwd(const LayerNormBackward& call);                 \
    void token_head_fwd(const TokenHeadForward& call);                  \
    void token_head_bwd(const TokenHeadBackward& call);                 \
    void attention_fwd(const AttentionForward& call);                   \
    void streamed_attention_fwd(const AttentionForward& call);          \
    int64_t streamed_attention_workspace(const AttentionForward& call); \
    void attention_bwd(const AttentionBackward& call);                  \
    void packed_conv2d_fwd(const PackedConv2dCall& call);               \
    void winograd_conv2d_fwd(const WinogradCall& call);                 \
    void to_uint8_fwd(const ToUint8Call& call);                         \
    void lora_merge_fwd(const LoraMergeCall& call);                     \
    }

SDXL_FAST_DECLARE_KERNELS(baseline)
SDXL_FAST_DECLARE_KERNELS(avx2)
SDXL_FAST_DECLARE_KERNELS(avx512)
SDXL_FAST_DECLARE_KERNELS(avx512_bf16)

// Bytes of scratch for group_norm_silu, enough for every dtype.
int64_t group_norm_silu_workspace(const GroupNormShape& shape, bool backward);

}  // namespace sdxl_fast
