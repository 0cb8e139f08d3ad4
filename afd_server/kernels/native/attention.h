// Attention over the paged cache, read in place: decoding rows and the rows of prompt chunks alike.
//
// A unit of work is up to BLOCK_ROWS query heads, of one request, for each of some key heads. It walks over the request's
// entries in tiles of TILE_TOKENS from the first one on, with a running maximum and sum (online softmax, arXiv 1805.02867).
// Tiles begin at the same tokens for every row, so that a row's result does not depend on how its prompt was cut.
//
// An entry holds all heads of a token side by side. A decoding row's unit takes as many key heads as leave work for all
// threads, because memory is read fast only where it is read in sequence: a core follows a few misses by itself, and a stream
// as fast as memory is.
#pragma once

#include <vector>

#include "rows.h"

namespace afd {

constexpr int BLOCK_ROWS = 16;
constexpr int TILE_TOKENS = 32;
constexpr int GROUP = 4;  // rows x tokens, or rows x vectors, of an innermost loop: 16 sums in registers

// Where keys and values lie in the cache, in elements. An entry (a token) holds all of its heads.
struct CacheLayout {
    long block_tokens, block_stride, token_stride;
    long key_offset, key_stride;      // of a key head within an entry, and between key heads
    long value_offset, value_stride;  // likewise
};

// The requests of a batch: request r has rows row_starts[r] to row_starts[r + 1] - 1, its last tokens; lengths[r] tokens are
// in the cache, these among them, in the blocks that tables[r * max_blocks ...] names.
struct Requests {
    long count;
    const int32_t *row_starts, *lengths, *tables;
    long max_blocks;
};

struct Unit {
    int request, first_head, heads;  // key heads
    int first;                       // of the request's (row, query head) pairs that share a key head
};

template <class Element>
class PagedAttention {
public:
    const float* queries;  // [rows, num_heads, key_dim], rows query_stride floats apart
    long query_stride, num_heads, num_key_heads, key_dim, value_dim;
    const Element* cache;
    CacheLayout layout;
    Requests requests;
    float scale;
    float* out;  // [rows, num_heads, value_dim]

    void run_on(int max_threads) {
        static thread_local std::vector<Unit> units_of_thread;
        std::vector<Unit>& units = units_of_thread;
        units.clear();
        const int shared_by = int(num_heads / num_key_heads);
        const int heads_of_a_row = heads_together(max_threads);
        long work = 0;
        for (int request = 0; request < requests.count; request++) {
            const int rows = requests.row_starts[request + 1] - requests.row_starts[request];
            const int heads = rows == 1 ? heads_of_a_row : 1;
            for (int head = 0; head < num_key_heads; head += heads)
                for (int first = 0; first < rows * shared_by; first += BLOCK_ROWS) units.push_back({request, head, heads, first});
            work += long(requests.lengths[request]) * rows * num_heads * key_dim;
        }
        // The last rows of a chunk have most to do: they go first. Little work is not worth waking a helper.
        const long num_units = long(units.size());
        share(num_units, work < ELEMENTS_OF_A_CHUNK ? 1 : max_threads,
              [&](long chunk) { attend(units[num_units - 1 - chunk]); });
    }

private:
    struct Workspace {
        Scratch queries, sums, running, converted;
    };

    // Key heads of a decoding row's unit: the most that give all threads the same to do, or many units to share.
    int heads_together(int max_threads) const {
        for (int heads = int(num_key_heads); heads > 1; heads--) {
            const long units = num_key_heads / heads * requests.count;
            if (num_key_heads % heads == 0 && (units >= 4 * max_threads || units % max_threads == 0)) return heads;
        }
        return 1;
    }

    // What is known of one key head's pairs so far.
    struct Running {
        float highest[BLOCK_ROWS], totals[BLOCK_ROWS];
    };

