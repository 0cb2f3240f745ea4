// SPDX-License-Identifier: Apache-2.0
//
// From the sums of a tile to y: scale, bias, gate, residual, one rounding, and of a gate a second one if it is to be
// e4m3. Plain CUDA, which also runs under the emulation of ../emulation.
#pragma once

#include "../gelu.cuh"
#include "job.h"

namespace sdxl_fast {
namespace hopper {

using cuda::bf16;

// Four values at consecutive places, moved by one access of 8 bytes and kept as they lie: two to a register.
using Packed = cuda::Vec<uint32_t, 2>;

__device__ __forceinline__ void add(float (&to)[4], const Packed& found) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
        to[2 * e] += float_from_bits(found.at[e] << 16);
        to[2 * e + 1] += float_from_bits(found.at[e] & 0xffff0000u);
    }
}

// What is added to a thread's runs, 16 columns apart; nothing where there is none. No load waits for a branch: a run
// beyond `limit`, which is not written, reads the first columns instead.
template <int kRuns>
__device__ __forceinline__ void load_runs(Packed (&to)[kRuns], const bf16* from, int64_t at, int column, int limit) {
#pragma unroll
    for (int i = 0; i < kRuns; ++i) to[i] = {};
    if (from == nullptr) return;
#pragma unroll
    for (int i = 0; i < kRuns; ++i) {
        const int of_run = column + 16 * i;
        to[i] = cuda::load<2>(reinterpret_cast<const uint32_t*>(from + (of_run < limit ? at + of_run : 0)));
    }
}

// wgmma leaves a thread two neighbouring columns of every eight. Of two such blocks each pair of lanes makes two runs
// of four columns, so that eight rows by 16 columns leave a warp as full sectors of 32 bytes.
__device__ __forceinline__ void pair_up(float (&run)[4], const float (&even)[2], const float (&odd)[2], bool is_odd) {
    const float first = __shfl_xor_sync(0xffffffffu, is_odd ? even[0] : odd[0], 1);
    const float second = __shfl_xor_sync(0xffffffffu, is_odd ? even[1] : odd[1], 1);
    run[0] = is_odd ? first : even[0];
    run[1] = is_odd ? second : even[1];
    run[2] = is_odd ? odd[0] : first;
    run[3] = is_odd ? odd[1] : second;
}

// Writes one row of a tile: `row[8-column block][column of the thread's two]`.
template <int kColumns, bool kGated>
__device__ __forceinline__ void write_row(const Job& job, const Place& place, const float (&row)[kColumns / 8][2],
                                          int position, float scale) {
    constexpr int kOut = kGated ? kColumns / 2 : kColumns;
    const int lane = threadIdx.x % 4;
    const bool is_odd = lane % 2 != 0;
    const int64_t at = output_at(job.output, job.schedule, place, position);
    const int limit = at < 0 ? 0 : job.c_out;  // columns from here on are not written
    const float reciprocal = kGated && job.scale_y != nullptr ? 1.0f / *job.scale_y : 1.0f;
    constexpr int kPairs = kOut / 16, kRuns = kPairs % 5 == 0 ? 5 : 4;
#pragma unroll
    for (int first = 0; first < kPairs; first += kRuns) {
        // All loads ahead of the first use, or each would wait for the one before it.
        const int begin = place.column + 16 * first + (is_odd ? 8 : 0) + lane / 2 * 4;
        Packed bias[kRuns], other[kRuns];  // other: of a gate its bias, else the residual
        load_runs(bias, job.bias, 0, begin, limit);
        if constexpr (kGated) {
            load_runs(other, job.bias == nullptr ? nullptr : job.bias + job.c_out, 0, begin, limit);
        } else {
            load_runs(other, job.residual, at, begin, limit);
        }
#pragma unroll
        for (int i = 0; i < kRuns; ++i) {
            const int pair = first + i, column = begin + 16 * i;
            float run[4], gate[4];
            pair_up(run, row[2 * pair], row[2 * pair + 1], is_odd);
            if constexpr (kGated) pair_up(gate, row[2 * pair + kOut / 8], row[2 * pair + 1 + kOut / 8], is_odd);
#pragma unroll
            for (int e = 0; e < 4; ++e) run[e] *= scale;
            add(run, bias[i]);
            if constexpr (kGated) {
#pragma unroll
                for (int e = 0; e < 4; ++e) gate[e] *= scale;
                add(gate, other[i]);
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    run[e] *= job.tanh ? cuda::gelu_for<bf16, true>(gate[e]).value
                                       : cuda::gelu_for<bf16, false>(gate[e]).value;
                }
            } else {
                add(run, other[i]);
            }
            cuda::Vec<bf16, 4> out;
#pragma unroll
            for (int e = 0; e < 4; ++e) out.at[e] = cuda::from_float<bf16>(run[e]);
            if (column >= limit) continue;
            if constexpr (kGated) {
                if (job.scale_y != nullptr) {
                    cuda::store_result(static_cast<E4M3*>(job.y) + at + column, out, reciprocal);
                    continue;
                }
            }
            cuda::store<4>(static_cast<bf16*>(job.y) + at + column, out);
        }
    }
}

}  // namespace hopper
}  // namespace sdxl_fast
