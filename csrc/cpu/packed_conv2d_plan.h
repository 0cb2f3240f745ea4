// SPDX-License-Identifier: Apache-2.0
//
// How packed_conv2d reads a shape and cuts its work into tiles of so many positions.
#pragma once

#include <stdint.h>

#include "common/macros.h"
#include "kernels.h"

namespace sdxl_fast {

constexpr int64_t kPanel = 32;  // output channels that lie side by side in the weight; of the last panel 16 or 32
constexpr int64_t kMostTaps = 9;

// A weight in order: panel after panel of output channels, in each [taps, c_in, channels of the panel], then zeros.
struct Panels {
    int64_t taps, c_in, c_out;

    SDXL_HD int64_t count() const { return (c_out + kPanel - 1) / kPanel; }
    // Channels of a panel.
    SDXL_HD int64_t width(int64_t panel) const { return c_out - panel * kPanel > kPanel / 2 ? kPanel : kPanel / 2; }
    // Where a panel begins.
    SDXL_HD int64_t offset(int64_t panel) const { return taps * c_in * panel * kPanel; }
    // Where the zeros begin.
    SDXL_HD int64_t end() const { return offset(count() - 1) + taps * c_in * width(count() - 1); }
};

struct PackedConv2dPlan {
    Panels weight;
    int64_t p, q, positions;
    int64_t tiles, group_tiles, groups;
};

SDXL_HD PackedConv2dPlan plan_packed_conv2d(const PackedConv2dShape& s, int64_t tile) {
    PackedConv2dPlan plan{};
    plan.weight = {s.kernel * s.kernel, s.c_in, s.c_out};
    plan.p = (s.h + 2 * s.padding - s.kernel) / s.stride + 1;
    plan.q = (s.w + 2 * s.padding - s.kernel) / s.stride + 1;
    plan.positions = s.n * plan.p * plan.q;
    plan.tiles = (plan.positions + tile - 1) / tile;
    // A dozen items or more, where there are as many tiles: few enough to use a panel again while it is in the cache.
    const int64_t share = plan.tiles * plan.weight.count() / 12;
    plan.group_tiles = share < 1 ? 1 : share < plan.tiles ? share : plan.tiles;
    plan.groups = (plan.tiles + plan.group_tiles - 1) / plan.group_tiles;
    return plan;
}

}  // namespace sdxl_fast
