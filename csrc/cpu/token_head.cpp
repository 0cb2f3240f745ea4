// SPDX-License-Identifier: Apache-2.0
//
// token_head: logit[l] = sum over c of direction[c] (residual + LeakyReLU(GroupNorm(hidden)))[c, l] + offset.
//   forward   an item of work is a group of a sample, which lies in one piece and is read three times, from the cache
//             after the first; it leaves its part of the sample's logits, which are then added up in a fixed order
//   backward  with s[l] = dlogit[l] LeakyReLU'(z): sums of s and s xhat per channel, then
//             dhidden = rstd (weight direction s - c1 - xhat c2), c1 and c2 being the group's means of what is before
//             and of that times xhat
#include <string.h>

#include "kernels.h"
#include "rows.h"
#include "token_head_plan.h"

namespace sdxl_fast {
namespace SDXL_FAST_ISA {
namespace {

template <class A>
constexpr A kSlope = A(0.2);

inline VecF leaky(VecF z) {
    return max(z, z * VecF(kSlope<float>));
}
inline VecD leaky(VecD z) {
    return z.v > 0 ? z.v : z.v * kSlope<double>;
}

constexpr int64_t kAhead = 256;  // elements that the backward asks for ahead

// The derivative of leaky, which is kSlope at zero.
inline VecF leaky_slope(VecF z) {
    return select_negative(VecF(0.0f) - z, VecF(1.0f), VecF(kSlope<float>));
}
inline VecD leaky_slope(VecD z) {
    return z.v > 0 ? 1.0 : kSlope<double>;
}

template <class T, class P>
struct Forward {
    using V = typename VecOf<T>::Type;
    using A = typename V::Scalar;
    const TokenHeadForward& call;

    int64_t group_channels() const { return call.c / call.groups; }
    A* part(int64_t item) const { return static_cast<A*>(call.workspace) + item * token_head_padded(call.length); }

    // `more`: whether the next item follows. Items are too short for the memory's own prefetching to find its way.
    void group(int64_t item, bool more) const {
        const int64_t sample = item / call.groups, first = item % call.groups * group_channels();
        const int64_t at = (sample * call.c + first) * call.length, count = group_channels() * call.length;
        const T* const hidden = static_cast<const T*>(call.hidden) + at;
        const T* const residual = static_cast<const T*>(call.residual) + at;
        Sums<V> sum;
        each_vector<V>(count, [&](int64_t i, auto full, int64_t left, auto slot) {
            prefetch(residual + i);
            sum.part[slot.value] = sum.part[slot.value] + fetch<full.value>(hidden + i, left);
        });
        A mean, rstd;
        finish_statistics<V>(
            sum.total(), count, call.eps,
            [&](int64_t i, auto full, int64_t left) {
                if (more) prefetch(hidden + count + i);
                return fetch<full.value>(hidden + i, left);
            },
            mean, rstd);
        static_cast<A*>(call.mean)[item] = mean;
        static_cast<A*>(call.rstd)[item] = rstd;
        A* const logits = part(item);
        memset(logits, 0, static_cast<size_t>(token_head_padded(call.length)) * sizeof(A));
        const V center(mean), scale(rstd);
        for (int64_t k = 0; k < group_channels(); ++k) {
            const V weight(get(static_cast<const P*>(call.weight) + first + k));
            const V bias(get(static_cast<const P*>(call.bias) + first + k));
            const V direction(get(static_cast<const P*>(call.direction) + sample * call.c + first + k));
            const T *const h = hidden + k * call.length, *const r = residual + k * call.length;
            each_vector<V>(call.length, [&](int64_t l, auto full, int64_t left, auto) {
                const V xhat = (fetch<full.value>(h + l, left) - center) * scale;
                const V total = fetch<full.value>(r + l, left) + leaky(fma(xhat, weight, bias));
                store(logits + l, fma(direction, total, load(logits + l)));
            });
        }
    }

    void sample(int64_t n) const {
        const V offset(get(static_cast<const P*>(call.offset) + n));
        A* const logits = static_cast<A*>(call.logits) + n * call.length;
        each_vector<V>(call.length, [&](int64_t l, auto full, int64_t left, auto) {
            V sum = offset;
            for (int64_t g = 0; g < call.groups; ++g) sum = sum + load(part(n * call.groups + g) + l);
            write<full.value, false>(logits + l, sum, left);
        });
    }

    void run() const {
        const int32_t threads = threads_for(call.n * call.c * call.length, call.num_threads);
        const int64_t items = call.n * call.groups, size = token_head_chunk(group_channels() * call.length);
        parallel(chunks_of(items, size), threads, [&](int64_t i) {
            const int64_t end = smaller((i + 1) * size, items);
            for (int64_t item = i * size; item < end; ++item) group(item, item + 1 < end);
        });
        parallel(call.n, threads_for(call.n * call.groups * call.length, call.num_threads),
                 [&](int64_t i) { sample(i); });
    }
};

template <class T, class P>
struct Backward {
    using V = typename VecOf<T>::Type;
    using A = typename V::Scalar;
    const TokenHeadBackward& call;

    int64_t group_channels() const { return call.c / call.groups; }
    bool parameters() const { return call.dweight != nullptr || call.dbias != nullptr; }
    bool sums() const { return call.dhidden != nullptr || parameters() || call.ddirection != nullptr; }
    // Per sample and channel: the sample's share of dweight, and of dbias.
    double* shares(int64_t sample, int64_t channel) const {
        return static_cast<double*>(call.workspace) + 2 * (sample * call.c + channel);
    }

