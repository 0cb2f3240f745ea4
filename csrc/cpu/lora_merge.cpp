// SPDX-License-Identifier: Apache-2.0
//
// lora_merge: weight = base + scale * up * down, module after module, sums in float, rounded once. A small product of
// matrices in front of one read and one write of the weight. An item of work is 96 rows by as many columns as have
// their part of `down` copied together in 128 KB: in the L2 cache, and without the strides of its rows, which share a
// few sets of the L1 cache. Six rows of the weight are then walked along, a strip of columns in registers. bfloat16
// factors are multiplied in pairs of ranks where the CPU can.
#include "kernels.h"
#include "words.h"

namespace sdxl_fast {
namespace SDXL_FAST_ISA {
namespace {

constexpr int64_t kItemRows = 96, kItemCols = 512;
constexpr int64_t kMostRanks = 512;  // summed over at a time
constexpr int64_t kCopied = 32768;   // words of `down` together

template <class T, class F>
struct Item {
    using V = typename VecOf<T>::Type;
    using Form = typename FormOf<V, F>::Type;
    using Word = typename Form::Word;
    static constexpr int64_t kStrip = Form::kStrip, kUpRow = kMostRanks / Form::kStep;

    const sdxl_fast_lora_module& m;
    Word down[kCopied];  // strip after strip, in each a row per word of ranks
    Word up[kRows * kUpRow];
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
                Form::of_rows(to, from + k * m.cols + strip, m.cols, ranks - k, cols - strip);
            }
        }
    }

    void copy_up(int64_t row, int64_t rows, int64_t first, int64_t ranks) {
        for (int64_t i = 0; i < rows; ++i) {
            Form::of_row(up + i * kUpRow, static_cast<const F*>(m.up) + (row + i) * m.rank + first, ranks);
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
                    multiply<Form>(sum, up, kUpRow, down + c * words, words);
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
