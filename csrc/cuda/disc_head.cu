// SPDX-License-Identifier: Apache-2.0
//
// disc_head: logit = mean over positions of projection . SiLU(GroupNorm(x)) + offset, and the loss of the logit.
//
// Formula    z = (x - mean) rstd w + b, pooled[c] = sum of SiLU(z) over the P positions / P, logit = projection .
// pooled
//            + offset. Backward with d = dlogit + dloss * slope of the loss: dy = d projection / P, then as
//            GroupNorm's; dprojection = sum over samples of d pooled, doffset = sum of d.
// Grid       a block a sample, in both directions, a warp a group: of the map that the convolutions leave (1280
// channels
//            of one position) a block holds all. A second small launch of the backward, a thread a channel, adds up the
//            samples' shares of the parameters' gradients, in order.
// Registers  the running sums of a group; its elements are read again, from L1.
// Bytes      x once from memory; backward x and dx. It is the launches that cost: one, backward two.
// Wrong      for large maps of few samples, whose blocks leave most of the GPU idle.
#include "../common/math.h"
#include "device.cuh"

namespace sdxl_fast {
namespace cuda {
namespace {

constexpr int kHeadWarps = 16;
constexpr int kHeadThreads = 32 * kHeadWarps;
constexpr int kMergeThreads = 128;

struct HeadProblem {
    int64_t n, groups, group_channels, positions;
    int64_t channel_step, position_step;  // of x, in elements
    const void *weight, *bias, *projection, *offset;
    int32_t param_dtype, loss;
    float sign;  // what the logit is to become

