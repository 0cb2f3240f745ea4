// SPDX-License-Identifier: Apache-2.0
//
// The scheduler of the emulation: fibers, barriers and shuffles; and what tests call beside the C ABI.
#include "emulation.h"

#include <setjmp.h>
#include <ucontext.h>

#include <memory>
#include <vector>

#include "../../include/sdxl_fast.h"
#include "../group_norm_geometry.h"

namespace emulation {

int multiprocessors = 4;

namespace {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 64 * 1024;
constexpr unsigned kMostThreads = 1024;

enum class State { runnable, at_block_barrier, at_warp_exchange, done };

// ucontext makes a fiber; switching is by setjmp, which unlike swapcontext makes no system call.
struct Fiber {
    ucontext_t birth;
    jmp_buf here;
    std::unique_ptr<char[]> stack;
    bool born = false;
    State state;
    unsigned exchanges;  // how many shuffles it has entered
    float sent[2];       // alternately, so that a fast lane cannot overwrite what a slow one still reads
    int distance;
};

bool reversed = false;
std::vector<Fiber> fibers;
unsigned current = 0, thread_count = 0;
jmp_buf scheduler;
const std::function<void()>* kernel = nullptr;

void wait(State state) {
    fibers[current].state = state;
    if (_setjmp(fibers[current].here) == 0) _longjmp(scheduler, 1);
}

// One thread after the other of that index, block after block.
void fiber_main() {
    for (;;) {
        (*kernel)();
        wait(State::done);
    }
}

void resume(unsigned thread) {
    current = thread;
    threadIdx = dim3(thread, 0, 0);
    Fiber& fiber = fibers[thread];
    if (_setjmp(scheduler) != 0) return;
    if (fiber.born) _longjmp(fiber.here, 1);
    fiber.born = true;
    if (!fiber.stack) fiber.stack.reset(new char[kStackBytes]);
    getcontext(&fiber.birth);
    fiber.birth.uc_stack.ss_sp = fiber.stack.get();
    fiber.birth.uc_stack.ss_size = kStackBytes;
    fiber.birth.uc_link = nullptr;
    makecontext(&fiber.birth, fiber_main, 0);
    setcontext(&fiber.birth);
}

// Whether all of [begin, end) wait in `state`; shuffles must also be the same one.
bool all_at(unsigned begin, unsigned end, State state) {
    for (unsigned i = begin; i < end; ++i) {
        if (fibers[i].state != state) return false;
        if (state == State::at_warp_exchange &&
            (fibers[i].exchanges != fibers[begin].exchanges || fibers[i].distance != fibers[begin].distance))
            return false;
    }
    return true;
}

void release(unsigned begin, unsigned end) {
    for (unsigned i = begin; i < end; ++i) fibers[i].state = State::runnable;
}

cudaError_t run_block() {
    for (unsigned i = 0; i < thread_count; ++i) {
        fibers[i].state = State::runnable;
        fibers[i].exchanges = 0;
    }
    for (;;) {
        bool progress = false;
        for (unsigned i = 0; i < thread_count; ++i) {
            const unsigned thread = reversed ? thread_count - 1 - i : i;
            if (fibers[thread].state != State::runnable) continue;
            resume(thread);
            progress = true;
        }
        for (unsigned warp = 0; warp < thread_count; warp += kWarp) {
            if (all_at(warp, warp + kWarp, State::at_warp_exchange)) {
                release(warp, warp + kWarp);
                progress = true;
            }
        }
        if (all_at(0, thread_count, State::at_block_barrier)) {
            release(0, thread_count);
            progress = true;
        }
        if (all_at(0, thread_count, State::done)) return cudaSuccess;
        if (!progress) {  // a barrier or shuffle that some thread never reaches
            for (Fiber& fiber : fibers) fiber.born = false;
            return cudaErrorLaunchFailure;
        }
    }
}

}  // namespace

void block_barrier() {
    wait(State::at_block_barrier);
}

float warp_exchange(float value, int distance) {
    const unsigned self = current, slot = fibers[self].exchanges++ % 2;
    fibers[self].sent[slot] = value;
    fibers[self].distance = distance;
    wait(State::at_warp_exchange);
    return fibers[self / kWarp * kWarp + ((self % kWarp) ^ static_cast<unsigned>(distance))].sent[slot];
}

const WarpWords& warp_gather(const uint32_t (&own)[6]) {
    static WarpWords words[kMostThreads / kWarp][2];  // alternately, as what a shuffle sends
    WarpWords& gathered = words[current / kWarp][fibers[current].exchanges % 2];
    memcpy(gathered[current % kWarp], own, sizeof(own));
    warp_exchange(0.0f, 0);
    return gathered;
}

cudaError_t run(dim3 grid, unsigned threads, const std::function<void()>& body) {
    const bool fits = threads > 0 && threads <= kMostThreads && threads % kWarp == 0 && grid.x > 0 && grid.y > 0 &&
                      grid.z > 0 && grid.x <= 0x7fffffffu && grid.y <= 65535 && grid.z <= 65535;
    if (!fits) return cudaErrorInvalidConfiguration;
    if (fibers.size() < threads) fibers.resize(threads);
    thread_count = threads;
    kernel = &body;
    gridDim = grid;
    blockDim = dim3(threads);
    for (unsigned z = 0; z < grid.z; ++z)
        for (unsigned y = 0; y < grid.y; ++y)
            for (unsigned x = 0; x < grid.x; ++x) {
                blockIdx = dim3(x, y, z);
                const cudaError_t error = run_block();
                if (error != cudaSuccess) return error;
            }
    return cudaSuccess;
}

}  // namespace emulation

extern "C" {

SDXL_FAST_API void sdxl_fast_emulation_configure(int32_t multiprocessors, int32_t reversed) {
    emulation::multiprocessors = multiprocessors;
    emulation::reversed = reversed != 0;
}

// Kernels that misuse the machine; each must be reported. 0: a barrier that half the block skips, 1: a shuffle that one
// lane skips, 2: a block of a size that is no whole number of warps, 3: none, for comparison.
SDXL_FAST_API int32_t sdxl_fast_emulation_misuse(int32_t which) {
    const auto body = [which] {
        if (which == 0 && threadIdx.x < 32) return;
        if (which == 1 && threadIdx.x == 5) return;
        __syncthreads();
        (void)__shfl_xor_sync(0xffffffffu, 1.0f, 1);
    };
    return emulation::run(dim3(2), which == 2 ? 48 : 64, body);
}

// chunk, chunks, entries, tile_entries, tiles, tx, ty, threads, sub_channels, subs; false where vec does not fit.
SDXL_FAST_API int32_t sdxl_fast_emulation_group_norm_geometry(int64_t n, int64_t c, int64_t hw, int64_t groups,
                                                              int32_t nhwc, int32_t vec, int64_t multiprocessors,
                                                              int64_t* out) {
    const auto g = sdxl_fast::cuda::group_norm_geometry(n, c, hw, groups, nhwc != 0, vec, multiprocessors);
    const int64_t values[] = {g.chunk, g.chunks, g.entries, g.tile_entries, g.tiles,
                              g.tx,    g.ty,     g.threads, g.sub_channels, g.subs};
    memcpy(out, values, sizeof(values));
    return g.ok;
}

SDXL_FAST_API int64_t sdxl_fast_emulation_group_norm_workspace(int64_t n, int64_t c, int64_t hw, int64_t groups,
                                                               int32_t nhwc, int32_t backward) {
    return sdxl_fast::cuda::group_norm_workspace(n, c, hw, groups, nhwc != 0, backward != 0);
}

}  // extern "C"
