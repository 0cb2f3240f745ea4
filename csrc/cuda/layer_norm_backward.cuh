// SPDX-License-Identifier: Apache-2.0
//
// The backward of layer_norm: dx with partial sums for the parameters, and their merging. See layer_norm.cu.
#pragma once

#include "layer_norm_device.cuh"

namespace sdxl_fast {
namespace cuda {
namespace {

constexpr int kRows = 4;  // rows of a block that share a reduction: 8 vectors in flight per thread
constexpr int kMostBackwardThreads = 512;
constexpr int kNarrowThreads = 160;  // 1280 columns of 16 bits
constexpr int kMostWarps = kMostBackwardThreads / 32;
// The workspace is sized for this many multiprocessors, so that its size does not depend on the current device.
constexpr int kLayerNormMaxMultiprocessors = 256;
constexpr int kMergeColumns = 32, kMergeLines = 8;

template <class T>
struct LayerNormBackward {
    const T *dy, *dsum, *s;
    const void* weight;
    const float *mean, *rstd;
    T* dx;
    float* partials;  // [blocks][2][cols]: sums of dy xhat and of dy; null when no parameter gradient is wanted
    int64_t rows, cols;
    int32_t param_dtype;
};

// A thread owns VEC columns; rows go by in groups of kRows, gridDim.x groups apart.
template <class T, class P, int VEC>
__global__ void __launch_bounds__(kMostBackwardThreads, 1) layer_norm_bwd_kernel(LayerNormBackward<T> p) {
    __shared__ float s_part[2 * kRows][kMostWarps];
    const int64_t col = static_cast<int64_t>(threadIdx.x) * VEC;
    const bool inside = col < p.cols;
    const float inverse_cols = 1.0f / static_cast<float>(p.cols);
    float weight[VEC], dweight[VEC] = {}, dbias[VEC] = {};
    if (inside && p.weight != nullptr) {
        const Vec<P, VEC> w = load<VEC>(static_cast<const P*>(p.weight) + col);
#pragma unroll
        for (int i = 0; i < VEC; ++i) weight[i] = to_float(w.at[i]);
    } else {
#pragma unroll
        for (int i = 0; i < VEC; ++i) weight[i] = 1.0f;
    }
    for (int64_t first = static_cast<int64_t>(blockIdx.x) * kRows; first < p.rows;
         first += static_cast<int64_t>(gridDim.x) * kRows) {
        Vec<T, VEC> dy[kRows], s[kRows];
        float mean[kRows], rstd[kRows], sums[2 * kRows] = {};
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            if (inside && first + r < p.rows) {
                dy[r] = load<VEC>(p.dy + (first + r) * p.cols + col);
                s[r] = load<VEC>(p.s + (first + r) * p.cols + col);
                mean[r] = p.mean[first + r];
                rstd[r] = p.rstd[first + r];
            }
        }
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            if (inside && first + r < p.rows) {
#pragma unroll
                for (int i = 0; i < VEC; ++i) {
                    const float g = to_float(dy[r].at[i]), xhat = (to_float(s[r].at[i]) - mean[r]) * rstd[r];
                    sums[2 * r] += weight[i] * g;
                    sums[2 * r + 1] += weight[i] * g * xhat;
                    dweight[i] += g * xhat;
                    dbias[i] += g;
                }
            }
        }
        if (p.dx == nullptr) continue;  // for all threads of all blocks
        block_sums<2 * kRows, kMostWarps>(sums, s_part);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            if (inside && first + r < p.rows) {
                const int64_t at = (first + r) * p.cols + col;
                const float c1 = sums[2 * r] * inverse_cols, c2 = sums[2 * r + 1] * inverse_cols;
                Vec<T, VEC> direct{}, dx;
                if (p.dsum != nullptr) direct = load<VEC>(p.dsum + at);
#pragma unroll
                for (int i = 0; i < VEC; ++i) {
                    const float g = to_float(dy[r].at[i]), xhat = (to_float(s[r].at[i]) - mean[r]) * rstd[r];
                    const float normed = rstd[r] * (weight[i] * g - c1 - xhat * c2);
                    dx.at[i] = from_float<T>(p.dsum == nullptr ? normed : normed + to_float(direct.at[i]));
                }
                store<VEC>(p.dx + at, dx);
            }
        }
    }
    if (p.partials == nullptr || !inside) return;
    float* out = p.partials + 2 * static_cast<int64_t>(blockIdx.x) * p.cols + col;
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
        out[i] = dweight[i];
        out[p.cols + i] = dbias[i];
    }
}

// A row at a time, of any width and alignment; each thread keeps its columns' sums in the block's own partials.
template <class T>
__global__ void __launch_bounds__(kWideThreads, 2) layer_norm_wide_bwd_kernel(LayerNormBackward<T> p) {
    __shared__ float s_part[2][kWideThreads / 32];
    float* const dweight = p.partials == nullptr ? nullptr : p.partials + 2 * static_cast<int64_t>(blockIdx.x) * p.cols;
    bool started = false;
    for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
        const int64_t base = row * p.cols;
        const float mean = p.mean[row], rstd = p.rstd[row];
        float sums[2] = {0.0f, 0.0f};
        for (int64_t c = threadIdx.x; c < p.cols; c += kWideThreads) {
            const float g = to_float(p.dy[base + c]), xhat = (to_float(p.s[base + c]) - mean) * rstd;
            const float weighted = g * load_param(p.weight, p.param_dtype, c, 1.0f);
            sums[0] += weighted;
            sums[1] += weighted * xhat;
            if (dweight != nullptr) {
                dweight[c] = (started ? dweight[c] : 0.0f) + g * xhat;
                dweight[p.cols + c] = (started ? dweight[p.cols + c] : 0.0f) + g;
            }
        }
        started = true;
        if (p.dx == nullptr) continue;
        block_sums<2, kWideThreads / 32>(sums, s_part);
        const float c1 = sums[0] / static_cast<float>(p.cols), c2 = sums[1] / static_cast<float>(p.cols);
        for (int64_t c = threadIdx.x; c < p.cols; c += kWideThreads) {
            const float g = to_float(p.dy[base + c]), xhat = (to_float(p.s[base + c]) - mean) * rstd;
            const float normed = rstd * (g * load_param(p.weight, p.param_dtype, c, 1.0f) - c1 - xhat * c2);
            p.dx[base + c] = from_float<T>(p.dsum == nullptr ? normed : normed + to_float(p.dsum[base + c]));
        }
    }
}

