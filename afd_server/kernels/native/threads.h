// How a kernel's threads share its work: OpenMP starts them, barriers inside a kernel spin.
//
// A phase of a kernel lasts microseconds, and an OpenMP barrier that sleeps takes as long as the phase itself. The threads of
// one kernel run at the same time, so the wait is short; one that lasts gives its core away.
#pragma once

#include <omp.h>
#include <sched.h>

#include <atomic>
#include <cstdlib>
#include <new>

namespace afd {

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

class Barrier {
public:
    // Returns when all `threads` of the kernel have come here.
    void wait(int threads) {
        const int phase = phase_.load(std::memory_order_acquire);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
            arrived_.store(0, std::memory_order_relaxed);
            phase_.store(phase + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; spins++)
            spins < 4096 ? pause() : (void)sched_yield();
    }

private:
    std::atomic<int> arrived_{0}, phase_{0};
};

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

// work(thread, threads) on each of `threads` threads, or on fewer where OpenMP gives no more.
template <class Work>
void run(int threads, const Work& work) {
    if (threads <= 1) {
        work(0, 1);
        return;
    }
#pragma omp parallel num_threads(threads)
    work(omp_get_thread_num(), omp_get_num_threads());
}

// Part `index` of `count` equal parts of [0, total).
struct Part {
    long first, last;
    Part(long total, int index, int count) : first(total * index / count), last(total * (index + 1) / count) {}
};

}  // namespace afd
