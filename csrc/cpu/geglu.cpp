// SPDX-License-Identifier: Apache-2.0
//
// geglu: y = value * GELU(gate), rows of x being [value | gate].
//   forward   reads 2 and writes 1 element per output
//   backward  dvalue = dy GELU(gate), dgate = dy value GELU'(gate): reads 3, writes 2
// One exponential and one reciprocal serve GELU and its derivative. Outputs larger than the cache are streamed past it.
#include "kernels.h"
#include "loops.h"
#include "vec_math.h"

namespace sdxl_fast {
namespace SDXL_FAST_ISA {
namespace {

// Elements of the output a chunk covers: enough to hide the hand-over between threads, few enough to balance them.
constexpr int64_t kChunk = 16384;

template <class T, bool tanh, bool derivative, class V>
inline ValueAndSlope<V> gate_of(V gate) {
    if constexpr (tanh) {
        return gelu_tanh<T, derivative>(gate);
    } else {
        return gelu<T, derivative>(gate);
    }
}

template <class T, bool tanh, bool streaming>
void forward_span(const T* value, const T* gate, T* y, int64_t count) {
    using V = typename VecOf<T>::Type;
    const auto compute = [](V v, V g) { return v * (g * gate_of<T, tanh, false>(g).value); };
    int64_t i = 0;
    for (; i + V::W <= count; i += V::W) emit<streaming>(y + i, compute(load(value + i), load(gate + i)));
    if (i < count) {
        store_some(y + i, compute(load_some(value + i, count - i), load_some(gate + i, count - i)), count - i);
    }
}

template <class T, bool tanh, bool streaming>
void backward_span(const T* dy, const T* value, const T* gate, T* dvalue, T* dgate, int64_t count) {
    using V = typename VecOf<T>::Type;
    int64_t i = 0;
    for (; i + V::W <= count; i += V::W) {
        const V d = load(dy + i), g = load(gate + i);
        const auto w = gate_of<T, tanh, true>(g);
        emit<streaming>(dvalue + i, d * (g * w.value));
        emit<streaming>(dgate + i, d * load(value + i) * w.derivative);
    }
    if (i < count) {
        const int64_t rest = count - i;
        const V d = load_some(dy + i, rest), g = load_some(gate + i, rest);
        const auto w = gate_of<T, tanh, true>(g);
        store_some(dvalue + i, d * (g * w.value), rest);
        store_some(dgate + i, d * load_some(value + i, rest) * w.derivative, rest);
    }
}

// Calls span(row, first column, count) for the pieces of rows that make up the outputs [begin, end).
template <class F>
void each_row_piece(int64_t begin, int64_t end, int64_t cols, F&& span) {
    while (begin < end) {
        const int64_t row = begin / cols, column = begin - row * cols;
        const int64_t count = smaller(cols - column, end - begin);
        span(row, column, count);
        begin += count;
    }
}

template <class T, bool tanh, bool streaming>
void forward(const GegluCall& call) {
    const T* const x = static_cast<const T*>(call.x);
    T* const y = static_cast<T*>(call.out);
    const int64_t total = call.rows * call.cols, cols = call.cols;
    parallel(chunks_of(total, kChunk), threads_for(total, call.num_threads), [&](int64_t chunk) {
        const int64_t begin = chunk * kChunk;
        each_row_piece(begin, smaller(begin + kChunk, total), cols, [&](int64_t row, int64_t column, int64_t count) {
            const T* const value = x + row * 2 * cols + column;
            forward_span<T, tanh, streaming>(value, value + cols, y + row * cols + column, count);
        });
        if (streaming) stream_fence();
    });
}

template <class T, bool tanh, bool streaming>
void backward(const GegluCall& call) {
    const T* const x = static_cast<const T*>(call.x);
    const T* const dy = static_cast<const T*>(call.dy);
    T* const dx = static_cast<T*>(call.out);
    const int64_t total = call.rows * call.cols, cols = call.cols;
    parallel(chunks_of(total, kChunk), threads_for(total, call.num_threads), [&](int64_t chunk) {
        const int64_t begin = chunk * kChunk;
        each_row_piece(begin, smaller(begin + kChunk, total), cols, [&](int64_t row, int64_t column, int64_t count) {
            const int64_t at = row * 2 * cols + column;
            backward_span<T, tanh, streaming>(dy + row * cols + column, x + at, x + at + cols, dx + at, dx + at + cols,
                                              count);
        });
        if (streaming) stream_fence();
    });
}

// Streaming needs every store aligned: the base, and the start of every row and chunk.
template <class T>
bool may_stream(const void* out, int64_t bytes, int64_t cols) {
    return bytes >= streaming_threshold() && aligned_to_line(out) && cols * int64_t{sizeof(T)} % 64 == 0;
}

}  // namespace

void geglu_fwd(const GegluCall& call) {
    with_dtype(call.dtype, [&](auto tag) {
        using T = typename decltype(tag)::Type;
        with_bool(call.tanh, [&](auto tanh) {
            const bool streaming = may_stream<T>(call.out, call.rows * call.cols * int64_t{sizeof(T)}, call.cols);
            with_bool(streaming, [&](auto stream) { forward<T, tanh.value, stream.value>(call); });
        });
    });
}

void geglu_bwd(const GegluCall& call) {
    with_dtype(call.dtype, [&](auto tag) {
        using T = typename decltype(tag)::Type;
        with_bool(call.tanh, [&](auto tanh) {
            const bool streaming = may_stream<T>(call.out, 2 * call.rows * call.cols * int64_t{sizeof(T)}, call.cols);
            with_bool(streaming, [&](auto stream) { backward<T, tanh.value, stream.value>(call); });
        });
    });
}

}  // namespace SDXL_FAST_ISA
}  // namespace sdxl_fast
