// SPDX-License-Identifier: Apache-2.0
//
// lora_merge: weight = base + scale * up * down, module after module, sums in float, rounded once. A small product of
// matrices in front of one read and one write of the weight. An item of work is 96 rows by as many columns as have
// their part of `down` copied together in 128 KB: in the L2 cache, and without the strides of its rows, which share a
// few sets of the L1 cache. Six rows of the weight are then walked along, a strip of columns in registers. bfloat16
// factors are multiplied in pairs of ranks where the CPU can.
#include "kernels.h"
#include "loops.h"

namespace sdxl_fast {
namespace SDXL_FAST_ISA {
namespace {

constexpr int kRows = 6;                        // of the weight in registers
constexpr int kVectors = kWidth >= 16 ? 4 : 2;  // of columns beside them: a strip
constexpr int64_t kItemRows = 96, kItemCols = 512;
constexpr int64_t kMostRanks = 512;  // summed over at a time
constexpr int64_t kCopied = 32768;   // words of `down` together

// Factors as numbers of the type that is summed in.
template <class V, class F>
struct Single {
    using Word = typename V::Scalar;
    static constexpr int64_t kStep = 1;  // ranks in a word

    static void of_up(Word* to, const F* up, int64_t ranks) {
        for (int64_t k = 0; k < ranks; k += V::W) {
            store(to + k, k + V::W <= ranks ? V(load(up + k)) : V(load_some(up + k, ranks - k)));
        }
    }
    // W columns of a rank; `count` of them exist.
    static void of_down(Word* to, const F* down, int64_t, int64_t, int64_t count) {
        store(to, count >= V::W ? V(load(down)) : V(load_some(down, count)));
    }
    static V sum(V so_far, Word up, const Word* down) { return fma(V(up), V(load(down)), so_far); }
};

#if defined(__AVX512BF16__)
// Pairs of ranks, the first in the lower half of a word.
struct Pair {
    using Word = uint32_t;
    static constexpr int64_t kStep = 2;

    static void of_up(Word* to, const BF16* up, int64_t ranks) {
        to[(ranks - 1) / 2] = 0;
        memcpy(to, up, static_cast<size_t>(ranks) * sizeof(BF16));
    }
    static void of_down(Word* to, const BF16* down, int64_t ranks, int64_t cols, int64_t count) {
        const __m512i first = _mm512_cvtepu16_epi32(columns(down, count));
        const __m512i second = ranks > 1 ? _mm512_cvtepu16_epi32(columns(down + cols, count)) : _mm512_setzero_si512();
        _mm512_storeu_si512(to, _mm512_or_si512(first, _mm512_slli_epi32(second, 16)));
    }
    static VecF sum(VecF so_far, Word up, const Word* down) {
        const __m512i pairs = _mm512_set1_epi32(static_cast<int>(up));
        return _mm512_dpbf16_ps(so_far.v, (__m512bh)pairs, (__m512bh)_mm512_loadu_si512(down));
    }

    static __m256i columns(const BF16* from, int64_t count) {
        const __mmask16 mask = count >= 16 ? 0xffff : static_cast<__mmask16>((1 << (count > 0 ? count : 0)) - 1);
        return _mm256_maskz_loadu_epi16(mask, from);
    }
};
#endif

template <class T, class F>
struct FormOf {
    using Type = Single<typename VecOf<T>::Type, F>;
};
#if defined(__AVX512BF16__)
template <class T>
struct FormOf<T, BF16> {
    using Type = Pair;
};
#endif

template <class T, class F>
struct Item {
    using V = typename VecOf<T>::Type;
    using Form = typename FormOf<T, F>::Type;
    using Word = typename Form::Word;
    static constexpr int64_t kStrip = kVectors * V::W;

    const sdxl_fast_lora_module& m;
    Word down[kCopied];  // strip after strip, in each a row per word of ranks
    Word up[kRows][kMostRanks / Form::kStep];
    V sums[kItemRows][kVectors];  // of the ranks before, if there are more than kMostRanks

    explicit Item(const sdxl_fast_lora_module& module) : m(module) {
        memset(up, 0, sizeof(up));  // rows that are missing at the end
    }

    // How many columns have room for all their ranks.
    static int64_t cols_for(int64_t rank) {
        const int64_t fit = kCopied / larger(smaller(rank, kMostRanks), 1) / kStrip * kStrip;
        return smaller(larger(fit, kStrip), kItemCols);
    }

    void copy_down(int64_t first, int64_t ranks, int64_t col, int64_t cols) {
        const F* const from = static_cast<const F*>(m.down) + first * m.cols + col;
        Word* to = down;
        for (int64_t strip = 0; strip < cols; strip += kStrip) {
            for (int64_t k = 0; k < ranks; k += Form::kStep, to += kStrip) {
                for (int64_t c = 0; c < kStrip; c += V::W) {
                    const int64_t at = strip + c;
                    Form::of_down(to + c, from + k * m.cols + at, ranks - k, m.cols, cols - at);
                }
            }
        }
    }

