// SPDX-License-Identifier: Apache-2.0
//
// What the library says about itself: ABI number, build facts, texts of statuses.
#include <cstdint>

#include "sdxl_fast.h"

#if defined(SDXL_FAST_WITH_CUDA)
#include <cuda_runtime_api.h>
#endif

#define SDXL_TEXT_(x) #x
#define SDXL_TEXT(x) SDXL_TEXT_(x)

#if defined(__clang__)
#define SDXL_COMPILER "clang " __clang_version__
#elif defined(__GNUC__)
#define SDXL_COMPILER "gcc " __VERSION__
#else
#define SDXL_COMPILER "unknown"
#endif

#if defined(SDXL_FAST_WITH_CUDA)
#define SDXL_CUDA_JSON "\"" SDXL_FAST_CUDA_VERSION "\""
#else
#define SDXL_CUDA_JSON "null"
#endif

#if defined(SDXL_FAST_WITH_HOPPER)
#define SDXL_CUTLASS_JSON "\"" SDXL_FAST_CUTLASS_VERSION "\""
#else
#define SDXL_CUTLASS_JSON "null"
#endif

extern "C" {

int32_t sdxl_fast_abi(void) {
    return SDXL_FAST_ABI;
}

const char* sdxl_fast_build_info(void) {
    return "{\"version\": \"" SDXL_FAST_VERSION
           "\", \"abi\": " SDXL_TEXT(SDXL_FAST_ABI) ", \"compiler\": \"" SDXL_COMPILER "\", \"cuda\": " SDXL_CUDA_JSON
                                                    ", \"cuda_archs\": [" SDXL_FAST_CUDA_ARCHS_JSON
                                                    "], \"cutlass\": " SDXL_CUTLASS_JSON
                                                    ", \"isas\": [" SDXL_FAST_ISAS_JSON "]}";
}

const char* sdxl_fast_status_text(int32_t status) {
    switch (status) {
        case SDXL_FAST_OK:
            return "ok";
        case SDXL_FAST_INVALID_ARGUMENT:
            return "invalid argument";
        case SDXL_FAST_UNSUPPORTED_DTYPE:
            return "unsupported dtype";
        case SDXL_FAST_NO_CUDA:
            return "the library was built without CUDA";
        case SDXL_FAST_NOT_BUILT:
            return "the library was built without these kernels, which need sm_90a and CUTLASS's headers";
        default:
            break;
    }
    if (status >= SDXL_FAST_CUDA_ERROR) {
#if defined(SDXL_FAST_WITH_CUDA)
        return cudaGetErrorString(static_cast<cudaError_t>(status - SDXL_FAST_CUDA_ERROR));
#else
        return "CUDA error from a library built without CUDA";
#endif
    }
    return "unknown status";
}

}  // extern "C"
