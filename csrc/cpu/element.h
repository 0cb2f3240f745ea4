// SPDX-License-Identifier: Apache-2.0
// Scalar conversion between stored elements and the type they are computed in.
#pragma once
#include <stdint.h>
#include <string.h>

#include "common/half.h"

namespace sdxl_fast {

template <class T> struct ComputeOf { using type = float; };
template <> struct ComputeOf<double> { using type = double; };

inline double to_compute(double v) { return v; }
inline float to_compute(float v) { return v; }
inline float to_compute(BF16 v) { return bf16_to_float(v); }
inline float to_compute(F16 v) { return f16_to_float(v); }

inline void from_compute(double v, double& o) { o = v; }
inline void from_compute(float v, float& o) { o = v; }
inline void from_compute(float v, BF16& o) { o = float_to_bf16(v); }
inline void from_compute(float v, F16& o) { o = float_to_f16(v); }

// Calls f with a null T* of the element type; false when the code is unknown.
template <class F>
bool with_dtype(int32_t dtype, F&& f) {
    switch (dtype) {
        case 0: f(static_cast<float*>(nullptr)); return true;
        case 1: f(static_cast<double*>(nullptr)); return true;
        case 2: f(static_cast<BF16*>(nullptr)); return true;
        case 3: f(static_cast<F16*>(nullptr)); return true;
        default: return false;
    }
}

}  // namespace sdxl_fast
