// SPDX-License-Identifier: Apache-2.0
//
// group_norm_silu: y = act(GroupNorm(x + shift)), forward. The channels may come from two tensors, x's before skip's
// (NHWC): each chunk then takes its lanes of one after those of the other, and everything else is as for one.
//   1. each chunk of a sample leaves mean and sum of squared deviations per lane (group_norm_lanes.h)
//   2. per group, the records are merged in double; what a lane needs for the output goes into a table
//   3. each chunk is normalised and activated
// Traffic: x twice, y once. A wave of samples that fits the cache goes through all steps together, and step 3 walks
// the chunks backwards, so that it starts on what step 1 read last. Nothing is added to memory that another thread
// writes, so the result is the same on every run and for any number of threads.
#include "group_norm_lanes.h"
#include "group_norm_plan.h"
#include "group_norm_span.h"

namespace sdxl_fast {
namespace SDXL_FAST_ISA {
namespace {

template <class T>
struct Forward {
    using A = Acc<T>;
    const GroupNormForward& call;
    const GroupNormPlan plan;
    const T *x, *skip;
    T* y;
    A *records, *tables;

    explicit Forward(const GroupNormForward& c)
        : call(c),
          plan(plan_group_norm(c.shape)),
          x(static_cast<const T*>(c.x)),
          skip(static_cast<const T*>(c.skip)),
          y(static_cast<T*>(c.y)),
          records(static_cast<A*>(c.workspace)),
          tables(records + c.shape.n * plan.chunks * kForwardRecord * plan.padded) {}

    A* record(int64_t sample, int64_t chunk) const {
        return records + (sample * plan.chunks + chunk) * kForwardRecord * plan.padded;
    }
    A* table(int64_t sample) const { return tables + sample * kForwardTables * plan.padded; }

    // NHWC: f(first row of the chunk in a tensor, the first lane that it holds, how many) for each of the tensors.
    template <class F>
    void each_source(int64_t sample, int64_t item, F&& f) const {
        const int64_t row = sample * plan.rows + item * plan.chunk_rows;
        const int64_t split = plan.lanes - plan.shape.c_skip;
        f(x + row * split, 0, split);
        if (plan.shape.c_skip > 0) f(skip + row * plan.shape.c_skip, split, plan.shape.c_skip);
    }

    void moments(int64_t sample, int64_t item) const {
        if (plan.shape.nhwc) {
            A* const r = record(sample, item);
            each_source(sample, item, [&](const T* from, int64_t first, int64_t lanes) {
                lane_moments(from, plan.count(item), lanes, lanes, r + first, r + plan.padded + first);
            });
            return;
        }
        const T* const from = x + sample * plan.sample();
        each_span(plan, item, [&](int64_t channel, int64_t chunk, int64_t offset, int64_t count) {
            A* const r = record(sample, chunk);
            span_moments(from + offset, count, r[channel], r[plan.padded + channel]);
        });
    }

    // Mean and rstd of one group, and the table entries of its lanes.
    void finish(int64_t sample, int64_t group) const {
        const int64_t c = plan.shape.c, p = plan.padded, first = group * plan.per_group;
        const double values = static_cast<double>(larger(plan.per_group * plan.shape.hw, 1));
        A* const centre = table(sample);  // holds the shifts of the channels until the mean is known
        for (int64_t k = first; k < first + plan.per_group; ++k) {
            centre[k] = static_cast<A>(parameter(call.shift, call.dtype, sample * c + k, 0.0));
        }
        const double mean =
            total(sample, group, [](double count, double value, double) { return count * value; }) / values;
        const double m2 = total(sample, group, [=](double count, double value, double square) {
            return square + count * (value - mean) * (value - mean);
        });
        const double rstd = 1.0 / __builtin_sqrt(m2 / values + call.eps);
        static_cast<A*>(call.mean)[sample * plan.shape.groups + group] = static_cast<A>(mean);
        static_cast<A*>(call.rstd)[sample * plan.shape.groups + group] = static_cast<A>(rstd);
        for (int64_t k = first; k < first + plan.per_group; ++k) {
            const double from = mean - static_cast<double>(centre[k]);
            const double scale = rstd * parameter(call.weight, call.param_dtype, k, 1.0);
            double bias = parameter(call.bias, call.param_dtype, k, 0.0);
            if (kFoldedCentre<T>) bias -= from * scale;
            const double factor = kFoldedCentre<T> && call.silu ? kSiluScale : 1.0;
            for (int64_t lane = k; lane < plan.lanes; lane += c) {
                centre[lane] = static_cast<A>(from);
                centre[p + lane] = static_cast<A>(factor * scale);
                centre[2 * p + lane] = static_cast<A>(factor * bias);
            }
        }
    }