    // What is the same along a channel of a sample.
    struct Channel {
        const T *hidden, *residual;
        const A* dlogits;
        A weight, bias, direction, mean, rstd;

        template <bool full>
        V xhat(int64_t l, int64_t left) const {
            return (fetch<full>(hidden + l, left) - V(mean)) * V(rstd);
        }
        V z(V xhat) const { return fma(xhat, V(weight), V(bias)); }
    };

    Channel channel(int64_t item, int64_t k) const {
        const int64_t sample = item / call.groups, c = item % call.groups * group_channels() + k;
        const int64_t row = sample * call.c + c;
        return {static_cast<const T*>(call.hidden) + row * call.length,
                static_cast<const T*>(call.residual) + row * call.length,
                static_cast<const A*>(call.dlogits) + sample * call.length,
                A(get(static_cast<const P*>(call.weight) + c)),
                A(get(static_cast<const P*>(call.bias) + c)),
                A(get(static_cast<const P*>(call.direction) + row)),
                static_cast<const A*>(call.mean)[item],
                static_cast<const A*>(call.rstd)[item]};
    }

    void group(int64_t item) const {
        const int64_t sample = item / call.groups, first = item % call.groups * group_channels();
        double c1 = 0, c2 = 0;
        for (int64_t k = 0; sums() && k < group_channels(); ++k) {
            const Channel ch = channel(item, k);
            Sums<V> plain, weighted, totals;
            each_vector<V>(call.length, [&](int64_t l, auto full, int64_t left, auto slot) {
                prefetch(ch.hidden + l + kAhead);
                prefetch(ch.residual + l + kAhead);
                const V dlogit = fetch<full.value>(ch.dlogits + l, left);  // zero beyond the row
                const V xhat = ch.template xhat<full.value>(l, left), z = ch.z(xhat), s = dlogit * leaky_slope(z);
                const V total = fetch<full.value>(ch.residual + l, left) + leaky(z);
                plain.part[slot.value] = plain.part[slot.value] + s;
                weighted.part[slot.value] = fma(s, xhat, weighted.part[slot.value]);
                totals.part[slot.value] = fma(dlogit, total, totals.part[slot.value]);
            });
            const double dbias = double(ch.direction) * plain.total(),
                         dweight = double(ch.direction) * weighted.total();
            shares(sample, first + k)[0] = dweight;
            shares(sample, first + k)[1] = dbias;
            c1 += double(ch.weight) * dbias;
            c2 += double(ch.weight) * dweight;
            if (call.ddirection != nullptr) {
                put(static_cast<P*>(call.ddirection) + sample * call.c + first + k, totals.total());
            }
        }
        if (call.dhidden == nullptr && call.dresidual == nullptr) return;
        const double count = static_cast<double>(group_channels() * call.length);
        const V mean_s(A(c1 / count)), mean_sx(A(c2 / count));
        for (int64_t k = 0; k < group_channels(); ++k) {
            const Channel ch = channel(item, k);
            const int64_t at = (sample * call.c + first + k) * call.length;
            T* const dhidden = call.dhidden == nullptr ? nullptr : static_cast<T*>(call.dhidden) + at;
            T* const dresidual = call.dresidual == nullptr ? nullptr : static_cast<T*>(call.dresidual) + at;
            each_vector<V>(call.length, [&](int64_t l, auto full, int64_t left, auto) {
                const V dtotal = V(ch.direction) * fetch<full.value>(ch.dlogits + l, left);
                if (dresidual != nullptr) write<full.value, false>(dresidual + l, dtotal, left);
                if (dhidden == nullptr) return;
                const V xhat = ch.template xhat<full.value>(l, left);
                const V dz = V(ch.weight) * (dtotal * leaky_slope(ch.z(xhat)));
                write<full.value, false>(dhidden + l, V(ch.rstd) * (dz - fma(xhat, mean_sx, mean_s)), left);
            });
        }
    }

    void run() const {
        const int32_t threads = threads_for(call.n * call.c * call.length, call.num_threads);
        parallel(call.n * call.groups, threads, [&](int64_t i) { group(i); });
        for (int64_t c = 0; parameters() && c < call.c; ++c) {
            double weight = 0, bias = 0;
            for (int64_t n = 0; n < call.n; ++n) {
                weight += shares(n, c)[0];
                bias += shares(n, c)[1];
            }
            if (call.dweight != nullptr) put(static_cast<P*>(call.dweight) + c, A(weight));
            if (call.dbias != nullptr) put(static_cast<P*>(call.dbias) + c, A(bias));
        }
        for (int64_t n = 0; call.doffset != nullptr && n < call.n; ++n) {
            double sum = 0;
            const A* const dlogits = static_cast<const A*>(call.dlogits) + n * call.length;
            for (int64_t l = 0; l < call.length; ++l) sum += static_cast<double>(dlogits[l]);
            put(static_cast<P*>(call.doffset) + n, A(sum));
        }
    }
};

}  // namespace

void token_head_fwd(const TokenHeadForward& call) {
    with_dtypes(call.dtype, call.param_dtype, [&](auto tag, auto param_tag) {
        Forward<typename decltype(tag)::Type, typename decltype(param_tag)::Type>{call}.run();
    });
}

void token_head_bwd(const TokenHeadBackward& call) {
    with_dtypes(call.dtype, call.param_dtype, [&](auto tag, auto param_tag) {
        Backward<typename decltype(tag)::Type, typename decltype(param_tag)::Type>{call}.run();
    });
}

}  // namespace SDXL_FAST_ISA
}  // namespace sdxl_fast
