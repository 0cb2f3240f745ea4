// SPDX-License-Identifier: Apache-2.0
//
// self_attention, cross_attention, vae_attention with few keys: out = softmax(scale q k^T) v per sample and head.
//   forward   an item of work is a run of queries of a head, whose keys and values wait as floats in the cache. Scores
//             of a block of queries are held whole, a query a lane: maximum, sum and exponentials run along the keys
//   backward  an item is a head, whose dk and dv are added up over blocks of queries: p = exp(scale q k^T - lse),
//             dv += p^T dout, dp = dout v^T, ds = scale p (dp - sum(p dp)), dq = ds k, dk += ds^T q
// All products are one function; rows of its left operand may be columns. Sums run along an axis in order, so numbers
// depend neither on threads nor on the batch.
#include "attention_plan.h"
#include "kernels.h"
#include "tiles.h"
#include "vec_math.h"

namespace sdxl_fast {
namespace SDXL_FAST_ISA {
namespace {

static_assert(kPadding % kTileRows == 0 && kQueryBlock % kPadding == 0);

inline VecF exponential(VecF x) {
    return exp_scaled<float, Range::kSaturate>(x, 1.0);
}
inline VecD exponential(VecD x) {
    return ::exp(x.v);
}
inline float logarithm(float x) {
    return ::logf(x);
}
inline double logarithm(double x) {
    return ::log(x);
}
inline VecD max(VecD a, VecD b) {
    return a.v > b.v ? a.v : b.v;
}

// A matrix of which element (r, k) is data[r * row + k * step].
template <class A>
struct Matrix {
    A* data;
    int64_t row, step = 1;

    Matrix transposed() const { return {data, step, row}; }
    A* at(int64_t r) const { return data + r * row; }
};

// c (+)= a b for kTileRows rows from `first` on and U vectors of columns from `column` on.
template <bool add, int U, class V, class A = typename V::Scalar>
inline void tile(Matrix<A> a, Matrix<A> b, Matrix<A> c, int64_t first, int64_t column, int64_t depth) {
    const A* rows[kTileRows];
    Tile<V, U> sum;
    for (int r = 0; r < kTileRows; ++r) {
        rows[r] = a.at(first + r);
        for (int u = 0; u < U; ++u) sum[r][u] = A(0);
    }
    accumulate<V, U>(sum, rows, a.step, b.data + column, b.row, depth);
    for (int r = 0; r < kTileRows; ++r) {
        for (int u = 0; u < U; ++u) {
            A* const at = c.at(first + r) + column + u * V::W;
            store(at, add ? load(at) + sum[r][u] : sum[r][u]);  // a long sum is one of short ones
        }
    }
}

// c (+)= a b: rows of c up to the next multiple of kTileRows, columns up to one of V::W.
template <bool add, class V, class A = typename V::Scalar>
void product(Matrix<A> a, Matrix<A> b, Matrix<A> c, int64_t rows, int64_t depth, int64_t cols) {
    for (int64_t r = 0; r < rows; r += kTileRows) {
        int64_t at = 0;
        for (; at + V::W < cols; at += 2 * V::W) tile<add, 2, V>(a, b, c, r, at, depth);
        if (at < cols) tile<add, 1, V>(a, b, c, r, at, depth);
    }
}

// Rows of elements as floats, each with zeros up to the next vector, and rows of zeros up to a whole tile.
template <class V, class T, class A = typename V::Scalar>
void gather(const T* from, int64_t stride, int64_t rows, int64_t cols, Matrix<A> to) {
    for (int64_t r = 0; r < rows; ++r) {
        int64_t c = 0;
        for (; c + V::W <= cols; c += V::W) store(to.at(r) + c, load(from + r * stride + c));
        if (c < cols) store(to.at(r) + c, load_some(from + r * stride + c, cols - c));
    }
    for (int64_t r = rows; r < padded_to(rows, kTileRows); ++r) {
        memset(to.at(r), 0, static_cast<size_t>(to.row) * sizeof(A));
    }
}

// The columns of `from` as rows, each with zeros up to the next vector.
template <class V, class A = typename V::Scalar>
void transpose(Matrix<A> from, int64_t rows, int64_t cols, Matrix<A> to) {
    for (int64_t c = 0; c < cols; ++c) {
        for (int64_t r = 0; r < rows; ++r) to.at(c)[r] = from.at(r)[c];
        for (int64_t r = rows; r < padded_to(rows, V::W); ++r) to.at(c)[r] = A(0);
    }
}

// Rows of floats, times a factor of each, as elements.
template <class V, class T, class A = typename V::Scalar>
void scatter(Matrix<A> from, const A* factors, int64_t rows, int64_t cols, T* to, int64_t stride) {
    for (int64_t r = 0; r < rows; ++r) {
        const V factor(factors == nullptr ? A(1) : factors[r]);
        int64_t c = 0;
        for (; c + V::W <= cols; c += V::W) store(to + r * stride + c, load(from.at(r) + c) * factor);
        if (c < cols) store_some(to + r * stride + c, load(from.at(r) + c) * factor, cols - c);
    }
}

// The first channel of a token.
template <class T>
const T* at(const AttentionTokens& from, int64_t sample, int64_t token, int64_t head) {
    return static_cast<const T*>(from.data) + sample * from.sample + token * from.token + head * from.head;
}

inline int32_t attention_threads(const AttentionShape& shape, int32_t num_threads) {
    return threads_for(shape.n * shape.h * shape.s * shape.t * shape.d / 8, num_threads);
}

// What the widest head takes, in elements.
constexpr int64_t kTokenRow = kMostChannels + kPadding;
constexpr int64_t kQueryArea = kQueryBlock * kTokenRow;
constexpr int64_t kScoreArea = kQueryBlock * (kMostKeys + kPadding);

template <class T>
struct Forward {
    using V = typename VecOf<T>::Type;
    using A = typename V::Scalar;
    const AttentionForward& call;
    const int64_t channels = padded_to(call.shape.d, kPadding);

