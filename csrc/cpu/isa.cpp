// SPDX-License-Identifier: Apache-2.0
#include "isa.h"

#include <cstdint>
#include <initializer_list>

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#endif

namespace sdxl_fast {
namespace {

#if defined(__x86_64__) || defined(__i386__)

struct Features {
    uint32_t leaf1_ecx = 0, leaf7_ebx = 0, leaf7_1_eax = 0;
    uint64_t saved_state = 0;  // XCR0: the registers the operating system saves for a thread

    Features() {
        uint32_t a = 0, b = 0, c = 0, d = 0;
        if (!__get_cpuid(1, &a, &b, &c, &d)) return;
        leaf1_ecx = c;
        if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) {
            leaf7_ebx = b;
            if (a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) leaf7_1_eax = a;
        }
        if (leaf1_ecx & (1u << 27)) {  // OSXSAVE
            uint32_t low = 0, high = 0;
            __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
            saved_state = static_cast<uint64_t>(high) << 32 | low;
        }
    }

    bool has(uint32_t word, std::initializer_list<int> bits) const {
        for (const int bit : bits) {
            if (!(word >> bit & 1)) return false;
        }
        return true;
    }
};

const Features& features() {
    static const Features found;
    return found;
}

#endif

}  // namespace

#if defined(__x86_64__) || defined(__i386__)

bool cpu_has_avx2() {
    const Features& f = features();
    constexpr uint64_t ymm = 0x6;
    return (f.saved_state & ymm) == ymm && f.has(f.leaf1_ecx, {12, 28, 29}) /* FMA, AVX, F16C */ &&
           f.has(f.leaf7_ebx, {5}) /* AVX2 */;
}

bool cpu_has_avx512() {
    const Features& f = features();
    constexpr uint64_t zmm = 0xe6;
    return cpu_has_avx2() && (f.saved_state & zmm) == zmm && f.has(f.leaf7_ebx, {16, 17, 30, 31}) /* F, DQ, BW, VL */;
}

bool cpu_has_avx512_bf16() {
    return cpu_has_avx512() && features().has(features().leaf7_1_eax, {5});
}

#else

bool cpu_has_avx2() {
    return false;
}
bool cpu_has_avx512() {
    return false;
}
bool cpu_has_avx512_bf16() {
    return false;
}

#endif

}  // namespace sdxl_fast
