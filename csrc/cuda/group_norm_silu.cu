// SPDX-License-Identifier: Apache-2.0
//
// group_norm_silu: y = act(GroupNorm(x + shift)), shift one value per (sample, channel), act none or SiLU.
//
// Formula    xh = (x + shift - mean) rstd,  z = xh w + b,  y = act(z).
//            Backward with dz = dy act'(z), M elements a group: S1 = sum(w dz) / M, S2 = sum(w dz xh) / M,
//            dx = rstd (w dz - S1 - xh S2),  db = sum(dz),  dw = sum(dz xh),
//            dshift = sum_hw dx = rstd (w sum(dz) - HW S1 - S2 sum(xh)), without another pass over the map.
// Grid       many blocks per group: a group of the 1024 px VAE has 8 M elements. x: chunks of hw times samples, y:
// tiles
//            of channels (NHWC) or groups (NCHW); group_norm_geometry.h says how they are chosen.
//            Forward, two launches: moments of every chunk; merge and apply.
//            Backward, three: sums of every chunk; one block per group for S1, S2, dw, db, dshift; dx.
// Registers  the factors of a thread's channels and its running moments or sums, VEC of each; 4 (backward 2 + 2)
// 16-byte
//            loads in flight.
// Bytes      forward 2 reads and 1 write (maybe of float8) per element, backward 4 and 1. The second read comes from
//            L2 where the map fits (all of SDXL's UNet on an H100, of its VAE decoder only the smallest); larger maps
//            are walked back to front the second time, which still finds the last L2-full of them there.
// Wrong      for tiny maps, where the launches cost more than the work.
//
// Deterministic: no atomics, partial results are merged in a fixed order.
#include <type_traits>

#include "../common/skip.h"
#include "group_norm_backward.cuh"
#include "group_norm_forward.cuh"

namespace sdxl_fast {
namespace cuda {
namespace {

struct GroupNormCall {
    int64_t n, c, hw, groups;
    int32_t layout, activation, dtype, param_dtype;
    const void *weight, *bias, *shift;
    void* stream;
    const void* skip = nullptr;  // of a forward
    int64_t c_skip = 0;

