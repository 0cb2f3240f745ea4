// SPDX-License-Identifier: Apache-2.0
//
// layer_norm: y = (s - mean) rstd weight + bias over the last dimension, s = x + residual (rounded, and returned).
//   forward   reads 1 and writes 1 element per element, 2 and 2 with a residual; up to kBuffered elements of a row
//             wait in the L1 cache as floats, wider rows are read again
//   backward  dx = rstd (w dy - c1 - xhat c2) + dsum, c1 and c2 being the row's means of w dy and w dy xhat: reads 2
//             (with dsum 3) and writes 1. dweight and dbias: sums over the rows of a chunk, then over the chunks in a
//             fixed order.
// The mean is corrected by what is left after taking it off: far from zero it is exact to its last bit.
#include "kernels.h"
#include "layer_norm_plan.h"
#include "rows.h"

namespace sdxl_fast {
namespace SDXL_FAST_ISA {
namespace {

constexpr int64_t kBuffered = 4096;  // elements of a row kept on the stack: 16 KiB of floats
constexpr int64_t kTogether = 4;     // rows in one go of the backward, which then wait in the L2 cache
constexpr int64_t kNarrow = 1024;    // up to so many columns the partial sums of their gradients wait in the L1 cache

template <class T, class P>
struct Forward {
    using V = typename VecOf<T>::Type;
    using A = typename V::Scalar;
    const LayerNormForward& call;

    template <bool streaming>
    void row(int64_t r) const {
        const int64_t cols = call.cols;
        if (cols <= kBuffered) {
            alignas(64) A buffer[kBuffered + kWidth];
            Sums<V> sum;
            take<streaming>(r, [&](int64_t c, V v, auto slot) {
                store(buffer + c, v);  // zeros beyond the row
                sum.part[slot.value] = sum.part[slot.value] + v;
            });
            normalise<streaming>(r, sum.total(), [&](int64_t c, auto, int64_t) { return load(buffer + c); });
        } else {
            Sums<V> sum;
            take<false>(r, [&](int64_t, V v, auto slot) { sum.part[slot.value] = sum.part[slot.value] + v; });
            const T* const again = static_cast<const T*>(call.residual == nullptr ? call.x : call.sum) + r * cols;
            normalise<streaming>(
                r, sum.total(), [&](int64_t c, auto full, int64_t left) { return fetch<full.value>(again + c, left); });
        }
    }

    // Calls each(column, value, slot) with the values of x + residual as they are rounded, and writes them.
    template <bool streaming, class F>
    void take(int64_t r, F&& each) const {
        const T* const x = static_cast<const T*>(call.x) + r * call.cols;
        if (call.residual == nullptr) {
            each_vector<V>(call.cols, [&](int64_t c, auto full, int64_t left, auto slot) {
                each(c, fetch<full.value>(x + c, left), slot);
            });
            return;
        }
        const T* const residual = static_cast<const T*>(call.residual) + r * call.cols;
        T* const to = static_cast<T*>(call.sum) + r * call.cols;
        each_vector<V>(call.cols, [&](int64_t c, auto full, int64_t left, auto slot) {
            const V s = fetch<full.value>(x + c, left) + fetch<full.value>(residual + c, left);
            write<full.value, streaming>(to + c, s, left);
            each(c, rounded(s), slot);
        });
    }

    static V rounded(V v) {
        if constexpr (sizeof(T) == 2) {
            T parts[V::W];
            store(parts, v);
            return load(parts);
        } else {
            return v;
        }
    }

    // The next row comes while this one is normalised, when the memory would have nothing to do: a tenth faster. It
    // comes as far as the L2 cache: in L1 it would drive out what this row still needs (35 KB of 1280 floats).
    void ask_for(int64_t r, int64_t c) const {
        prefetch_to_l2(static_cast<const T*>(call.x) + r * call.cols + c);
        if (call.residual != nullptr) prefetch_to_l2(static_cast<const T*>(call.residual) + r * call.cols + c);
    }

