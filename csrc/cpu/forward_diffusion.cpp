// SPDX-License-Identifier: Apache-2.0
#include <cmath>
#include <type_traits>
#include "element.h"
#include "common/philox.h"
#include "sdxl_fast.h"
using namespace sdxl_fast;
extern "C" {
int32_t sdxl_fast_forward_diffusion_fwd_cpu(const void* x0v, const void* ab, const int64_t* ts, const int64_t* seeds, const void* nin, void* xtv, void* nout,
    int64_t n, int64_t c, int64_t h, int64_t w, int64_t T_, int64_t stream, int64_t pure, int32_t layout, int32_t dtype, int32_t) {
    if (n < 0 || c < 0 || h < 0 || w < 0) return SDXL_FAST_INVALID_ARGUMENT;
    const int64_t hw = h * w, per = c * hw;
    if (n * per == 0) return SDXL_FAST_OK;
    if ((seeds == nullptr) == (nin == nullptr)) return SDXL_FAST_INVALID_ARGUMENT;
    return with_dtype(dtype, [&](auto* tag) { (void)tag;
        using T = std::remove_pointer_t<decltype(tag)>;
        using A = typename ComputeOf<T>::type;
        const T* x0 = static_cast<const T*>(x0v); T* xt = static_cast<T*>(xtv);
        for (int64_t b = 0; b < n; ++b) {
            const bool ok = ts[b] >= 0 && ts[b] < T_;
            const A a = ok ? static_cast<const A*>(ab)[ts[b]] : A(NAN);
            const A p = std::sqrt(a), q = std::sqrt(A(1) - a);
            for (int64_t k = 0; k < per; ++k) {
                const int64_t i = layout == 0 ? (k % c) * hw + k / c : k;
                T noise;
                if (nin) noise = static_cast<const T*>(nin)[b * per + k];
                else {
                    const auto r = philox4x32_10(uint32_t(seeds[b]), uint32_t(uint64_t(seeds[b]) >> 32), uint64_t(i) >> 2, uint64_t(stream));
                    const int e = i & 2;
                    const A rad = std::sqrt(A(-2) * std::log(A(philox_u1(r.w[e])))), ang = A(6.283185307179586) * A(philox_u2(r.w[e + 1]));
                    from_compute(A(rad * ((i & 1) ? std::sin(ang) : std::cos(ang))), noise);
                    static_cast<T*>(nout)[b * per + k] = noise;
                }
                if (ts[b] == pure) xt[b * per + k] = noise;
                else from_compute(A(p * to_compute(x0[b * per + k]) + q * to_compute(noise)), xt[b * per + k]);
            }
        }
    }) ? SDXL_FAST_OK : SDXL_FAST_UNSUPPORTED_DTYPE;
}
int32_t sdxl_fast_forward_diffusion_bwd_cpu(const void* dv, const void* ab, const int64_t* ts, void* ov, int64_t n, int64_t per, int64_t T_, int64_t pure, int32_t dtype, int32_t) {
    return with_dtype(dtype, [&](auto* tag) { (void)tag;
        using T = std::remove_pointer_t<decltype(tag)>;
        using A = typename ComputeOf<T>::type;
        for (int64_t b = 0; b < n; ++b) {
            const bool ok = ts[b] >= 0 && ts[b] < T_;
            const A p = ts[b] == pure ? A(0) : std::sqrt(ok ? static_cast<const A*>(ab)[ts[b]] : A(NAN));
            for (int64_t k = b * per; k < (b + 1) * per; ++k) from_compute(A(p * to_compute(static_cast<const T*>(dv)[k])), static_cast<T*>(ov)[k]);
        }
    }) ? SDXL_FAST_OK : SDXL_FAST_UNSUPPORTED_DTYPE;
}
}
