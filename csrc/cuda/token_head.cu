// SPDX-License-Identifier: Apache-2.0
//
// token_head: logit[l] = sum over channels of direction (residual + LeakyReLU(GroupNorm(hidden))) + offset.
//
// Formula    z = (hidden - mean) rstd w + b, a = z where z > 0, else 0.2 z. Backward with e = direction dlogit:
// dresidual
//            = e, dz = e or 0.2 e, dhidden as GroupNorm's from dz, ddirection = sum over tokens of dlogit (residual +
//            a), doffset = sum of dlogit.
// Grid       a block for every group of every sample, in both directions: 8 channels and 257 to 1370 tokens, which lie
// in
//            one piece. Forward: a thread a token; its share of every logit, which a second launch adds up over the
//            groups, in order. Backward: a warp a channel; a second launch, a thread a channel, adds up the samples'
//            shares of dw and db, in order.
// Registers  the running sums; the elements of a group are read again, from L1.
// Bytes      hidden and residual once from memory, and the shares, 4 bytes a group and token, written and read: at 8
//            channels of 16 bits an eighth of that. Backward the same two and both gradients.
// Wrong      for groups of many channels and tokens, which have few blocks.
#include "device.cuh"

namespace sdxl_fast {
namespace cuda {
namespace {

constexpr int kTokenWarps = 8;
constexpr int kTokenThreads = 32 * kTokenWarps;
constexpr int kTokenBlocks = 2;  // resident at once: left alone, ptxas makes room for five and spills
constexpr int kTokenMergeThreads = 128;
constexpr int kFactors = 64;  // channels whose factors lie in shared memory at a time
constexpr float kSlope = 0.2f;

struct TokenProblem {
    int64_t n, groups, group_channels, length;
    const void *weight, *bias, *direction, *offset;
    int32_t param_dtype;

