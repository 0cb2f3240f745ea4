// SPDX-License-Identifier: Apache-2.0
#include "product.cuh"

int32_t sdxl_fast::hopper::launch_e4m3_160_gated(const Maps& maps, const Job& job, int64_t ctas, void* stream) {
    return launch_product<e4m3, 160, 1, true>(maps, job, ctas, stream);
}
