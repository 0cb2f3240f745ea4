// SPDX-License-Identifier: Apache-2.0
//
// Backward of group_norm_silu. With g = dy * act'(z), D the values of a group, and means over a group:
//   dweight[c] = sum g xhat,  dbias[c] = sum g
//   dx = rstd (g w - mean(g w) - xhat mean(g w xhat)),  dshift[n, c] = sum of dx over the pixels
//   1. each chunk leaves the sums of g, g xhat and xhat per lane
//   2. per group, they are merged in double: the two means, and dshift in closed form
//   3. dx, chunk by chunk; dweight and dbias by summing over the samples
// Traffic: dy and x twice, dx once. Waves, order and determinism as in the forward.
#include "group_norm_lanes.h"
#include "group_norm_plan.h"
#include "group_norm_span.h"

namespace sdxl_fast {
namespace SDXL_FAST_ISA {
namespace {

template <class T>
struct Backward {
    using A = Acc<T>;
    const GroupNormBackward& call;
    const GroupNormPlan plan;
    const T *dy, *x;
    T* dx;
    double* totals;
    A *records, *tables;

    explicit Backward(const GroupNormBackward& c)
        : call(c),
          plan(plan_group_norm(c.shape)),
          dy(static_cast<const T*>(c.dy)),
          x(static_cast<const T*>(c.x)),
          dx(static_cast<T*>(c.dx)),
          totals(static_cast<double*>(c.workspace)),
          records(reinterpret_cast<A*>(totals + c.shape.n * kBackwardTotals * plan.padded)),
          tables(records + c.shape.n * plan.chunks * kBackwardRecord * plan.padded) {}

    A* record(int64_t sample, int64_t chunk) const {
        return records + (sample * plan.chunks + chunk) * kBackwardRecord * plan.padded;
    }
    double* total_of(int64_t sample) const { return totals + sample * kBackwardTotals * plan.padded; }

    GradientTables<A> tables_of(int64_t sample, int64_t lane) const {
        A* const t = table(sample, 0) + lane;
        const int64_t p = plan.padded;
        return {t, t + p, t + 2 * p, t + 3 * p, t + 4 * p, t + 5 * p, t + 6 * p};
    }
    A* table(int64_t sample, int which) const { return tables + (sample * kBackwardTables + which) * plan.padded; }

    // Fills in what is known before the sums: mean, shift, rstd, weight, bias.
    void prepare(int64_t sample, int64_t group) const {
        const int64_t statistic = sample * plan.shape.groups + group, first = group * plan.per_group;
        const A mean = static_cast<const A*>(call.mean)[statistic], rstd = static_cast<const A*>(call.rstd)[statistic];
        for (int64_t k = first; k < first + plan.per_group; ++k) {
            const double shift = parameter(call.shift, call.dtype, sample * plan.shape.c + k, 0.0);
            const A weight = static_cast<A>(parameter(call.weight, call.param_dtype, k, 1.0));
            const A bias = static_cast<A>(parameter(call.bias, call.param_dtype, k, 0.0));
            const A values[5] = {mean, static_cast<A>(shift), rstd, weight, bias};
            for (int64_t lane = k; lane < plan.lanes; lane += plan.shape.c) {
                for (int i = 0; i < 5; ++i) table(sample, i)[lane] = values[i];
            }
        }
    }

    template <class M, bool silu_on>
    void sums(int64_t sample, int64_t item) const {
        const int64_t base = sample * plan.sample();
        if (plan.shape.nhwc) {
            const int64_t at = base + item * plan.chunk_rows * plan.lanes, p = plan.padded;
            A* const r = record(sample, item);
            for (int64_t i = 0; i < kBackwardRecord * p; ++i) r[i] = A(0);
            lane_gradient_sums<T, M, silu_on, false>(dy + at, x + at, plan.count(item), plan.lanes, plan.lanes,
                                                     tables_of(sample, 0), r, r + p, r + 2 * p);
            return;
        }
        each_span(plan, item, [&](int64_t channel, int64_t chunk, int64_t offset, int64_t count) {
            const GradientTables<A> t = tables_of(sample, channel);
            double all[kBackwardRecord] = {};
            each_width(count, [&](int64_t start, int64_t rows, int64_t width) {
                A part[kBackwardRecord][kSpanWidth + kPadLanes] = {};
                const int64_t at = base + offset + start;
                lane_gradient_sums<T, M, silu_on, true>(dy + at, x + at, rows, width, width, t, part[0], part[1],
                                                        part[2]);
                for (int k = 0; k < kBackwardRecord; ++k) {
                    for (int64_t l = 0; l < width; ++l) all[k] += static_cast<double>(part[k][l]);
                }
            });
            A* const r = record(sample, chunk) + channel;
            for (int k = 0; k < kBackwardRecord; ++k) r[k * plan.padded] = static_cast<A>(all[k]);
        });
    }

