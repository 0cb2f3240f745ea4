// SPDX-License-Identifier: Apache-2.0
//
// The one kernel of the matrix ops on Hopper: y = window(x) . W + bias + residual, or value * GELU(gate) of it.
//
// Block     384 threads. One warp group keeps the loads going, two multiply: 64 of the tile's 128 rows each, all of its
//           columns, fp32 accumulators in registers. Blocks are persistent: they take tile after tile, and the next
//           tile's first slices arrive while the last one is written.
// Stage     128 rows of x and `kColumns` of W, 128 bytes of K each, brought by TMA in its 128-byte swizzle, as wgmma
//           reads them. What lies beyond the map or beyond K arrives as zeros: padding costs nothing.
// Split     with kParts = 2 the blocks of a cluster take half of K each, hand each other the rows they do not finish
//           through distributed shared memory, and write half the rows each. The sum has one order: no atomics.
// Gated     W's tile is kColumns / 2 rows of the value and as many of the gate, two loads; both halves of an output
//           are then in the same thread.
// e4m3      Its accumulators keep some 14 bits in the tensor core, so sums of 512 are added up in fp32 registers.
// Wrong     for a handful of rows, where a tile of 128 is mostly padding.
#pragma once

// Of CUTLASS the instructions alone: its algebra of layouts, for which nothing is left to do here, takes the compiler
// most of a minute a file.
#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>

#include <cute/arch/cluster_sm90.hpp>
#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/copy_sm90_tma.hpp>
#include <cute/arch/mma_sm90_desc.hpp>
#include <cute/arch/mma_sm90_gmma.hpp>

#include <utility>

#include "epilogue.cuh"
#include "launch.h"

