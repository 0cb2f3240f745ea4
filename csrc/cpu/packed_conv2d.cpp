// SPDX-License-Identifier: Apache-2.0
//
// Convolutions of small channels_last maps, whose weight has been put in order once: y = sum over taps of x w + bias.
// A tile is kTileRows output positions times two vectors of output channels; of the weight it reads a panel of 32
// channels from one end to the other. Positions beyond the map read a row of zeros.
#include "kernels.h"
#include "packed_conv2d_plan.h"
#include "tiles.h"

namespace sdxl_fast {
namespace SDXL_FAST_ISA {
namespace {

struct Convolution {
    using V = VecF;
    const PackedConv2dCall& call;
    const PackedConv2dPlan plan = plan_packed_conv2d(call.shape, kTileRows);

    // Where the taps of a tile's positions begin, the map's or the row of zeros'.
    struct Rows {
        const float* at[kMostTaps][kTileRows];
    };

    void find_rows(int64_t tile, Rows& rows) const {
        const PackedConv2dShape& s = call.shape;
        for (int r = 0; r < kTileRows; ++r) {
            const int64_t position = tile * kTileRows + r;
            const int64_t j = position % plan.q, i = position / plan.q % plan.p, n = position / plan.q / plan.p;
            for (int64_t tap = 0; tap < plan.weight.taps; ++tap) {
                const int64_t row = i * s.stride + tap / s.kernel - s.padding;
                const int64_t column = j * s.stride + tap % s.kernel - s.padding;
                const bool inside = n < s.n && row >= 0 && row < s.h && column >= 0 && column < s.w;
                rows.at[tap][r] = inside ? call.x + ((n * s.h + row) * s.w + column) * s.c_in : call.zeros;
            }
        }
    }

    // The tile's sums of U vectors of channels from `channel` on, of which `left` exist.
    template <int U>
    void columns(const Rows& rows, const float* panel, int64_t width, int64_t tile, int64_t channel,
                 int64_t left) const {
        const PackedConv2dShape& s = call.shape;
        Tile<V, U> sum;
        for (int u = 0; u < U; ++u) {
            const int64_t rest = left - u * V::W;
            const V start = call.bias == nullptr || rest <= 0 ? V(0.0f)
                            : rest >= V::W                    ? load(call.bias + channel + u * V::W)
                                                              : load_some(call.bias + channel + u * V::W, rest);
            for (int r = 0; r < kTileRows; ++r) sum[r][u] = start;
        }
        for (int64_t tap = 0; tap < plan.weight.taps; ++tap) {
            accumulate<V, U>(sum, rows.at[tap], 1, panel + tap * s.c_in * width, width, s.c_in);
        }
        for (int r = 0; r < kTileRows; ++r) {
            const int64_t position = tile * kTileRows + r;
            if (position >= plan.positions) return;
            float* const y = call.y + position * s.c_out + channel;
            for (int u = 0; u < U; ++u) {
                const int64_t rest = left - u * V::W;
                if (rest >= V::W) {
                    store(y + u * V::W, sum[r][u]);
                } else if (rest > 0) {
                    store_some(y + u * V::W, sum[r][u], rest);
                }
            }
        }
    }

    void item(int64_t i) const {
        const PackedConv2dShape& s = call.shape;
        const int64_t group = i % plan.groups, panel = i / plan.groups;
        const int64_t first = panel * kPanel, width = plan.weight.width(panel);
        const float* const weight = call.weight + plan.weight.offset(panel);
        const int64_t end = smaller((group + 1) * plan.group_tiles, plan.tiles);
        for (int64_t tile = group * plan.group_tiles; tile < end; ++tile) {
            Rows rows;
            find_rows(tile, rows);
            int64_t at = 0;
            for (; at + V::W < width; at += 2 * V::W) {
                columns<2>(rows, weight + at, width, tile, first + at, s.c_out - first - at);
            }
            if (at < width) columns<1>(rows, weight + at, width, tile, first + at, s.c_out - first - at);
        }
    }
};

}  // namespace

void packed_conv2d_fwd(const PackedConv2dCall& call) {
    const Convolution convolution{call};
    const PackedConv2dPlan& plan = convolution.plan;
    const int64_t work = plan.positions * plan.weight.taps * call.shape.c_in * call.shape.c_out / 8;
    parallel(plan.weight.count() * plan.groups, threads_for(work, call.num_threads),
             [&](int64_t i) { convolution.item(i); });
}

}  // namespace SDXL_FAST_ISA
}  // namespace sdxl_fast