    __host__ __device__ int64_t channels() const { return groups * group_channels; }
};

struct HeadOutputs {
    float *logits, *losses, *pooled, *mean, *rstd;
};

struct HeadGradients {
    const float *mean, *rstd, *logits, *dlogits, *dlosses, *pooled;
    float *arrived, *partials;  // [n], and [n, 2, c] or null
    void *dweight, *dbias, *dprojection, *doffset;
};

__device__ __forceinline__ float parameter(const HeadProblem& p, const void* of, int64_t channel) {
    return load_param(of, p.param_dtype, channel, 0.0f);
}

// Calls body(offset of an element, its value) for a lane's share of the group whose channels begin at `first`.
template <class T, class Body>
__device__ __forceinline__ void for_each_element(const T* __restrict__ x, const HeadProblem& p, int64_t first,
                                                 Body body) {
    for (int64_t c = threadIdx.x % 32; c < p.group_channels; c += 32) {
        const int64_t row = (first + c) * p.channel_step;
        for (int64_t i = 0; i < p.positions; ++i) {
            const int64_t at = row + i * p.position_step;
            body(at, to_float(x[at]));
        }
    }
}

// log(1 + e^v), to its last bits also where e^v is small.
__device__ __forceinline__ float softplus(float v) {
    return fmaxf(v, 0.0f) + log1pf(expf(-fabsf(v)));
}

__device__ __forceinline__ float loss_of(const HeadProblem& p, float logit) {
    const float signed_logit = p.sign * logit;
    if (p.loss == SDXL_FAST_LOSS_NON_SATURATING) return softplus(-signed_logit);
    return p.loss == SDXL_FAST_LOSS_HINGE ? fmaxf(1.0f - signed_logit, 0.0f) : -signed_logit;
}

__device__ __forceinline__ float slope_of(const HeadProblem& p, float logit) {
    const float signed_logit = p.sign * logit;
    if (p.loss == SDXL_FAST_LOSS_NON_SATURATING) return -p.sign * sigmoid(-signed_logit);
    return p.loss == SDXL_FAST_LOSS_HINGE && signed_logit >= 1.0f ? 0.0f : -p.sign;
}

template <class T>
__global__ void __launch_bounds__(kHeadThreads)
    disc_head_fwd_kernel(const T* __restrict__ x, HeadProblem p, HeadOutputs out, float eps) {
    __shared__ float shares[kHeadWarps];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t sample = blockIdx.x;
    x += sample * p.channels() * p.positions;
    const float count = static_cast<float>(p.group_channels * p.positions);
    float share = 0.0f;
    for (int64_t group = warp; group < p.groups; group += kHeadWarps) {
        const int64_t first = group * p.group_channels;
        float sum = 0.0f, rest = 0.0f, squares = 0.0f;
        for_each_element(x, p, first, [&](int64_t, float value) { sum += value; });
        float mean = warp_sum(sum) / count;
        for_each_element(x, p, first, [&](int64_t, float value) {
            rest += value - mean;
            squares = fmaf(value - mean, value - mean, squares);
        });
        rest = warp_sum(rest) / count;  // what the rounding of the mean left over
        const float variance = fmaxf(warp_sum(squares) / count - rest * rest, 0.0f);
        const float rstd = 1.0f / sqrtf(variance + eps);
        mean += rest;
        for (int64_t c = first + lane; c < first + p.group_channels; c += 32) {
            const float scale = rstd * parameter(p, p.weight, c), bias = parameter(p, p.bias, c);
            float pooled = 0.0f;
            for (int64_t i = 0; i < p.positions; ++i) {
                pooled += silu(fmaf(to_float(x[c * p.channel_step + i * p.position_step]) - mean, scale, bias));
            }
            pooled /= static_cast<float>(p.positions);
            out.pooled[sample * p.channels() + c] = pooled;
            share = fmaf(pooled, parameter(p, p.projection, c), share);
        }
        if (lane == 0) {
            out.mean[sample * p.groups + group] = mean;
            out.rstd[sample * p.groups + group] = rstd;
        }
    }
    share = warp_sum(share);
    if (lane == 0) shares[warp] = share;
    __syncthreads();
    if (threadIdx.x == 0) {
        float logit = 0.0f;
        for (int w = 0; w < kHeadWarps; ++w) logit += shares[w];
        logit += parameter(p, p.offset, 0);
        out.logits[sample] = logit;
        out.losses[sample] = loss_of(p, logit);
    }
}

// dx of a sample, what arrived at its logit, and its sums of dz xh and dz.
template <class T>
__global__ void __launch_bounds__(kHeadThreads)
    disc_head_bwd_kernel(const T* __restrict__ x, T* __restrict__ dx, HeadProblem p, HeadGradients k) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t sample = blockIdx.x;
    x += sample * p.channels() * p.positions;
    float arrived = k.dlogits == nullptr ? 0.0f : k.dlogits[sample];
    if (k.dlosses != nullptr) arrived = fmaf(k.dlosses[sample], slope_of(p, k.logits[sample]), arrived);
    if (threadIdx.x == 0) k.arrived[sample] = arrived;
    const float count = static_cast<float>(p.group_channels * p.positions);
    const float per_position = arrived / static_cast<float>(p.positions);
    for (int64_t group = warp; group < p.groups; group += kHeadWarps) {
        const int64_t first = group * p.group_channels;
        const float mean = k.mean[sample * p.groups + group], rstd = k.rstd[sample * p.groups + group];
        float s1 = 0.0f, s2 = 0.0f;
        for (int64_t c = first + lane; c < first + p.group_channels; c += 32) {
            const float weight = parameter(p, p.weight, c), bias = parameter(p, p.bias, c);
            const float dy = per_position * parameter(p, p.projection, c);
            float dweight = 0.0f, dbias = 0.0f;
            for (int64_t i = 0; i < p.positions; ++i) {
                const float xh = (to_float(x[c * p.channel_step + i * p.position_step]) - mean) * rstd;
                const float dz = dy * silu_derivative(fmaf(xh, weight, bias));
                dweight = fmaf(dz, xh, dweight);
                dbias += dz;
            }
            if (k.partials != nullptr) {
                float* partials = k.partials + 2 * sample * p.channels() + c;
                partials[0] = dweight;
                partials[p.channels()] = dbias;
            }
            s1 = fmaf(weight, dbias, s1);
            s2 = fmaf(weight, dweight, s2);
        }
        s1 = warp_sum(s1) / count;
        s2 = warp_sum(s2) / count;
        if (dx == nullptr) continue;
        for (int64_t c = first + lane; c < first + p.group_channels; c += 32) {
            const float weight = parameter(p, p.weight, c), bias = parameter(p, p.bias, c);
            const float dy = per_position * parameter(p, p.projection, c);
            for (int64_t i = 0; i < p.positions; ++i) {
                const int64_t at = c * p.channel_step + i * p.position_step;
                const float xh = (to_float(x[at]) - mean) * rstd;
                const float dz = dy * silu_derivative(fmaf(xh, weight, bias));
                dx[sample * p.channels() * p.positions + at] = from_float<T>(rstd * (weight * dz - s1 - xh * s2));
            }
        }
    }
}

__global__ void __launch_bounds__(kMergeThreads) disc_head_bwd_merge_kernel(HeadProblem p, HeadGradients k) {
    const int64_t channels = p.channels();
    const int64_t c = static_cast<int64_t>(blockIdx.x) * kMergeThreads + threadIdx.x;
    if (c >= channels) return;
    float dweight = 0.0f, dbias = 0.0f, dprojection = 0.0f, doffset = 0.0f;
    for (int64_t sample = 0; sample < p.n; ++sample) {
        doffset += k.arrived[sample];
        if (k.partials != nullptr) {
            dweight += k.partials[2 * sample * channels + c];
            dbias += k.partials[(2 * sample + 1) * channels + c];
        }
        if (k.dprojection != nullptr) {
            dprojection = fmaf(k.arrived[sample], k.pooled[sample * channels + c], dprojection);
        }
    }
    if (k.dweight != nullptr) store_param(k.dweight, p.param_dtype, c, dweight);
    if (k.dbias != nullptr) store_param(k.dbias, p.param_dtype, c, dbias);
    if (k.dprojection != nullptr) store_param(k.dprojection, p.param_dtype, c, dprojection);
    if (k.doffset != nullptr && c == 0) store_param(k.doffset, p.param_dtype, 0, doffset);
}

int32_t problem_of(HeadProblem& p, int64_t n, int64_t c, int64_t hw, int64_t groups, int32_t loss, int32_t real,
                   int32_t layout, int32_t dtype) {
    const bool sizes = n >= 0 && n <= INT32_MAX && c > 0 && hw > 0 && groups > 0 && c % groups == 0;
    const bool codes = (layout == SDXL_FAST_NHWC || layout == SDXL_FAST_NCHW) &&
                       loss >= SDXL_FAST_LOSS_NON_SATURATING && loss <= SDXL_FAST_LOSS_LINEAR;
    if (!sizes || !codes) return SDXL_FAST_INVALID_ARGUMENT;
    if (p.param_dtype != dtype && p.param_dtype != SDXL_FAST_F32) return SDXL_FAST_UNSUPPORTED_DTYPE;
    p.n = n;
    p.groups = groups;
    p.group_channels = c / groups;
    p.positions = hw;
    p.channel_step = layout == SDXL_FAST_NHWC ? 1 : hw;
    p.position_step = layout == SDXL_FAST_NHWC ? c : 1;
    p.loss = loss;
    p.sign = real != 0 ? 1.0f : -1.0f;
    return SDXL_FAST_OK;
}

}  // namespace
}  // namespace cuda
}  // namespace sdxl_fast