    template <bool streaming, class At>
    void normalise(int64_t r, A sum, At&& at) const {
        A mean, rstd;
        finish_statistics<V>(sum, call.cols, call.eps, at, mean, rstd);
        static_cast<A*>(call.mean)[r] = mean;
        static_cast<A*>(call.rstd)[r] = rstd;
        T* const y = static_cast<T*>(call.y) + r * call.cols;
        const P *const weight = static_cast<const P*>(call.weight), *const bias = static_cast<const P*>(call.bias);
        const V center(mean), scale(rstd);
        if (weight == nullptr) {
            each_vector<V>(call.cols, [&](int64_t c, auto full, int64_t left, auto) {
                ask_for(r + 1, c);
                write<full.value, streaming>(y + c, (at(c, full, left) - center) * scale, left);
            });
            return;
        }
        each_vector<V>(call.cols, [&](int64_t c, auto full, int64_t left, auto) {
            ask_for(r + 1, c);
            const V xhat = (at(c, full, left) - center) * scale;
            const V w = fetch<full.value>(weight + c, left), b = fetch<full.value>(bias + c, left);
            write<full.value, streaming>(y + c, fma(xhat, w, b), left);
        });
    }

    void run() const {
        const int64_t bytes = call.cols * int64_t{sizeof(T)}, maps = call.residual == nullptr ? 1 : 2;
        const bool streaming = maps * call.rows * bytes >= streaming_threshold() && bytes % 64 == 0 &&
                               aligned_to_line(call.y) && aligned_to_line(call.sum);
        const int64_t size = layer_norm_chunk_rows(call.rows, call.cols);
        with_bool(streaming, [&](auto past_the_cache) {
            parallel(chunks_of(call.rows, size), threads_for(call.rows * call.cols, call.num_threads), [&](int64_t i) {
                const int64_t end = smaller((i + 1) * size, call.rows);
                for (int64_t r = i * size; r < end; ++r) row<past_the_cache.value>(r);
                if (past_the_cache.value) stream_fence();
            });
        });
    }
};

template <class T, class P>
struct Backward {
    using V = typename VecOf<T>::Type;
    using A = typename V::Scalar;
    const LayerNormBackward& call;

    bool parameters() const { return call.dweight != nullptr || call.dbias != nullptr; }
    // Sums of dy xhat and of dy over the rows of a chunk, one after the other.
    A* partials(int64_t chunk) const { return static_cast<A*>(call.workspace) + 2 * chunk * padded(); }
    int64_t padded() const { return layer_norm_padded(call.cols); }

    const T* at(const void* map, int64_t r) const { return static_cast<const T*>(map) + r * call.cols; }

    // What the gradient of a row needs beside its elements.
    struct Row {
        V mean, rstd, c1, c2;
    };

    Row means(int64_t r) const {
        const V mean(static_cast<const A*>(call.mean)[r]), rstd(static_cast<const A*>(call.rstd)[r]);
        if (call.dx == nullptr) return {mean, rstd, V(0), V(0)};
        const T *const dy = at(call.dy, r), *const s = at(call.s, r);
        const P* const weight = static_cast<const P*>(call.weight);
        Sums<V> first, second;
        each_vector<V>(call.cols, [&](int64_t c, auto full, int64_t left, auto slot) {
            if (call.dsum != nullptr) prefetch(at(call.dsum, r) + c);
            V wdy = fetch<full.value>(dy + c, left);  // zero beyond the row
            if (weight != nullptr) wdy = wdy * fetch<full.value>(weight + c, left);
            const V xhat = (fetch<full.value>(s + c, left) - mean) * rstd;
            first.part[slot.value] = first.part[slot.value] + wdy;
            second.part[slot.value] = fma(wdy, xhat, second.part[slot.value]);
        });
        return {mean, rstd, V(first.total() / A(call.cols)), V(second.total() / A(call.cols))};
    }

