// SPDX-License-Identifier: Apache-2.0
//
// layer_norm: y = (s - mean) rstd weight + bias over rows of `cols`, s = x + residual, rounded and returned.
//
// Formula    backward  dx = rstd (w dy - c1 - xhat c2) + dsum, with c1 and c2 the row's means of w dy and w dy xhat;
//            dweight = sum over rows of dy xhat, dbias of dy.
// Grid       forward: a warp per row, the row in registers. Backward: a block walks down the rows, a thread keeps its
//            vector of columns and the parameters' sums in registers; kRows rows share a reduction and a barrier.
//            Blocks leave partial sums, a second kernel adds them up in a fixed order. Rows too wide or too ragged for
//            these take a block per row that reads the row again from the cache.
// Registers  forward: ITEMS vectors of a row as floats. Backward: kRows vectors of dy and s as they are, two sums.
// Bytes      forward reads 1 and writes 1 element per element, 2 and 2 with a residual, y maybe float8; backward reads
// 2 (3) and writes
//            1, and two rows of floats per block for the parameters.
// Wrong      when a GEMM follows: there the row's statistics belong in that GEMM's epilogue.
#include "layer_norm_backward.cuh"
#include "layer_norm_device.cuh"

namespace sdxl_fast {
namespace cuda {
namespace {

constexpr int kRowWarps = 4;  // rows of a forward block

template <class T, class OUT>
struct LayerNormForward {
    const T *x, *residual;
    const void *weight, *bias;
    const float* scale;
    OUT* y;
    T* sum;
    float *mean, *rstd;
    int64_t rows, cols;
    float eps;
    int32_t param_dtype;
};

// Blocks an SM must hold: with more, 64 values a thread spill on sm_120.
constexpr int resident(int values) {
    return values > 40 ? 3 : 4;
}

// A warp per row. The last vectors of a row may be missing: their values are kept as 0 and not counted.
template <class T, class OUT, class P, int VEC, int ITEMS>
__global__ void __launch_bounds__(kRowWarps * 32, resident(ITEMS* VEC))
    layer_norm_fwd_kernel(LayerNormForward<T, OUT> p) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int64_t row = static_cast<int64_t>(blockIdx.x) * kRowWarps + threadIdx.x / 32;
    if (row >= p.rows) return;  // the whole warp
    const int64_t base = row * p.cols;
    float value[ITEMS * VEC];
    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < ITEMS; ++k) {
        const int64_t col = (static_cast<int64_t>(k) * 32 + lane) * VEC;
        const bool inside = col < p.cols;
        Vec<T, VEC> x{};
        if (inside) x = load<VEC>(p.x + base + col);
        if (p.residual != nullptr && inside) {
            const Vec<T, VEC> residual = load<VEC>(p.residual + base + col);
#pragma unroll
            for (int i = 0; i < VEC; ++i) x.at[i] = from_float<T>(to_float(x.at[i]) + to_float(residual.at[i]));
            store<VEC>(p.sum + base + col, x);
        }
#pragma unroll
        for (int i = 0; i < VEC; ++i) {
            value[k * VEC + i] = inside ? to_float(x.at[i]) : 0.0f;
            sum += value[k * VEC + i];
        }
    }
    const float mean = warp_sum(sum) / static_cast<float>(p.cols);
    float squares = 0.0f;
#pragma unroll
    for (int k = 0; k < ITEMS; ++k) {
        const bool inside = (static_cast<int64_t>(k) * 32 + lane) * VEC < p.cols;
#pragma unroll
        for (int i = 0; i < VEC; ++i) {
            value[k * VEC + i] -= mean;
            squares += inside ? value[k * VEC + i] * value[k * VEC + i] : 0.0f;
        }
    }
    const float rstd = rsqrtf(warp_sum(squares) / static_cast<float>(p.cols) + p.eps);
    if (lane == 0) {
        p.mean[row] = mean;
        p.rstd[row] = rstd;
    }
    const float reciprocal = reciprocal_of<OUT>(p.scale);
#pragma unroll
    for (int k = 0; k < ITEMS; ++k) {
        const int64_t col = (static_cast<int64_t>(k) * 32 + lane) * VEC;
        if (col >= p.cols) break;
        Vec<P, VEC> weight, bias;
        if (p.weight != nullptr) {
            weight = load<VEC>(static_cast<const P*>(p.weight) + col);
            bias = load<VEC>(static_cast<const P*>(p.bias) + col);
        }
        Vec<T, VEC> y;
#pragma unroll
        for (int i = 0; i < VEC; ++i) {
            const float xhat = value[k * VEC + i] * rstd;
            y.at[i] = from_float<T>(p.weight == nullptr ? xhat : xhat * to_float(weight.at[i]) + to_float(bias.at[i]));
        }
        store_result(p.y + base + col, y, reciprocal);
    }
}

// A block per row of any width and alignment.
template <class T, class OUT>
__global__ void __launch_bounds__(kWideThreads, 2) layer_norm_wide_fwd_kernel(LayerNormForward<T, OUT> p) {
    __shared__ float s_part[2][kWideThreads / 32];
    const float reciprocal = reciprocal_of<OUT>(p.scale);
    for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
        const int64_t base = row * p.cols;
        float part[2] = {0.0f, 0.0f};
        for (int64_t c = threadIdx.x; c < p.cols; c += kWideThreads) {
            T s = p.x[base + c];
            if (p.residual != nullptr) {
                s = from_float<T>(to_float(s) + to_float(p.residual[base + c]));
                p.sum[base + c] = s;
            }
            part[0] += to_float(s);
        }
        block_sums<1, kWideThreads / 32>(part, s_part);
        const float mean = part[0] / static_cast<float>(p.cols);
        const T* from = p.residual != nullptr ? p.sum : p.x;  // each thread reads what it wrote
        part[0] = part[1] = 0.0f;
        for (int64_t c = threadIdx.x; c < p.cols; c += kWideThreads) {
            const float d = to_float(from[base + c]) - mean;
            part[0] += d;
            part[1] += d * d;
        }
        block_sums<2, kWideThreads / 32>(part, s_part);
        // What the rounding of the mean of a very wide row left over.
        const float rest = part[0] / static_cast<float>(p.cols);
        const float variance = part[1] / static_cast<float>(p.cols) - rest * rest;
        const float center = mean + rest, rstd = rsqrtf(variance + p.eps);
        if (threadIdx.x == 0) {
            p.mean[row] = center;
            p.rstd[row] = rstd;
        }
        for (int64_t c = threadIdx.x; c < p.cols; c += kWideThreads) {
            const float xhat = (to_float(from[base + c]) - center) * rstd;
            const float weight = load_param(p.weight, p.param_dtype, c, 1.0f);
            const Vec<T, 1> y{{from_float<T>(xhat * weight + load_param(p.bias, p.param_dtype, c, 0.0f))}};
            store_result(p.y + base + c, y, reciprocal);
        }
    }
}