struct LayerNormMerge {
    const float* partials;
    void *dweight, *dbias;
    int64_t blocks, cols;
    int32_t param_dtype;
};

// kMergeLines threads share a column and add every kMergeLines-th partial sum; the first of them adds those up.
__global__ void __launch_bounds__(kMergeColumns* kMergeLines, 2) layer_norm_merge_kernel(LayerNormMerge m) {
    __shared__ float s_part[2][kMergeLines][kMergeColumns];
    const int column = static_cast<int>(threadIdx.x) % kMergeColumns;
    const int line = static_cast<int>(threadIdx.x) / kMergeColumns;
    const int64_t col = static_cast<int64_t>(blockIdx.x) * kMergeColumns + column;
    float sums[2] = {0.0f, 0.0f};
    if (col < m.cols) {
        for (int64_t block = line; block < m.blocks; block += kMergeLines) {
            sums[0] += m.partials[2 * block * m.cols + col];
            sums[1] += m.partials[(2 * block + 1) * m.cols + col];
        }
    }
    s_part[0][line][column] = sums[0];
    s_part[1][line][column] = sums[1];
    __syncthreads();
    if (line != 0 || col >= m.cols) return;
    for (int other = 1; other < kMergeLines; ++other) {
        sums[0] += s_part[0][other][column];
        sums[1] += s_part[1][other][column];
    }
    if (m.dweight != nullptr) store_param(m.dweight, m.param_dtype, col, sums[0]);
    if (m.dbias != nullptr) store_param(m.dbias, m.param_dtype, col, sums[1]);
}

// Blocks that leave partial sums: one a multiprocessor, since what they write and read again is 8 bytes a column, and
// two where each still has more than 128 rows to walk. The few warps of a narrow block leave a multiprocessor waiting
// for memory, so that two pay from three groups of rows each (an estimate, not measured).
inline int64_t layer_norm_blocks(int64_t rows, int64_t threads, int64_t multiprocessors) {
    const int64_t least = threads <= kNarrowThreads ? 3 * kRows : 128;
    const int64_t wanted = rows > 2 * least * multiprocessors ? 2 * multiprocessors : multiprocessors;
    const int64_t groups = ceil_div(rows, kRows);
    return groups < wanted ? groups : wanted;
}

inline int64_t layer_norm_workspace(int64_t rows, int64_t cols) {
    if (rows <= 0 || cols <= 0) return 0;
    const int64_t most = 2 * kLayerNormMaxMultiprocessors, groups = ceil_div(rows, kRows);
    return (groups < most ? groups : most) * 2 * cols * static_cast<int64_t>(sizeof(float));
}

template <class T, class P>
int32_t layer_norm_backward(const LayerNormBackward<T>& p, void* dweight, void* dbias, void* stream) {
    int64_t blocks = 0;
    if (p.rows > 0) {
        int count = 0;
        const int32_t status = multiprocessors(count);
        if (status != SDXL_FAST_OK) return status;
        if (count > kLayerNormMaxMultiprocessors) count = kLayerNormMaxMultiprocessors;
        constexpr int kVec = kVecWidth<T>;
        const bool wide = p.cols % kVec == 0 && p.cols / kVec <= kMostBackwardThreads &&
                          all_aligned(16, p.dy, p.dsum, p.s, p.dx) &&
                          aligned(p.weight, kVec * static_cast<int64_t>(sizeof(P)));
        const int64_t threads = wide ? ceil_div(p.cols / kVec, 32) * 32 : kWideThreads;
        // Without partial sums nothing keeps the blocks few.
        const int64_t groups = ceil_div(p.rows, kRows), most = int64_t{0x7fffffff};
        blocks = p.partials != nullptr ? layer_norm_blocks(p.rows, threads, count) : groups < most ? groups : most;
        const int32_t launched = launch(wide ? layer_norm_bwd_kernel<T, P, kVec> : layer_norm_wide_bwd_kernel<T>,
                                        dim3(static_cast<unsigned>(blocks)), static_cast<unsigned>(threads), stream, p);
        if (launched != SDXL_FAST_OK) return launched;
    }
    if (dweight == nullptr && dbias == nullptr) return SDXL_FAST_OK;
    const LayerNormMerge merge{p.partials, dweight, dbias, blocks, p.cols, p.param_dtype};
    return launch(layer_norm_merge_kernel, dim3(static_cast<unsigned>(ceil_div(p.cols, kMergeColumns))),
                  kMergeColumns * kMergeLines, stream, merge);
}

}  // namespace
}  // namespace cuda
}  // namespace sdxl_fast
