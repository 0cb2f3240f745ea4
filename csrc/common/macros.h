// SPDX-License-Identifier: Apache-2.0
#pragma once

// Functions of common/ run on the host and, when nvcc compiles them, on the device. On the host they are always
// inlined: the C++ backend compiles the same header for several instruction sets, and a shared out-of-line copy would
// leak the newest one into the others.
#if defined(__CUDACC__)
#define SDXL_HD __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define SDXL_HD inline __attribute__((always_inline))
#else
#define SDXL_HD inline
#endif
