// SPDX-License-Identifier: Apache-2.0
//
// The CPU functions of the C ABI for attention and packed convolutions: they check the arguments and call the kernels.
#include "attention_plan.h"
#include "dispatch.h"
#include "packed_conv2d_plan.h"
#include "sdxl_fast.h"
#include "winograd_conv2d_plan.h"

namespace sdxl_fast {
namespace {

bool bad_shape(const AttentionShape& shape, double scale) {
    return any_negative({shape.n, shape.s, shape.h}) || shape.t < 1 || shape.d < 1 ||
           !attention_fits(shape.t, shape.d) || !(scale >= 0);
}

bool bad_streamed_shape(const AttentionShape& shape, double scale) {
    return any_negative({shape.n, shape.s, shape.h}) || shape.t < 1 || shape.d < 1 || shape.d > kStreamedChannels ||
           !(scale >= 0);
}

bool streams(int32_t dtype) {
    return known_dtype(dtype) && dtype != SDXL_FAST_F64;
}

bool bad_shape(const PackedConv2dShape& s) {
    if (any_negative({s.n, s.h, s.w}) || s.c_in < 1 || s.c_out < 1) return true;
    return (s.kernel != 1 && s.kernel != 3) || s.stride < 1 || s.stride > 2 || s.padding < 0 || s.padding > 1 ||
           s.h + 2 * s.padding < s.kernel || s.w + 2 * s.padding < s.kernel;
}

}  // namespace
}  // namespace sdxl_fast

using namespace sdxl_fast;