    void attend(const Unit& unit) const {
        static thread_local Workspace workspace;
        const int shared_by = int(num_heads / num_key_heads);
        const int first_row = requests.row_starts[unit.request];
        const int num_rows = requests.row_starts[unit.request + 1] - first_row;
        const int pairs = std::min(BLOCK_ROWS, num_rows * shared_by - unit.first);
        const long key_width = rounded_up(key_dim), value_width = rounded_up(value_dim);
        const long queries_of_head = BLOCK_ROWS * key_width, sums_of_head = BLOCK_ROWS * value_width;
        float* scaled = workspace.queries.template get<float>(unit.heads * queries_of_head);
        float* sums = workspace.sums.template get<float>(unit.heads * sums_of_head);
        Running* running = workspace.running.template get<Running>(unit.heads);
        std::memset(scaled, 0, unit.heads * queries_of_head * sizeof(float));
        std::memset(sums, 0, unit.heads * sums_of_head * sizeof(float));
        int visible[BLOCK_ROWS] = {};
        for (int i = 0; i < pairs; i++) visible[i] = requests.lengths[unit.request] - num_rows + (unit.first + i) / shared_by + 1;
        for (int head = 0; head < unit.heads; head++)
            for (int i = 0; i < pairs; i++) {
                const float* query = queries + row_of(unit, i) * query_stride + query_head_of(unit, head, i) * key_dim;
                float* to = scaled + head * queries_of_head + i * key_width;
                for (long d = 0; d < key_dim; d++) to[d] = query[d] * scale;
                running[head].highest[i] = -INFINITY;
                running[head].totals[i] = 0;
            }
        const int most = visible[pairs - 1];
        Tokens tiles[2];
        locate(unit, 0, most, tiles[0]);
        for (int first = 0, tile = 0; first < most; first += TILE_TOKENS, tile ^= 1) {
            const Tokens &here = tiles[tile], &next = tiles[tile ^ 1];
            if (first + TILE_TOKENS < most) locate(unit, first + TILE_TOKENS, most, tiles[tile ^ 1]);
            const int tokens = std::min(TILE_TOKENS, most - first);
            Ahead ahead = ahead_of(unit, next, std::min(TILE_TOKENS, most - first - tokens));
            for (int head = 0; head < unit.heads; head++) {
                const float *keys[TILE_TOKENS], *values[TILE_TOKENS];
                as_floats(here, unit, head, tokens, workspace, keys, values);
                float scores[BLOCK_ROWS][TILE_TOKENS];
                float* sums_here = sums + head * sums_of_head;
                score(scaled + head * queries_of_head, key_width, pairs, keys, tokens, ahead, scores);
                for (int i = 0; i < pairs; i++)
                    soften(scores[i], std::min(tokens, visible[i] - first), running[head].highest[i], running[head].totals[i],
                           sums_here + i * value_width);
                add_values(scores, pairs, values, tokens, ahead, sums_here, value_width);
            }
        }
        for (int head = 0; head < unit.heads; head++)
            for (int i = 0; i < pairs; i++) {
                float* to = out + (row_of(unit, i) * num_heads + query_head_of(unit, head, i)) * value_dim;
                const float* sum = sums + head * sums_of_head + i * value_width;
                for (long d = 0; d < value_dim; d++) to[d] = sum[d] / running[head].totals[i];
            }
    }

    long row_of(const Unit& unit, int pair) const {
        return requests.row_starts[unit.request] + (unit.first + pair) / (num_heads / num_key_heads);
    }

    long query_head_of(const Unit& unit, int head, int pair) const {
        const long shared_by = num_heads / num_key_heads;
        return (unit.first_head + head) * shared_by + (unit.first + pair) % shared_by;
    }

    static long rounded_up(long dim) { return (dim + LANES - 1) / LANES * LANES; }

    // Where a tile's entries lie; beyond the last token, that one's again.
    struct Tokens {
        const Element* entries[TILE_TOKENS];
    };

    // A stretch of an entry, in bytes.
    struct Stretch {
        long first, last;
    };

    // The next tile, asked for line by line in the order of memory while this one is computed. All at once they would fill the
    // core's miss buffers and stop it.
    class Ahead {
    public:
        Ahead(const Tokens& tokens, int count, Stretch keys, Stretch values)
            : tokens_(tokens), left_(2 * count), stretches_{keys, values} {}

