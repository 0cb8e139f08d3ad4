// The two limits of a machine, as near as code gets to them: reading memory, and multiplying in registers.
#include <cstddef>

#include "../afd_server/kernels/native/threads.h"
#include "../afd_server/kernels/native/vector.h"

using namespace afd;

extern "C" {

// Adds up `count` floats in chunks of 64 Ki, with 8 sums each, so that additions do not wait for one another.
float machine_read(const float* from, long count, long max_threads) {
    constexpr long CHUNK = 1 << 16;
    std::atomic<float> total{0};
    share(count / CHUNK, int(max_threads), [&](long chunk) {
        const float* in = from + chunk * CHUNK;
        vec sums[8] = {};
        for (long i = 0; i < CHUNK; i += 8 * LANES) {
#pragma GCC unroll 8
            for (int lane = 0; lane < 8; lane++) {
                __builtin_prefetch(in + i + lane * LANES + 2048);
                sums[lane] += load(in + i + lane * LANES);
            }
        }
        for (int lane = 1; lane < 8; lane++) sums[0] += sums[lane];
        total.store(sum_of_lanes(sums[0]), std::memory_order_relaxed);
    });
    return total.load();
}

// 16 vectors multiplied and added `rounds` times on each thread; gives the operations of one thread.
double machine_multiply(long rounds, float factor, long threads, float* sink) {
    share(threads, int(threads), [&](long thread) {
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
