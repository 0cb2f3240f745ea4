// SPDX-License-Identifier: Apache-2.0
//
// lora_merge: weight = base + scale * up * down, in place, for any number of modules in one launch.
//
// Formula    sums over the rank in float, scaled and added to the base in float, rounded once.
// Grid       one block per tile of 64 rows by 128 columns of some module's weight; a warp finds the module by its first
//            tile, in a table in device memory, 32 entries a look.
// Registers  64 sums a thread. 16-bit factors: four warps, each 32 by 64 of the tile, by the tensor cores; the columns
//            of their tiles are dealt so that a thread ends with 8 neighbouring columns and needs no shared memory to
//            turn its sums into vectors. Float factors: 8 by 8 a thread, by multiply-adds, since tensor cores would
//            round them.
// Shared     32 (float: 16) ranks of both factors, the pairs of ranks that the tensor cores want in one word.
// Bytes      reads and writes 1 element per element; the factors again for every tile, from the L2 cache: 24 KB beside
//            the tile's 32 KB at rank 64 and 16 bits.
// Wrong      for float factors of a high rank, where the multiply-adds take longer than the memory (about 32 on an
//            H100); and where the weight may wait: a forward with the two factors reads less.
#include "device.cuh"
#include "mma.cuh"

namespace sdxl_fast {
namespace cuda {
namespace {

using Module = sdxl_fast_lora_module;

constexpr int kRowsOfTile = 64, kColsOfTile = 128, kThreads = 128;
constexpr int kRun = 8;  // columns a thread adds to the weight together

// ---- which tile ----

struct Tile {
    Module module;
    int64_t row, col;
};

// The last module whose first tile is not beyond `tile`: its warp looks at 32 entries at a time.
__device__ __forceinline__ Tile find_tile(const Module* modules, int64_t count, int64_t tile) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    int64_t low = 0, span = count;
    while (span > 1) {
        const int64_t step = (span + 31) / 32, mine = low + lane * step;
        const bool begun = lane * step < span && modules[mine].first_tile <= tile;
        const int64_t last = static_cast<int64_t>(warp_sum(begun ? 1.0f : 0.0f)) - 1;
        low += last * step;
        span = span - last * step < step ? span - last * step : step;
    }
    Tile found;
    found.module = modules[low];
    const int64_t within = tile - found.module.first_tile, across = (found.module.cols + kColsOfTile - 1) / kColsOfTile;
    found.row = within / across * kRowsOfTile;
    found.col = within % across * kColsOfTile;
    return found;
}

// ---- the weight ----

// Adds N neighbouring sums to the weight.
template <class T, int N>
__device__ __forceinline__ void add_run(const Module& m, int64_t row, int64_t col, const float (&sum)[N], bool wide) {
    constexpr int kVec = kVecWidth<T> < N ? kVecWidth<T> : N;
    if (row >= m.rows) return;
    const float scale = static_cast<float>(m.scale);
    const T* base = static_cast<const T*>(m.base) + row * m.cols;
    T* weight = static_cast<T*>(m.weight) + row * m.cols;
    if (wide) {
        if (col >= m.cols) return;  // a run is inside or outside: the width is a multiple of it
        Vec<T, kVec> part[N / kVec];
#pragma unroll
        for (int v = 0; v < N / kVec; ++v) part[v] = load<kVec>(base + col + v * kVec);
#pragma unroll
        for (int i = 0; i < N; ++i) {
            T& at = part[i / kVec].at[i % kVec];
            at = from_float<T>(fmaf(scale, sum[i], to_float(at)));
        }
#pragma unroll
        for (int v = 0; v < N / kVec; ++v) store<kVec>(weight + col + v * kVec, part[v]);
    } else {
#pragma unroll
        for (int i = 0; i < N; ++i)
            if (col + i < m.cols) weight[col + i] = from_float<T>(fmaf(scale, sum[i], to_float(base[col + i])));
    }
}

__device__ __forceinline__ bool on_16(const void* pointer) {
    return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

template <class T>
__device__ __forceinline__ bool wide_weight(const Module& m) {
    return m.cols % kRun == 0 && on_16(m.base) && on_16(m.weight);
}

// N elements of a row that has `size`, from `at` on; 0 beyond it.
template <int N, class T>
__device__ __forceinline__ Vec<T, N> load_part(const T* row, int64_t at, int64_t size, bool wide) {
    constexpr int kVec = kVecWidth<T> < N ? kVecWidth<T> : N;
    Vec<T, N> out{};
    if (wide && at + N <= size) {
#pragma unroll
        for (int v = 0; v < N / kVec; ++v) {
            const Vec<T, kVec> part = load<kVec>(row + at + v * kVec);
#pragma unroll
            for (int i = 0; i < kVec; ++i) out.at[v * kVec + i] = part.at[i];
        }
    } else {
#pragma unroll
        for (int i = 0; i < N; ++i)
            if (at + i < size) out.at[i] = row[at + i];
    }
    return out;
}

// ---- 16-bit factors, by the tensor cores ----

constexpr int kRanks = 32, kPairs = kRanks / 2;
// Words from one row to the next: 20 and 130 keep the lanes of a warp in 32 different banks when they read.
constexpr int kUpStride = 20, kDownStride = 130;

struct PairedFactors {
    alignas(16) uint32_t up[kRowsOfTile][kUpStride];
    alignas(16) uint32_t down[kPairs][kDownStride];
};

__device__ __forceinline__ void stage_pairs(PairedFactors& s, const Tile& tile, int64_t rank, bool up_wide,
                                            bool down_wide) {
    const Module& m = tile.module;
    const int thread = static_cast<int>(threadIdx.x);
    {
        const int64_t row = thread / 2, of = tile.row + row < m.rows ? tile.row + row : m.rows - 1;
        const uint16_t* up = static_cast<const uint16_t*>(m.up) + of * m.rank;
#pragma unroll
        for (int part = 0; part < 2; ++part) {
            const int at = thread % 2 * 16 + part * 8;
            const Vec<uint16_t, 8> from = load_part<8>(up, rank + at, m.rank, up_wide);
            Vec<uint32_t, 4> to;
#pragma unroll
            for (int i = 0; i < 4; ++i) to.at[i] = from.at[2 * i] | static_cast<uint32_t>(from.at[2 * i + 1]) << 16;
            store_shared<4>(&s.up[row][at / 2], to);
        }
    }
#pragma unroll
    for (int item = thread; item < kPairs * (kColsOfTile / 8); item += kThreads) {
        const int pair = item / (kColsOfTile / 8), col = item % (kColsOfTile / 8) * 8;
        const uint16_t* down = static_cast<const uint16_t*>(m.down);
        Vec<uint16_t, 8> both[2] = {};
#pragma unroll
        for (int which = 0; which < 2; ++which) {
            const int64_t at = rank + 2 * pair + which;
            if (at < m.rank) both[which] = load_part<8>(down + at * m.cols, tile.col + col, m.cols, down_wide);
        }
#pragma unroll
        for (int i = 0; i < 8; i += 2) {
            Vec<uint32_t, 2> to;
#pragma unroll
            for (int k = 0; k < 2; ++k) to.at[k] = both[0].at[i + k] | static_cast<uint32_t>(both[1].at[i + k]) << 16;
            store_shared<2>(&s.down[pair][col + i], to);
        }
    }
}

// Blocks on a multiprocessor. From sm_100 on the addresses take more registers, and a fourth block would make it spill.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kPairedBlocks = 3;
#else
constexpr int kPairedBlocks = 4;
#endif

template <class T, class F>
__global__ void __launch_bounds__(kThreads, kPairedBlocks)
    lora_merge_paired_kernel(const Module* __restrict__ modules, int64_t count) {
    __shared__ PairedFactors s;
    const Tile tile = find_tile(modules, count, blockIdx.x);
    const Module& m = tile.module;
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const int g = lane / 4, t = lane % 4, first_row = warp / 2 * 32, first_col = warp % 2 * 64;
    const bool up_wide = m.rank % 8 == 0 && on_16(m.up), down_wide = m.cols % 8 == 0 && on_16(m.down);
    float sum[2][2][4][4] = {};  // 16 rows, 32 columns, 8 of them, the four of a thread
    for (int64_t rank = 0; rank < m.rank; rank += kRanks) {
        if (rank > 0) __syncthreads();
        stage_pairs(s, tile, rank, up_wide, down_wide);
        __syncthreads();
#pragma unroll
        for (int k = 0; k < kPairs; k += 8) {
            uint32_t a[2][4];
#pragma unroll
            for (int rows = 0; rows < 2; ++rows)
#pragma unroll
                for (int i = 0; i < 4; ++i) a[rows][i] = s.up[first_row + rows * 16 + i % 2 * 8 + g][k + i / 2 * 4 + t];
#pragma unroll
            for (int cols = 0; cols < 2; ++cols)
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    // Column 2t + e of the product, which thread t gets, is column 8t + 2j + e of the tile.
                    const int col = first_col + cols * 32 + g / 2 * 8 + 2 * j + g % 2;
                    const uint32_t b[2] = {s.down[k + t][col], s.down[k + 4 + t][col]};
                    mma_16x8x16<F>(sum[0][cols][j], a[0], b);
                    mma_16x8x16<F>(sum[1][cols][j], a[1], b);
                }
        }
    }
    const bool wide = wide_weight<T>(m);
#pragma unroll
    for (int rows = 0; rows < 2; ++rows)
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int cols = 0; cols < 2; ++cols) {
                float run[kRun];
#pragma unroll
                for (int i = 0; i < kRun; ++i) run[i] = sum[rows][cols][i / 2][half * 2 + i % 2];
                add_run<T>(m, tile.row + first_row + rows * 16 + half * 8 + g, tile.col + first_col + cols * 32 + t * 8,
                           run, wide);
            }
}

// ---- float factors, by multiply-adds ----

constexpr int kFloatRanks = 16;

struct FloatFactors {
    alignas(16) float up[kFloatRanks][kRowsOfTile + 4];
    alignas(16) float down[kFloatRanks][kColsOfTile];
};

__device__ __forceinline__ void stage_floats(FloatFactors& s, const Tile& tile, int64_t rank, bool up_wide,
                                             bool down_wide) {
    const Module& m = tile.module;
    const int thread = static_cast<int>(threadIdx.x);
    const int64_t row = thread / 2, of = tile.row + row < m.rows ? tile.row + row : m.rows - 1;
    const float* up = static_cast<const float*>(m.up) + of * m.rank;
    const int at = thread % 2 * 8;
    const Vec<float, 8> from = load_part<8>(up, rank + at, m.rank, up_wide);
#pragma unroll
    for (int i = 0; i < 8; ++i) s.up[at + i][row] = from.at[i];
#pragma unroll
    for (int item = thread; item < kFloatRanks * (kColsOfTile / 4); item += kThreads) {
        const int k = item / (kColsOfTile / 4), col = item % (kColsOfTile / 4) * 4;
        const float* down = static_cast<const float*>(m.down) + (rank + k) * m.cols;
        Vec<float, 4> to{};
        if (rank + k < m.rank) to = load_part<4>(down, tile.col + col, m.cols, down_wide);
        store_shared<4>(&s.down[k][col], to);
    }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 3)
    lora_merge_float_kernel(const Module* __restrict__ modules, int64_t count) {
    __shared__ FloatFactors s;
    const Tile tile = find_tile(modules, count, blockIdx.x);
    const Module& m = tile.module;
    const int first_row = static_cast<int>(threadIdx.x) / 16 * 8, first_col = static_cast<int>(threadIdx.x) % 16 * 4;
    const bool up_wide = m.rank % 4 == 0 && on_16(m.up), down_wide = m.cols % 4 == 0 && on_16(m.down);
    float sum[8][2][4] = {};
    for (int64_t rank = 0; rank < m.rank; rank += kFloatRanks) {
        if (rank > 0) __syncthreads();
        stage_floats(s, tile, rank, up_wide, down_wide);
        __syncthreads();
#pragma unroll
        for (int k = 0; k < kFloatRanks; ++k) {
            const Vec<float, 4> up[2] = {load<4>(&s.up[k][first_row]), load<4>(&s.up[k][first_row + 4])};
            const Vec<float, 4> down[2] = {load<4>(&s.down[k][first_col]), load<4>(&s.down[k][first_col + 64])};
#pragma unroll
            for (int i = 0; i < 8; ++i)
#pragma unroll
                for (int j = 0; j < 8; ++j)
                    sum[i][j / 4][j % 4] = fmaf(up[i / 4].at[i % 4], down[j / 4].at[j % 4], sum[i][j / 4][j % 4]);
        }
    }
    const bool wide = wide_weight<T>(m);
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
        for (int cols = 0; cols < 2; ++cols)
            add_run<T>(m, tile.row + first_row + i, tile.col + first_col + cols * 64, sum[i][cols], wide);
}

template <class T>
int32_t merge(const Module* modules, int64_t count, int64_t tiles, int32_t factor_dtype, void* stream) {
    const dim3 grid(static_cast<unsigned>(tiles));
    if (factor_dtype == SDXL_FAST_BF16)
        return launch(lora_merge_paired_kernel<T, bf16>, grid, kThreads, stream, modules, count);
    if (factor_dtype == SDXL_FAST_F16)
        return launch(lora_merge_paired_kernel<T, f16>, grid, kThreads, stream, modules, count);
    return launch(lora_merge_float_kernel<T>, grid, kThreads, stream, modules, count);
}

}  // namespace
}  // namespace cuda
}  // namespace sdxl_fast

