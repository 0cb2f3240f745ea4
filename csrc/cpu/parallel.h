// SPDX-License-Identifier: Apache-2.0
//
// Work sharing of the C++ backend. Kernels cut their work into chunks by sizes alone, so the numbers never depend on
// how many threads there are. A thread begins with the same part of the chunks in every call, the one that PyTorch's
// own loops give it: what it wrote last time may still be in a cache that only its core is near to. Then it helps the
// others.
#pragma once

#include <stdint.h>

namespace sdxl_fast {

using ChunkFunction = void (*)(void* context, int64_t chunk);

// Runs function(context, i) for every 0 <= i < chunks on at most num_threads threads, the caller among them, and
// returns when all are done. Uses the OpenMP runtime already in the process (that of torch, whose threads are then
// shared rather than competed with), else threads of its own. Safe to call from several threads, inside a parallel
// region, and in a forked child.
void run_chunks(int64_t chunks, int32_t num_threads, ChunkFunction function, void* context);

// "openmp" or "pool".
const char* threading_name();

// Bytes of the last-level cache, with a guess where the system does not say.
int64_t last_level_cache_bytes();

}  // namespace sdxl_fast
