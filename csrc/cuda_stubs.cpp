// SPDX-License-Identifier: Apache-2.0
//
// The CUDA half of the ABI in a build without CUDA: every symbol is there and says SDXL_FAST_NO_CUDA.
#include "sdxl_fast.h"

extern "C" {

int32_t sdxl_fast_group_norm_silu_fwd_cuda(const void*, const void*, const void*, const void*, const void*, void*,
                                           void*, void*, void*, int64_t, int64_t, int64_t, int64_t, int64_t, double,
                                           int32_t, int32_t, int32_t, int32_t, void*) {
    return SDXL_FAST_NO_CUDA;
}

int32_t sdxl_fast_group_norm_silu_bwd_cuda(const void*, const void*, const void*, const void*, const void*, const void*,
                                           const void*, void*, void*, void*, void*, void*, int64_t, int64_t, int64_t,
                                           int64_t, int32_t, int32_t, int32_t, int32_t, void*) {
    return SDXL_FAST_NO_CUDA;
}

int64_t sdxl_fast_group_norm_silu_workspace_cuda(int64_t, int64_t, int64_t, int64_t, int32_t, int32_t) {
    return 0;
}

int32_t sdxl_fast_geglu_fwd_cuda(const void*, void*, int64_t, int64_t, int32_t, int32_t, void*) {
    return SDXL_FAST_NO_CUDA;
}

int32_t sdxl_fast_group_norm_silu_e4m3_fwd_cuda(const void*, const void*, const void*, const void*, const void*,
                                                const float*, void*, void*, void*, void*, int64_t, int64_t, int64_t,
                                                int64_t, int64_t, double, int32_t, int32_t, int32_t, int32_t, void*) {
    return SDXL_FAST_NO_CUDA;
}

int32_t sdxl_fast_geglu_e4m3_fwd_cuda(const void*, const float*, void*, int64_t, int64_t, int32_t, int32_t, void*) {
    return SDXL_FAST_NO_CUDA;
}

int32_t sdxl_fast_layer_norm_e4m3_fwd_cuda(const void*, const void*, const void*, const void*, const float*, void*,
                                           void*, void*, void*, int64_t, int64_t, double, int32_t, int32_t, void*) {
    return SDXL_FAST_NO_CUDA;
}

int32_t sdxl_fast_geglu_bwd_cuda(const void*, const void*, void*, int64_t, int64_t, int32_t, int32_t, void*) {
    return SDXL_FAST_NO_CUDA;
}

int32_t sdxl_fast_forward_diffusion_fwd_cuda(const void*, const void*, const int64_t*, const int64_t*, const void*,
                                             void*, void*, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                                             int64_t, int32_t, int32_t, void*) {
    return SDXL_FAST_NO_CUDA;
}

int32_t sdxl_fast_forward_diffusion_bwd_cuda(const void*, const void*, const int64_t*, void*, int64_t, int64_t, int64_t,
                                             int64_t, int32_t, void*) {
    return SDXL_FAST_NO_CUDA;
}

int32_t sdxl_fast_ddim_move_fwd_cuda(const void*, const void*, const void*, const int64_t*, const int64_t*,
                                     const int64_t*, const int64_t*, void*, void*, int64_t, int64_t, int64_t, int64_t,
                                     int64_t, int64_t, int32_t, int32_t, int32_t, int32_t, void*) {
    return SDXL_FAST_NO_CUDA;
}

int32_t sdxl_fast_ddim_move_bwd_cuda(const void*, const void*, const void*, const int64_t*, const int64_t*,
                                     const int64_t*, void*, void*, int64_t, int64_t, int64_t, int32_t, int32_t, int32_t,
                                     void*) {
    return SDXL_FAST_NO_CUDA;
}

int32_t sdxl_fast_layer_norm_fwd_cuda(const void*, const void*, const void*, const void*, void*, void*, void*, void*,
                                      int64_t, int64_t, double, int32_t, int32_t, void*) {
    return SDXL_FAST_NO_CUDA;
}

int32_t sdxl_fast_layer_norm_bwd_cuda(const void*, const void*, const void*, const void*, const void*, const void*,
                                      void*, void*, void*, void*, int64_t, int64_t, int32_t, int32_t, void*) {
    return SDXL_FAST_NO_CUDA;
}

int64_t sdxl_fast_layer_norm_workspace_cuda(int64_t, int64_t) {
    return 0;
}

int64_t sdxl_fast_lora_merge_plan_cuda(sdxl_fast_lora_module*, int64_t) {
    return 0;
}

int32_t sdxl_fast_lora_merge_fwd_cuda(const sdxl_fast_lora_module*, int64_t, int64_t, int32_t, int32_t, void*) {
    return SDXL_FAST_NO_CUDA;
}

int32_t sdxl_fast_to_uint8_fwd_cuda(const void*, void*, int64_t, int64_t, int64_t, int32_t, int32_t, void*) {
    return SDXL_FAST_NO_CUDA;
}

int32_t sdxl_fast_linear_fwd_cuda(const void*, const void*, const void*, const void*, const float*, const float*, void*,
                                  int64_t, int64_t, int64_t, int32_t, void*) {
    return SDXL_FAST_NO_CUDA;
}

int32_t sdxl_fast_linear_geglu_fwd_cuda(const void*, const void*, const void*, const float*, const float*, const float*,
                                        void*, int64_t, int64_t, int64_t, int32_t, int32_t, void*) {
    return SDXL_FAST_NO_CUDA;
}

int32_t sdxl_fast_conv2d_fwd_cuda(const void*, const void*, const void*, const void*, const float*, const float*, void*,
                                  int64_t, int64_t, int64_t, int64_t, int64_t, int32_t, int32_t, int32_t, void*) {
    return SDXL_FAST_NO_CUDA;
}

int32_t sdxl_fast_upsample_conv2d_fwd_cuda(const void*, const void*, const void*, void*, int64_t, int64_t, int64_t,
                                           int64_t, int64_t, int32_t, void*) {
    return SDXL_FAST_NO_CUDA;
}

int64_t sdxl_fast_disc_head_workspace_cuda(int64_t, int64_t) {
    return 0;
}

int32_t sdxl_fast_disc_head_fwd_cuda(const void*, const void*, const void*, const void*, const void*, float*, float*,
                                     float*, float*, float*, int64_t, int64_t, int64_t, int64_t, double, int32_t,
                                     int32_t, int32_t, int32_t, int32_t, void*) {
    return SDXL_FAST_NO_CUDA;
}

int32_t sdxl_fast_disc_head_bwd_cuda(const void*, const void*, const void*, const void*, const float*, const float*,
                                     const float*, const float*, const float*, const float*, void*, void*, void*, void*,
                                     void*, void*, int64_t, int64_t, int64_t, int64_t, int32_t, int32_t, int32_t,
                                     int32_t, int32_t, void*) {
    return SDXL_FAST_NO_CUDA;
}

int64_t sdxl_fast_token_head_workspace_cuda(int64_t, int64_t, int64_t, int64_t, int32_t) {
    return 0;
}

int32_t sdxl_fast_token_head_fwd_cuda(const void*, const void*, const void*, const void*, const void*, const void*,
                                      float*, float*, float*, void*, int64_t, int64_t, int64_t, int64_t, double,
                                      int32_t, int32_t, void*) {
    return SDXL_FAST_NO_CUDA;
}

int32_t sdxl_fast_token_head_bwd_cuda(const void*, const void*, const void*, const void*, const void*, const float*,
                                      const float*, const float*, void*, void*, void*, void*, void*, void*, void*,
                                      int64_t, int64_t, int64_t, int64_t, int32_t, int32_t, void*) {
    return SDXL_FAST_NO_CUDA;
}

}  // extern "C"