        void ask() {
            if (at_ >= end_) {
                if (left_ == 0) return;
                const char* entry = reinterpret_cast<const char*>(tokens_.entries[taken_ / 2]);
                const Stretch& stretch = stretches_[taken_ % 2];
                at_ = entry + stretch.first, end_ = entry + stretch.last;
                taken_++, left_--;
            }
            __builtin_prefetch(at_, 0, 2);  // into the second-level cache: more misses may be under way there than in the first
            at_ += 64;
        }

    private:
        const Tokens& tokens_;
        int left_, taken_ = 0;
        Stretch stretches_[2];
        const char *at_ = nullptr, *end_ = nullptr;
    };

    Ahead ahead_of(const Unit& unit, const Tokens& tokens, int count) const {
        const auto stretch = [&](long offset, long stride, long dim) {
            const long first = offset + unit.first_head * stride;
            return Stretch{first * long(sizeof(Element)), (first + (unit.heads - 1) * stride + dim) * long(sizeof(Element))};
        };
        return Ahead(tokens, count, stretch(layout.key_offset, layout.key_stride, key_dim),
                     stretch(layout.value_offset, layout.value_stride, value_dim));
    }

    void locate(const Unit& unit, int first, int last, Tokens& tokens) const {
        const int32_t* table = requests.tables + unit.request * requests.max_blocks;
        const int block_tokens = int(layout.block_tokens);
        int block = first / block_tokens, offset = first % block_tokens;  // the only divisions: they are slow
        const Element* entry = nullptr;
        for (int j = 0; j < TILE_TOKENS; j++) {
            if (first + j < last) {
                entry = cache + table[block] * layout.block_stride + offset * layout.token_stride;
                if (++offset == block_tokens) offset = 0, block++;
            }
            tokens.entries[j] = entry;
        }
    }

    // One head's tile as floats: the cache itself where it holds floats of whole vectors, else a copy.
    void as_floats(const Tokens& tile, const Unit& unit, int head, int tokens, Workspace& workspace, const float** keys,
                   const float** values) const {
        const long key_at = layout.key_offset + (unit.first_head + head) * layout.key_stride;
        const long value_at = layout.value_offset + (unit.first_head + head) * layout.value_stride;
        if constexpr (sizeof(Element) == sizeof(float))
            if (key_dim % LANES == 0 && value_dim % LANES == 0) {
                for (int j = 0; j < TILE_TOKENS; j++) keys[j] = tile.entries[j] + key_at, values[j] = tile.entries[j] + value_at;
                return;
            }
        const long key_width = rounded_up(key_dim), value_width = rounded_up(value_dim);
        float* copy = workspace.converted.template get<float>(TILE_TOKENS * (key_width + value_width));
        for (int j = 0; j < TILE_TOKENS; j++) {
            float* own = copy + std::min(j, tokens - 1) * (key_width + value_width);
            keys[j] = own;
            values[j] = own + key_width;
            if (j >= tokens) continue;
            convert(tile.entries[j] + key_at, key_dim, key_width, own);
            convert(tile.entries[j] + value_at, value_dim, value_width, own + key_width);
        }
    }

    static void convert(const Element* from, long dim, long width, float* to) {
        long d = 0;
        for (; d + LANES <= dim; d += LANES) store(to + d, load(from + d));
        for (; d < width; d++) to[d] = d < dim ? to_float(from[d]) : 0;
    }

    static void score(const float* scaled, long width, int pairs, const float* const* keys, int tokens,
                      Ahead& ahead, float (*scores)[TILE_TOKENS]) {
        for (int i = 0; i < pairs; i += GROUP)
            for (int j = 0; j < tokens; j += GROUP)
                (i ? score_group<false> : score_group<true>)(scaled + i * width, width, keys + j, ahead, scores + i, j);
    }

