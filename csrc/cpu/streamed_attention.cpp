// SPDX-License-Identifier: Apache-2.0
//
// self_attention, cross_attention, vae_attention with many keys: out = softmax(scale q k^T) v per sample and head, the
// keys passing by in blocks (Dao et al. 2022, arXiv:2205.14135). Keys and values are first put into the order in which
// both products read them, strips of some vectors of keys or of channels. An item of work is a block of queries of a
// head: of each block of keys it makes the scores, a query a row, corrects its maxima, sums and outputs so far, and
// adds the exponentials times the values. bfloat16 is multiplied in pairs where the CPU can, the exponentials rounded
// to it. Blocks are cut by position alone, so numbers depend neither on threads nor on the batch.
#include "attention_plan.h"
#include "kernels.h"
#include "rows.h"
#include "vec_math.h"
#include "words.h"

namespace sdxl_fast {
namespace SDXL_FAST_ISA {
namespace {

using V = VecF;

constexpr int64_t kStrip = kVectors * V::W;  // of keys or channels
constexpr int64_t kPart = 128;               // words summed up at a time
constexpr float kOut = -1e30f;               // score of a key that is not there

static_assert(kStreamedQueries % kRows == 0 && kStreamedKeys % kStrip == 0 && kStreamedChannels % kStrip == 0);

// Exponentials as words of the second product.
inline void of_exponentials(float* to, const float* from, int64_t count) {
    memcpy(to, from, static_cast<size_t>(count) * sizeof(float));
}
#if defined(__AVX512BF16__)
inline void of_exponentials(uint32_t* to, const float* from, int64_t count) {
    for (int64_t j = 0; j < count; j += 2 * V::W) {
        const V second = j + V::W < count ? load(from + j + V::W) : V(0.0f);
        const __m512bh pair = _mm512_cvtne2ps_pbh(second.v, load(from + j).v);
        memcpy(to + j / 2, &pair, sizeof(pair));
    }
}
#endif

inline float highest(V v) {
    float parts[V::W];
    store(parts, v);
    float most = parts[0];
    for (int i = 1; i < V::W; ++i) most = parts[i] > most || parts[i] != parts[i] ? parts[i] : most;
    return most;
}

inline V exponential(V x) {
    return exp_scaled<float, Range::kSaturate>(x, 1.0);
}

template <class T>
struct Streamed {
    using Form = typename FormOf<V, T>::Type;
    using Word = typename Form::Word;
    static constexpr int64_t kStep = Form::kStep;

    const AttentionForward& call;
    const AttentionShape& shape = call.shape;
    const int64_t depth = chunks_of(shape.d, kStep);            // words of a query or key
    const int64_t width = chunks_of(shape.d, kStrip) * kStrip;  // channels of a row of outputs
    const int64_t blocks = chunks_of(shape.t, kStreamedKeys);   // of keys
    const int64_t key_words = kStreamedKeys * depth;            // of a block
    const int64_t value_words = kStreamedKeys / kStep * width;
    const int64_t runs = chunks_of(shape.s, kStreamedQueries);  // of queries

    int64_t workspace() const { return shape.n * shape.h * blocks * (key_words + value_words) * int64_t{sizeof(Word)}; }
    // The keys of a block: strip after strip of keys, in each a row per word of channels.
    Word* keys_of(int64_t head, int64_t block) const {
        return static_cast<Word*>(call.workspace) + (head * blocks + block) * (key_words + value_words);
    }
    // Its values: strip after strip of channels, in each a row per word of keys.
    Word* values_of(int64_t head, int64_t block) const { return keys_of(head, block) + key_words; }

    const T* token(const AttentionTokens& from, int64_t head, int64_t index) const {
        return static_cast<const T*>(from.data) + head / shape.h * from.sample + index * from.token +
               head % shape.h * from.head;
    }

    void order(int64_t head, int64_t block) const {
        const int64_t first = block * kStreamedKeys, count = smaller(kStreamedKeys, shape.t - first);
        Word* const keys = keys_of(head, block);
        Word row[kStreamedChannels];
        for (int64_t j = 0; j < chunks_of(count, kStrip) * kStrip; ++j) {
            Word* const to = keys + j / kStrip * kStrip * depth + j % kStrip;
            if (j < count) Form::of_row(row, token(call.k, head, first + j), shape.d);
            for (int64_t c = 0; c < depth; ++c) to[c * kStrip] = j < count ? row[c] : Word(0);
        }
        Word* const values = values_of(head, block);
        const int64_t words = chunks_of(count, kStep);
        for (int64_t j = 0; j < words; ++j) {
            for (int64_t c = 0; c < width; c += kStrip) {
                Word* const to = values + c * (kStreamedKeys / kStep) + j * kStrip;
                const T* const from = token(call.v, head, first + j * kStep) + c;
                Form::of_rows(to, from, call.v.token, count - j * kStep, shape.d - c);
            }
        }
    }

    // to[r][c] (+)= sum over words k of a[r][k] b[k][c], for kRows rows and a strip of columns.
    template <bool add>
    static void tile(const Word* a, int64_t a_row, const Word* b, int64_t words, float* to, int64_t to_row) {
        V sum[kRows][kVectors];
        for (int r = 0; r < kRows; ++r) {
            for (int v = 0; v < kVectors; ++v) sum[r][v] = V(0.0f);
        }
        multiply<Form>(sum, a, a_row, b, words);
        for (int r = 0; r < kRows; ++r) {
            for (int v = 0; v < kVectors; ++v) {
                float* const at = to + r * to_row + v * V::W;
                store(at, add ? load(at) + sum[r][v] : sum[r][v]);
            }
        }
    }

