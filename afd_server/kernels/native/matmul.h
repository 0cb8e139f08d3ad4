// y = x W^T for a weight matrix that was packed once, and few or many rows of x.
//
// Packing. W is [N, K]; its rows are cut into panels of PANEL = 2 vectors, and a panel stores its K columns one after the
// other: a product reads weights in one sequential stream, exactly once for up to MAX_ROWS rows of x, which bounds it by
// the memory's bandwidth there. Rows of x are packed alike, into blocks of at most MAX_ROWS rows.
//
// A format says how weights are stored: Float32, BFloat16 (both computed in float32) and Int8 (one scale per row of W,
// sums exact in int32).
#pragma once

#include <algorithm>
#include <cmath>
#include <utility>

#include "threads.h"
#include "vector.h"
#if defined(__AVX512VNNI__)
#include <immintrin.h>
#endif

namespace afd {

constexpr int PANEL = 2 * LANES;
constexpr double GROUP_BYTES = 640 * 1024;  // of rows of x: the second-level cache of a core is 1 to 2 MiB
constexpr double CHUNK_BYTES = 192 * 1024;  // of weights, for few rows
constexpr long AHEAD_BYTES = 8192;         // of where a product reads, with one block of rows

inline long panels_of(long n) { return (n + PANEL - 1) / PANEL; }

// What a product asks for while it computes: `step` bytes further with every column of W.
struct Ahead {
    const char* at;
    long step;

    template <size_t COLUMN_BYTES>
    void ask() {
        __builtin_prefetch(at, 0, 2);
        if (COLUMN_BYTES > 64) __builtin_prefetch(at + 64, 0, 2);
        at += step;
    }
};

// A tile: `rows` rows of x times one panel, [rows][PANEL] floats.
typedef float Tile[MAX_ROWS][PANEL];

template <class Element>
struct Floating {
    static constexpr int MAX_ROWS = afd::MAX_ROWS;  // of a block

    static long columns(long k) { return k; }  // that a product takes one by one
    static size_t panel_bytes(long k) { return size_t(k) * PANEL * sizeof(Element); }
    static size_t block_bytes(int rows, long k) { return size_t(rows) * k * sizeof(float); }

    // rows_of_panel: PANEL pointers to rows of W, null where the panel is wider than the matrix.
    static void pack_panel(const float* const* rows_of_panel, long k, char* to) {
        Element* out = reinterpret_cast<Element*>(to);
        for (int column = 0; column < PANEL; column++)
            for (long i = 0; i < k; i++)
                assign(out[i * PANEL + column], rows_of_panel[column] ? rows_of_panel[column][i] : 0.0f);
    }

    static void pack_block(const float* const* rows_of_x, int rows, long k, char* to) {
        float* out = reinterpret_cast<float*>(to);
        if (rows == 1) {
            std::memcpy(out, rows_of_x[0], k * sizeof(float));
            return;
        }
        long done = 0;
        // A vector of a column reaches beyond its `rows` numbers, into what the next columns overwrite.
        for (; 2 * rows >= LANES && rows <= LANES && (done + LANES) * rows + LANES <= k * rows; done += LANES) {
            vec square[LANES];
#pragma GCC unroll 16
            for (int row = 0; row < LANES; row++) square[row] = load(rows_of_x[std::min(row, rows - 1)] + done);
            transpose(square);
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++) store(out + (done + i) * rows, square[i]);
        }
        for (long i = done; i < k; i++)
            for (int row = 0; row < rows; row++) out[i * rows + row] = rows_of_x[row][i];
    }

