// SPDX-License-Identifier: Apache-2.0
//
// From a convolution to a launch: the two tensor maps beside what describe.h says.
#include "describe.h"

#include <cudaTypedefs.h>

#include "launch.h"

namespace sdxl_fast {
namespace hopper {
namespace {

// The driver's encoder of tensor maps. Asked for at run time: this library links against no driver.
PFN_cuTensorMapEncodeTiled_v12000 encoder() {
    static const PFN_cuTensorMapEncodeTiled_v12000 found = [] {
        void* symbol = nullptr;
        cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
        cudaError_t error =
            cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &symbol, 12000, cudaEnableDefault, &result);
#else
        cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &symbol, cudaEnableDefault, &result);
#endif
        const bool good = error == cudaSuccess && result == cudaDriverEntryPointSuccess;
        if (error != cudaSuccess) (void)cudaGetLastError();
        return good ? reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(symbol) : nullptr;
    }();
    return found;
}

// A dense tensor of `rank` dimensions, the innermost first, read in boxes with the swizzle wgmma expects.
int32_t encode(CUtensorMap& map, const void* base, bool float8, int rank, const int64_t* sizes, const int* box) {
    if (encoder() == nullptr) return cuda::status_of(cudaErrorNotSupported);
    cuuint64_t dims[5], strides[5];
    cuuint32_t extents[5], steps[5];
    cuuint64_t bytes = float8 ? 1 : 2;
    for (int d = 0; d < rank; ++d) {
        dims[d] = static_cast<cuuint64_t>(sizes[d]);
        extents[d] = static_cast<cuuint32_t>(box[d]);
        steps[d] = 1;
        bytes *= dims[d];
        strides[d] = bytes;  // from one index of dimension d + 1 to the next
    }
    const CUresult found = encoder()(&map, float8 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                                     static_cast<cuuint32_t>(rank), const_cast<void*>(base), dims, strides, extents,
                                     steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                     CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return found == CUDA_SUCCESS ? SDXL_FAST_OK : cuda::status_of(cudaErrorInvalidValue);
}

auto* launcher(const Description& d) {
    const bool split = d.plan.split > 1;
    if (d.problem.gated) return d.problem.float8 ? &launch_e4m3_160_gated : &launch_bf16_160_gated;
    if (d.problem.float8) return split ? &launch_e4m3_160_split : &launch_e4m3_160;
    if (d.plan.width == Width::k128) return &launch_bf16_128;
    if (d.plan.width == Width::k256) return &launch_bf16_256;
    return split ? &launch_bf16_160_split : &launch_bf16_160;
}

}  // namespace

int32_t run(const Convolution& convolution, void* stream) {
    int multiprocessors = 0;
    int32_t status = cuda::multiprocessors(multiprocessors);
    if (status != SDXL_FAST_OK) return status;
    const Description d = describe(convolution, multiprocessors);
    if (!d.fits) return SDXL_FAST_INVALID_ARGUMENT;
    Maps maps{};
    const int64_t x_sizes[] = {convolution.c_in, convolution.x_width, convolution.x_height, convolution.images};
    const int x_box[] = {d.depth, d.plan.tile_w, d.plan.tile_h, 1};
    status = encode(maps.x, convolution.x, convolution.float8, 4, x_sizes, x_box);
    if (status != SDXL_FAST_OK) return status;
    const int64_t weight_rows = convolution.gated ? 2 * convolution.c_out : convolution.c_out;
    const int64_t weight_sizes[] = {convolution.c_in, convolution.weight_taps, weight_rows};
    const int weight_box[] = {d.depth, 1, d.weight_rows};
    status = encode(maps.weight, convolution.weight, convolution.float8, 3, weight_sizes, weight_box);
    if (status != SDXL_FAST_OK) return status;
    return launcher(d)(maps, d.job, d.plan.ctas, stream);
}

}  // namespace hopper
}  // namespace sdxl_fast