    // The same for kRows rows after kRows rows. A long sum is one of short ones.
    template <bool add>
    static void product(const Word* a, int64_t a_row, const Word* b, int64_t words, float* to, int64_t to_row,
                        int64_t rows) {
        for (int64_t r = 0; r < rows; r += kRows) {
            const Word* const from = a + r * a_row;
            float* const at = to + r * to_row;
            tile<add>(from, a_row, b, smaller(kPart, words), at, to_row);
            for (int64_t k = kPart; k < words; k += kPart) {
                tile<true>(from + k, a_row, b + k * kStrip, smaller(kPart, words - k), at, to_row);
            }
        }
    }

    // What an item of work holds.
    struct Queries {
        Word query[kStreamedQueries * kStreamedChannels / kStep];
        float score[kStreamedQueries * kStreamedKeys];
        Word probability[kStreamedQueries * kStreamedKeys / kStep];
        float out[kStreamedQueries * kStreamedChannels];
        float most[kStreamedQueries], sum[kStreamedQueries];
    };

    // Turns a query's scores of `count` keys into exponentials, and what there is so far to their maximum.
    void exponentiate(Queries& of, int64_t r, int64_t count, bool begun) const {
        float* const score = of.score + r * kStreamedKeys;
        const V scale(static_cast<float>(call.scale));
        const int64_t end = padded_to(count, V::W);
        V top(kOut);
        for (int64_t j = 0; j < end; j += V::W) {
            store(score + j, load(score + j) * scale);
            for (int64_t i = larger(j, count); i < j + V::W; ++i) score[i] = kOut;
            top = max(load(score + j), top);
        }
        float most = highest(top);
        if (begun) {
            most = most < of.most[r] ? of.most[r] : most;
            const V factor = exponential(V(of.most[r] - most));
            for (int64_t c = 0; c < width; c += V::W) {
                store(of.out + r * width + c, load(of.out + r * width + c) * factor);
            }
            of.sum[r] *= highest(factor);
        }
        const V less(most);
        V sum(0.0f);
        for (int64_t j = 0; j < end; j += V::W) {
            const V p = exponential(load(score + j) - less);
            store(score + j, p);
            sum = sum + p;
        }
        of.most[r] = most;
        of.sum[r] += sum_of(sum);
        of_exponentials(of.probability + r * (kStreamedKeys / kStep), score, end);
    }

    void item(int64_t i) const {
        const int64_t head = i / runs, first = i % runs * kStreamedQueries;
        const int64_t rows = smaller(kStreamedQueries, shape.s - first), tiles = chunks_of(rows, kRows) * kRows;
        alignas(64) Queries of;
        for (int64_t r = 0; r < tiles; ++r) {
            Word* const query = of.query + r * depth;
            if (r < rows) {
                Form::of_row(query, token(call.q, head, first + r), shape.d);
            } else {
                memset(query, 0, static_cast<size_t>(depth) * sizeof(Word));
            }
        }
        memset(of.out, 0, static_cast<size_t>(tiles * width) * sizeof(float));
        memset(of.sum, 0, sizeof(of.sum));
        for (int64_t block = 0; block < blocks; ++block) {
            const int64_t count = smaller(kStreamedKeys, shape.t - block * kStreamedKeys);
            const Word *const keys = keys_of(head, block), *const values = values_of(head, block);
            for (int64_t j = 0; j < count; j += kStrip) {
                product<false>(of.query, depth, keys + j * depth, depth, of.score + j, kStreamedKeys, tiles);
            }
            for (int64_t r = 0; r < tiles; ++r) exponentiate(of, r, count, block > 0);
            for (int64_t c = 0; c < width; c += kStrip) {
                product<true>(of.probability, kStreamedKeys / kStep, values + c * (kStreamedKeys / kStep),
                              chunks_of(count, kStep), of.out + c, width, tiles);
            }
        }
        for (int64_t r = 0; r < rows; ++r) finish(of, r, head, first + r);
    }

    void finish(const Queries& of, int64_t r, int64_t head, int64_t index) const {
        const V inverse(1.0f / of.sum[r]);
        const int64_t sample = head / shape.h;
        T* const to = static_cast<T*>(call.out) + ((sample * shape.s + index) * shape.h + head % shape.h) * shape.d;
        for (int64_t c = 0; c < shape.d; c += V::W) {
            const V y = load(of.out + r * width + c) * inverse;
            if (c + V::W <= shape.d) {
                store(to + c, y);
            } else {
                store_some(to + c, y, shape.d - c);
            }
        }
        if (call.lse != nullptr) {
            static_cast<float*>(call.lse)[head * shape.s + index] = of.most[r] + __builtin_logf(of.sum[r]);
        }
    }

    void run() const {
        const int64_t heads = shape.n * shape.h;
        parallel(heads * blocks, call.num_threads, [&](int64_t i) { order(i / blocks, i % blocks); });
        parallel(heads * runs, call.num_threads, [&](int64_t i) { item(i); });
    }
};

template <class F>
void with_element(int32_t dtype, F&& f) {
    if (dtype == SDXL_FAST_F32) return f(Tag<float>{});
    if (dtype == SDXL_FAST_BF16) return f(Tag<BF16>{});
    f(Tag<F16>{});
}

}  // namespace

int64_t streamed_attention_workspace(const AttentionForward& call) {
    int64_t bytes = 0;
    with_element(call.dtype, [&](auto tag) { bytes = Streamed<typename decltype(tag)::Type>{call}.workspace(); });
    return bytes;
}

void streamed_attention_fwd(const AttentionForward& call) {
    with_element(call.dtype, [&](auto tag) { Streamed<typename decltype(tag)::Type>{call}.run(); });
}

}  // namespace SDXL_FAST_ISA
}  // namespace sdxl_fast
