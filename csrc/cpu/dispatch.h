// SPDX-License-Identifier: Apache-2.0
//
// What the files of the CPU half of the C ABI share: the kernels of the instruction set in use, and checks of
// arguments.
#pragma once

#include <initializer_list>

#include "kernels.h"

namespace sdxl_fast {

struct KernelTable {
    const char* name;
    bool (*supported)();
    void (*group_norm_silu_fwd)(const GroupNormForward&);
    void (*group_norm_silu_bwd)(const GroupNormBackward&);
    void (*layer_norm_fwd)(const LayerNormForward&);
    void (*layer_norm_bwd)(const LayerNormBackward&);
    void (*token_head_fwd)(const TokenHeadForward&);
    void (*token_head_bwd)(const TokenHeadBackward&);
    void (*attention_fwd)(const AttentionForward&);
    void (*attention_bwd)(const AttentionBackward&);
    void (*streamed_attention_fwd)(const AttentionForward&);
    int64_t (*streamed_attention_workspace)(const AttentionForward&);
    void (*packed_conv2d_fwd)(const PackedConv2dCall&);
    void (*winograd_conv2d_fwd)(const WinogradCall&);
    void (*geglu_fwd)(const GegluCall&);
    void (*geglu_bwd)(const GegluCall&);
    void (*forward_diffusion_fwd)(const DiffusionForward&);
    void (*forward_diffusion_bwd)(const DiffusionBackward&);
    void (*ddim_move_fwd)(const MoveForward&);
    void (*ddim_move_bwd)(const MoveBackward&);
    void (*to_uint8_fwd)(const ToUint8Call&);
    void (*lora_merge_fwd)(const LoraMergeCall&);
};

// The kernels that run elements of `dtype`.
const KernelTable& kernels(int32_t dtype);

inline bool any_negative(std::initializer_list<int64_t> sizes) {
    for (const int64_t size : sizes) {
        if (size < 0) return true;
    }
    return false;
}

inline bool any_null(std::initializer_list<const void*> pointers) {
    for (const void* pointer : pointers) {
        if (pointer == nullptr) return true;
    }
    return false;
}

inline bool is_flag(int32_t code) {
    return code == 0 || code == 1;
}

inline bool known_dtype(int32_t dtype) {
    return dtype >= SDXL_FAST_F32 && dtype <= SDXL_FAST_F16;
}

// Parameters have the dtype of x, or are float32 beside a smaller one.
inline bool known_dtypes(int32_t dtype, int32_t param_dtype) {
    return known_dtype(dtype) && (param_dtype == dtype || (param_dtype == SDXL_FAST_F32 && dtype != SDXL_FAST_F64));
}

}  // namespace sdxl_fast
