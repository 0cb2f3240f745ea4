// SPDX-License-Identifier: Apache-2.0
//
// 3x3 convolutions of channels_last maps, stride 1, padding 1, with 16 multiplications where there are 36: Winograd's
// F(2x2, 3x3) (Lavin & Gray 2016, arXiv:1509.09308, section 4.1). A tile is 2 x 2 output positions, for which 4 x 4 of
// the input are seen. An item of work is a block of tiles: they are transformed into 16 points, at each of which the
// channels are multiplied by the weight of that point, panel after panel of output channels, and transformed back.
// The weight was transformed once, in double precision.
//
// In a map doubled by nearest neighbours the middle two of the four positions are the same one, so that one of four
// differences is zero in each direction: 9 points are left, and the doubled map is never made.
#include "kernels.h"
#include "tiles.h"
#include "winograd_conv2d_plan.h"

namespace sdxl_fast {
namespace SDXL_FAST_ISA {
namespace {

using V = VecF;

struct Winograd {
    const WinogradCall& call;
    const WinogradShape& shape = call.shape;
    const WinogradPlan plan = plan_winograd(call.shape);

    // What an item of work holds: by point and tile the channels that go in, and those of a panel that come out.
    struct Block {
        float in[kWinogradPoints * kBlockValues];
        float out[kWinogradPoints * kMostBlockTiles * kPanel];
    };

    float* in(Block& of, int64_t point, int64_t t) const { return of.in + (point * plan.block + t) * plan.padded; }
    float* out(Block& of, int64_t point, int64_t t) const { return of.out + (point * plan.block + t) * kPanel; }

    struct Place {
        int64_t n, row, column;  // of the first output position
    };
    Place place(int64_t tile) const {
        const int64_t column = tile % plan.columns, row = tile / plan.columns % plan.rows;
        return {tile / plan.columns / plan.rows, 2 * row, 2 * column};
    }

    // B^T d B of the positions of the input around a tile, kSide x kSide of them.
    template <bool upsample>
    void spread(Block& of, int64_t tile, int64_t t) const {
        constexpr int kSide = upsample ? 3 : 4;
        const Place at = place(tile);
        const int64_t first_row = (upsample ? at.row / 2 : at.row) - 1;
        const int64_t first_column = (upsample ? at.column / 2 : at.column) - 1;
        const float* from[kSide][kSide];
        for (int a = 0; a < kSide; ++a) {
            for (int b = 0; b < kSide; ++b) {
                const int64_t row = first_row + a, column = first_column + b;
                const bool inside = row >= 0 && row < shape.h && column >= 0 && column < shape.w;
                from[a][b] = inside ? call.x + ((at.n * shape.h + row) * shape.w + column) * shape.c_in : call.zeros;
            }
        }
        int64_t c = 0;
        for (; c + V::W <= shape.c_in; c += V::W) spread_vector<kSide, true>(of, from, t, c);
        if (c < shape.c_in) spread_vector<kSide, false>(of, from, t, c);
    }

    // B^T d: of four positions, or of three of which the middle one stands twice.
    static void differences(const V (&d)[4], V (&to)[4]) {
        to[0] = d[0] - d[2];
        to[1] = d[1] + d[2];
        to[2] = d[2] - d[1];
        to[3] = d[1] - d[3];
    }
    static void differences(const V (&d)[3], V (&to)[3]) {
        to[0] = d[0] - d[1];
        to[1] = d[1] + d[1];
        to[2] = d[1] - d[2];
    }

    template <int kSide, bool full>
    void spread_vector(Block& of, const float* (&from)[kSide][kSide], int64_t t, int64_t c) const {
        V rows[kSide][kSide];
        for (int b = 0; b < kSide; ++b) {
            V d[kSide], to[kSide];
            for (int a = 0; a < kSide; ++a) d[a] = fetch<full>(from[a][b] + c, shape.c_in - c);
            differences(d, to);
            for (int a = 0; a < kSide; ++a) rows[a][b] = to[a];
        }
        for (int a = 0; a < kSide; ++a) {
            V to[kSide];
            differences(rows[a], to);
            for (int b = 0; b < kSide; ++b) store(in(of, kSide * a + b, t) + c, to[b]);
        }
    }

