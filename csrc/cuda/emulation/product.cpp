// SPDX-License-Identifier: Apache-2.0
//
// The matrix kernel of ../hopper without its tensor cores: the plan, the schedule, the patches and taps every slice
// reads, the way sums lie in threads, and the epilogue are those of the GPU; the products are loops.
#include <vector>

#include "../hopper/describe.h"
#include "../hopper/epilogue.cuh"

namespace sdxl_fast {
namespace hopper {
namespace {

float from_e4m3(uint8_t bits) {
    const int exponent = bits >> 3 & 15, mantissa = bits & 7;
    if (exponent == 15 && mantissa == 7) return NAN;
    const float size = exponent == 0 ? ldexpf(static_cast<float>(mantissa), -9)
                                     : ldexpf(static_cast<float>(8 + mantissa), exponent - 10);
    return bits & 128 ? -size : size;
}

float element(const void* base, int64_t index, bool float8) {
    return float8 ? from_e4m3(static_cast<const uint8_t*>(base)[index])
                  : cuda::to_float(static_cast<const bf16*>(base)[index]);
}

// What TMA brings: zeros beyond the tensor.
float x_at(const Convolution& c, int64_t image, int64_t h, int64_t w, int64_t channel) {
    if (h < 0 || h >= c.x_height || w < 0 || w >= c.x_width || channel >= c.c_in) return 0.0f;
    return element(c.x, ((image * c.x_height + h) * c.x_width + w) * c.c_in + channel, c.float8);
}

float weight_at(const Convolution& c, int64_t row, int64_t tap, int64_t channel) {
    const int64_t rows = c.gated ? 2 * c.c_out : c.c_out;
    if (row >= rows || channel >= c.c_in) return 0.0f;
    return element(c.weight, (row * c.weight_taps + tap) * c.c_in + channel, c.float8);
}

// Adds a slice's products to the sums [kRows, columns] of a tile.
void multiply(const Convolution& c, const Description& d, const Place& place, int slice, int columns,
              std::vector<float>& sums) {
    const Source from = source_of(d.job.taps, place, slice, d.depth);
    std::vector<float> a(kRows), b(columns);
    for (int k = 0; k < d.depth && from.c + k < c.c_in; ++k) {
        for (int row = 0; row < kRows; ++row) {
            a[row] = x_at(c, place.image, from.h + row / d.plan.tile_w, from.w + row % d.plan.tile_w, from.c + k);
        }
        for (int column = 0; column < columns; ++column) {
            const bool gate = column >= d.weight_rows;
            b[column] =
                weight_at(c, place.column + column + (gate ? c.c_out - d.weight_rows : 0), from.tap, from.c + k);
        }
        for (int row = 0; row < kRows; ++row) {
            float* sum = &sums[static_cast<size_t>(row) * columns];
            for (int column = 0; column < columns; ++column) sum[column] += a[row] * b[column];
        }
    }
}

template <int kColumns, bool kGated>
__global__ void finish_kernel(const Job* job, const Place* place, const float* sums) {
    const int thread = static_cast<int>(threadIdx.x);
    const float scale = job->scale_x == nullptr ? 1.0f : *job->scale_x * *job->scale_w;
    for (int half = 0; half < 2; ++half) {
        const int position = first_row(thread) + 8 * half;
        float row[kColumns / 8][2];
        for (int e = 0; e < kColumns / 4; ++e) {
            row[e / 2][e % 2] = sums[position * kColumns + e / 2 * 8 + first_column(thread) + e % 2];
        }
        write_row<kColumns, kGated>(*job, *place, row, position, scale);
    }
}

}  // namespace

int32_t run(const Convolution& c, void* stream) {
    const Description d = describe(c, emulation::multiprocessors);
    if (!d.fits) return SDXL_FAST_INVALID_ARGUMENT;
    const int columns = static_cast<int>(d.plan.width);
    auto* finish = d.problem.gated  ? &finish_kernel<160, true>
                   : columns == 128 ? &finish_kernel<128, false>
                   : columns == 160 ? &finish_kernel<160, false>
                                    : &finish_kernel<256, false>;
    // As the blocks take them: block b every tile b, b + blocks, ...
    const int64_t blocks = d.plan.ctas / d.plan.split;
    for (int64_t block = 0; block < blocks; ++block) {
        for (int64_t tile = block; tile < d.job.tiles; tile += blocks) {
            const Place place = place_of(d.job.schedule, static_cast<int>(tile));
            std::vector<float> sums(static_cast<size_t>(kRows) * columns);
            for (int part = 0; part < d.plan.split; ++part) {
                int begin, end;
                slices_of_part(d.job.taps, d.plan.split, part, begin, end);
                std::vector<float> partial(sums.size());
                for (int slice = begin; slice < end; ++slice) multiply(c, d, place, slice, columns, partial);
                for (size_t at = 0; at < sums.size(); ++at) sums[at] += partial[at];
            }
            const int32_t status = cuda::launch(finish, dim3(1), 256, stream, &d.job, &place, sums.data());
            if (status != SDXL_FAST_OK) return status;
        }
    }
    return SDXL_FAST_OK;
}

}  // namespace hopper
}  // namespace sdxl_fast

// ---- what tests ask beside the C ABI ----

extern "C" {

// out: columns of a tile, split, tile_h, tile_w, tiles_m, tiles_n, ctas.
__attribute__((visibility("default"))) void sdxl_fast_emulation_plan(int64_t images, int64_t height, int64_t width,
                                                                     int64_t columns, int64_t slices, int32_t phases,
                                                                     int32_t gated, int32_t float8, int32_t sms,
                                                                     int64_t* out) {
    using namespace sdxl_fast::hopper;
    const Plan plan = plan_product({images, height, width, columns, slices, phases, gated != 0, float8 != 0}, sms);
    const int64_t found[] = {
        static_cast<int64_t>(plan.width), plan.split, plan.tile_h, plan.tile_w, plan.tiles_m, plan.tiles_n, plan.ctas};
    for (int at = 0; at < 7; ++at) out[at] = found[at];
}

// out: image, h, w, column, phase of a tile.
__attribute__((visibility("default"))) void sdxl_fast_emulation_place(int32_t tiles_h, int32_t tiles_w, int32_t tiles_m,
                                                                      int32_t tiles_n, int32_t tile_h, int32_t tile_w,
                                                                      int32_t columns, int32_t phases, int32_t tile,
                                                                      int32_t* out) {
    using namespace sdxl_fast::hopper;
    const Place place = place_of({tiles_h, tiles_w, tiles_m, tiles_n, tile_h, tile_w, columns, phases}, tile);
    const int32_t found[] = {place.image, place.h, place.w, place.column, place.phase};
    for (int at = 0; at < 5; ++at) out[at] = found[at];
}

// out: stages of the ring, bytes of shared memory of a block.
__attribute__((visibility("default"))) void sdxl_fast_emulation_shared(int32_t columns, int32_t split, int32_t* out) {
    using namespace sdxl_fast::hopper;
    out[0] = ring_stages(columns, split);
    out[1] = shared_bytes(columns, split);
}

}  // extern "C"