    template <bool LOOKS_AHEAD>
    static void score_group(const float* scaled, long width, const float* const* keys, Ahead& ahead,
                            float (*scores)[TILE_TOKENS], int column) {
        vec sums[GROUP][GROUP];
#pragma GCC unroll 4
        for (int a = 0; a < GROUP; a++)
#pragma GCC unroll 4
            for (int b = 0; b < GROUP; b++) sums[a][b] = vec{};
        for (long d = 0; d < width; d += LANES) {
            vec key[GROUP];
#pragma GCC unroll 4
            for (int b = 0; b < GROUP; b++) {
                key[b] = load(keys[b] + d);
                if (LOOKS_AHEAD) ahead.ask();
            }
#pragma GCC unroll 4
            for (int a = 0; a < GROUP; a++) {
                const vec query = load(scaled + a * width + d);
#pragma GCC unroll 4
                for (int b = 0; b < GROUP; b++) sums[a][b] += query * key[b];
            }
        }
        sums_of_lanes(sums, scores[0] + column, TILE_TOKENS);
    }

    // Scores become weights relative to the running maximum, 0 from `seen` on; what was summed so far is scaled to it.
    void soften(float* scores, int seen, float& highest, float& total, float* sums) const {
        if (seen <= 0) {
            std::memset(scores, 0, TILE_TOKENS * sizeof(float));
            return;
        }
        for (int j = seen; j < TILE_TOKENS; j++) scores[j] = -INFINITY;
        vec largest = load(scores);
        for (int j = LANES; j < TILE_TOKENS; j += LANES) largest = load(scores + j) > largest ? load(scores + j) : largest;
        const float now = std::max(highest, largest_lane(largest));
        if (now != highest) {
            float shrink[LANES];
            store(shrink, exponential(broadcast(highest - now)));
            for (long d = 0; d < rounded_up(value_dim); d += LANES) store(sums + d, load(sums + d) * broadcast(shrink[0]));
            total *= shrink[0];
            highest = now;
        }
        for (int j = 0; j < TILE_TOKENS; j += LANES) {
            const vec weights = exponential(load(scores + j) - broadcast(now));
            store(scores + j, weights);
            total += sum_of_lanes(weights);
        }
    }

    static void add_values(const float (*scores)[TILE_TOKENS], int pairs, const float* const* values, int tokens,
                           Ahead& ahead, float* sums, long width) {
        for (int i = 0; i < pairs; i += GROUP)
            for (long first = 0; first < width;) {
                const bool four = first + GROUP * LANES <= width;
                const auto add = i ? (four ? add_vectors<GROUP, false> : add_vectors<1, false>)
                                   : (four ? add_vectors<GROUP, true> : add_vectors<1, true>);
                add(scores + i, values, ahead, tokens, sums + i * width, width, first);
                first += four ? GROUP * LANES : LANES;
            }
    }

    template <int VECTORS, bool LOOKS_AHEAD>
    static void add_vectors(const float (*scores)[TILE_TOKENS], const float* const* values, Ahead& ahead, int tokens,
                            float* sums, long width, long first) {
        vec totals[GROUP][VECTORS];
#pragma GCC unroll 4
        for (int a = 0; a < GROUP; a++)
#pragma GCC unroll 4
            for (int b = 0; b < VECTORS; b++) totals[a][b] = load(sums + a * width + first + b * LANES);
        for (int j = 0; j < tokens; j++) {
            vec value[VECTORS];
#pragma GCC unroll 4
            for (int b = 0; b < VECTORS; b++) {
                value[b] = load(values[j] + first + b * LANES);
                if (LOOKS_AHEAD) ahead.ask();
            }
#pragma GCC unroll 4
            for (int a = 0; a < GROUP; a++)
#pragma GCC unroll 4
                for (int b = 0; b < VECTORS; b++) totals[a][b] += broadcast(scores[a][j]) * value[b];
        }
#pragma GCC unroll 4
        for (int a = 0; a < GROUP; a++)
#pragma GCC unroll 4
            for (int b = 0; b < VECTORS; b++) store(sums + a * width + first + b * LANES, totals[a][b]);
    }
};

}  // namespace afd
