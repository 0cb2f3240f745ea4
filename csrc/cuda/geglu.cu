// SPDX-License-Identifier: Apache-2.0
//
// geglu: y = value * GELU(gate), value and gate being the halves of a row.
//
// Formula    forward  y = v GELU(g);   backward  dv = dy GELU(g),  dg = dy v GELU'(g).
// Grid       x: column tiles, y: blocks of rows (strided, so any number of rows). A block is tx column lanes by ty row
//            lanes: long rows give it one row of up to 256 vectors, short rows many rows; no index is divided in the
//            loop.
// Registers  one 16-byte vector of v, g and dy for each of kUnroll rows in flight.
// Bytes      forward reads 2 and writes 1 element (or float8, half of bf16) per output, backward reads 3 and writes 2;
//            nothing is saved but x.
// Wrong      when x comes straight from a projection: there the product belongs in that GEMM's epilogue.
//
// Ragged     a number of columns that is no multiple of the vector (or an unaligned pointer) takes the same code with
//            vectors of one element.
#include "device.cuh"
#include "gelu.cuh"

namespace sdxl_fast {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 2;  // rows in flight per thread: 4 to 6 independent 16-byte loads

struct GegluShape {
    int64_t rows, cols;
    int tx, ty;
};

// First row, row step and column of a thread; false when it has none.
__device__ __forceinline__ bool geglu_position(const GegluShape& shape, int vec, int64_t& row, int64_t& step,
                                               int64_t& col) {
    const int lane = static_cast<int>(threadIdx.x) % shape.tx;
    const int line = static_cast<int>(threadIdx.x) / shape.tx;
    row = static_cast<int64_t>(blockIdx.y) * shape.ty + line;
    step = static_cast<int64_t>(gridDim.y) * shape.ty;
    col = (static_cast<int64_t>(blockIdx.x) * shape.tx + lane) * vec;
    return line < shape.ty && col < shape.cols;
}

template <class T, class OUT, int VEC, bool TANH>
__global__ void __launch_bounds__(kThreads, 2)
    geglu_fwd_kernel(const T* __restrict__ x, const float* scale_y, OUT* __restrict__ y, GegluShape shape) {
    int64_t row, step, col;
    if (!geglu_position(shape, VEC, row, step, col)) return;
    const float reciprocal = reciprocal_of<OUT>(scale_y);
    while (row < shape.rows) {
        Vec<T, VEC> value[kUnroll], gate[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            const int64_t r = row + u * step;
            if (r < shape.rows) {
                value[u] = load<VEC>(x + r * 2 * shape.cols + col);
                gate[u] = load<VEC>(x + r * 2 * shape.cols + shape.cols + col);
            }
        }
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            const int64_t r = row + u * step;
            if (r < shape.rows) {
                Vec<T, VEC> out;
#pragma unroll
                for (int i = 0; i < VEC; ++i) {
                    const float gelu = gelu_for<T, TANH>(to_float(gate[u].at[i])).value;
                    out.at[i] = from_float<T>(to_float(value[u].at[i]) * gelu);
                }
                store_result(y + r * shape.cols + col, out, reciprocal);
            }
        }
        row += kUnroll * step;
    }
}

template <class T, int VEC, bool TANH>
__global__ void __launch_bounds__(kThreads, 2)
    geglu_bwd_kernel(const T* __restrict__ dy, const T* __restrict__ x, T* __restrict__ dx, GegluShape shape) {
    int64_t row, step, col;
    if (!geglu_position(shape, VEC, row, step, col)) return;
    while (row < shape.rows) {
        Vec<T, VEC> value[kUnroll], gate[kUnroll], grad[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            const int64_t r = row + u * step;
            if (r < shape.rows) {
                value[u] = load<VEC>(x + r * 2 * shape.cols + col);
                gate[u] = load<VEC>(x + r * 2 * shape.cols + shape.cols + col);
                grad[u] = load<VEC>(dy + r * shape.cols + col);
            }
        }
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            const int64_t r = row + u * step;
            if (r < shape.rows) {
                Vec<T, VEC> dvalue, dgate;
#pragma unroll
                for (int i = 0; i < VEC; ++i) {
                    const Gelu gelu = gelu_for<T, TANH>(to_float(gate[u].at[i]));
                    const float g = to_float(grad[u].at[i]);
                    dvalue.at[i] = from_float<T>(g * gelu.value);
                    dgate.at[i] = from_float<T>(g * to_float(value[u].at[i]) * gelu.derivative);
                }
                store<VEC>(dx + r * 2 * shape.cols + col, dvalue);
                store<VEC>(dx + r * 2 * shape.cols + shape.cols + col, dgate);
            }
        }
        row += kUnroll * step;
    }
}