    int64_t runs() const { return chunks_of(call.shape.s, kQueriesPerItem); }

    // Turns the columns of scores into e^(scale score - maximum); the reciprocals of their sums, the log-sum-exps.
    void softmax(Matrix<A> score, int64_t rows, A* inverse, A* lse) const {
        const V scale = A(call.scale);
        A sums[kQueryBlock], tops[kQueryBlock];
        for (int64_t lane = 0; lane < rows; lane += V::W) {
            A* const column = score.data + lane;
            V most = load(column);
            for (int64_t j = 1; j < call.shape.t; ++j) most = max(load(column + j * score.row), most);
            const V top = most * scale;
            V sum = A(0);
            for (int64_t j = 0; j < call.shape.t; ++j) {
                const V p = exponential(load(column + j * score.row) * scale - top);
                store(column + j * score.row, p);
                sum = sum + p;
            }
            store(inverse + lane, V(A(1)) / sum);
            store(sums + lane, sum);
            store(tops + lane, top);
        }
        for (int64_t r = 0; lse != nullptr && r < rows; ++r) lse[r] = tops[r] + logarithm(sums[r]);
    }

    void item(int64_t i) const {
        const AttentionShape& shape = call.shape;
        const int64_t run = i % runs(), head = i / runs() % shape.h, sample = i / runs() / shape.h;
        alignas(64) A key_areas[2][kKeyArea], query_areas[3][kQueryArea], score_area[kScoreArea];
        const Matrix<A> key{key_areas[0], channels}, value{key_areas[1], channels};
        const Matrix<A> query{query_areas[0], channels}, query_lanes{query_areas[1], kQueryBlock};
        const Matrix<A> out{query_areas[2], channels}, score{score_area, kQueryBlock};
        gather<V>(at<T>(call.k, sample, 0, head), call.k.token, shape.t, shape.d, key);
        gather<V>(at<T>(call.v, sample, 0, head), call.v.token, shape.t, shape.d, value);
        const int64_t end = smaller((run + 1) * kQueriesPerItem, shape.s);
        for (int64_t first = run * kQueriesPerItem; first < end; first += kQueryBlock) {
            const int64_t rows = smaller(kQueryBlock, end - first);
            gather<V>(at<T>(call.q, sample, first, head), call.q.token, rows, shape.d, query);
            transpose<V>(query, rows, shape.d, query_lanes);
            product<false, V>(key, query_lanes, score, shape.t, shape.d, padded_to(rows, V::W));
            A inverse[kQueryBlock];
            A* const lse =
                call.lse == nullptr ? nullptr : static_cast<A*>(call.lse) + (sample * shape.h + head) * shape.s + first;
            softmax(score, rows, inverse, lse);
            product<false, V>(score.transposed(), value, out, rows, shape.t, padded_to(shape.d, V::W));
            T* const to = static_cast<T*>(call.out) + ((sample * shape.s + first) * shape.h + head) * shape.d;
            scatter<V>(out, inverse, rows, shape.d, to, shape.h * shape.d);
        }
    }

    void run() const {
        const int32_t threads = attention_threads(call.shape, call.num_threads);
        parallel(call.shape.n * call.shape.h * runs(), threads, [&](int64_t i) { item(i); });
    }
};

template <class T>
struct Backward {
    using V = typename VecOf<T>::Type;
    using A = typename V::Scalar;
    const AttentionBackward& call;
    const int64_t channels = padded_to(call.shape.d, kPadding);

