// SPDX-License-Identifier: Apache-2.0
//
// to_uint8: round(255 clamp(x / 2 + 1/2, 0, 1)), ties to even, in float whatever the element type; NaN gives 0. Always
// written channels innermost: NHWC is one walk through memory, NCHW turns runs of pixels into bytes channel by channel
// and weaves them together while they are in the L1 cache. Reads 1 element and writes 1 byte.
#include "kernels.h"
#include "loops.h"

namespace sdxl_fast {
namespace SDXL_FAST_ISA {
namespace {

constexpr int64_t kPiece = 16384;  // elements in an item of work, about
constexpr int64_t kPixels = 1024;  // pixels of a channel turned together
constexpr int64_t kRoom = 64;      // whole vectors are written

// The low byte of the sum is the rounded value: adding 1.5 * 2^23 leaves no bits for the fraction.
inline RawU byte_bits(VecF x) {
    const VecF unit = min(max(fma(x, VecF(0.5f), VecF(0.5f)), VecF(0.0f)), VecF(1.0f));
    return bits(unit * VecF(255.0f) + VecF(0x1.8p23f));
}

// Writes a byte per lane.
inline void put_bytes(uint8_t* p, VecF x) {
    const RawU lanes = byte_bits(x);
#if defined(__AVX512F__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8((__m512i)lanes));
#elif defined(__AVX2__)
    const __m256i low = (__m256i)(lanes & 0xffu);
    const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
#else
    for (int i = 0; i < kWidth; ++i) p[i] = static_cast<uint8_t>(lanes[i]);
#endif
}
inline void put_bytes(uint8_t* p, VecD x) {
    const double half = x.v * 0.5 + 0.5;
    const double unit = half > 0.0 ? (half < 1.0 ? half : 1.0) : 0.0;  // false for NaN
    *p = static_cast<uint8_t>((unit * 255.0 + 0x1.8p52) - 0x1.8p52);
}

// Turns `count` values into bytes; `to` has kRoom bytes more than that only if `roomy`.
template <bool roomy, class T>
void turn(const T* from, uint8_t* to, int64_t count) {
    using V = typename VecOf<T>::Type;
    int64_t i = 0;
    for (; i + V::W <= count; i += V::W) put_bytes(to + i, load(from + i));
    if (i == count) return;
    if constexpr (roomy) {
        put_bytes(to + i, load_some(from + i, count - i));
    } else {
        uint8_t rest[kRoom];
        put_bytes(rest, load_some(from + i, count - i));
        for (int64_t k = 0; i + k < count; ++k) to[i + k] = rest[k];
    }
}

template <int64_t channels, class T>
void weave(const T* sample, uint8_t* to, int64_t c, int64_t hw, int64_t begin, int64_t end) {
    uint8_t planes[4][kPixels + kRoom];
    for (int64_t pixel = begin; pixel < end; pixel += kPixels) {
        const int64_t count = smaller(kPixels, end - pixel);
        if constexpr (channels > 0) {
            for (int64_t k = 0; k < channels; ++k) turn<true>(sample + k * hw + pixel, planes[k], count);
            uint8_t* out = to + pixel * channels;
            for (int64_t i = 0; i < count; ++i) {
                for (int64_t k = 0; k < channels; ++k) *out++ = planes[k][i];
            }
        } else {
            for (int64_t k = 0; k < c; ++k) {
                turn<true>(sample + k * hw + pixel, planes[0], count);
                for (int64_t i = 0; i < count; ++i) to[(pixel + i) * c + k] = planes[0][i];
            }
        }
    }
}

template <class T>
void convert(const ToUint8Call& call) {
    const T* const x = static_cast<const T*>(call.x);
    uint8_t* const out = static_cast<uint8_t*>(call.out);
    const int64_t c = call.c, elements = c * call.hw;
    const int32_t threads = threads_for(call.n * elements, call.num_threads);
    if (call.nhwc || c == 1) {
        const int64_t total = call.n * elements;
        parallel(chunks_of(total, kPiece), threads, [&](int64_t i) {
            const int64_t begin = i * kPiece;
            turn<false>(x + begin, out + begin, smaller(kPiece, total - begin));
        });
        return;
    }
    const int64_t pixels = larger(kPiece / c, 256), items = chunks_of(call.hw, pixels);
    parallel(call.n * items, threads, [&](int64_t i) {
        const int64_t base = i / items * elements, begin = i % items * pixels;
        const int64_t end = smaller(begin + pixels, call.hw);
        if (c == 3) {
            weave<3>(x + base, out + base, c, call.hw, begin, end);
        } else if (c == 4) {
            weave<4>(x + base, out + base, c, call.hw, begin, end);
        } else {
            weave<0>(x + base, out + base, c, call.hw, begin, end);
        }
    });
}

}  // namespace

void to_uint8_fwd(const ToUint8Call& call) {
    with_dtype(call.dtype, [&](auto tag) { convert<typename decltype(tag)::Type>(call); });
}

}  // namespace SDXL_FAST_ISA
}  // namespace sdxl_fast