    // `count` rows from r on. Their shares of the parameters' gradients are added up in registers: partial sums are
    // read and written once, where row by row that would be most of the work.
    template <bool with_parameters, int count>
    void rows(int64_t r, A* dweight, A* dbias) const {
        Row row[count];
        for (int k = 0; k < count; ++k) row[k] = means(r + k);
        const P* const weight = static_cast<const P*>(call.weight);
        each_vector<V>(call.cols, [&](int64_t c, auto full, int64_t left, auto) {
            V w(1), weights(0), biases(0);
            if (weight != nullptr) w = fetch<full.value>(weight + c, left);
            for (int k = 0; k < count; ++k) {
                prefetch_to_l2(at(call.dy, r + k + count) + c);
                prefetch_to_l2(at(call.s, r + k + count) + c);
                const V dy = fetch<full.value>(at(call.dy, r + k) + c, left);
                const V xhat = (fetch<full.value>(at(call.s, r + k) + c, left) - row[k].mean) * row[k].rstd;
                if (with_parameters) {
                    weights = fma(dy, xhat, weights);
                    biases = biases + dy;
                }
                if (call.dx == nullptr) continue;
                V g = row[k].rstd * (dy * w - fma(xhat, row[k].c2, row[k].c1));
                if (call.dsum != nullptr) g = g + fetch<full.value>(at(call.dsum, r + k) + c, left);
                write<full.value, false>(static_cast<T*>(call.dx) + (r + k) * call.cols + c, g, left);
            }
            if (with_parameters) {
                store(dweight + c, load(dweight + c) + weights);
                store(dbias + c, load(dbias + c) + biases);
            }
        });
    }

    template <bool with_parameters>
    void run() const {
        const int64_t size = layer_norm_chunk_rows(call.rows, call.cols), chunks = chunks_of(call.rows, size);
        const int32_t threads = threads_for(call.rows * call.cols, call.num_threads);
        const bool wide = call.cols > kNarrow;
        parallel(chunks, threads, [&](int64_t i) {
            A* const dweight = with_parameters ? partials(i) : nullptr;
            A* const dbias = with_parameters ? dweight + padded() : nullptr;
            if constexpr (with_parameters) memset(dweight, 0, static_cast<size_t>(2 * padded()) * sizeof(A));
            const int64_t end = smaller((i + 1) * size, call.rows);
            int64_t r = i * size;
            for (; wide && r + kTogether <= end; r += kTogether) rows<with_parameters, kTogether>(r, dweight, dbias);
            for (; r < end; ++r) rows<with_parameters, 1>(r, dweight, dbias);
        });
        if (!with_parameters) return;
        constexpr int64_t kColumns = 64;
        parallel(chunks_of(call.cols, kColumns), threads, [&](int64_t i) {
            const int64_t begin = i * kColumns, count = smaller(kColumns, call.cols - begin);
            double weight[kColumns] = {}, bias[kColumns] = {};
            for (int64_t chunk = 0; chunk < chunks; ++chunk) {
                const A* const sums = partials(chunk) + begin;
                for (int64_t c = 0; c < count; ++c) weight[c] += static_cast<double>(sums[c]);
                for (int64_t c = 0; c < count; ++c) bias[c] += static_cast<double>(sums[padded() + c]);
            }
            for (int64_t c = 0; c < count; ++c) {
                if (call.dweight != nullptr) put(static_cast<P*>(call.dweight) + begin + c, A(weight[c]));
                if (call.dbias != nullptr) put(static_cast<P*>(call.dbias) + begin + c, A(bias[c]));
            }
        });
    }
};

}  // namespace

void layer_norm_fwd(const LayerNormForward& call) {
    with_dtypes(call.dtype, call.param_dtype, [&](auto tag, auto param_tag) {
        Forward<typename decltype(tag)::Type, typename decltype(param_tag)::Type>{call}.run();
    });
}

void layer_norm_bwd(const LayerNormBackward& call) {
    with_dtypes(call.dtype, call.param_dtype, [&](auto tag, auto param_tag) {
        const Backward<typename decltype(tag)::Type, typename decltype(param_tag)::Type> backward{call};
        with_bool(backward.parameters(),
                  [&](auto with_parameters) { backward.template run<decltype(with_parameters)::value>(); });
    });
}

}  // namespace SDXL_FAST_ISA
}  // namespace sdxl_fast
