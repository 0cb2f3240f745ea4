// SPDX-License-Identifier: Apache-2.0
//
// The CPU functions of the C ABI for the norms and the head that begins with one: they check the arguments and call the
// kernels.
#include "common/skip.h"
#include "dispatch.h"
#include "group_norm_plan.h"
#include "layer_norm_plan.h"
#include "sdxl_fast.h"
#include "token_head_plan.h"

namespace sdxl_fast {
namespace {

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

int64_t sdxl_fast_group_norm_silu_workspace_cpu(int64_t n, int64_t c, int64_t hw, int64_t groups, int32_t layout,
                                                int32_t backward) {
    if (bad_shape(n, c, hw, groups, layout)) return 0;
    return group_norm_silu_workspace({n, c, hw, groups, layout == SDXL_FAST_NHWC}, backward != 0);
}

int32_t sdxl_fast_group_norm_silu_fwd_cpu(const void* x, const void* skip, const void* weight, const void* bias,
                                          const void* shift, void* y, void* mean, void* rstd, void* workspace,
                                          int64_t n, int64_t c, int64_t c_skip, int64_t hw, int64_t groups, double eps,
                                          int32_t layout, int32_t activation, int32_t dtype, int32_t param_dtype,
                                          int32_t num_threads) {
    if (!known_dtypes(dtype, param_dtype)) return SDXL_FAST_UNSUPPORTED_DTYPE;
    if (bad_shape(n, c, hw, groups, layout) || bad_skip(skip, c, c_skip, layout) || !is_flag(activation) ||
        !(eps >= 0) || (weight == nullptr) != (bias == nullptr)) {
        return SDXL_FAST_INVALID_ARGUMENT;
    }
    if (n == 0) return SDXL_FAST_OK;
    if (any_null({mean, rstd}) || (c != 0 && workspace == nullptr) || (c * hw != 0 && any_null({x, y}))) {
        return SDXL_FAST_INVALID_ARGUMENT;
    }
    kernels(dtype).group_norm_silu_fwd({x,
                                        skip,
                                        weight,
                                        bias,
                                        shift,
                                        y,
                                        mean,
                                        rstd,
                                        workspace,
                                        {n, c, hw, groups, layout == SDXL_FAST_NHWC, c_skip},
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

int64_t sdxl_fast_layer_norm_workspace_cpu(int64_t rows, int64_t cols) {
    if (rows <= 0 || cols <= 0) return 0;
    const int64_t size = layer_norm_chunk_rows(rows, cols), chunks = (rows + size - 1) / size;
    return chunks * 2 * layer_norm_padded(cols) * static_cast<int64_t>(sizeof(double));
}

int32_t sdxl_fast_layer_norm_fwd_cpu(const void* x, const void* residual, const void* weight, const void* bias, void* y,
                                     void* sum, void* mean, void* rstd, int64_t rows, int64_t cols, double eps,
                                     int32_t dtype, int32_t param_dtype, int32_t num_threads) {
    if (!known_dtypes(dtype, param_dtype)) return SDXL_FAST_UNSUPPORTED_DTYPE;
    if (any_negative({rows, cols}) || !(eps >= 0) || (weight == nullptr) != (bias == nullptr)) {
        return SDXL_FAST_INVALID_ARGUMENT;
    }
    if (rows == 0 || cols == 0) return SDXL_FAST_OK;
    if (any_null({x, y, mean, rstd}) || (residual == nullptr) != (sum == nullptr)) return SDXL_FAST_INVALID_ARGUMENT;
    kernels(dtype).layer_norm_fwd(
        {x, residual, weight, bias, y, sum, mean, rstd, rows, cols, eps, dtype, param_dtype, num_threads});
    return SDXL_FAST_OK;
}

int32_t sdxl_fast_layer_norm_bwd_cpu(const void* dy, const void* dsum, const void* s, const void* weight,
                                     const void* mean, const void* rstd, void* dx, void* dweight, void* dbias,
                                     void* workspace, int64_t rows, int64_t cols, int32_t dtype, int32_t param_dtype,
                                     int32_t num_threads) {
    if (!known_dtypes(dtype, param_dtype)) return SDXL_FAST_UNSUPPORTED_DTYPE;
    if (any_negative({rows, cols})) return SDXL_FAST_INVALID_ARGUMENT;
    if (cols == 0) return SDXL_FAST_OK;
    const bool parameters = dweight != nullptr || dbias != nullptr;
    if (rows != 0 && (any_null({dy, s, mean, rstd}) || (parameters && workspace == nullptr))) {
        return SDXL_FAST_INVALID_ARGUMENT;
    }
    kernels(dtype).layer_norm_bwd(
        {dy, dsum, s, weight, mean, rstd, dx, dweight, dbias, workspace, rows, cols, dtype, param_dtype, num_threads});
    return SDXL_FAST_OK;
}

int64_t sdxl_fast_token_head_workspace_cpu(int64_t n, int64_t c, int64_t length, int64_t groups, int32_t backward) {
    if (bad_shape(n, c, length, groups, SDXL_FAST_NCHW)) return 0;
    const int64_t numbers = backward != 0 ? 2 * n * c : n * groups * token_head_padded(length);
    return numbers * static_cast<int64_t>(sizeof(double));
}

int32_t sdxl_fast_token_head_fwd_cpu(const void* hidden, const void* residual, const void* weight, const void* bias,
                                     const void* direction, const void* offset, void* logits, void* mean, void* rstd,
                                     void* workspace, int64_t n, int64_t c, int64_t length, int64_t groups, double eps,
                                     int32_t dtype, int32_t param_dtype, int32_t num_threads) {
    if (!known_dtypes(dtype, param_dtype)) return SDXL_FAST_UNSUPPORTED_DTYPE;
    if (bad_shape(n, c, length, groups, SDXL_FAST_NCHW) || c == 0 || length == 0 || !(eps >= 0)) {
        return SDXL_FAST_INVALID_ARGUMENT;
    }
    if (n == 0) return SDXL_FAST_OK;
    if (any_null({hidden, residual, weight, bias, direction, offset, logits, mean, rstd, workspace})) {
        return SDXL_FAST_INVALID_ARGUMENT;
    }
    kernels(dtype).token_head_fwd({hidden, residual, weight, bias, direction, offset, logits, mean, rstd, workspace, n,
                                   c, length, groups, eps, dtype, param_dtype, num_threads});
    return SDXL_FAST_OK;
}

int32_t sdxl_fast_token_head_bwd_cpu(const void* hidden, const void* residual, const void* weight, const void* bias,
                                     const void* direction, const void* dlogits, const void* mean, const void* rstd,
                                     void* dhidden, void* dresidual, void* dweight, void* dbias, void* ddirection,
                                     void* doffset, void* workspace, int64_t n, int64_t c, int64_t length,
                                     int64_t groups, int32_t dtype, int32_t param_dtype, int32_t num_threads) {
    if (!known_dtypes(dtype, param_dtype)) return SDXL_FAST_UNSUPPORTED_DTYPE;
    if (bad_shape(n, c, length, groups, SDXL_FAST_NCHW) || c == 0 || length == 0) return SDXL_FAST_INVALID_ARGUMENT;
    if (n != 0 && any_null({hidden, residual, weight, bias, direction, dlogits, mean, rstd, workspace})) {
        return SDXL_FAST_INVALID_ARGUMENT;
    }
    kernels(dtype).token_head_bwd({hidden,  residual,  weight,  bias,  direction,   dlogits,    mean,      rstd,
                                   dhidden, dresidual, dweight, dbias, ddirection,  doffset,    workspace, n,
                                   c,       length,    groups,  dtype, param_dtype, num_threads});
    return SDXL_FAST_OK;
}

}  // extern "C"
