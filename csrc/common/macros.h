// SPDX-License-Identifier: Apache-2.0
#pragma once

// Functions of common/ run on the host and, when nvcc compiles them, on the device.
#if defined(__CUDACC__)
#define SDXL_HD __host__ __device__ __forceinline__
#else
#define SDXL_HD inline
#endif