namespace sdxl_fast {
namespace hopper {

struct e4m3 {
    uint8_t bits;
};

constexpr int kThreads = 384;
constexpr int kConsumers = 2;  // warp groups
constexpr int kConsumerWarps = 8;
// Of the 168 a thread is launched with, most go to those that keep the sums.
constexpr int kProducerRegisters = 56;
constexpr int kConsumerRegisters = 224;
constexpr int kPromoteSlices = 4;  // e4m3: slices of 128 after which the sums move to fp32 registers

// 64 rows by kColumns, 32 bytes of K, both operands in shared memory with K innermost.
constexpr auto kByK = cute::SM90::GMMA::Major::K;
template <class T, int kColumns>
struct Multiply;
template <>
struct Multiply<bf16, 128> {
    using Instruction = cute::SM90::GMMA::MMA_64x128x16_F32BF16BF16_SS<kByK, kByK>;
};
template <>
struct Multiply<bf16, 160> {
    using Instruction = cute::SM90::GMMA::MMA_64x160x16_F32BF16BF16_SS<kByK, kByK>;
};
template <>
struct Multiply<bf16, 256> {
    using Instruction = cute::SM90::GMMA::MMA_64x256x16_F32BF16BF16_SS<kByK, kByK>;
};
template <>
struct Multiply<e4m3, 160> {
    using Instruction = cute::SM90::GMMA::MMA_64x160x32_F32E4M3E4M3_SS_TN<>;
};

template <class T, int kColumns, int kParts>
struct Layout {
    static constexpr int kDepth = kSliceBytes / static_cast<int>(sizeof(T));
    static constexpr int kBytesA = kRows * kSliceBytes;
    static constexpr int kBytesB = kColumns * kSliceBytes;
    static constexpr int kExchange = exchange_bytes(kColumns, kParts);
    static constexpr int kStages = ring_stages(kColumns, kParts);
    static constexpr int kBytes = shared_bytes(kColumns, kParts);
    static_assert(kStages >= 3, "too few stages to hide the latency of memory");
};

// A ring of stages: which one, and how often the ring has gone round, modulo 2.
template <int kStages>
struct Ring {
    int stage = 0;
    uint32_t phase = 0;
    __device__ __forceinline__ void advance() {
        if (++stage == kStages) {
            stage = 0;
            phase ^= 1;
        }
    }
};

struct Memory {
    unsigned char* a;
    unsigned char* b;
    float* exchange;
    cutlass::arch::ClusterTransactionBarrier* full;
    cutlass::arch::ClusterBarrier* empty;
};

template <class L>
__device__ __forceinline__ Memory carve(unsigned char* raw) {
    unsigned char* base = raw + (kTileAlignment - cute::cast_smem_ptr_to_uint(raw) % kTileAlignment) % kTileAlignment;
    Memory memory;
    memory.a = base;
    memory.b = memory.a + L::kStages * L::kBytesA;
    memory.exchange = reinterpret_cast<float*>(memory.b + L::kStages * L::kBytesB);
    unsigned char* barriers = memory.b + L::kStages * L::kBytesB + L::kExchange;
    memory.full = reinterpret_cast<cutlass::arch::ClusterTransactionBarrier*>(barriers);
    memory.empty = reinterpret_cast<cutlass::arch::ClusterBarrier*>(memory.full + L::kStages);
    return memory;
}

// One thread: every slice of every tile into the ring, as stages fall empty.
template <class L, int kColumns, int kParts, bool kGated>
__device__ __forceinline__ void produce(const Maps& maps, const Job& job, const Memory& memory, int part) {
    constexpr uint64_t kHint = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL);
    Ring<L::kStages> ring;
    int begin, end;
    slices_of_part(job.taps, kParts, part, begin, end);
    for (int tile = blockIdx.x / kParts; tile < job.tiles; tile += gridDim.x / kParts) {
        const Place place = place_of(job.schedule, tile);
        // Unrolled it would spill: this warp group has given its registers to the others.
#pragma unroll 1
        for (int k = begin; k < end; ++k) {
            const Source from = source_of(job.taps, place, k, L::kDepth);
            memory.empty[ring.stage].wait(ring.phase ^ 1);
            memory.full[ring.stage].arrive_and_expect_tx(L::kBytesA + L::kBytesB);
            uint64_t* barrier = reinterpret_cast<uint64_t*>(&memory.full[ring.stage]);
            unsigned char* a = memory.a + ring.stage * L::kBytesA;
            unsigned char* b = memory.b + ring.stage * L::kBytesB;
            cute::SM90_TMA_LOAD_4D::copy(&maps.x, barrier, kHint, a, from.c, from.w, from.h, place.image);
            cute::SM90_TMA_LOAD_3D::copy(&maps.weight, barrier, kHint, b, from.c, from.tap, place.column);
            if constexpr (kGated) {
                const int gate = place.column + job.c_out;
                cute::SM90_TMA_LOAD_3D::copy(&maps.weight, barrier, kHint, b + L::kBytesB / 2, from.c, from.tap, gate);
            }
            ring.advance();
        }
    }
}

// A tile as wgmma is told of it: rows of 128 bytes in the 128-byte swizzle, eight of them in 1024 bytes. Its lowest
// bits are the address in units of 16 bytes, so that an offset is simply added.
__device__ __forceinline__ uint64_t descriptor_of(const unsigned char* tile) {
    cute::GmmaDescriptor descriptor;
    descriptor.bitfield.start_address_ = static_cast<uint16_t>(cute::cast_smem_ptr_to_uint(tile) >> 4);
    descriptor.bitfield.leading_byte_offset_ = 1;  // without meaning for a swizzled tile
    descriptor.bitfield.stride_byte_offset_ = 8 * kSliceBytes >> 4;
    descriptor.bitfield.base_offset_ = 0;
    descriptor.bitfield.layout_type_ = static_cast<uint8_t>(cute::SM90::GMMA::LayoutType::B128);
    return descriptor;
}

template <class Instruction, int kSums, size_t... kEach>
__device__ __forceinline__ void multiply_block(uint64_t a, uint64_t b, float (&sums)[kSums], bool first,
                                               std::index_sequence<kEach...>) {
    using cute::SM90::GMMA::ScaleOut;
    Instruction::fma(a, b, sums[kEach]..., first ? ScaleOut::Zero : ScaleOut::One);
}

// The compiler moves no access to the sums across this.
template <int kSums>
__device__ __forceinline__ void fence(float (&sums)[kSums]) {
#pragma unroll
    for (int e = 0; e < kSums; ++e) cute::warpgroup_fence_operand(sums[e]);
}

// sums = the products of `count` slices; `a` and `b` describe the tiles of the first stage. At most two slices'
// products are in flight; a stage is given back when the products that read it are done.
template <class L, class Instruction, int kSums>
__device__ __forceinline__ void multiply(const Memory& memory, uint64_t a, uint64_t b, float (&sums)[kSums], int count,
                                         Ring<L::kStages>& ring, Ring<L::kStages>& read, bool speaks) {
    constexpr int kBlockBytes = 32;  // of K in one instruction
    const auto give_back = [&] {
        if (speaks) memory.empty[read.stage].arrive();
        read.advance();
    };
    fence(sums);
    for (int k = 0; k < count; ++k) {
        memory.full[ring.stage].wait(ring.phase);
        cute::warpgroup_arrive();
        const uint64_t slice_a = a + ring.stage * (L::kBytesA >> 4), slice_b = b + ring.stage * (L::kBytesB >> 4);
#pragma unroll
        for (int byte = 0; byte < kSliceBytes; byte += kBlockBytes) {
            multiply_block<Instruction>(slice_a + (byte >> 4), slice_b + (byte >> 4), sums, k == 0 && byte == 0,
                                        std::make_index_sequence<kSums>{});
        }
        cute::warpgroup_commit_batch();
        ring.advance();
        if (k > 0) {
            cute::warpgroup_wait<1>();
            give_back();
        }
        fence(sums);
    }
    cute::warpgroup_wait<0>();
    fence(sums);
    if (count > 0) give_back();
}

// Sends the half of this thread's sums that the other block of the cluster finishes: rows 8 further for the first.
template <int kColumns>
__device__ __forceinline__ void send_half(const Memory& memory, const float* sums, int part, int thread) {
    const uint32_t there = cute::set_block_rank(cute::cast_smem_ptr_to_uint(memory.exchange + thread), part ^ 1);
#pragma unroll
    for (int e = 0; e < kColumns / 4; ++e) {
        const int block = e / 2, column = e % 2;
        const float value = part == 0 ? sums[4 * block + 2 + column] : sums[4 * block + column];
        asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(there + e * kConsumers * 128 * 4), "f"(value) : "memory");
    }
}

