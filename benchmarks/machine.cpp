// The two limits of a machine, as near as code gets to them: reading memory, and multiplying in registers.
#include <cstddef>

#include "../afd_server/kernels/native/threads.h"
#include "../afd_server/kernels/native/vector.h"

using namespace afd;

extern "C" {

// Adds up `count` floats, each thread its part: 8 sums, so that additions do not wait for one another.
float machine_read(const float* from, long count, long max_threads) {
    std::atomic<float> total{0};
    run(int(max_threads), [&](int thread, int threads) {
        const Part mine(count / (8 * LANES), thread, threads);
        vec sums[8] = {};
        for (long i = mine.first; i < mine.last; i++) {
            __builtin_prefetch(from + i * 8 * LANES + 2048);
#pragma GCC unroll 8
            for (int lane = 0; lane < 8; lane++) sums[lane] += load(from + (i * 8 + lane) * LANES);
        }
        for (int lane = 1; lane < 8; lane++) sums[0] += sums[lane];
        total.store(total.load() + sum_of_lanes(sums[0]));
    });
    return total.load();
}

// `rounds` x 16 vectors multiplied and added on each thread; gives the operations of one thread.
double machine_multiply(long rounds, float factor, long max_threads, float* sink) {
    run(int(max_threads), [&](int thread, int) {
        vec sums[16];
        for (int i = 0; i < 16; i++) sums[i] = broadcast(float(i));
        const vec by = broadcast(factor);
        for (long round = 0; round < rounds; round++) {
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++) sums[i] = sums[i] * by + by;
        }
        for (int i = 1; i < 16; i++) sums[0] += sums[i];
        sink[thread] = sum_of_lanes(sums[0]);
    });
    return double(rounds) * 16 * LANES * 2;
}
}