extern "C" {

int32_t sdxl_fast_attention_fwd_cpu(const void* q, const void* k, const void* v, void* out, void* lse, int64_t n,
                                    int64_t s, int64_t t, int64_t h, int64_t d, int64_t q_sample, int64_t q_token,
                                    int64_t q_head, int64_t k_sample, int64_t k_token, int64_t k_head, int64_t v_sample,
                                    int64_t v_token, int64_t v_head, double scale, int32_t dtype, int32_t num_threads) {
    if (!known_dtype(dtype)) return SDXL_FAST_UNSUPPORTED_DTYPE;
    const AttentionShape shape{n, s, t, h, d};
    if (bad_shape(shape, scale)) return SDXL_FAST_INVALID_ARGUMENT;
    if (n * s * h == 0) return SDXL_FAST_OK;
    if (any_null({q, k, v, out})) return SDXL_FAST_INVALID_ARGUMENT;
    kernels(dtype).attention_fwd({{q, q_sample, q_token, q_head},
                                  {k, k_sample, k_token, k_head},
                                  {v, v_sample, v_token, v_head},
                                  out,
                                  lse,
                                  nullptr,
                                  shape,
                                  scale,
                                  dtype,
                                  num_threads});
    return SDXL_FAST_OK;
}

int64_t sdxl_fast_streamed_attention_workspace_cpu(int64_t n, int64_t s, int64_t t, int64_t h, int64_t d,
                                                   int32_t dtype) {
    const AttentionShape shape{n, s, t, h, d};
    if (!streams(dtype) || bad_streamed_shape(shape, 1.0)) return 0;
    AttentionForward call{};
    call.shape = shape;
    call.dtype = dtype;
    return kernels(dtype).streamed_attention_workspace(call);
}

int32_t sdxl_fast_streamed_attention_fwd_cpu(const void* q, const void* k, const void* v, void* out, void* lse,
                                             void* workspace, int64_t n, int64_t s, int64_t t, int64_t h, int64_t d,
                                             int64_t q_sample, int64_t q_token, int64_t q_head, int64_t k_sample,
                                             int64_t k_token, int64_t k_head, int64_t v_sample, int64_t v_token,
                                             int64_t v_head, double scale, int32_t dtype, int32_t num_threads) {
    if (!streams(dtype)) return SDXL_FAST_UNSUPPORTED_DTYPE;
    const AttentionShape shape{n, s, t, h, d};
    if (bad_streamed_shape(shape, scale)) return SDXL_FAST_INVALID_ARGUMENT;
    if (n * s * h == 0) return SDXL_FAST_OK;
    if (any_null({q, k, v, out, workspace})) return SDXL_FAST_INVALID_ARGUMENT;
    kernels(dtype).streamed_attention_fwd({{q, q_sample, q_token, q_head},
                                           {k, k_sample, k_token, k_head},
                                           {v, v_sample, v_token, v_head},
                                           out,
                                           lse,
                                           workspace,
                                           shape,
                                           scale,
                                           dtype,
                                           num_threads});
    return SDXL_FAST_OK;
}

int32_t sdxl_fast_attention_bwd_cpu(const void* dout, const void* q, const void* k, const void* v, const void* lse,
                                    void* dq, void* dk, void* dv, int64_t n, int64_t s, int64_t t, int64_t h, int64_t d,
                                    int64_t dout_sample, int64_t dout_token, int64_t dout_head, int64_t q_sample,
                                    int64_t q_token, int64_t q_head, int64_t k_sample, int64_t k_token, int64_t k_head,
                                    int64_t v_sample, int64_t v_token, int64_t v_head, double scale, int32_t dtype,
                                    int32_t num_threads) {
    if (!known_dtype(dtype)) return SDXL_FAST_UNSUPPORTED_DTYPE;
    const AttentionShape shape{n, s, t, h, d};
    if (bad_shape(shape, scale)) return SDXL_FAST_INVALID_ARGUMENT;
    if (n * h == 0) return SDXL_FAST_OK;
    if (any_null({k, v}) || (s != 0 && any_null({dout, q, lse}))) return SDXL_FAST_INVALID_ARGUMENT;
    kernels(dtype).attention_bwd({{dout, dout_sample, dout_token, dout_head},
                                  {q, q_sample, q_token, q_head},
                                  {k, k_sample, k_token, k_head},
                                  {v, v_sample, v_token, v_head},
                                  lse,
                                  dq,
                                  dk,
                                  dv,
                                  shape,
                                  scale,
                                  dtype,
                                  num_threads});
    return SDXL_FAST_OK;
}

int32_t sdxl_fast_packed_conv2d_fwd_cpu(const float* x, const float* weight, const float* bias, float* y, int64_t n,
                                        int64_t h, int64_t w, int64_t c_in, int64_t c_out, int64_t kernel,
                                        int64_t stride, int64_t padding, int32_t num_threads) {
    const PackedConv2dShape shape{n, h, w, c_in, c_out, kernel, stride, padding};
    if (bad_shape(shape)) return SDXL_FAST_INVALID_ARGUMENT;
    if (n * h * w == 0) return SDXL_FAST_OK;
    if (any_null({x, weight, y})) return SDXL_FAST_INVALID_ARGUMENT;
    const float* const zeros = weight + plan_packed_conv2d(shape, 1).weight.end();
    kernels(SDXL_FAST_F32).packed_conv2d_fwd({x, weight, zeros, bias, y, shape, num_threads});
    return SDXL_FAST_OK;
}

int32_t sdxl_fast_winograd_conv2d_fwd_cpu(const float* x, const float* weight, const float* bias, float* y, int64_t n,
                                          int64_t h, int64_t w, int64_t c_in, int64_t c_out, int32_t upsample,
                                          int32_t num_threads) {
    const WinogradShape shape{n, h, w, c_in, c_out, upsample == 1};
    if (any_negative({n, h, w}) || c_in < 1 || c_in > kWinogradChannels || c_out < 1 || !is_flag(upsample)) {
        return SDXL_FAST_INVALID_ARGUMENT;
    }
    if (n * h * w == 0) return SDXL_FAST_OK;
    if (any_null({x, weight, y})) return SDXL_FAST_INVALID_ARGUMENT;
    const float* const zeros = weight + plan_winograd(shape).weight.end();
    kernels(SDXL_FAST_F32).winograd_conv2d_fwd({x, weight, zeros, bias, y, shape, num_threads});
    return SDXL_FAST_OK;
}

}  // extern "C"