    template <int ROWS>
    static void tile(const char* panel, const char* block, long k, Ahead ahead, Tile& result) {
        const Element* w = reinterpret_cast<const Element*>(panel);
        const float* x = reinterpret_cast<const float*>(block);
        vec sums[ROWS][2];
#pragma GCC unroll 12
        for (int row = 0; row < ROWS; row++) sums[row][0] = sums[row][1] = vec{};
        for (long i = 0; i < k; i++) {
            const vec w0 = load(w), w1 = load(w + LANES);
            ahead.ask<PANEL * sizeof(Element)>();
            w += PANEL;
#pragma GCC unroll 12
            for (int row = 0; row < ROWS; row++) {
                sums[row][0] += broadcast(x[row]) * w0;
                sums[row][1] += broadcast(x[row]) * w1;
            }
            x += ROWS;
        }
#pragma GCC unroll 12
        for (int row = 0; row < ROWS; row++) {
            store(result[row], sums[row][0]);
            store(result[row] + LANES, sums[row][1]);
        }
    }
};

using Float32 = Floating<float>;
using BFloat16 = Floating<bfloat16>;

// A panel: scales [PANEL] float, sums of its rows [PANEL] int32, then for every 4 columns of W [PANEL][4] int8.
//
// Activations are rounded to 16 bits, value = 256 * high + low: 8 would cost far more accuracy than the weights' 8 do. A block:
// scales [rows] float, then for every 4 columns [rows][4] low bytes and [rows][4] high bytes; the instruction wants unsigned
// ones, so 128 is added to the high byte, and 128 * 256 times the sum of the weights taken off the result.
struct Int8 {
    static constexpr int MAX_ROWS = std::max(1, afd::MAX_ROWS / 2);  // of a block: two sums for each of Floating's

    static long quads(long k) { return (k + 3) / 4; }
    static long columns(long k) { return quads(k); }
    static size_t panel_bytes(long k) { return size_t(PANEL) * 8 + size_t(quads(k)) * PANEL * 4; }
    static size_t block_bytes(int rows, long k) { return size_t(rows) * 4 + size_t(rows) * quads(k) * 8; }

    static void pack_panel(const float* const* rows_of_panel, long k, char* to) {
        float* scales = reinterpret_cast<float*>(to);
        int32_t* sums = reinterpret_cast<int32_t*>(to) + PANEL;
        int8_t* out = reinterpret_cast<int8_t*>(to + PANEL * 8);
        std::memset(out, 0, quads(k) * PANEL * 4);
        for (int column = 0; column < PANEL; column++) {
            scales[column] = 0;
            sums[column] = 0;
            const float* row = rows_of_panel[column];
            if (!row) continue;
            scales[column] = largest(row, k) / 127;
            const float inverse = scales[column] > 0 ? 1 / scales[column] : 0;
            for (long i = 0; i < k; i++) {
                const int value = std::max(-127, std::min(127, int(std::lrintf(row[i] * inverse))));
                out[(i / 4 * PANEL + column) * 4 + i % 4] = int8_t(value);
                sums[column] += value;
            }
        }
    }

    static void pack_block(const float* const* rows_of_x, int rows, long k, char* to) {
        float* scales = reinterpret_cast<float*>(to);
        uint8_t* out = reinterpret_cast<uint8_t*>(to + size_t(rows) * 4);
        std::memset(out, 0, size_t(rows) * quads(k) * 8);
        for (int row = 0; row < rows; row++) {
            scales[row] = largest(rows_of_x[row], k) / 32767;
            const float inverse = scales[row] > 0 ? 1 / scales[row] : 0;
            for (long i = 0; i < k; i++) {
                const int value = std::max(-32767, std::min(32767, int(std::lrintf(rows_of_x[row][i] * inverse))));
                uint8_t* quad = out + (i / 4 * 2 * rows + row) * 4 + i % 4;
                quad[0] = uint8_t(value);
                quad[rows * 4] = uint8_t((value >> 8) + 128);
            }
        }
    }