    template <bool silu_on, bool streaming>
    void apply(int64_t sample, int64_t item) const {
        T* const to = y + sample * plan.sample();
        const auto tables_from = [&](int64_t lane) -> ApplyTables<A> {
            const A* const t = table(sample) + lane;
            return {t, t + plan.padded, t + 2 * plan.padded};
        };
        if (plan.shape.nhwc) {
            T* const row = to + item * plan.chunk_rows * plan.lanes;
            each_source(sample, item, [&](const T* from, int64_t first, int64_t lanes) {
                lane_apply<T, silu_on, false, streaming>(from, lanes, row + first, plan.lanes, plan.count(item), lanes,
                                                         tables_from(first));
            });
        } else {
            const T* const from = x + sample * plan.sample();
            each_span(plan, item, [&](int64_t channel, int64_t, int64_t offset, int64_t count) {
                lane_apply<T, silu_on, true, streaming>(from + offset, count, to + offset, count, 1, count,
                                                        tables_from(channel));
            });
        }
        if (streaming) stream_fence();
    }

    template <bool silu_on, bool streaming>
    void run() const {
        const Wave wave(plan, sizeof(T), call.num_threads);
        for (int64_t begin = 0; begin < plan.shape.n; begin += wave.samples) {
            const int64_t samples = smaller(wave.samples, plan.shape.n - begin), items = plan.items();
            parallel(samples * items, wave.threads, [&](int64_t i) { moments(begin + i / items, i % items); });
            parallel(samples * plan.shape.groups, wave.threads_for_groups,
                     [&](int64_t i) { finish(begin + i / plan.shape.groups, i % plan.shape.groups); });
            parallel(samples * items, wave.threads, [&](int64_t i) {
                const int64_t last = samples * items - 1 - i;
                apply<silu_on, streaming>(begin + last / items, last % items);
            });
        }
    }

    // Sum over the records of a group of f(count, mean after the shift, sum of squared deviations). It goes over the
    // chunks for some channels at a time, side by side, so that the compiler can take them as vectors.
    template <class F>
    double total(int64_t sample, int64_t group, F&& f) const {
        constexpr int64_t kChannels = 64, kFew = 16;
        const int64_t end = (group + 1) * plan.per_group;
        double sum = 0;
        if (plan.chunks == 1 && plan.lanes == plan.shape.c && plan.per_group <= kFew) {
            const A *const mean = record(sample, 0), *const square = mean + plan.padded, *const shift = table(sample);
            for (int64_t k = group * plan.per_group; k < end; ++k) {
                sum += f(static_cast<double>(plan.count(0)),
                         static_cast<double>(mean[k]) + static_cast<double>(shift[k]), static_cast<double>(square[k]));
            }
            return sum;
        }
        for (int64_t first = group * plan.per_group; first < end; first += kChannels) {
            const int64_t channels = smaller(kChannels, end - first);
            const A* const shift = table(sample) + first;
            double part[kChannels] = {};
            for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
                const double count = static_cast<double>(plan.count(chunk));
                for (int64_t lane = first; lane < plan.lanes; lane += plan.shape.c) {
                    const A *const mean = record(sample, chunk) + lane, *const square = mean + plan.padded;
                    for (int64_t k = 0; k < channels; ++k) {
                        part[k] += f(count, static_cast<double>(mean[k]) + static_cast<double>(shift[k]),
                                     static_cast<double>(square[k]));
                    }
                }
            }
            for (int64_t k = 0; k < channels; ++k) sum += part[k];
        }
        return sum;
    }
};

}  // namespace

void group_norm_silu_fwd(const GroupNormForward& call) {
    with_dtype(call.dtype, [&](auto tag) {
        using T = typename decltype(tag)::Type;
        const Forward<T> forward(call);
        with_bool(call.silu, [&](auto silu_on) {
            with_bool(may_stream<T>(forward.plan, call.y), [&](auto streaming) {
                forward.template run<decltype(silu_on)::value, decltype(streaming)::value>();
            });
        });
    });
}

}  // namespace SDXL_FAST_ISA
}  // namespace sdxl_fast