    bool nhwc() const { return layout == SDXL_FAST_NHWC; }
    bool empty() const { return n == 0 || c == 0 || hw == 0; }
    GroupNormCall with_skip(const void* other, int64_t channels) const {
        GroupNormCall both = *this;
        both.skip = other;
        both.c_skip = channels;
        return both;
    }
};

int32_t check(const GroupNormCall& call) {
    const bool sizes = call.n >= 0 && call.c >= 0 && call.hw >= 0 && call.groups > 0 && call.c % call.groups == 0;
    const bool codes = (call.layout == SDXL_FAST_NHWC || call.layout == SDXL_FAST_NCHW) &&
                       (call.activation == SDXL_FAST_ACT_NONE || call.activation == SDXL_FAST_ACT_SILU);
    const bool skipped = !bad_skip(call.skip, call.c, call.c_skip, call.layout);
    if (!sizes || !codes || !skipped || (call.weight == nullptr) != (call.bias == nullptr))
        return SDXL_FAST_INVALID_ARGUMENT;
    if (call.param_dtype != call.dtype && call.param_dtype != SDXL_FAST_F32) return SDXL_FAST_UNSUPPORTED_DTYPE;
    return SDXL_FAST_OK;
}

// Geometry and grid of a call; vec 16 bytes wide where shape and pointers allow it, else one element.
struct Plan {
    GroupNormProblem problem;
    int vec;
    dim3 grid;
    int32_t status;
};

Plan plan(const GroupNormCall& call, int widest, bool is_aligned) {
    Plan out{
        {call.n, call.c, call.hw, call.groups, {}, call.weight, call.bias, call.shift, call.dtype, call.param_dtype},
        1,
        dim3(1),
        SDXL_FAST_OK};
    out.problem.c_skip = call.c_skip;
    int multiprocessor_count = 0;
    out.status = multiprocessors(multiprocessor_count);
    if (out.status != SDXL_FAST_OK) return out;
    GroupNormGeometry& g = out.problem.g;
    if (is_aligned) {
        g = group_norm_geometry(call.n, call.c, call.hw, call.groups, call.nhwc(), widest, multiprocessor_count);
        if (g.ok) out.vec = widest;
    }
    if (!g.ok) g = group_norm_geometry(call.n, call.c, call.hw, call.groups, call.nhwc(), 1, multiprocessor_count);
    const int64_t x = call.n * (call.nhwc() ? g.chunks : g.tiles), y = call.nhwc() ? g.tiles : call.groups;
    if (x > 0x7fffffff || y > 65535 || g.chunks * g.entries > 0x7fffffff || g.group_channels * g.chunks > 0x7fffffff ||
        call.c > 0x7fffffff)
        out.status = SDXL_FAST_INVALID_ARGUMENT;
    out.grid = dim3(static_cast<unsigned>(x), static_cast<unsigned>(y));
    return out;
}

// Calls f(layout is NHWC, vector width) with both as compile-time constants.
template <class T, class F>
int32_t with_access(const GroupNormCall& call, const Plan& plan, F f) {
    using Nhwc = std::integral_constant<bool, true>;
    using Nchw = std::integral_constant<bool, false>;
    using Wide = std::integral_constant<int, kVecWidth<T>>;
    using One = std::integral_constant<int, 1>;
    if (call.nhwc()) return plan.vec == 1 ? f(Nhwc{}, One{}) : f(Nhwc{}, Wide{});
    return plan.vec == 1 ? f(Nchw{}, One{}) : f(Nchw{}, Wide{});
}

int32_t zero(void* pointer, int64_t bytes, void* stream) {
    if (pointer == nullptr || bytes == 0) return SDXL_FAST_OK;
    return status_of(cudaMemsetAsync(pointer, 0, bytes, static_cast<cudaStream_t>(stream)));
}

template <class OUT, class T>
int32_t forward(const GroupNormCall& call, const T* x, const float* scale_y, OUT* y, float* mean, float* rstd,
                void* workspace, float eps) {
    if (call.empty()) {
        const int64_t bytes = call.n * call.groups * static_cast<int64_t>(sizeof(float));
        const int32_t zeroed = zero(mean, bytes, call.stream);
        return zeroed == SDXL_FAST_OK ? zero(rstd, bytes, call.stream) : zeroed;
    }
    const bool is_aligned = all_aligned(16, x, call.skip) && aligned(y, alignof(Vec<OUT, kVecWidth<T>>));
    const Plan plan = cuda::plan(call, kVecWidth<T>, is_aligned);
    if (plan.status != SDXL_FAST_OK) return plan.status;
    const unsigned threads = static_cast<unsigned>(plan.problem.g.threads);
    const T* skip = static_cast<const T*>(call.skip);
    MeanM2* partials = static_cast<MeanM2*>(workspace);
    return with_access<T>(call, plan, [&](auto nhwc, auto vec) -> int32_t {
        constexpr bool kNhwc = decltype(nhwc)::value;
        constexpr int kVec = decltype(vec)::value;
        const int32_t status = launch(group_norm_silu_moments_kernel<T, kNhwc, kVec>, plan.grid, threads, call.stream,
                                      x, skip, partials, plan.problem);
        if (status != SDXL_FAST_OK) return status;
        const auto apply = [&](auto silu) {
            constexpr bool kSilu = decltype(silu)::value;
            return call.c_skip > 0 ? group_norm_silu_apply_kernel<T, OUT, kNhwc, kVec, kSilu, kNhwc>
                                   : group_norm_silu_apply_kernel<T, OUT, kNhwc, kVec, kSilu, false>;
        };
        return launch(call.activation == SDXL_FAST_ACT_SILU ? apply(std::true_type{}) : apply(std::false_type{}),
                      plan.grid, threads, call.stream, x, skip, partials, scale_y, y, mean, rstd, eps, plan.problem);
    });
}

FinalizeShape finalize_shape(const GroupNormCall& call) {
    FinalizeShape shape{1, 1};
    while (shape.width < 32 && shape.width < call.c / call.groups) shape.width *= 2;
    while (shape.samples < kFinalizeWarps && shape.samples * 2 <= call.n) shape.samples *= 2;
    return shape;
}

template <class T>
int32_t backward(const GroupNormCall& call, const T* dy, const T* x, T* dx, GroupNormGradients k, float* workspace) {
    const Plan plan = cuda::plan(call, kVecWidth<T>, all_aligned(16, dy, x, dx));
    if (plan.status != SDXL_FAST_OK) return plan.status;
    const unsigned threads = static_cast<unsigned>(plan.problem.g.threads);
    k.sums = workspace;
    k.group_sums = k.sums + 3 * call.n * plan.problem.g.chunks * call.c;
    k.totals = k.group_sums + 2 * call.n * call.groups;
    const bool silu = call.activation == SDXL_FAST_ACT_SILU;
    return with_access<T>(call, plan, [&](auto nhwc, auto vec) -> int32_t {
        constexpr bool kNhwc = decltype(nhwc)::value;
        constexpr int kVec = decltype(vec)::value;
        int32_t status = launch(silu ? group_norm_silu_bwd_sums_kernel<T, kNhwc, kVec, true>
                                     : group_norm_silu_bwd_sums_kernel<T, kNhwc, kVec, false>,
                                plan.grid, threads, call.stream, dy, x, k, plan.problem);
        if (status == SDXL_FAST_OK)
            status = launch(group_norm_silu_bwd_finalize_kernel, dim3(static_cast<unsigned>(call.groups)),
                            kFinalizeWarps * 32, call.stream, k, plan.problem, finalize_shape(call));
        if (status != SDXL_FAST_OK || dx == nullptr) return status;
        return launch(
            silu ? group_norm_silu_dx_kernel<T, kNhwc, kVec, true> : group_norm_silu_dx_kernel<T, kNhwc, kVec, false>,
            plan.grid, threads, call.stream, dy, x, dx, k, plan.problem);
    });
}

}  // namespace
}  // namespace cuda
}  // namespace sdxl_fast

