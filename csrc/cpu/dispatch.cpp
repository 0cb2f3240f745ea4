// SPDX-License-Identifier: Apache-2.0
//
// The choice of the best instruction set this CPU has, and the functions of the C ABI that report and force it.
#include "dispatch.h"

#include <atomic>
#include <cstring>

#include "isa.h"
#include "parallel.h"
#include "sdxl_fast.h"

namespace sdxl_fast {
namespace {

#define SDXL_FAST_TABLE(isa, supported) \
    {#isa,                              \
     supported,                         \
     isa::group_norm_silu_fwd,          \
     isa::group_norm_silu_bwd,          \
     isa::layer_norm_fwd,               \
     isa::layer_norm_bwd,               \
     isa::token_head_fwd,               \
     isa::token_head_bwd,               \
     isa::attention_fwd,                \
     isa::attention_bwd,                \
     isa::streamed_attention_fwd,       \
     isa::streamed_attention_workspace, \
     isa::packed_conv2d_fwd,            \
     isa::winograd_conv2d_fwd,          \
     isa::geglu_fwd,                    \
     isa::geglu_bwd,                    \
     isa::forward_diffusion_fwd,        \
     isa::forward_diffusion_bwd,        \
     isa::ddim_move_fwd,                \
     isa::ddim_move_bwd,                \
     isa::to_uint8_fwd,                 \
     isa::lora_merge_fwd}

// The baseline first, the best last.
constexpr KernelTable kTables[] = {
    SDXL_FAST_TABLE(baseline, [] { return true; }),
#if defined(SDXL_FAST_HAVE_AVX2)
    SDXL_FAST_TABLE(avx2, cpu_has_avx2),
#endif
#if defined(SDXL_FAST_HAVE_AVX512)
    SDXL_FAST_TABLE(avx512, cpu_has_avx512),
#endif
#if defined(SDXL_FAST_HAVE_AVX512_BF16)
    SDXL_FAST_TABLE(avx512_bf16, cpu_has_avx512_bf16),
#endif
};

const KernelTable* best_table() {
    const KernelTable* best = kTables;
    for (const KernelTable& table : kTables) {
        if (table.supported()) best = &table;
    }
    return best;
}

std::atomic<const KernelTable*> forced{nullptr};

const KernelTable& chosen_table() {
    static const KernelTable* const best = best_table();
    const KernelTable* const chosen = forced.load(std::memory_order_relaxed);
    return chosen != nullptr ? *chosen : *best;
}

}  // namespace

// Only the baseline has the fp64 kernels (loops.h).
const KernelTable& kernels(int32_t dtype) {
    return dtype == SDXL_FAST_F64 ? kTables[0] : chosen_table();
}

}  // namespace sdxl_fast

using namespace sdxl_fast;

extern "C" {

const char* sdxl_fast_cpu_isa(void) {
    return chosen_table().name;
}

int32_t sdxl_fast_set_cpu_isa(const char* name) {
    if (name == nullptr) return SDXL_FAST_INVALID_ARGUMENT;
    if (std::strcmp(name, "auto") == 0) {
        forced.store(nullptr);
        return SDXL_FAST_OK;
    }
    for (const KernelTable& table : kTables) {
        if (std::strcmp(name, table.name) == 0 && table.supported()) {
            forced.store(&table);
            return SDXL_FAST_OK;
        }
    }
    return SDXL_FAST_INVALID_ARGUMENT;
}

const char* sdxl_fast_cpu_threading(void) {
    return threading_name();
}

}  // extern "C"