    // Scores and dp of a block of queries become p and ds.
    void differentiate(Matrix<A> p, Matrix<A> ds, int64_t rows, const A* lse) const {
        const V scale = A(call.scale);
        for (int64_t lane = 0; lane < rows; lane += V::W) {
            const V sums = load_some(lse + lane, smaller(V::W, rows - lane));
            V delta = A(0);
            for (int64_t j = 0; j < call.shape.t; ++j) {
                const V probability = exponential(load(p.at(j) + lane) * scale - sums);
                store(p.at(j) + lane, probability);
                delta = fma(probability, load(ds.at(j) + lane), delta);
            }
            for (int64_t j = 0; j < call.shape.t; ++j) {
                store(ds.at(j) + lane, load(p.at(j) + lane) * (load(ds.at(j) + lane) - delta) * scale);
            }
        }
    }

    void item(int64_t i) const {
        const AttentionShape& shape = call.shape;
        const int64_t head = i % shape.h, sample = i / shape.h;
        const int64_t cols = padded_to(shape.d, V::W);
        alignas(64) A key_areas[4][kKeyArea], query_areas[5][kQueryArea], score_areas[2][kScoreArea];
        const Matrix<A> key{key_areas[0], channels}, value{key_areas[1], channels};
        const Matrix<A> dk{key_areas[2], channels}, dv{key_areas[3], channels};
        const Matrix<A> query{query_areas[0], channels}, dout{query_areas[1], channels}, dq{query_areas[2], channels};
        const Matrix<A> query_lanes{query_areas[3], kQueryBlock}, dout_lanes{query_areas[4], kQueryBlock};
        const Matrix<A> p{score_areas[0], kQueryBlock}, ds{score_areas[1], kQueryBlock};
        gather<V>(at<T>(call.k, sample, 0, head), call.k.token, shape.t, shape.d, key);
        gather<V>(at<T>(call.v, sample, 0, head), call.v.token, shape.t, shape.d, value);
        const size_t key_bytes = static_cast<size_t>(padded_to(shape.t, kTileRows) * channels) * sizeof(A);
        memset(dk.data, 0, key_bytes);
        memset(dv.data, 0, key_bytes);
        for (int64_t first = 0; first < shape.s; first += kQueryBlock) {
            const int64_t rows = smaller(kQueryBlock, shape.s - first), lanes = padded_to(rows, V::W);
            gather<V>(at<T>(call.q, sample, first, head), call.q.token, rows, shape.d, query);
            gather<V>(at<T>(call.dout, sample, first, head), call.dout.token, rows, shape.d, dout);
            transpose<V>(query, rows, shape.d, query_lanes);
            transpose<V>(dout, rows, shape.d, dout_lanes);
            product<false, V>(key, query_lanes, p, shape.t, shape.d, lanes);
            product<false, V>(value, dout_lanes, ds, shape.t, shape.d, lanes);
            differentiate(p, ds, rows, static_cast<const A*>(call.lse) + (sample * shape.h + head) * shape.s + first);
            if (call.dv != nullptr) product<true, V>(p, dout, dv, shape.t, rows, cols);
            if (call.dk != nullptr) product<true, V>(ds, query, dk, shape.t, rows, cols);
            if (call.dq != nullptr) {
                product<false, V>(ds.transposed(), key, dq, rows, shape.t, cols);
                put_rows(dq, rows, call.dq, (sample * shape.s + first) * shape.h + head);
            }
        }
        if (call.dk != nullptr) put_rows(dk, shape.t, call.dk, sample * shape.t * shape.h + head);
        if (call.dv != nullptr) put_rows(dv, shape.t, call.dv, sample * shape.t * shape.h + head);
    }

    // Of a contiguous gradient; `first` counts heads.
    void put_rows(Matrix<A> from, int64_t rows, void* to, int64_t first) const {
        const AttentionShape& shape = call.shape;
        scatter<V>(from, static_cast<const A*>(nullptr), rows, shape.d, static_cast<T*>(to) + first * shape.d,
                   shape.h * shape.d);
    }

    void run() const {
        const int32_t threads = attention_threads(call.shape, call.num_threads);
        parallel(call.shape.n * call.shape.h, threads, [&](int64_t i) { item(i); });
    }
};

}  // namespace

void attention_fwd(const AttentionForward& call) {
    with_dtype(call.dtype, [&](auto tag) { Forward<typename decltype(tag)::Type>{call}.run(); });
}

void attention_bwd(const AttentionBackward& call) {
    with_dtype(call.dtype, [&](auto tag) { Backward<typename decltype(tag)::Type>{call}.run(); });
}

}  // namespace SDXL_FAST_ISA
}  // namespace sdxl_fast