    __host__ __device__ int64_t channels() const { return groups * group_channels; }
};

struct TokenGradients {
    const float *dlogits, *mean, *rstd;
    float* partials;  // [n, 2, c] or null
    void *dweight, *dbias, *ddirection, *doffset;
};

__device__ __forceinline__ float parameter(const TokenProblem& p, const void* of, int64_t index) {
    return load_param(of, p.param_dtype, index, 0.0f);
}

__device__ __forceinline__ float leaky(float z, float value) {
    return z > 0.0f ? value : kSlope * value;
}

// The sum over the block, for all of its threads, in one order.
__device__ __forceinline__ float block_sum(float value, float (&shared)[kTokenWarps]) {
    value = warp_sum(value);
    __syncthreads();  // whoever still reads the last one
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
    __syncthreads();
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kTokenWarps; ++w) sum += shared[w];
    return sum;
}

// mean and rstd of a group, and its share of the logit of every token.
template <class T>
__global__ void __launch_bounds__(kTokenThreads, kTokenBlocks)
    token_head_fwd_kernel(const T* __restrict__ hidden, const T* __restrict__ residual, TokenProblem p,
                          float* __restrict__ shares, float* __restrict__ mean_out, float* __restrict__ rstd_out,
                          float eps) {
    __shared__ float sums[kTokenWarps];
    __shared__ float scale[kFactors], bias[kFactors], direction[kFactors];
    const int64_t block = blockIdx.x, first = block % p.groups * p.group_channels;
    const int64_t elements = p.group_channels * p.length;
    hidden += block * elements;
    residual += block * elements;
    shares += block * p.length;
    const float count = static_cast<float>(elements);
    float sum = 0.0f;
    for (int64_t i = threadIdx.x; i < elements; i += kTokenThreads) sum += to_float(hidden[i]);
    float mean = block_sum(sum, sums) / count;
    float rest = 0.0f, squares = 0.0f;
    for (int64_t i = threadIdx.x; i < elements; i += kTokenThreads) {
        const float d = to_float(hidden[i]) - mean;
        rest += d;
        squares = fmaf(d, d, squares);
    }
    rest = block_sum(rest, sums) / count;  // what the rounding of the mean left over
    const float variance = fmaxf(block_sum(squares, sums) / count - rest * rest, 0.0f);
    const float rstd = 1.0f / sqrtf(variance + eps);
    mean += rest;
    if (threadIdx.x == 0) {
        mean_out[block] = mean;
        rstd_out[block] = rstd;
    }
    for (int64_t from = 0; from < p.group_channels; from += kFactors) {
        const int width = static_cast<int>(p.group_channels - from < kFactors ? p.group_channels - from : kFactors);
        __syncthreads();
        if (static_cast<int>(threadIdx.x) < width) {
            const int64_t channel = first + from + threadIdx.x;
            scale[threadIdx.x] = rstd * parameter(p, p.weight, channel);
            bias[threadIdx.x] = parameter(p, p.bias, channel);
            direction[threadIdx.x] = parameter(p, p.direction, block / p.groups * p.channels() + channel);
        }
        __syncthreads();
        for (int64_t l = threadIdx.x; l < p.length; l += kTokenThreads) {
            float share = from == 0 ? 0.0f : shares[l];
            const T* __restrict__ of_hidden = hidden + from * p.length + l;
            const T* __restrict__ of_residual = residual + from * p.length + l;
#pragma unroll 4
            for (int c = 0; c < width; ++c, of_hidden += p.length, of_residual += p.length) {
                const float z = fmaf(to_float(*of_hidden) - mean, scale[c], bias[c]);
                share = fmaf(direction[c], to_float(*of_residual) + leaky(z, z), share);
            }
            shares[l] = share;
        }
    }
}

// The sum over the groups, in order, and the offset.
__global__ void __launch_bounds__(kTokenMergeThreads)
    token_head_merge_kernel(const float* __restrict__ shares, TokenProblem p, float* __restrict__ logits) {
    const int64_t at = static_cast<int64_t>(blockIdx.x) * kTokenMergeThreads + threadIdx.x;
    if (at >= p.n * p.length) return;
    const int64_t sample = at / p.length, l = at % p.length;
    float logit = 0.0f;
    for (int64_t group = 0; group < p.groups; ++group) logit += shares[(sample * p.groups + group) * p.length + l];
    logits[at] = logit + parameter(p, p.offset, sample);
}

// A group's dhidden, dresidual and ddirection, its sums of dz xh and dz; the first group's block also has doffset.
template <class T>
__global__ void __launch_bounds__(kTokenThreads, kTokenBlocks)
    token_head_bwd_kernel(const T* __restrict__ hidden, const T* __restrict__ residual, T* __restrict__ dhidden,
                          T* __restrict__ dresidual, TokenProblem p, TokenGradients k) {
    __shared__ float sums[kTokenWarps];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t block = blockIdx.x, sample = block / p.groups, group = block % p.groups;
    const int64_t start = block * p.group_channels * p.length;
    const float mean = k.mean[block], rstd = k.rstd[block];
    const float* __restrict__ dlogits = k.dlogits + sample * p.length;
    float s1 = 0.0f, s2 = 0.0f;
    for (int64_t c = warp; c < p.group_channels; c += kTokenWarps) {
        const int64_t channel = group * p.group_channels + c, at = start + c * p.length;
        const float weight = parameter(p, p.weight, channel), bias = parameter(p, p.bias, channel);
        const float direction = parameter(p, p.direction, sample * p.channels() + channel);
        float dweight = 0.0f, dbias = 0.0f, ddirection = 0.0f;
        for (int64_t l = lane; l < p.length; l += 32) {
            const float xh = (to_float(hidden[at + l]) - mean) * rstd, z = fmaf(xh, weight, bias);
            const float dz = leaky(z, direction * dlogits[l]);
            dweight = fmaf(dz, xh, dweight);
            dbias += dz;
            if (k.ddirection != nullptr) {
                ddirection = fmaf(dlogits[l], to_float(residual[at + l]) + leaky(z, z), ddirection);
            }
        }
        dweight = warp_sum(dweight);
        dbias = warp_sum(dbias);
        ddirection = warp_sum(ddirection);
        s1 = fmaf(weight, dbias, s1);
        s2 = fmaf(weight, dweight, s2);
        if (lane != 0) continue;
        if (k.partials != nullptr) {
            k.partials[2 * sample * p.channels() + channel] = dweight;
            k.partials[(2 * sample + 1) * p.channels() + channel] = dbias;
        }
        if (k.ddirection != nullptr) {
            store_param(k.ddirection, p.param_dtype, sample * p.channels() + channel, ddirection);
        }
    }
    const float count = static_cast<float>(p.group_channels * p.length);
    s1 = block_sum(lane == 0 ? s1 : 0.0f, sums) / count;
    s2 = block_sum(lane == 0 ? s2 : 0.0f, sums) / count;
    if (k.doffset != nullptr && group == 0) {
        float doffset = 0.0f;
        for (int64_t l = threadIdx.x; l < p.length; l += kTokenThreads) doffset += dlogits[l];
        doffset = block_sum(doffset, sums);
        if (threadIdx.x == 0) store_param(k.doffset, p.param_dtype, sample, doffset);
    }
    if (dhidden == nullptr && dresidual == nullptr) return;
    for (int64_t c = warp; c < p.group_channels; c += kTokenWarps) {
        const int64_t channel = group * p.group_channels + c, at = start + c * p.length;
        const float weight = parameter(p, p.weight, channel), bias = parameter(p, p.bias, channel);
        const float direction = parameter(p, p.direction, sample * p.channels() + channel);
        for (int64_t l = lane; l < p.length; l += 32) {
            const float dtotal = direction * dlogits[l];
            if (dresidual != nullptr) dresidual[at + l] = from_float<T>(dtotal);
            if (dhidden == nullptr) continue;
            const float xh = (to_float(hidden[at + l]) - mean) * rstd;
            const float dz = leaky(fmaf(xh, weight, bias), dtotal);
            dhidden[at + l] = from_float<T>(rstd * (weight * dz - s1 - xh * s2));
        }
    }
}

__global__ void __launch_bounds__(kTokenMergeThreads) token_head_bwd_merge_kernel(TokenProblem p, TokenGradients k) {
    const int64_t channels = p.channels();
    const int64_t c = static_cast<int64_t>(blockIdx.x) * kTokenMergeThreads + threadIdx.x;
    if (c >= channels) return;
    float dweight = 0.0f, dbias = 0.0f;
    for (int64_t sample = 0; sample < p.n; ++sample) {
        dweight += k.partials[2 * sample * channels + c];
        dbias += k.partials[(2 * sample + 1) * channels + c];
    }
    if (k.dweight != nullptr) store_param(k.dweight, p.param_dtype, c, dweight);
    if (k.dbias != nullptr) store_param(k.dbias, p.param_dtype, c, dbias);
}

int32_t check(const TokenProblem& p, int64_t c, int32_t dtype) {
    const bool sizes = p.n >= 0 && c > 0 && p.length > 0 && p.groups > 0 && c % p.groups == 0;
    if (!sizes || p.n > INT32_MAX / p.groups || p.length > INT32_MAX) return SDXL_FAST_INVALID_ARGUMENT;
    return p.param_dtype == dtype || p.param_dtype == SDXL_FAST_F32 ? SDXL_FAST_OK : SDXL_FAST_UNSUPPORTED_DTYPE;
}

unsigned blocks_for(int64_t threads) {
    return static_cast<unsigned>(ceil_div(threads, kTokenMergeThreads));
}

}  // namespace
}  // namespace cuda
}  // namespace sdxl_fast

