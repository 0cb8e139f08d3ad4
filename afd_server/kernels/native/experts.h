// The gated MLPs of a mixture of experts in one call: y = sum over a row's experts of weight * down(silu(gate x) * up x).
//
// First, (expert, panel of gate and up) pairs are shared out among the threads; then columns of y, so that no two threads add
// to one number and a row's experts are added in the order of their ids. Each active expert's weights are read once for up
// to MAX_ROWS rows; idle experts are never touched. A dense MLP is the case of one expert that every row chose with weight 1.
#pragma once

#include <vector>

#include "matmul.h"

namespace afd {

// Some (row, weight) pairs of one expert: as many rows as a tile has, or fewer.
struct ExpertBlock {
    int first_pair, count;
};

// A group of blocks of one expert; see groups_for.
struct ExpertGroup {
    long expert;  // among those held
    int first_block, last_block;
};

struct Dispatch {
    std::vector<int> rows;        // of the pairs, sorted by expert, in the order of rows within one
    std::vector<float> weights;   // of the pairs
    std::vector<ExpertBlock> blocks;
    std::vector<ExpertGroup> groups;  // of the experts that some row chose

    // ids, weights: [num_rows, top_k]; ids outside [first_expert, first_expert + num_experts) are other shards'.
    // max_rows: of a block; block_bytes: of its rows.
    void build(const int32_t* ids, const float* weights_in, long num_rows, int top_k, int first_expert, int num_experts,
               int max_rows, size_t block_bytes) {
        const long num_ids = num_rows * top_k;
        starts_.assign(num_experts + 1, 0);
        for (long i = 0; i < num_ids; i++)
            if (unsigned(ids[i] - first_expert) < unsigned(num_experts)) starts_[ids[i] - first_expert + 1]++;
        for (int expert = 0; expert < num_experts; expert++) starts_[expert + 1] += starts_[expert];
        rows.resize(starts_[num_experts]);
        weights.resize(starts_[num_experts]);
        blocks.clear();
        groups.clear();
        for (int expert = 0; expert < num_experts; expert++) {
            if (starts_[expert] == starts_[expert + 1]) continue;
            const int first_block = int(blocks.size());
            const int pairs = starts_[expert + 1] - starts_[expert];
            const long count = (pairs + max_rows - 1) / max_rows, parts = groups_for(count, block_bytes);
            for (long block = 0; block < count; block++) {  // of nearly the same size: products of few rows are slow
                const Part mine(pairs, block, count);
                blocks.push_back({starts_[expert] + int(mine.first), int(mine.last - mine.first)});
            }
            for (long part = 0; part < parts; part++) {
                const Part mine(count, part, parts);
                groups.push_back({expert, first_block + int(mine.first), first_block + int(mine.last)});
            }
        }
        for (long i = 0; i < num_ids; i++)
            if (unsigned(ids[i] - first_expert) < unsigned(num_experts)) {
                const int place = starts_[ids[i] - first_expert]++;
                rows[place] = int(i / top_k);
                weights[place] = weights_in[i];
            }
    }

private:
    std::vector<int> starts_;
};

// to += weight * from.
inline void add_scaled(const float* from, float weight, float* to, long count) {
    long i = 0;
    for (; i + LANES <= count; i += LANES) store(to + i, load(to + i) + broadcast(weight) * load(from + i));
    for (; i < count; i++) to[i] += weight * from[i];
}

// x: [num_rows, hidden]. gate_up: per expert the packed, interleaved [2 width, hidden]; down: per expert the packed
// [hidden, width]. y: [num_rows, hidden], overwritten.
template <class Format>
void experts(const float* x, long num_rows, long hidden, long width, const char* gate_up, const char* down,
             const int32_t* ids, const float* weights, int top_k, int first_expert, int num_experts, float* y, int max_threads) {
    constexpr int MAX_ROWS = Format::MAX_ROWS;
    static thread_local Dispatch dispatch_of_thread;
    static thread_local Scratch x_scratch, inner_scratch, packed_scratch;
    const size_t x_stride = Format::block_bytes(MAX_ROWS, hidden), inner_stride = Format::block_bytes(MAX_ROWS, width);
    Dispatch& dispatch = dispatch_of_thread;
    dispatch.build(ids, weights, num_rows, top_k, first_expert, num_experts, MAX_ROWS, x_stride);
    const std::vector<ExpertBlock>& blocks = dispatch.blocks;
    const long num_blocks = long(blocks.size()), num_pairs = long(dispatch.rows.size());
    const long num_groups = long(dispatch.groups.size());

    const long inner_panels = panels_of(2 * width, true), y_panels = panels_of(hidden);
    const size_t gate_up_bytes = inner_panels * Format::panel_bytes(hidden);
    const size_t down_bytes = y_panels * Format::panel_bytes(width);
    char* packed_x = x_scratch.get<char>(num_blocks * x_stride);
    float* inner = inner_scratch.get<float>(num_pairs * width);
    char* packed_inner = packed_scratch.get<char>(num_blocks * inner_stride);

    const auto pack_blocks = [&](const float* from, const int* row_of_pair, long row_size, size_t stride, char* to) {
        share(num_blocks, max_threads, [&](long block) {
            const float* rows[MAX_ROWS];
            for (int i = 0; i < blocks[block].count; i++) {
                const int pair = blocks[block].first_pair + i;
                rows[i] = from + (row_of_pair ? row_of_pair[pair] : pair) * row_size;
            }
            Format::pack_block(rows, blocks[block].count, row_size, to + block * stride);
        });
    };

    // Parts are (group, panel) pairs.
    pack_blocks(x, dispatch.rows.data(), hidden, x_stride, packed_x);
    const long parts = num_groups * inner_panels;
    const double blocks_of_a_panel = num_groups ? double(num_blocks) / num_groups : 0;
    const long chunks = chunks_for(parts, double(num_groups) * gate_up_bytes, blocks_of_a_panel, max_threads);
    share(chunks, max_threads, [&](long chunk) {
        const Part mine(parts, chunk, chunks);
        Tile tile;
        for (long part = mine.first; part < mine.last; part++) {
            const ExpertGroup& group = dispatch.groups[part / inner_panels];
            const long panel = part % inner_panels, panel_bytes = Format::panel_bytes(hidden);
            const char* weights = gate_up + group.expert * gate_up_bytes + panel * panel_bytes;
            const int lanes = int(std::min<long>(LANES, width - panel * LANES));
            for_blocks_of_panel<Format>(
                weights, weights + panel_bytes, hidden, group.first_block, group.last_block, [&](long block, Ahead ahead) {
                    const int count = blocks[block].count;
                    tile_function<Format>(count)(weights, packed_x + block * x_stride, hidden, ahead, tile);
                    for (int i = 0; i < count; i++) {
                        store(tile[i], silu(load(tile[i])) * load(tile[i] + LANES));
                        std::memcpy(inner + (blocks[block].first_pair + i) * width + panel * LANES, tile[i],
                                    lanes == LANES ? LANES * sizeof(float) : lanes * sizeof(float));
                    }
                });
        }
    });

    pack_blocks(inner, nullptr, width, inner_stride, packed_inner);
    // With many rows a strip of columns is wide, since each of them reads all of `packed_inner`.
    const long column_chunks = blocks_of_a_panel > 4 ? std::min(y_panels, 4L * max_threads)
                                                     : chunks_for(y_panels, double(num_groups) * down_bytes, 1, max_threads);
    share(column_chunks, max_threads, [&](long chunk) {
        const Part mine(y_panels, chunk, column_chunks);
        const long first_column = mine.first * PANEL, columns = std::min(hidden, mine.last * PANEL) - first_column;
        const long strip = mine.last - mine.first, panel_bytes = Format::panel_bytes(width);
        for (long row = 0; row < num_rows; row++) std::memset(y + row * hidden + first_column, 0, columns * sizeof(float));
        const auto weights_of = [&](long part) {
            return down + dispatch.groups[part / strip].expert * down_bytes + (mine.first + part % strip) * panel_bytes;
        };
        Tile tile;
        for (long part = 0; part < num_groups * strip; part++) {
            const ExpertGroup& group = dispatch.groups[part / strip];
            const char *weights = weights_of(part), *next = weights_of(std::min(part + 1, num_groups * strip - 1));
            const long column = (mine.first + part % strip) * PANEL;
            for_blocks_of_panel<Format>(
                weights, next, width, group.first_block, group.last_block, [&](long block, Ahead ahead) {
                    const int count = blocks[block].count, first_pair = blocks[block].first_pair;
                    tile_function<Format>(count)(weights, packed_inner + block * inner_stride, width, ahead, tile);
                    for (int i = 0; i < count; i++)
                        add_scaled(tile[i], dispatch.weights[first_pair + i],
                                   y + dispatch.rows[first_pair + i] * hidden + column,
                                   std::min<long>(PANEL, hidden - column));
                });
        }
    });
}

}  // namespace afd