extern "C" {

int64_t sdxl_fast_lora_merge_plan_cuda(sdxl_fast_lora_module* modules, int64_t count) {
    using namespace sdxl_fast::cuda;
    int64_t tiles = 0;
    for (int64_t i = 0; i < count; ++i) {
        const int64_t down = ceil_div(modules[i].rows, kRowsOfTile), across = ceil_div(modules[i].cols, kColsOfTile);
        const bool fits = across == 0 || down <= (0x7fffffff - tiles) / across;
        if (modules[i].rows < 0 || modules[i].cols < 0 || modules[i].rank < 0 || !fits) return -1;
        modules[i].first_tile = tiles;
        tiles += down * across;
    }
    return tiles;
}

int32_t sdxl_fast_lora_merge_fwd_cuda(const sdxl_fast_lora_module* modules, int64_t count, int64_t tiles, int32_t dtype,
                                      int32_t factor_dtype, void* stream) {
    using namespace sdxl_fast::cuda;
    if (count < 0 || tiles < 0 || tiles > 0x7fffffff || (tiles > 0 && (count == 0 || modules == nullptr)))
        return SDXL_FAST_INVALID_ARGUMENT;
    if (factor_dtype == SDXL_FAST_F64) return SDXL_FAST_UNSUPPORTED_DTYPE;
    if (factor_dtype < SDXL_FAST_F32 || factor_dtype > SDXL_FAST_F16) return SDXL_FAST_INVALID_ARGUMENT;
    return with_dtype(dtype, [&](auto element) -> int32_t {
        using T = decltype(element);
        return tiles == 0 ? SDXL_FAST_OK : merge<T>(modules, count, tiles, factor_dtype, stream);
    });
}

}  // extern "C"