    // The products of a point for kTileRows tiles from t on, of which `count` exist, and U vectors of a panel.
    template <int U>
    void multiply(Block& of, const float* weight, int64_t width, int64_t point, int64_t t, int64_t count,
                  int64_t at) const {
        Tile<V, U> sum;
        const float* rows[kTileRows];
        for (int r = 0; r < kTileRows; ++r) {
            rows[r] = in(of, point, t + smaller(r, count - 1));
            for (int u = 0; u < U; ++u) sum[r][u] = V(0.0f);
        }
        accumulate<V, U>(sum, rows, 1, weight + at, width, shape.c_in);
        for (int r = 0; r < kTileRows; ++r) {
            for (int u = 0; u < U; ++u) store(out(of, point, t + r) + at + u * V::W, sum[r][u]);
        }
    }

    // A^T m.
    static void sums(const V (&m)[4], V (&to)[2]) {
        to[0] = m[0] + m[1] + m[2];
        to[1] = m[1] - m[2] - m[3];
    }
    static void sums(const V (&m)[3], V (&to)[2]) {
        to[0] = m[0] + m[1];
        to[1] = m[1] - m[2];
    }

    // A^T m A, and the bias: the 2 x 2 positions of a tile, of the channels of a panel from `first` on.
    template <bool upsample>
    void gather(Block& of, int64_t tile, int64_t t, int64_t first, int64_t channels) const {
        constexpr int kSide = upsample ? 3 : 4;
        const Place to = place(tile);
        for (int64_t c = 0; c < channels; c += V::W) {
            V rows[2][kSide];
            for (int b = 0; b < kSide; ++b) {
                V m[kSide], two[2];
                for (int a = 0; a < kSide; ++a) m[a] = load(out(of, kSide * a + b, t) + c);
                sums(m, two);
                for (int a = 0; a < 2; ++a) rows[a][b] = two[a];
            }
            const int64_t left = channels - c;
            V bias(0.0f);
            if (call.bias != nullptr) {
                bias = left >= V::W ? load(call.bias + first + c) : load_some(call.bias + first + c, left);
            }
            for (int a = 0; a < 2; ++a) {
                if (to.row + a >= plan.p) continue;
                V two[2];
                sums(rows[a], two);
                put_channels(to, a, 0, first + c, two[0] + bias, left);
                if (to.column + 1 < plan.q) put_channels(to, a, 1, first + c, two[1] + bias, left);
            }
        }
    }

    void put_channels(const Place& to, int64_t a, int64_t b, int64_t channel, V value, int64_t left) const {
        const int64_t position = (to.n * plan.p + to.row + a) * plan.q + to.column + b;
        float* const y = call.y + position * shape.c_out + channel;
        if (left >= V::W) {
            store(y, value);
        } else {
            store_some(y, value, left);
        }
    }

    template <bool upsample>
    void item(int64_t i) const {
        alignas(64) Block of;
        const int64_t first = i * plan.block, count = smaller(plan.block, plan.tiles - first);
        for (int64_t t = 0; t < count; ++t) spread<upsample>(of, first + t, t);
        for (int64_t panel = 0; panel < plan.weight.count(); ++panel) {
            const int64_t width = plan.weight.width(panel);
            for (int64_t point = 0; point < plan.weight.taps; ++point) {
                const float* const weight = call.weight + plan.weight.offset(panel) + point * shape.c_in * width;
                for (int64_t t = 0; t < count; t += kTileRows) {
                    int64_t at = 0;
                    for (; at + V::W < width; at += 2 * V::W) multiply<2>(of, weight, width, point, t, count - t, at);
                    if (at < width) multiply<1>(of, weight, width, point, t, count - t, at);
                }
            }
            const int64_t channel = panel * kPanel, channels = smaller(width, shape.c_out - channel);
            for (int64_t t = 0; t < count; ++t) gather<upsample>(of, first + t, t, channel, channels);
        }
    }
};

}  // namespace

void winograd_conv2d_fwd(const WinogradCall& call) {
    const Winograd winograd{call};
    const int64_t work = winograd.plan.tiles * winograd.plan.weight.taps * call.shape.c_in * call.shape.c_out / 8;
    with_bool(call.shape.upsample, [&](auto upsample) {
        parallel(winograd.plan.blocks, threads_for(work, call.num_threads),
                 [&](int64_t i) { winograd.template item<upsample.value>(i); });
    });
}

}  // namespace SDXL_FAST_ISA
}  // namespace sdxl_fast
