// How a kernel's threads share its work: in chunks that whoever is free takes next.
//
// The thread that calls a kernel works from the start; helpers join as they wake up, and one that comes too late finds nothing
// to do and is not waited for. So a helper whose core another process holds for a while delays a kernel by a chunk at most,
// where a fixed share for each thread (as OpenMP gives it) would wait until the scheduler lets it run: milliseconds. Results do
// not depend on who computes a chunk.
//
// Every thread that calls kernels has helpers of its own. After a job they look out for the next one for SPIN_US, since the
// kernels of a layer follow one another closely and waking an idle core takes long; in between they give the core to whoever
// waits for it, such as the other side of the model.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#include <sched.h>

namespace afd {

constexpr int SPIN_US = 200;

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

class Helpers {
public:
    typedef void (*Function)(const void* work, long chunk);

    ~Helpers() {
        stopping_.store(true, std::memory_order_relaxed);
        announce(0, 0);
        for (std::thread& thread : threads_) thread.join();
    }

    // work(chunk) for every chunk, on this thread and up to max_threads - 1 helpers; returns when all are done.
    void run(Function function, const void* work, long chunks, int max_threads) {
        while (int(threads_.size()) < max_threads - 1) {
            const int index = int(threads_.size());
            threads_.emplace_back([this, index] { help(index); });
        }
        done_.store(0, std::memory_order_relaxed);
        function_.store(function, std::memory_order_relaxed);
        work_.store(work, std::memory_order_relaxed);
        const uint32_t job = announce(chunks, max_threads - 1);
        const long mine = take_chunks(job);
        done_.fetch_add(mine, std::memory_order_relaxed);
        for (int spins = 0; done_.load(std::memory_order_acquire) != chunks; spins++)
            spins < 4096 ? pause() : (void)sched_yield();
    }

private:
    // Which job it is and which of its chunks is the next: one number, so that nobody takes a chunk of a job that is over.
    static uint64_t ticket(uint32_t job, uint32_t chunk) { return uint64_t(job) << 32 | chunk; }

    uint32_t announce(long chunks, int helpers) {
        chunks_.store(chunks, std::memory_order_relaxed);
        helpers_.store(helpers, std::memory_order_relaxed);
        const uint32_t job = job_.load(std::memory_order_relaxed) + 1;
        next_.store(ticket(job, 0), std::memory_order_release);
        job_.store(job, std::memory_order_seq_cst);
        if (helpers > 0 || stopping_.load(std::memory_order_relaxed))
            if (sleeping_.load(std::memory_order_seq_cst) > 0) job_.notify_all();
        return job;
    }

    // Computes chunks of this job until none is left; gives how many. What describes the job is read before the exchange that
    // takes a chunk: the exchange fails if the job was over by then and the words are another job's.
    long take_chunks(uint32_t job) {
        long taken = 0;
        uint64_t next = next_.load(std::memory_order_acquire);
        for (;;) {
            const long chunks = chunks_.load(std::memory_order_relaxed);
            const Function function = function_.load(std::memory_order_relaxed);
            const void* work = work_.load(std::memory_order_relaxed);
            const uint32_t chunk = uint32_t(next);
            if (uint32_t(next >> 32) != job || chunk >= chunks) return taken;
            if (!next_.compare_exchange_weak(next, ticket(job, chunk + 1), std::memory_order_acq_rel)) continue;
            function(work, chunk);
            taken++;
            next = next_.load(std::memory_order_acquire);
        }
    }

    void help(int index) {
        uint32_t seen = 0;
        for (;;) {
            wait_for_another(seen);
            if (stopping_.load(std::memory_order_relaxed)) return;
            seen = job_.load(std::memory_order_acquire);
            if (index >= helpers_.load(std::memory_order_relaxed)) continue;
            const long taken = take_chunks(seen);
            if (taken) done_.fetch_add(taken, std::memory_order_release);
        }
    }

    void wait_for_another(uint32_t seen) {
        const auto until = std::chrono::steady_clock::now() + std::chrono::microseconds(SPIN_US);
        do {
            for (int spins = 0; spins < 64; spins++) {
                if (job_.load(std::memory_order_acquire) != seen) return;
                pause();
            }
            sched_yield();
        } while (std::chrono::steady_clock::now() < until);
        sleeping_.fetch_add(1, std::memory_order_seq_cst);
        job_.wait(seen, std::memory_order_acquire);
        sleeping_.fetch_sub(1, std::memory_order_relaxed);
    }

    alignas(64) std::atomic<uint64_t> next_{0};
    alignas(64) std::atomic<long> done_{0};
    alignas(64) std::atomic<uint32_t> job_{0};
    std::atomic<int> sleeping_{0}, helpers_{0};
    std::atomic<long> chunks_{0};
    std::atomic<Function> function_{nullptr};
    std::atomic<const void*> work_{nullptr};
    std::atomic<bool> stopping_{false};
    std::vector<std::thread> threads_;
};

// work(chunk) for every chunk of [0, chunks), on at most max_threads threads; returns when all are done.
template <class Work>
void share(long chunks, int max_threads, const Work& work) {
    if (chunks <= 1 || max_threads <= 1) {
        for (long chunk = 0; chunk < chunks; chunk++) work(chunk);
        return;
    }
    static thread_local Helpers helpers;
    helpers.run([](const void* work, long chunk) { (*static_cast<const Work*>(work))(chunk); }, &work, chunks,
                int(std::min<long>(max_threads, chunks)));
}

// Memory that a thread keeps from call to call, grown when a call needs more.
class Scratch {
public:
    ~Scratch() { std::free(memory_); }

    template <class T>
    T* get(size_t count) {
        const size_t bytes = (count * sizeof(T) + 4095) / 4096 * 4096;
        if (bytes > bytes_) {
            std::free(memory_);
            bytes_ = 0;
            memory_ = std::aligned_alloc(4096, bytes);
            if (!memory_) throw std::bad_alloc();
            bytes_ = bytes;
        }
        return static_cast<T*>(memory_);
    }

private:
    void* memory_ = nullptr;
    size_t bytes_ = 0;
};

// Part `index` of `count` nearly equal parts of [0, total).
struct Part {
    long first, last;
    Part(long total, long index, long count) : first(total * index / count), last(total * (index + 1) / count) {}
};

}  // namespace afd