    void copy_up(int64_t row, int64_t rows, int64_t first, int64_t ranks) {
        for (int64_t i = 0; i < rows; ++i) {
            Form::of_up(up[i], static_cast<const F*>(m.up) + (row + i) * m.rank + first, ranks);
        }
    }

    void multiply(V (&sum)[kRows][kVectors], const Word* of_down, int64_t words) const {
        for (int64_t k = 0; k < words; ++k) {
            for (int i = 0; i < kRows; ++i) {
                for (int v = 0; v < kVectors; ++v) {
                    sum[i][v] = Form::sum(sum[i][v], up[i][k], of_down + k * kStrip + v * V::W);
                }
            }
        }
    }

    // Asks for what a strip of the weight is made of; it comes while the strip is multiplied.
    void ask_for(int64_t row, int64_t rows, int64_t col, int64_t cols) const {
        for (int64_t i = 0; i < rows; ++i) {
            const T* const base = static_cast<const T*>(m.base) + (row + i) * m.cols + col;
            for (int64_t c = 0; c < cols; c += 64 / int64_t{sizeof(T)}) prefetch(base + c);
        }
    }

    template <bool streaming>
    void add(const V (&sum)[kRows][kVectors], int64_t row, int64_t rows, int64_t col, int64_t cols) const {
        const V scale(static_cast<typename V::Scalar>(m.scale));
        for (int64_t i = 0; i < rows; ++i) {
            const int64_t at = (row + i) * m.cols + col;
            const T* const base = static_cast<const T*>(m.base) + at;
            T* const weight = static_cast<T*>(m.weight) + at;
            for (int v = 0; v < kVectors; ++v) {
                const int64_t c = v * V::W;
                if (c + V::W <= cols) {
                    emit<streaming>(weight + c, fma(scale, sum[i][v], load(base + c)));
                } else if (c < cols) {
                    store_some(weight + c, fma(scale, sum[i][v], load_some(base + c, cols - c)), cols - c);
                }
            }
        }
    }

    template <bool streaming>
    void merge(int64_t row, int64_t rows, int64_t col, int64_t cols) {
        for (int64_t first = 0; first == 0 || first < m.rank; first += kMostRanks) {
            const int64_t ranks = smaller(kMostRanks, m.rank - first), words = chunks_of(ranks, Form::kStep);
            const bool last = first + kMostRanks >= m.rank;
            copy_down(first, ranks, col, cols);
            for (int64_t i = 0; i < rows; i += kRows) {
                const int64_t some = smaller(kRows, rows - i);
                copy_up(row + i, some, first, ranks);
                for (int64_t c = 0; c < cols; c += kStrip) {
                    V sum[kRows][kVectors];
                    const int64_t width = smaller(kStrip, cols - c);
                    if (last) ask_for(row + i, some, col + c, width);
                    // More ranks than fit leave room for one strip, and its sums wait here.
                    if (first > 0) {
                        memcpy(sum, sums[i], sizeof(sum));
                    } else {
                        memset(sum, 0, sizeof(sum));
                    }
                    multiply(sum, down + c * words, words);
                    if (last) {
                        add<streaming>(sum, row + i, some, col + c, width);
                    } else {
                        memcpy(sums[i], sum, sizeof(sum));
                    }
                }
            }
        }
    }
};

template <class T, class F>
void merge_all(const LoraMergeCall& call) {
    int64_t bytes = 0;
    for (int64_t i = 0; i < call.count; ++i) {
        bytes += call.modules[i].rows * call.modules[i].cols * int64_t{sizeof(T)};
    }
    for (int64_t i = 0; i < call.count; ++i) {
        const sdxl_fast_lora_module& m = call.modules[i];
        // Rows and strips begin at a line.
        const bool streaming =
            bytes >= streaming_threshold() && aligned_to_line(m.weight) && m.cols * int64_t{sizeof(T)} % 64 == 0;
        const int64_t cols = Item<T, F>::cols_for(m.rank), across = chunks_of(m.cols, cols);
        const int32_t threads = threads_for(m.rows * m.cols, call.num_threads);
        parallel(across * chunks_of(m.rows, kItemRows), threads, [&](int64_t item) {
            const int64_t row = item / across * kItemRows, col = item % across * cols;
            Item<T, F> work(m);
            with_bool(streaming, [&](auto past_the_cache) {
                work.template merge<past_the_cache.value>(row, smaller(kItemRows, m.rows - row), col,
                                                          smaller(cols, m.cols - col));
            });
            if (streaming) stream_fence();
        });
    }
}

}  // namespace

void lora_merge_fwd(const LoraMergeCall& call) {
    with_dtype(call.dtype, [&](auto tag) {
        using T = typename decltype(tag)::Type;
        if constexpr (sizeof(T) == sizeof(double)) {
            merge_all<T, T>(call);
        } else {
            switch (call.factor_dtype) {
                case SDXL_FAST_F32:
                    return merge_all<T, float>(call);
                case SDXL_FAST_BF16:
                    return merge_all<T, BF16>(call);
                default:
                    return merge_all<T, F16>(call);
            }
        }
    });
}

}  // namespace SDXL_FAST_ISA
}  // namespace sdxl_fast
