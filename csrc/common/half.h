// SPDX-License-Identifier: Apache-2.0
//
// bfloat16, float16 and float8 e4m3 as bare bits, with portable conversions (round to nearest even) for a CPU, a GPU or
// a compiler that has none.
#pragma once

#include <stdint.h>
#include <string.h>

#include "macros.h"

namespace sdxl_fast {

struct BF16 {
    uint16_t bits;
};

struct F16 {
    uint16_t bits;
};

struct E4M3 {
    uint8_t bits;
};

SDXL_HD uint32_t float_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof(bits));
    return bits;
}

SDXL_HD float float_from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof(value));
    return value;
}

SDXL_HD float bf16_to_float(BF16 value) {
    return float_from_bits(static_cast<uint32_t>(value.bits) << 16);
}

SDXL_HD BF16 float_to_bf16(float value) {
    const uint32_t bits = float_bits(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((bits >> 16) | 0x40u)};  // quiet the NaN
    return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

SDXL_HD float f16_to_float(F16 value) {
    const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
    const uint32_t magnitude = value.bits & 0x7fffu;
    if (magnitude >= 0x7c00u) return float_from_bits(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
    if (magnitude < 0x0400u) {  // zero and subnormals: magnitude * 2^-24, exact
        const float small = static_cast<float>(magnitude) * 0x1p-24f;
        return sign ? -small : small;
    }
    return float_from_bits(sign | ((magnitude << 13) + ((127u - 15u) << 23)));
}

SDXL_HD F16 float_to_f16(float value) {
    const uint32_t bits = float_bits(value);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
    if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // rounds to 2^16 or above
    if (magnitude < 0x38800000u) {
        // Subnormal result: adding 0.5 leaves the value in units of 2^-24, rounded to even by the addition itself.
        const float shifted = float_from_bits(magnitude) + 0.5f;
        return {static_cast<uint16_t>(sign | (float_bits(shifted) - 0x3f000000u))};
    }
    const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
    return {static_cast<uint16_t>(sign | ((rounded - ((127u - 15u) << 23)) >> 13))};
}

// What lies beyond the largest number, 448, becomes that number.
SDXL_HD E4M3 float_to_e4m3(float value) {
    const uint32_t bits = float_bits(value);
    const uint32_t sign = (bits >> 24) & 0x80u;
    uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return {static_cast<uint8_t>(sign | 0x7fu)};
    if (magnitude > 0x43e00000u) magnitude = 0x43e00000u;
    if (magnitude < 0x3c800000u) {
        // Subnormal result: adding 2^14 leaves the value in units of 2^-9, rounded to even by the addition itself.
        const float shifted = float_from_bits(magnitude) + 16384.0f;
        return {static_cast<uint8_t>(sign | (float_bits(shifted) - 0x46800000u))};
    }
    const uint32_t rounded = magnitude + 0x7ffffu + ((magnitude >> 20) & 1u);
    return {static_cast<uint8_t>(sign | ((rounded - ((127u - 7u) << 23)) >> 20))};
}

}  // namespace sdxl_fast
