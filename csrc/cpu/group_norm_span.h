// SPDX-License-Identifier: Apache-2.0
//
// What forward and backward of group_norm_silu share outside their inner loops.
#pragma once

#include "common/welford.h"
#include "group_norm_lanes.h"
#include "group_norm_plan.h"

namespace sdxl_fast {
namespace SDXL_FAST_ISA {
namespace {

// Element i of an array of the given dtype; `fallback` for a null array.
inline double parameter(const void* p, int32_t dtype, int64_t i, double fallback) {
    if (p == nullptr) return fallback;
    switch (dtype) {
        case SDXL_FAST_F32:
            return static_cast<const float*>(p)[i];
        case SDXL_FAST_F64:
            return static_cast<const double*>(p)[i];
        case SDXL_FAST_BF16:
            return bf16_to_float(static_cast<const BF16*>(p)[i]);
        default:
            return f16_to_float(static_cast<const F16*>(p)[i]);
    }
}

inline void set_parameter(void* p, int32_t dtype, int64_t i, double value) {
    switch (dtype) {
        case SDXL_FAST_F32:
            static_cast<float*>(p)[i] = static_cast<float>(value);
            break;
        case SDXL_FAST_F64:
            static_cast<double*>(p)[i] = value;
            break;
        case SDXL_FAST_BF16:
            static_cast<BF16*>(p)[i] = float_to_bf16(static_cast<float>(value));
            break;
        default:
            static_cast<F16*>(p)[i] = float_to_f16(static_cast<float>(value));
    }
}

// NCHW: f(channel, chunk, offset in the sample, elements) for each piece of a channel in an item of work.
template <class F>
inline void each_span(const GroupNormPlan& plan, int64_t item, F&& f) {
    const int64_t chunk = item % plan.chunks, first = item / plan.chunks * plan.channel_block;
    const int64_t end = smaller(first + plan.channel_block, plan.shape.c), count = plan.count(chunk);
    for (int64_t channel = first; channel < end; ++channel) {
        f(channel, chunk, channel * plan.shape.hw + chunk * plan.chunk_rows, count);
    }
}

// A run of elements of one lane is taken as rows of 256, then 16, then 1 side by side, to have vectors to work with.
// f(offset, rows, width) for each.
constexpr int64_t kSpanWidth = 256;
template <class F>
inline void each_width(int64_t count, F&& f) {
    int64_t offset = 0;
    for (int64_t width = kSpanWidth; width >= 1; width /= 16) {
        // Wide rows want enough of them to pay for merging their lanes.
        const int64_t rows = width == kSpanWidth && count < 16 * kSpanWidth ? 0 : (count - offset) / width;
        if (rows > 0) f(offset, rows, width);
        offset += rows * width;
    }
}

// Mean and sum of squared deviations of consecutive elements.
template <class T>
void span_moments(const T* x, int64_t count, Acc<T>& mean, Acc<T>& m2) {
    Moments<double> all;
    each_width(count, [&](int64_t offset, int64_t rows, int64_t width) {
        Acc<T> means[kSpanWidth + kPadLanes], squares[kSpanWidth + kPadLanes];
        lane_moments(x + offset, rows, width, width, means, squares);
        Moments<double> part;
        for (int64_t l = 0; l < width; ++l) part.mean += static_cast<double>(means[l]);
        part.mean /= static_cast<double>(width);
        for (int64_t l = 0; l < width; ++l) {
            const double delta = static_cast<double>(means[l]) - part.mean;
            part.m2 += static_cast<double>(squares[l]) + static_cast<double>(rows) * delta * delta;
        }
        part.count = static_cast<double>(rows * width);
        all.merge(part);
    });
    mean = static_cast<Acc<T>>(all.mean);
    m2 = static_cast<Acc<T>>(all.m2);
}

// Samples that are taken through all steps together: a few megabytes, so that later steps find them in the cache.
struct Wave {
    int64_t samples;
    int32_t threads, threads_for_groups;

    Wave(const GroupNormPlan& plan, int64_t element_bytes, int32_t num_threads) {
        const int64_t bytes = larger(plan.sample() * element_bytes, 1);
        samples = larger(1, smaller(plan.shape.n, last_level_cache_bytes() / 4 / bytes));
        threads = threads_for(samples * plan.sample(), num_threads);
        threads_for_groups = threads_for(samples * plan.chunks * plan.lanes, num_threads);
    }
};

// Whether an output is large enough to be streamed past the caches and aligned throughout.
template <class T>
bool may_stream(const GroupNormPlan& plan, const void* out) {
    // what is written in one go: the lanes of a row, of two tensors each one's
    const int64_t run = (plan.shape.nhwc ? plan.lanes : plan.shape.hw) * static_cast<int64_t>(sizeof(T));
    const int64_t second = plan.shape.c_skip * static_cast<int64_t>(sizeof(T));
    const int64_t bytes = plan.shape.n * plan.sample() * static_cast<int64_t>(sizeof(T));
    return bytes >= streaming_threshold() && aligned_to_line(out) && run % 64 == 0 && second % 64 == 0;
}

}  // namespace
}  // namespace SDXL_FAST_ISA
}  // namespace sdxl_fast