extern "C" {

int64_t sdxl_fast_token_head_workspace_cuda(int64_t n, int64_t c, int64_t length, int64_t groups, int32_t backward) {
    if (n <= 0 || c <= 0 || length <= 0 || groups <= 0) return 0;
    return n * (backward != 0 ? 2 * c : groups * length) * static_cast<int64_t>(sizeof(float));
}

int32_t sdxl_fast_token_head_fwd_cuda(const void* hidden, const void* residual, const void* weight, const void* bias,
                                      const void* direction, const void* offset, float* logits, float* mean,
                                      float* rstd, void* workspace, int64_t n, int64_t c, int64_t length,
                                      int64_t groups, double eps, int32_t dtype, int32_t param_dtype, void* stream) {
    using namespace sdxl_fast::cuda;
    return with_dtype(dtype, [&](auto element) -> int32_t {
        using T = decltype(element);
        const TokenProblem p{n,      groups,     groups > 0 ? c / groups : 0, length, weight, bias, direction,
                             offset, param_dtype};
        int32_t status = check(p, c, dtype);
        if (status != SDXL_FAST_OK || n == 0) return status;
        float* shares = static_cast<float*>(workspace);
        status = launch(token_head_fwd_kernel<T>, dim3(static_cast<unsigned>(n * groups)), kTokenThreads, stream,
                        static_cast<const T*>(hidden), static_cast<const T*>(residual), p, shares, mean, rstd,
                        static_cast<float>(eps));
        if (status != SDXL_FAST_OK) return status;
        return launch(token_head_merge_kernel, dim3(blocks_for(n * length)), kTokenMergeThreads, stream, shares, p,
                      logits);
    });
}

int32_t sdxl_fast_token_head_bwd_cuda(const void* hidden, const void* residual, const void* weight, const void* bias,
                                      const void* direction, const float* dlogits, const float* mean, const float* rstd,
                                      void* dhidden_or_null, void* dresidual_or_null, void* dweight_or_null,
                                      void* dbias_or_null, void* ddirection_or_null, void* doffset_or_null,
                                      void* workspace, int64_t n, int64_t c, int64_t length, int64_t groups,
                                      int32_t dtype, int32_t param_dtype, void* stream) {
    using namespace sdxl_fast::cuda;
    return with_dtype(dtype, [&](auto element) -> int32_t {
        using T = decltype(element);
        const TokenProblem p{n,       groups,     groups > 0 ? c / groups : 0, length, weight, bias, direction,
                             nullptr, param_dtype};
        int32_t status = check(p, c, dtype);
        if (status != SDXL_FAST_OK) return status;
        const bool norm = dweight_or_null != nullptr || dbias_or_null != nullptr;
        const TokenGradients k{dlogits,
                               mean,
                               rstd,
                               norm ? static_cast<float*>(workspace) : nullptr,
                               dweight_or_null,
                               dbias_or_null,
                               ddirection_or_null,
                               doffset_or_null};
        if (n > 0) {
            status = launch(token_head_bwd_kernel<T>, dim3(static_cast<unsigned>(n * groups)), kTokenThreads, stream,
                            static_cast<const T*>(hidden), static_cast<const T*>(residual),
                            static_cast<T*>(dhidden_or_null), static_cast<T*>(dresidual_or_null), p, k);
        }
        if (status != SDXL_FAST_OK || !norm) return status;
        // Of no samples the sums are zeros.
        return launch(token_head_bwd_merge_kernel, dim3(blocks_for(c)), kTokenMergeThreads, stream, p, k);
    });
}

}  // extern "C"
