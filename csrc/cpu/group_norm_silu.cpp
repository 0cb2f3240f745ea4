// SPDX-License-Identifier: Apache-2.0
#include <cmath>
#include <type_traits>
#include <vector>
#include "element.h"
#include "common/math.h"
#include "sdxl_fast.h"
using namespace sdxl_fast;
extern "C" {
int64_t sdxl_fast_group_norm_silu_workspace_cpu(int64_t, int64_t, int64_t, int64_t, int32_t, int32_t) { return 64; }
}
namespace {
struct View {
    int64_t c, hw; bool nhwc;
    int64_t at(int64_t n, int64_t ch, int64_t p) const { return nhwc ? (n * hw + p) * c + ch : (n * c + ch) * hw + p; }
};
template <class A> A param(const void* p, int64_t i, int32_t param_dtype, A fallback) {
    if (!p) return fallback;
    A r = 0;
    with_dtype(param_dtype, [&](auto* tag) { (void)tag; r = A(to_compute(static_cast<const std::remove_pointer_t<decltype(tag)>*>(p)[i])); });
    return r;
}
void put(void* p, int64_t i, int32_t param_dtype, double v) {
    with_dtype(param_dtype, [&](auto* tag) { (void)tag; using T = std::remove_pointer_t<decltype(tag)>; from_compute(typename ComputeOf<T>::type(v), static_cast<T*>(p)[i]); });
}
}
extern "C" {
int32_t sdxl_fast_group_norm_silu_fwd_cpu(const void* xv, const void* w, const void* b, const void* sh, void* yv, void* mean, void* rstd, void*,
    int64_t n, int64_t c, int64_t hw, int64_t groups, double eps, int32_t layout, int32_t act, int32_t dtype, int32_t pd, int32_t) {
    if (n < 0 || c < 0 || hw < 0 || groups <= 0 || c % groups) return SDXL_FAST_INVALID_ARGUMENT;
    return with_dtype(dtype, [&](auto* tag) { (void)tag;
        using T = std::remove_pointer_t<decltype(tag)>; using A = typename ComputeOf<T>::type;
        const View v{c, hw, layout == 0}; const int64_t cg = c / groups; const T* x = static_cast<const T*>(xv); T* y = static_cast<T*>(yv);
        for (int64_t i = 0; i < n; ++i) for (int64_t g = 0; g < groups; ++g) {
            double s = 0, q = 0; const double m = double(cg * hw);
            auto val = [&](int64_t ch, int64_t p) { return double(to_compute(x[v.at(i, ch, p)])) + param<double>(sh, i * c + ch, dtype, 0.0); };
            for (int64_t ch = g * cg; ch < (g + 1) * cg; ++ch) for (int64_t p = 0; p < hw; ++p) s += val(ch, p);
            const double mu = m ? s / m : 0;
            for (int64_t ch = g * cg; ch < (g + 1) * cg; ++ch) for (int64_t p = 0; p < hw; ++p) { const double d = val(ch, p) - mu; q += d * d; }
            const double r = 1 / std::sqrt((m ? q / m : 0) + eps);
            static_cast<A*>(mean)[i * groups + g] = A(mu); static_cast<A*>(rstd)[i * groups + g] = A(r);
            for (int64_t ch = g * cg; ch < (g + 1) * cg; ++ch) for (int64_t p = 0; p < hw; ++p) {
                const A z = A((val(ch, p) - mu) * r) * param<A>(w, ch, pd, A(1)) + param<A>(b, ch, pd, A(0));
                from_compute(A(act ? silu(z) : z), y[v.at(i, ch, p)]);
            }
        }
    }) ? SDXL_FAST_OK : SDXL_FAST_UNSUPPORTED_DTYPE;
}
int32_t sdxl_fast_group_norm_silu_bwd_cpu(const void* dyv, const void* xv, const void* w, const void* b, const void* sh, const void* mean, const void* rstd,
    void* dxv, void* dw, void* db, void* dsh, void*, int64_t n, int64_t c, int64_t hw, int64_t groups, int32_t layout, int32_t act, int32_t dtype, int32_t pd, int32_t) {
    if (n < 0 || c < 0 || hw < 0 || groups <= 0 || c % groups) return SDXL_FAST_INVALID_ARGUMENT;
    return with_dtype(dtype, [&](auto* tag) { (void)tag;
        using T = std::remove_pointer_t<decltype(tag)>; using A = typename ComputeOf<T>::type;
        const View v{c, hw, layout == 0}; const int64_t cg = c / groups; const T *x = static_cast<const T*>(xv), *dy = static_cast<const T*>(dyv); T* dx = static_cast<T*>(dxv);
        std::vector<double> sw(c, 0.0), sb(c, 0.0);
        for (int64_t i = 0; i < n; ++i) for (int64_t g = 0; g < groups; ++g) {
            const double mu = static_cast<const A*>(mean)[i * groups + g], r = static_cast<const A*>(rstd)[i * groups + g];
            double c1 = 0, c2 = 0; const double m = double(cg * hw);
            auto hat = [&](int64_t ch, int64_t p) { return (double(to_compute(x[v.at(i, ch, p)])) + param<double>(sh, i * c + ch, dtype, 0.0) - mu) * r; };
            auto grad = [&](int64_t ch, int64_t p) {
                const double z = hat(ch, p) * param<double>(w, ch, pd, 1.0) + param<double>(b, ch, pd, 0.0);
                return double(to_compute(dy[v.at(i, ch, p)])) * (act ? silu_derivative(z) : 1.0);
            };
            for (int64_t ch = g * cg; ch < (g + 1) * cg; ++ch) for (int64_t p = 0; p < hw; ++p) {
                const double d = grad(ch, p), xh = hat(ch, p), wt = param<double>(w, ch, pd, 1.0);
                sw[ch] += d * xh; sb[ch] += d; c1 += d * wt; c2 += d * wt * xh;
            }
            c1 /= m; c2 /= m;
            for (int64_t ch = g * cg; ch < (g + 1) * cg; ++ch) {
                double total = 0;
                for (int64_t p = 0; p < hw; ++p) {
                    const double d = r * (grad(ch, p) * param<double>(w, ch, pd, 1.0) - c1 - hat(ch, p) * c2);
                    total += d;
                    if (dx) from_compute(A(d), dx[v.at(i, ch, p)]);
                }
                if (dsh) put(dsh, i * c + ch, dtype, total);
            }
        }
        for (int64_t ch = 0; ch < c; ++ch) { if (dw) put(dw, ch, pd, sw[ch]); if (db) put(db, ch, pd, sb[ch]); }
    }) ? SDXL_FAST_OK : SDXL_FAST_UNSUPPORTED_DTYPE;
}
}
