// SPDX-License-Identifier: Apache-2.0
//
// Merging of partial means and sums of squared deviations (Chan, Golub, LeVeque 1979): numerically safe where
// E[x^2] - E[x]^2 is not.
#pragma once

#include "macros.h"

namespace sdxl_fast {

template <class T>
struct Moments {
    T count = 0, mean = 0, m2 = 0;

    // Takes one more value.
    SDXL_HD void push(T value) {
        count += T(1);
        const T delta = value - mean;
        mean += delta / count;
        m2 += delta * (value - mean);
    }

    // Takes the moments of other, disjoint values.
    SDXL_HD void merge(const Moments& other) {
        if (other.count == T(0)) return;
        const T total = count + other.count;
        const T delta = other.mean - mean;
        const T share = other.count / total;
        mean += delta * share;
        m2 += other.m2 + delta * delta * count * share;
        count = total;
    }
};

}  // namespace sdxl_fast