// Lanes along a row: as few tiles of at most kThreads vectors as it takes, all equally wide.
GegluShape geglu_shape(int64_t rows, int64_t cols, int vec, dim3& grid) {
    const int64_t vectors = ceil_div(cols, vec);
    const int64_t tiles = ceil_div(vectors, kThreads);
    GegluShape shape{rows, cols, static_cast<int>(ceil_div(vectors, tiles)), 1};
    shape.ty = kThreads / shape.tx;
    const int64_t row_blocks = ceil_div(rows, static_cast<int64_t>(shape.ty) * kUnroll);
    grid = dim3(static_cast<unsigned>(tiles), static_cast<unsigned>(row_blocks < 65535 ? row_blocks : 65535));
    return shape;
}

bool geglu_valid(int64_t rows, int64_t cols, int32_t approximate) {
    return rows >= 0 && cols >= 0 && cols < (int64_t{1} << 38) &&
           (approximate == SDXL_FAST_GELU_NONE || approximate == SDXL_FAST_GELU_TANH);
}

template <class T, class OUT, int VEC>
int32_t geglu_fwd(const void* x, const float* scale_y, void* y, int64_t rows, int64_t cols, bool tanh, void* stream) {
    dim3 grid;
    const GegluShape shape = geglu_shape(rows, cols, VEC, grid);
    return launch(tanh ? geglu_fwd_kernel<T, OUT, VEC, true> : geglu_fwd_kernel<T, OUT, VEC, false>, grid, kThreads,
                  stream, static_cast<const T*>(x), scale_y, static_cast<OUT*>(y), shape);
}

template <class T, class OUT>
int32_t geglu_fwd(const void* x, const float* scale_y, void* y, int64_t rows, int64_t cols, int32_t approximate,
                  void* stream) {
    if (rows == 0 || cols == 0) return SDXL_FAST_OK;
    const bool tanh = approximate == SDXL_FAST_GELU_TANH;
    constexpr int kVec = kVecWidth<T>;
    if (cols % kVec == 0 && aligned(x, 16) && aligned(y, alignof(Vec<OUT, kVec>)))
        return geglu_fwd<T, OUT, kVec>(x, scale_y, y, rows, cols, tanh, stream);
    return geglu_fwd<T, OUT, 1>(x, scale_y, y, rows, cols, tanh, stream);
}

template <class T, int VEC>
int32_t geglu_bwd(const void* dy, const void* x, void* dx, int64_t rows, int64_t cols, bool tanh, void* stream) {
    dim3 grid;
    const GegluShape shape = geglu_shape(rows, cols, VEC, grid);
    return launch(tanh ? geglu_bwd_kernel<T, VEC, true> : geglu_bwd_kernel<T, VEC, false>, grid, kThreads, stream,
                  static_cast<const T*>(dy), static_cast<const T*>(x), static_cast<T*>(dx), shape);
}

}  // namespace
}  // namespace cuda
}  // namespace sdxl_fast

extern "C" {

int32_t sdxl_fast_geglu_fwd_cuda(const void* x, void* y, int64_t rows, int64_t cols, int32_t approximate, int32_t dtype,
                                 void* stream) {
    using namespace sdxl_fast::cuda;
    if (!geglu_valid(rows, cols, approximate)) return SDXL_FAST_INVALID_ARGUMENT;
    return with_dtype(dtype, [&](auto element) -> int32_t {
        using T = decltype(element);
        return geglu_fwd<T, T>(x, nullptr, y, rows, cols, approximate, stream);
    });
}

int32_t sdxl_fast_geglu_e4m3_fwd_cuda(const void* x, const float* scale_y, void* y, int64_t rows, int64_t cols,
                                      int32_t approximate, int32_t dtype, void* stream) {
    using namespace sdxl_fast::cuda;
    if (!geglu_valid(rows, cols, approximate) || scale_y == nullptr) return SDXL_FAST_INVALID_ARGUMENT;
    if (dtype != SDXL_FAST_BF16) return SDXL_FAST_UNSUPPORTED_DTYPE;
    return geglu_fwd<bf16, sdxl_fast::E4M3>(x, scale_y, y, rows, cols, approximate, stream);
}

int32_t sdxl_fast_geglu_bwd_cuda(const void* dy, const void* x, void* dx, int64_t rows, int64_t cols,
                                 int32_t approximate, int32_t dtype, void* stream) {
    using namespace sdxl_fast::cuda;
    if (!geglu_valid(rows, cols, approximate)) return SDXL_FAST_INVALID_ARGUMENT;
    return with_dtype(dtype, [&](auto element) -> int32_t {
        using T = decltype(element);
        if (rows == 0 || cols == 0) return SDXL_FAST_OK;
        const bool tanh = approximate == SDXL_FAST_GELU_TANH;
        if (cols % kVecWidth<T> == 0 && all_aligned(16, dy, x, dx))
            return geglu_bwd<T, kVecWidth<T>>(dy, x, dx, rows, cols, tanh, stream);
        return geglu_bwd<T, 1>(dy, x, dx, rows, cols, tanh, stream);
    });
}

}  // extern "C"