    template <int ROWS>
    static void tile(const char* panel, const char* block, long k, Ahead ahead, Tile& result) {
        const float* w_scales = reinterpret_cast<const float*>(panel);
        const int32_t* w_sums = reinterpret_cast<const int32_t*>(panel) + PANEL;
        const int32_t* w = reinterpret_cast<const int32_t*>(panel + PANEL * 8);
        const float* x_scales = reinterpret_cast<const float*>(block);
        const int32_t* x = reinterpret_cast<const int32_t*>(block) + ROWS;
        ivec low[ROWS][2] = {}, high[ROWS][2] = {};
        for (long quad = 0; quad < quads(k); quad++) {
            const ivec w0 = *reinterpret_cast<const ivec*>(w), w1 = *reinterpret_cast<const ivec*>(w + LANES);
            ahead.ask<PANEL * 4>();
            w += PANEL;
#pragma GCC unroll 6
            for (int row = 0; row < ROWS; row++) {
                low[row][0] = multiply_add(low[row][0], x[row], w0);
                low[row][1] = multiply_add(low[row][1], x[row], w1);
                high[row][0] = multiply_add(high[row][0], x[ROWS + row], w0);
                high[row][1] = multiply_add(high[row][1], x[ROWS + row], w1);
            }
            x += 2 * ROWS;
        }
        for (int row = 0; row < ROWS; row++)
            for (int half = 0; half < 2; half++) {
                const ivec signed_high = high[row][half] - 128 * *reinterpret_cast<const ivec*>(w_sums + half * LANES);
                const vec sum = broadcast(256) * __builtin_convertvector(signed_high, vec) +
                                __builtin_convertvector(low[row][half], vec);
                store(result[row] + half * LANES, sum * broadcast(x_scales[row]) * load(w_scales + half * LANES));
            }
    }

private:
    static float largest(const float* row, long k) {
        float found = 0;
        for (long i = 0; i < k; i++) found = std::max(found, std::fabs(row[i]));
        return found;
    }

    // Adds to each lane the products of its 4 signed bytes of w with the 4 unsigned bytes of x.
    static ivec multiply_add(ivec sum, int32_t x, ivec w) {
#if defined(__AVX512VNNI__)
        return reinterpret_cast<ivec>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sum), _mm512_set1_epi32(x),
                                                          reinterpret_cast<__m512i>(w)));
#else
        for (int byte = 0; byte < 4; byte++)
            sum += ((w << (24 - 8 * byte)) >> 24) * (ivec{} + int32_t(uint32_t(x) >> (8 * byte) & 255));
        return sum;
#endif
    }
};

typedef void (*TileFunction)(const char* panel, const char* block, long k, Ahead ahead, Tile& result);

// The tile function for 1 to Format::MAX_ROWS rows.
template <class Format, int... ROWS>
TileFunction tile_function_of(int rows, std::integer_sequence<int, ROWS...>) {
    static constexpr TileFunction functions[] = {Format::template tile<ROWS + 1>...};
    return functions[rows - 1];
}

template <class Format>
TileFunction tile_function(int rows) {
    return tile_function_of<Format>(rows, std::make_integer_sequence<int, Format::MAX_ROWS>{});
}

// Panels of a packed matrix of n rows. interleaved: as `pack` says.
inline long panels_of(long n, bool interleaved) { return interleaved ? (n / 2 + LANES - 1) / LANES : panels_of(n); }

// Into how many groups to cut `blocks` blocks of rows: the second-level cache holds one while it meets panel after panel.
inline long groups_for(long blocks, size_t block_bytes) {
    const long most = std::max(1L, long(GROUP_BYTES / block_bytes));
    return (blocks + most - 1) / most;
}

// tile(block, ahead) for every block of a group with one panel. A panel that meets a single block is asked for a little ahead of
// its use: the hardware's own prefetcher stops at the end of a page. One that meets many is asked for, part by part, by all the
// products of the panel before it: `next`.
template <class Format, class Body>
void for_blocks_of_panel(const char* panel, const char* next, long k, long first, long last, const Body& tile) {
    const long bytes = Format::panel_bytes(k), blocks = last - first, columns = Format::columns(k);
    const long step = (bytes / columns + blocks - 1) / blocks;
    for (long block = first; block < last; block++)
        tile(block, Ahead{blocks == 1 ? panel + AHEAD_BYTES : next + (block - first) * columns * step, step});
}