extern "C" {

int64_t sdxl_fast_disc_head_workspace_cuda(int64_t n, int64_t c) {
    return n <= 0 || c <= 0 ? 0 : n * (2 * c + 1) * static_cast<int64_t>(sizeof(float));
}

int32_t sdxl_fast_disc_head_fwd_cuda(const void* x, const void* weight, const void* bias, const void* projection,
                                     const void* offset, float* logits, float* losses, float* pooled, float* mean,
                                     float* rstd, int64_t n, int64_t c, int64_t hw, int64_t groups, double eps,
                                     int32_t loss, int32_t real, int32_t layout, int32_t dtype, int32_t param_dtype,
                                     void* stream) {
    using namespace sdxl_fast::cuda;
    return with_dtype(dtype, [&](auto element) -> int32_t {
        using T = decltype(element);
        HeadProblem p{};
        p.weight = weight;
        p.bias = bias;
        p.projection = projection;
        p.offset = offset;
        p.param_dtype = param_dtype;
        const int32_t status = problem_of(p, n, c, hw, groups, loss, real, layout, dtype);
        if (status != SDXL_FAST_OK || n == 0) return status;
        return launch(disc_head_fwd_kernel<T>, dim3(static_cast<unsigned>(n)), kHeadThreads, stream,
                      static_cast<const T*>(x), p, HeadOutputs{logits, losses, pooled, mean, rstd},
                      static_cast<float>(eps));
    });
}

int32_t sdxl_fast_disc_head_bwd_cuda(const void* x, const void* weight, const void* bias, const void* projection,
                                     const float* dlogits_or_null, const float* dlosses_or_null, const float* logits,
                                     const float* pooled, const float* mean, const float* rstd, void* dx_or_null,
                                     void* dweight_or_null, void* dbias_or_null, void* dprojection_or_null,
                                     void* doffset_or_null, void* workspace, int64_t n, int64_t c, int64_t hw,
                                     int64_t groups, int32_t loss, int32_t real, int32_t layout, int32_t dtype,
                                     int32_t param_dtype, void* stream) {
    using namespace sdxl_fast::cuda;
    return with_dtype(dtype, [&](auto element) -> int32_t {
        using T = decltype(element);
        HeadProblem p{};
        p.weight = weight;
        p.bias = bias;
        p.projection = projection;
        p.param_dtype = param_dtype;
        int32_t status = problem_of(p, n, c, hw, groups, loss, real, layout, dtype);
        if (status != SDXL_FAST_OK) return status;
        float* arrived = static_cast<float*>(workspace);
        const bool norm = dweight_or_null != nullptr || dbias_or_null != nullptr;
        const HeadGradients k{mean,
                              rstd,
                              logits,
                              dlogits_or_null,
                              dlosses_or_null,
                              pooled,
                              arrived,
                              norm ? arrived + n : nullptr,
                              dweight_or_null,
                              dbias_or_null,
                              dprojection_or_null,
                              doffset_or_null};
        if (n > 0) {
            status = launch(disc_head_bwd_kernel<T>, dim3(static_cast<unsigned>(n)), kHeadThreads, stream,
                            static_cast<const T*>(x), static_cast<T*>(dx_or_null), p, k);
        }
        const bool parameters = norm || dprojection_or_null != nullptr || doffset_or_null != nullptr;
        if (status != SDXL_FAST_OK || !parameters) return status;
        // Of no samples the sums are zeros.
        return launch(disc_head_bwd_merge_kernel, dim3(static_cast<unsigned>(ceil_div(c, kMergeThreads))),
                      kMergeThreads, stream, p, k);
    });
}

}  // extern "C"