// Items by what SDXL's widths need at 16 bits and at 32: 640 and 768, 1280, 2048.
template <class T, class OUT, class P>
int32_t forward(const LayerNormForward<T, OUT>& p, void* stream) {
    constexpr int kVec = kVecWidth<T>, kShare = static_cast<int>(sizeof(T)) / 2;
    const bool wide = p.cols % kVec == 0 && all_aligned(16, p.x, p.residual, p.sum) &&
                      aligned(p.y, alignof(Vec<OUT, kVec>)) &&
                      all_aligned(kVec * static_cast<int64_t>(sizeof(P)), p.weight, p.bias);
    const int64_t items = ceil_div(p.cols, 32 * kVec);
    const int64_t blocks = ceil_div(p.rows, kRowWarps);
    if (!wide || items > 8 * kShare || blocks > 0x7fffffff) {
        const int64_t rows = p.rows < 0x7fffffff ? p.rows : 0x7fffffff;
        return launch(layer_norm_wide_fwd_kernel<T, OUT>, dim3(static_cast<unsigned>(rows)), kWideThreads, stream, p);
    }
    const dim3 grid(static_cast<unsigned>(blocks));
    if (items <= 3 * kShare)
        return launch(layer_norm_fwd_kernel<T, OUT, P, kVec, 3 * kShare>, grid, kRowWarps * 32, stream, p);
    if (items <= 5 * kShare)
        return launch(layer_norm_fwd_kernel<T, OUT, P, kVec, 5 * kShare>, grid, kRowWarps * 32, stream, p);
    return launch(layer_norm_fwd_kernel<T, OUT, P, kVec, 8 * kShare>, grid, kRowWarps * 32, stream, p);
}

// Of a call of either function; scale_y is null for a result of type T.
template <class T, class OUT, class P>
int32_t call_forward(const void* x, const void* residual, const void* weight, const void* bias, const float* scale_y,
                     void* y, void* sum, void* mean, void* rstd, int64_t rows, int64_t cols, double eps,
                     int32_t param_dtype, void* stream) {
    if (rows == 0 || cols == 0) return SDXL_FAST_OK;
    const LayerNormForward<T, OUT> p{static_cast<const T*>(x),
                                     static_cast<const T*>(residual),
                                     weight,
                                     bias,
                                     scale_y,
                                     static_cast<OUT*>(y),
                                     static_cast<T*>(sum),
                                     static_cast<float*>(mean),
                                     static_cast<float*>(rstd),
                                     rows,
                                     cols,
                                     static_cast<float>(eps),
                                     param_dtype};
    return forward<T, OUT, P>(p, stream);
}

