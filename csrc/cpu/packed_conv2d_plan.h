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

struct PackedConv2dPlan {
    int64_t phases, taps;           // 1 and k^2, or for an upsampling 4 and 4
    int64_t p, q, step, positions;  // of a phase: positions, and how far apart they lie in the output
    int64_t padding, c_in, c_out;
    int64_t panels, tiles, group_tiles, groups;

    // Rows (or columns) of the map that lie before the first tap of the first position of a phase.
    SDXL_HD int64_t before(int64_t phase) const { return phases == 1 ? padding : 1 - phase; }
    // Channels of a panel.
    SDXL_HD int64_t width(int64_t panel) const {
        const int64_t left = c_out - panel * kPanel;
        return left > kPanel / 2 ? kPanel : kPanel / 2;
    }
    // Where a panel begins in the weight.
    SDXL_HD int64_t offset(int64_t phase, int64_t panel) const {
        return taps * c_in * (phase * phase_channels() + panel * kPanel);
    }
    SDXL_HD int64_t phase_channels() const { return (panels - 1) * kPanel + width(panels - 1); }
};

SDXL_HD PackedConv2dPlan plan_packed_conv2d(const PackedConv2dShape& s, int64_t tile) {
    PackedConv2dPlan plan{};
    plan.phases = s.upsample ? 4 : 1;
    plan.step = s.upsample ? 2 : 1;
    plan.taps = s.kernel * s.kernel;
    plan.padding = s.padding;
    plan.c_in = s.c_in;
    plan.c_out = s.c_out;
    plan.p = s.upsample ? s.h : (s.h + 2 * s.padding - s.kernel) / s.stride + 1;
    plan.q = s.upsample ? s.w : (s.w + 2 * s.padding - s.kernel) / s.stride + 1;
    plan.positions = s.n * plan.p * plan.q;
    plan.panels = (s.c_out + kPanel - 1) / kPanel;
    plan.tiles = (plan.positions + tile - 1) / tile;
    // A dozen items or more, where there are as many tiles: few enough to use a panel again while it is in the cache.
    const int64_t share = plan.tiles * plan.panels * plan.phases / 12;
    plan.group_tiles = share < 1 ? 1 : share < plan.tiles ? share : plan.tiles;
    plan.groups = (plan.tiles + plan.group_tiles - 1) / plan.group_tiles;
    return plan;
}

}  // namespace sdxl_fast