extern "C" {

int64_t sdxl_fast_group_norm_silu_workspace_cuda(int64_t n, int64_t c, int64_t hw, int64_t groups, int32_t layout,
                                                 int32_t backward) {
    if (n <= 0 || c <= 0 || hw <= 0 || groups <= 0 || c % groups != 0) return 0;
    return sdxl_fast::cuda::group_norm_workspace(n, c, hw, groups, layout == SDXL_FAST_NHWC, backward != 0);
}

int32_t sdxl_fast_group_norm_silu_fwd_cuda(const void* x, const void* skip_or_null, const void* weight_or_null,
                                           const void* bias_or_null, const void* shift_or_null, void* y, void* mean,
                                           void* rstd, void* workspace, int64_t n, int64_t c, int64_t c_skip,
                                           int64_t hw, int64_t groups, double eps, int32_t layout, int32_t activation,
                                           int32_t dtype, int32_t param_dtype, void* stream) {
    using namespace sdxl_fast::cuda;
    const GroupNormCall one{
        n, c, hw, groups, layout, activation, dtype, param_dtype, weight_or_null, bias_or_null, shift_or_null, stream};
    const GroupNormCall call = one.with_skip(skip_or_null, c_skip);
    return with_dtype(dtype, [&](auto element) -> int32_t {
        using T = decltype(element);
        const int32_t status = check(call);
        if (status != SDXL_FAST_OK) return status;
        return forward<T>(call, static_cast<const T*>(x), nullptr, static_cast<T*>(y), static_cast<float*>(mean),
                          static_cast<float*>(rstd), workspace, static_cast<float>(eps));
    });
}

int32_t sdxl_fast_group_norm_silu_e4m3_fwd_cuda(const void* x, const void* skip_or_null, const void* weight_or_null,
                                                const void* bias_or_null, const void* shift_or_null,
                                                const float* scale_y, void* y, void* mean, void* rstd, void* workspace,
                                                int64_t n, int64_t c, int64_t c_skip, int64_t hw, int64_t groups,
                                                double eps, int32_t layout, int32_t activation, int32_t dtype,
                                                int32_t param_dtype, void* stream) {
    using namespace sdxl_fast::cuda;
    const GroupNormCall one{
        n, c, hw, groups, layout, activation, dtype, param_dtype, weight_or_null, bias_or_null, shift_or_null, stream};
    const GroupNormCall call = one.with_skip(skip_or_null, c_skip);
    const int32_t status = scale_y == nullptr ? SDXL_FAST_INVALID_ARGUMENT : check(call);
    if (status != SDXL_FAST_OK) return status;
    if (dtype != SDXL_FAST_BF16) return SDXL_FAST_UNSUPPORTED_DTYPE;
    return forward(call, static_cast<const bf16*>(x), scale_y, static_cast<sdxl_fast::E4M3*>(y),
                   static_cast<float*>(mean), static_cast<float*>(rstd), workspace, static_cast<float>(eps));
}

int32_t sdxl_fast_group_norm_silu_bwd_cuda(const void* dy, const void* x, const void* weight_or_null,
                                           const void* bias_or_null, const void* shift_or_null, const void* mean,
                                           const void* rstd, void* dx_or_null, void* dweight_or_null,
                                           void* dbias_or_null, void* dshift_or_null, void* workspace, int64_t n,
                                           int64_t c, int64_t hw, int64_t groups, int32_t layout, int32_t activation,
                                           int32_t dtype, int32_t param_dtype, void* stream) {
    using namespace sdxl_fast::cuda;
    const GroupNormCall call{
        n, c, hw, groups, layout, activation, dtype, param_dtype, weight_or_null, bias_or_null, shift_or_null, stream};
    return with_dtype(dtype, [&](auto element) -> int32_t {
        using T = decltype(element);
        int32_t status = check(call);
        if (status != SDXL_FAST_OK) return status;
        if (call.empty()) {
            const int64_t param_size = param_dtype == SDXL_FAST_F32 ? 4 : 2;
            status = zero(dweight_or_null, c * param_size, stream);
            if (status == SDXL_FAST_OK) status = zero(dbias_or_null, c * param_size, stream);
            if (status == SDXL_FAST_OK) status = zero(dshift_or_null, n * c * static_cast<int64_t>(sizeof(T)), stream);
            return status;
        }
        const GroupNormGradients gradients{static_cast<const float*>(mean),
                                           static_cast<const float*>(rstd),
                                           nullptr,
                                           nullptr,
                                           nullptr,
                                           dweight_or_null,
                                           dbias_or_null,
                                           dshift_or_null};
        return backward<T>(call, static_cast<const T*>(dy), static_cast<const T*>(x), static_cast<T*>(dx_or_null),
                           gradients, static_cast<float*>(workspace));
    });
}

}  // extern "C"