bool forward_valid(const void* residual, const void* weight, const void* bias, const void* sum, int64_t rows,
                   int64_t cols, double eps) {
    return rows >= 0 && cols >= 0 && eps >= 0 && (weight == nullptr) == (bias == nullptr) &&
           (residual == nullptr) == (sum == nullptr);
}

// Calls f(T{}, P{}) for the elements' type and the parameters', which is the same or float.
template <class F>
int32_t with_dtypes(int32_t dtype, int32_t param_dtype, F f) {
    if (dtype != param_dtype && param_dtype != SDXL_FAST_F32) return SDXL_FAST_UNSUPPORTED_DTYPE;
    return with_dtype(dtype, [&](auto element) -> int32_t {
        if (dtype == param_dtype) return f(element, element);
        return f(element, float{});
    });
}

}  // namespace
}  // namespace cuda
}  // namespace sdxl_fast

extern "C" {

int64_t sdxl_fast_layer_norm_workspace_cuda(int64_t rows, int64_t cols) {
    return sdxl_fast::cuda::layer_norm_workspace(rows, cols);
}

int32_t sdxl_fast_layer_norm_fwd_cuda(const void* x, const void* residual_or_null, const void* weight_or_null,
                                      const void* bias_or_null, void* y, void* sum_or_null, void* mean, void* rstd,
                                      int64_t rows, int64_t cols, double eps, int32_t dtype, int32_t param_dtype,
                                      void* stream) {
    using namespace sdxl_fast::cuda;
    if (!forward_valid(residual_or_null, weight_or_null, bias_or_null, sum_or_null, rows, cols, eps))
        return SDXL_FAST_INVALID_ARGUMENT;
    return with_dtypes(dtype, param_dtype, [&](auto element, auto param) -> int32_t {
        using T = decltype(element);
        return call_forward<T, T, decltype(param)>(x, residual_or_null, weight_or_null, bias_or_null, nullptr, y,
                                                   sum_or_null, mean, rstd, rows, cols, eps, param_dtype, stream);
    });
}

int32_t sdxl_fast_layer_norm_e4m3_fwd_cuda(const void* x, const void* residual_or_null, const void* weight_or_null,
                                           const void* bias_or_null, const float* scale_y, void* y, void* sum_or_null,
                                           void* mean, void* rstd, int64_t rows, int64_t cols, double eps,
                                           int32_t dtype, int32_t param_dtype, void* stream) {
    using namespace sdxl_fast::cuda;
    if (!forward_valid(residual_or_null, weight_or_null, bias_or_null, sum_or_null, rows, cols, eps) ||
        scale_y == nullptr)
        return SDXL_FAST_INVALID_ARGUMENT;
    if (dtype != SDXL_FAST_BF16 || (param_dtype != SDXL_FAST_BF16 && param_dtype != SDXL_FAST_F32))
        return SDXL_FAST_UNSUPPORTED_DTYPE;
    return (param_dtype == SDXL_FAST_F32
                ? call_forward<bf16, sdxl_fast::E4M3, float>
                : call_forward<bf16, sdxl_fast::E4M3, bf16>)(x, residual_or_null, weight_or_null, bias_or_null, scale_y,
                                                             y, sum_or_null, mean, rstd, rows, cols, eps, param_dtype,
                                                             stream);
}

int32_t sdxl_fast_layer_norm_bwd_cuda(const void* dy, const void* dsum_or_null, const void* s,
                                      const void* weight_or_null, const void* mean, const void* rstd, void* dx_or_null,
                                      void* dweight_or_null, void* dbias_or_null, void* workspace, int64_t rows,
                                      int64_t cols, int32_t dtype, int32_t param_dtype, void* stream) {
    using namespace sdxl_fast::cuda;
    const bool parameters = dweight_or_null != nullptr || dbias_or_null != nullptr;
    if (rows < 0 || cols < 0 || (rows > 0 && cols > 0 && parameters && workspace == nullptr))
        return SDXL_FAST_INVALID_ARGUMENT;
    return with_dtypes(dtype, param_dtype, [&](auto element, auto param) -> int32_t {
        using T = decltype(element);
        if (cols == 0 || (dx_or_null == nullptr && !parameters)) return SDXL_FAST_OK;
        const LayerNormBackward<T> p{static_cast<const T*>(dy),
                                     static_cast<const T*>(dsum_or_null),
                                     static_cast<const T*>(s),
                                     weight_or_null,
                                     static_cast<const float*>(mean),
                                     static_cast<const float*>(rstd),
                                     static_cast<T*>(dx_or_null),
                                     parameters ? static_cast<float*>(workspace) : nullptr,
                                     rows,
                                     cols,
                                     param_dtype};
        return layer_norm_backward<T, decltype(param)>(p, dweight_or_null, dbias_or_null, stream);
    });
}

}  // extern "C"