    // The two means of one group, the rest of the tables, dshift, and the totals of its channels.
    void finish(int64_t sample, int64_t group) const {
        const int64_t c = plan.shape.c, p = plan.padded, first = group * plan.per_group;
        const int64_t end = first + plan.per_group;
        const double values = static_cast<double>(larger(plan.per_group * plan.shape.hw, 1));
        double* const g = total_of(sample);
        double* const gx = g + p;
        double mean_g = 0, mean_gx = 0;
        for (int64_t channel = first; channel < end; ++channel) {
            g[channel] = channel_sum(sample, channel, 0);
            gx[channel] = channel_sum(sample, channel, 1);
            const double weight = static_cast<double>(table(sample, 3)[channel]);
            mean_g += weight * g[channel];
            mean_gx += weight * gx[channel];
        }
        mean_g /= values;
        mean_gx /= values;
        const double rstd = static_cast<double>(table(sample, 2)[first]);
        for (int64_t channel = first; channel < end; ++channel) {
            for (int64_t lane = channel; lane < plan.lanes; lane += c) {
                table(sample, 5)[lane] = static_cast<A>(mean_g);
                table(sample, 6)[lane] = static_cast<A>(mean_gx);
            }
            if (call.dshift == nullptr) continue;
            const double weight = static_cast<double>(table(sample, 3)[channel]);
            const double hat = channel_sum(sample, channel, 2);
            const double sum = weight * g[channel] - static_cast<double>(plan.shape.hw) * mean_g - hat * mean_gx;
            set_parameter(call.dshift, call.dtype, sample * c + channel, rstd * sum);
        }
    }

    double channel_sum(int64_t sample, int64_t channel, int which) const {
        double sum = 0;
        for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
            const A* const r = record(sample, chunk) + which * plan.padded;
            for (int64_t lane = channel; lane < plan.lanes; lane += plan.shape.c) sum += static_cast<double>(r[lane]);
        }
        return sum;
    }

    template <bool silu_on, bool streaming>
    void gradient(int64_t sample, int64_t item) const {
        const int64_t base = sample * plan.sample();
        if (plan.shape.nhwc) {
            const int64_t at = base + item * plan.chunk_rows * plan.lanes;
            lane_gradient<T, silu_on, false, streaming>(dy + at, x + at, dx + at, plan.count(item), plan.lanes,
                                                        plan.lanes, tables_of(sample, 0));
        } else {
            each_span(plan, item, [&](int64_t channel, int64_t, int64_t offset, int64_t count) {
                const int64_t at = base + offset;
                lane_gradient<T, silu_on, true, streaming>(dy + at, x + at, dx + at, 1, count, count,
                                                           tables_of(sample, channel));
            });
        }
        if (streaming) stream_fence();
    }

    void parameter_gradients() const {
        for (int64_t channel = 0; channel < plan.shape.c; ++channel) {
            double weight = 0, bias = 0;
            for (int64_t sample = 0; sample < plan.shape.n; ++sample) {
                bias += total_of(sample)[channel];
                weight += total_of(sample)[plan.padded + channel];
            }
            if (call.dweight != nullptr) set_parameter(call.dweight, call.param_dtype, channel, weight);
            if (call.dbias != nullptr) set_parameter(call.dbias, call.param_dtype, channel, bias);
        }
    }

    template <bool silu_on, bool streaming>
    void run() const {
        // Two tensors go through the cache here.
        const Wave wave(plan, 2 * sizeof(T), call.num_threads);
        const int64_t items = plan.items(), groups = plan.shape.groups;
        for (int64_t begin = 0; begin < plan.shape.n; begin += wave.samples) {
            const int64_t samples = smaller(wave.samples, plan.shape.n - begin);
            for (int64_t i = 0; i < samples * groups; ++i) prepare(begin + i / groups, i % groups);
            parallel(samples * items, wave.threads, [&](int64_t i) {
                // Float32 parameters beside two-byte elements get float32 gradients.
                if constexpr (sizeof(T) == 2) {
                    if (call.param_dtype == SDXL_FAST_F32) {
                        return sums<float, silu_on>(begin + i / items, i % items);
                    }
                }
                sums<T, silu_on>(begin + i / items, i % items);
            });
            parallel(samples * groups, wave.threads_for_groups,
                     [&](int64_t i) { finish(begin + i / groups, i % groups); });
            if (dx == nullptr) continue;
            parallel(samples * items, wave.threads, [&](int64_t i) {
                const int64_t last = samples * items - 1 - i;
                gradient<silu_on, streaming>(begin + last / items, last % items);
            });
        }
        if (call.dweight != nullptr || call.dbias != nullptr) parameter_gradients();
    }
};

}  // namespace

void group_norm_silu_bwd(const GroupNormBackward& call) {
    with_dtype(call.dtype, [&](auto tag) {
        using T = typename decltype(tag)::Type;
        const Backward<T> backward(call);
        with_bool(call.silu, [&](auto silu_on) {
            with_bool(may_stream<T>(backward.plan, call.dx), [&](auto streaming) {
                backward.template run<decltype(silu_on)::value, decltype(streaming)::value>();
            });
        });
    });
}

}  // namespace SDXL_FAST_ISA
}  // namespace sdxl_fast