// Into how many chunks to cut `panels` panels of `bytes` in all. Where most panels meet one block of rows, a chunk is 192 KiB,
// about 8 us of reading: a thread that is held up in it holds up little. Where they meet more it is larger, as only within a
// chunk a panel is asked for while the one before it is computed, but there are enough chunks for all threads to end together.
inline long chunks_for(long panels, double bytes, double blocks_of_a_panel, int max_threads) {
    if (max_threads <= 1) return std::min(panels, 1L);
    const bool many = blocks_of_a_panel > 1.5;
    return std::min(panels, std::max((many ? 16L : 2L) * max_threads, long(bytes / (many ? GROUP_BYTES : CHUNK_BYTES))));
}

// Packs W [n, k]. interleaved: W is the gate's rows, then the up's; a panel takes
// LANES of each, so that a tile holds a gate beside its up (experts.h).
template <class Format>
void pack(const float* w, long n, long k, char* to, bool interleaved) {
    const long half = n / 2, panels = panels_of(n, interleaved);
    share(panels, int(std::thread::hardware_concurrency()), [&](long panel) {
        const float* rows[PANEL];
        for (int column = 0; column < PANEL; column++) {
            const long within = panel * LANES + column % LANES;
            const long row = !interleaved ? panel * PANEL + column : within + (column < LANES ? 0 : half);
            const bool exists = interleaved ? within < half : row < n;
            rows[column] = exists ? w + row * k : nullptr;
        }
        Format::pack_panel(rows, k, to + panel * Format::panel_bytes(k));
    });
}

// y [m, n] = x [m, k] W^T + bias, rows of x and y `*_stride` floats apart. bias: [n] or null.
template <class Format>
void linear(const float* x, long x_stride, long m, long k, const char* w, const float* bias, long n, float* y,
            long y_stride, int max_threads) {
    static thread_local Scratch scratch;
    constexpr int MAX_ROWS = Format::MAX_ROWS;
    const long blocks = (m + MAX_ROWS - 1) / MAX_ROWS, panels = panels_of(n);
    const size_t block_stride = Format::block_bytes(MAX_ROWS, k);
    char* packed_x = scratch.get<char>(blocks * block_stride);
    share(blocks, max_threads, [&](long block) {
        const float* rows[MAX_ROWS];
        const int count = int(std::min<long>(MAX_ROWS, m - block * MAX_ROWS));
        for (int row = 0; row < count; row++) rows[row] = x + (block * MAX_ROWS + row) * x_stride;
        Format::pack_block(rows, count, k, packed_x + block * block_stride);
    });
    // A chunk is some panels with one group of blocks.
    const long groups = groups_for(blocks, block_stride), panel_bytes = Format::panel_bytes(k);
    const long chunks = chunks_for(panels, double(panels) * panel_bytes, double(blocks) / groups, max_threads);
    share(groups * chunks, max_threads, [&](long chunk) {
        const Part group(blocks, chunk / chunks, groups), mine(panels, chunk % chunks, chunks);
        Tile tile;
        for (long panel = mine.first; panel < mine.last; panel++) {
            const char* weights = w + panel * panel_bytes;
            const int width = int(std::min<long>(PANEL, n - panel * PANEL));
            for_blocks_of_panel<Format>(weights, weights + panel_bytes, k, group.first, group.last, [&](long block, Ahead ahead) {
                const int count = int(std::min<long>(MAX_ROWS, m - block * MAX_ROWS));
                tile_function<Format>(count)(weights, packed_x + block * block_stride, k, ahead, tile);
                for (int row = 0; row < count; row++) {
                    float* out = y + (block * MAX_ROWS + row) * y_stride + panel * PANEL;
                    if (bias)
                        for (int column = 0; column < width; column++) tile[row][column] += bias[panel * PANEL + column];
                    std::memcpy(out, tile[row], width == PANEL ? sizeof(tile[row]) : width * sizeof(float));
                }
            });
        }
    });
}

}  // namespace afd