template <class T, int kColumns, int kParts, bool kGated>
__global__ void __launch_bounds__(kThreads, 1)
    product_kernel(const __grid_constant__ Maps maps, const __grid_constant__ Job job) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    using L = Layout<T, kColumns, kParts>;
    extern __shared__ unsigned char raw[];
    const Memory memory = carve<L>(raw);
    const int part = kParts > 1 ? static_cast<int>(cute::block_rank_in_cluster()) : 0;
    const int group = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);  // so the compiler knows it is a warp's
    if (threadIdx.x == 0) {
        cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(&maps.x));
        cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(&maps.weight));
        for (int stage = 0; stage < L::kStages; ++stage) {
            memory.full[stage].init(1);
            memory.empty[stage].init(kConsumerWarps);
        }
        cutlass::arch::fence_barrier_init();
    }
    if constexpr (kParts > 1) {
        cute::cluster_arrive_relaxed();
        cute::cluster_wait();
    } else {
        __syncthreads();
    }
    if (group == 0) {
        cutlass::arch::warpgroup_reg_dealloc<kProducerRegisters>();
        if (threadIdx.x == 0) produce<L, kColumns, kParts, kGated>(maps, job, memory, part);
        __syncwarp();
        if constexpr (kParts > 1) {
            cute::cluster_arrive();
            cute::cluster_wait();
        }
        return;
    }
    cutlass::arch::warpgroup_reg_alloc<kConsumerRegisters>();
    const int thread = threadIdx.x - 128;
    const bool speaks = thread % 32 == 0;
    using Instruction = typename Multiply<T, kColumns>::Instruction;
    const uint64_t a = descriptor_of(memory.a + (group - 1) * (kRows / kConsumers) * kSliceBytes);
    const uint64_t b = descriptor_of(memory.b);
    float sums[kColumns / 2];  // of two rows, of every eight columns two
    Ring<L::kStages> ring, read;
    int begin, end;
    slices_of_part(job.taps, kParts, part, begin, end);
    const float scale = job.scale_x == nullptr ? 1.0f : *job.scale_x * *job.scale_w;
    for (int tile = blockIdx.x / kParts; tile < job.tiles; tile += gridDim.x / kParts) {
        if constexpr (sizeof(T) == 1) {
            float partial[kColumns / 2];
#pragma unroll
            for (int e = 0; e < kColumns / 2; ++e) sums[e] = 0.0f;
            for (int k = begin; k < end; k += kPromoteSlices) {
                multiply<L, Instruction>(memory, a, b, partial, min(kPromoteSlices, end - k), ring, read, speaks);
#pragma unroll
                for (int e = 0; e < kColumns / 2; ++e) sums[e] += partial[e];
            }
        } else {
            multiply<L, Instruction>(memory, a, b, sums, end - begin, ring, read, speaks);
        }
        const Place place = place_of(job.schedule, tile);
        if constexpr (kParts > 1) {
            // One tile a block, so the exchange is used once: sent by all, then read by all.
            send_half<kColumns>(memory, sums, part, thread);
            cute::cluster_arrive();
            cute::cluster_wait();
        }
#pragma unroll
        for (int half = 0; half < 2 / kParts; ++half) {
            const int which = kParts > 1 ? part : half;
            float row[kColumns / 8][2];
#pragma unroll
            for (int e = 0; e < kColumns / 4; ++e) {
                const int at = e / 2 * 4 + e % 2;
                float value = which == 0 ? sums[at] : sums[at + 2];
                if constexpr (kParts > 1) value += memory.exchange[e * kConsumers * 128 + thread];
                row[e / 2][e % 2] = value;
            }
            write_row<kColumns, kGated>(job, place, row, first_row(thread) + 8 * which, scale);
        }
    }
#else
    (void)maps;
    (void)job;
#endif
}

// Launches it; the host side of every instantiation.
template <class T, int kColumns, int kParts, bool kGated>
int32_t launch_product(const Maps& maps, const Job& job, int64_t ctas, void* stream) {
    using L = Layout<T, kColumns, kParts>;
    const auto kernel = product_kernel<T, kColumns, kParts, kGated>;
    cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(L::kBytes));
    if (error == cudaSuccess) {
        cudaLaunchAttribute cluster{};
        cluster.id = cudaLaunchAttributeClusterDimension;
        cluster.val.clusterDim = {kParts, 1, 1};
        cudaLaunchConfig_t config{};
        config.gridDim = dim3(static_cast<unsigned>(ctas));
        config.blockDim = dim3(kThreads);
        config.dynamicSmemBytes = L::kBytes;
        config.stream = static_cast<cudaStream_t>(stream);
        config.attrs = &cluster;
        config.numAttrs = 1;
        error = cudaLaunchKernelEx(&config, kernel, maps, job);
    }
    if (error != cudaSuccess) (void)cudaGetLastError();
    return cuda::status_of(error);
}

}  // namespace hopper
}  // namespace sdxl_fast
