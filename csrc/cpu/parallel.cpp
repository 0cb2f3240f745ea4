// SPDX-License-Identifier: Apache-2.0
#include "parallel.h"

#include <dlfcn.h>
#include <pthread.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

namespace sdxl_fast {
namespace {

constexpr int32_t kMostRanges = 64;

// Consecutive chunks, taken one by one. On a line of its own.
struct alignas(64) Range {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
};

struct Job {
    ChunkFunction function;
    void* context;
    int32_t count;  // of ranges: one per thread
    Range ranges[kMostRanges];

    Job(ChunkFunction f, void* c, int64_t chunks, int32_t threads)
        : function(f), context(c), count(threads < kMostRanges ? threads : kMostRanges) {
        for (int64_t r = 0; r < count; ++r) {
            ranges[r].next.store(r * chunks / count, std::memory_order_relaxed);
            ranges[r].end = (r + 1) * chunks / count;
        }
    }

    // The thread's own range first, then what is left of the others'.
    void work(int32_t thread) {
        for (int32_t k = 0; k < count; ++k) {
            Range& range = ranges[(thread + k) % count];
            for (int64_t i; (i = range.next.fetch_add(1, std::memory_order_relaxed)) < range.end;) {
                function(context, i);
            }
        }
    }
};

inline void pause_cpu() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// ---- the OpenMP runtime of the process ----

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

// libgomp's entry point, which LLVM's and Intel's runtimes have as well. Looked up rather than linked: a second
// runtime beside torch's would fight it for the cores.
GompParallel find_openmp() {
    return reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
}

// This thread's number in its team.
int32_t openmp_thread() {
    using Number = int (*)();
    static const Number number = reinterpret_cast<Number>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
    return number == nullptr ? 0 : number();
}

std::atomic<bool> in_forked_child{false};

// ---- threads of our own ----

// Workers wait for the epoch to change: first spinning, since calls come in bursts, then asleep.
class Pool {
  public:
    // Runs the job on up to `threads` threads; false when the pool is busy with another caller's.
    bool run(Job& job, int32_t threads) {
        std::unique_lock<std::mutex> busy(busy_, std::try_to_lock);
        if (!busy) return false;
        grow(threads - 1);
        const int32_t helpers = threads - 1 < count_ ? threads - 1 : count_;
        if (helpers == 0) return false;
        {
            std::lock_guard<std::mutex> lock(mutex_);
            job_ = &job;
            wanted_ = helpers;
            running_.store(helpers, std::memory_order_relaxed);
            epoch_.fetch_add(1, std::memory_order_release);
        }
        wake_.notify_all();
        job.work(0);
        for (int spins = 0; running_.load(std::memory_order_acquire) != 0; ++spins) {
            pause_cpu();
            if (spins > 2000) std::this_thread::yield();
        }
        return true;
    }

  private:
    void grow(int32_t wanted) {
        try {
            for (; count_ < wanted; ++count_) std::thread(&Pool::loop, this, count_, epoch_.load()).detach();
        } catch (const std::system_error&) {
            // No more threads to be had: go on with those there are.
        }
    }

    void loop(int32_t index, uint64_t seen) {
        for (;;) {
            const auto until = std::chrono::steady_clock::now() + std::chrono::microseconds(30);
            while (epoch_.load(std::memory_order_acquire) == seen && std::chrono::steady_clock::now() < until) {
                for (int i = 0; i < 16; ++i) pause_cpu();
            }
            Job* job;
            {
                std::unique_lock<std::mutex> lock(mutex_);
                wake_.wait(lock, [&] { return epoch_.load(std::memory_order_relaxed) != seen; });
                seen = epoch_.load(std::memory_order_relaxed);
                job = index < wanted_ ? job_ : nullptr;
            }
            if (job == nullptr) continue;
            job->work(index + 1);
            running_.fetch_sub(1, std::memory_order_release);
        }
    }

    std::mutex busy_, mutex_;
    std::condition_variable wake_;
    std::atomic<uint64_t> epoch_{0};
    std::atomic<int32_t> running_{0};
    Job* job_ = nullptr;
    int32_t wanted_ = 0;
    int32_t count_ = 0;
};

std::atomic<Pool*> the_pool{nullptr};

// The pool is never destroyed: its detached workers sleep until the process ends.
Pool* pool() {
    Pool* current = the_pool.load(std::memory_order_acquire);
    if (current != nullptr) return current;
    Pool* fresh = new (std::nothrow) Pool;
    if (fresh == nullptr) return nullptr;
    if (the_pool.compare_exchange_strong(current, fresh)) return fresh;
    delete fresh;
    return current;
}

// A forked child has none of its parent's threads: it gets a new pool, and leaves OpenMP alone, whose runtime would
// wait for its lost threads for ever.
void after_fork_in_child() {
    in_forked_child.store(true);
    the_pool.store(nullptr);
}

GompParallel openmp() {
    static const GompParallel found = [] {
        pthread_atfork(nullptr, nullptr, after_fork_in_child);
        return find_openmp();
    }();
    return in_forked_child.load(std::memory_order_relaxed) ? nullptr : found;
}

}  // namespace

void run_chunks(int64_t chunks, int32_t num_threads, ChunkFunction function, void* context) {
    if (num_threads > chunks) num_threads = static_cast<int32_t>(chunks);
    if (num_threads <= 1) {
        for (int64_t i = 0; i < chunks; ++i) function(context, i);
        return;
    }
    Job job(function, context, chunks, num_threads);
    if (const GompParallel parallel = openmp()) {
        const auto body = [](void* data) { static_cast<Job*>(data)->work(openmp_thread()); };
        parallel(body, &job, static_cast<unsigned>(num_threads), 0);
    } else {
        Pool* const threads = pool();
        if (threads == nullptr || !threads->run(job, num_threads)) job.work(0);
    }
}

const char* threading_name() {
    return openmp() != nullptr ? "openmp" : "pool";
}

int64_t last_level_cache_bytes() {
    static const int64_t bytes = [] {
        int64_t found = 0;
#if defined(_SC_LEVEL3_CACHE_SIZE)
        found = sysconf(_SC_LEVEL3_CACHE_SIZE);
        if (found <= 0) found = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
        return found > 0 ? found : int64_t{16} << 20;
    }();
    return bytes;
}

}  // namespace sdxl_fast
