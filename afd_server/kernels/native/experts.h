// The gated MLPs of a mixture of experts in one call: y = sum over a row's experts of weight * down(silu(gate x) * up x).
//
// Two phases with a barrier between them. In the first, (expert, panel of gate and up) pairs are shared out among the
// threads; in the second, columns of y, so that no two threads add to one number and a row's experts are added in the order
// of their ids. Each active expert's weights are read once for up to MAX_ROWS rows; idle experts are never touched. A dense
// MLP is the case of one expert that every row chose with weight 1.
#pragma once

#include <vector>

#include "matmul.h"

namespace afd {

// Rows of x that chose one expert, in blocks: block b of an expert has up to MAX_ROWS pairs (row, weight).
struct ExpertBlock {
    int expert, first_pair, count;
};

struct Dispatch {
    std::vector<int> rows;        // of the pairs, sorted by expert, in the order of rows within one
    std::vector<float> weights;   // of the pairs
    std::vector<ExpertBlock> blocks;

    // ids, weights: [num_rows, top_k]; ids outside [first_expert, first_expert + num_experts) are other shards'.
    void build(const int32_t* ids, const float* weights_in, long num_rows, int top_k, int first_expert, int num_experts) {
        const long num_ids = num_rows * top_k;
        starts_.assign(num_experts + 1, 0);
        for (long i = 0; i < num_ids; i++)
            if (unsigned(ids[i] - first_expert) < unsigned(num_experts)) starts_[ids[i] - first_expert + 1]++;
        for (int expert = 0; expert < num_experts; expert++) starts_[expert + 1] += starts_[expert];
        rows.resize(starts_[num_experts]);
        weights.resize(starts_[num_experts]);
        blocks.clear();
        for (int expert = 0; expert < num_experts; expert++)
            for (int pair = starts_[expert]; pair < starts_[expert + 1]; pair += MAX_ROWS)
                blocks.push_back({expert, pair, std::min(MAX_ROWS, starts_[expert + 1] - pair)});
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

// x: [num_rows, hidden]. gate_up: per expert the packed, interleaved [2 width, hidden]; down: per expert the packed
// [hidden, width]. y: [num_rows, hidden], overwritten.
template <class Format>
void experts(const float* x, long num_rows, long hidden, long width, const char* gate_up, const char* down,
             const int32_t* ids, const float* weights, int top_k, int first_expert, int num_experts, float* y, int max_threads) {
    static thread_local Dispatch dispatch_of_thread;
    static thread_local Scratch x_scratch, inner_scratch, packed_scratch;
    Dispatch& dispatch = dispatch_of_thread;
    dispatch.build(ids, weights, num_rows, top_k, first_expert, num_experts);
    const std::vector<ExpertBlock>& blocks = dispatch.blocks;
    const long num_blocks = long(blocks.size()), num_pairs = long(dispatch.rows.size());

    const long inner_panels = panels_of(2 * width, true), y_panels = panels_of(hidden);
    const size_t gate_up_bytes = inner_panels * Format::panel_bytes(hidden);
    const size_t down_bytes = y_panels * Format::panel_bytes(width);
    const size_t x_stride = Format::block_bytes(MAX_ROWS, hidden), inner_stride = Format::block_bytes(MAX_ROWS, width);
    char* packed_x = x_scratch.get<char>(num_blocks * x_stride);
    float* inner = inner_scratch.get<float>(num_pairs * width);
    char* packed_inner = packed_scratch.get<char>(num_blocks * inner_stride);

    Barrier barrier;
    run(max_threads, [&](int thread, int threads) {
        const Part my_blocks(num_blocks, thread, threads);
        const float* rows[MAX_ROWS];
        Tile tile;
        for (long block = my_blocks.first; block < my_blocks.last; block++) {
            for (int i = 0; i < blocks[block].count; i++)
                rows[i] = x + dispatch.rows[blocks[block].first_pair + i] * hidden;
            Format::pack_block(rows, blocks[block].count, hidden, packed_x + block * x_stride);
        }
        barrier.wait(threads);

        // An expert's panels stay in the cache while its blocks pass by: panels are the outer loop within an expert.
        long first_of_expert = 0, panels_before = 0;
        long active = 0;
        for (long block = 0; block < num_blocks; block++)
            active += block == 0 || blocks[block].expert != blocks[block - 1].expert;
        const Part my_panels(active * inner_panels, thread, threads);
        while (first_of_expert < num_blocks) {
            long last = first_of_expert + 1;
            while (last < num_blocks && blocks[last].expert == blocks[first_of_expert].expert) last++;
            const char* weights_of_expert = gate_up + blocks[first_of_expert].expert * gate_up_bytes;
            const long first_panel = std::max(0L, my_panels.first - panels_before);
            const long last_panel = std::min(inner_panels, my_panels.last - panels_before);
            for (long panel = first_panel; panel < last_panel; panel++)
                for (long block = first_of_expert; block < last; block++) {
                    const int count = blocks[block].count, lanes = int(std::min<long>(LANES, width - panel * LANES));
                    tile_function<Format>(count)(weights_of_expert + panel * Format::panel_bytes(hidden),
                                                 packed_x + block * x_stride, hidden, tile);
                    for (int i = 0; i < count; i++) {
                        store(tile[i], silu(load(tile[i])) * load(tile[i] + LANES));
                        std::memcpy(inner + (blocks[block].first_pair + i) * width + panel * LANES, tile[i],
                                    lanes * sizeof(float));
                    }
                }
            panels_before += inner_panels;
            first_of_expert = last;
        }
        barrier.wait(threads);

        for (long block = my_blocks.first; block < my_blocks.last; block++) {
            for (int i = 0; i < blocks[block].count; i++) rows[i] = inner + (blocks[block].first_pair + i) * width;
            Format::pack_block(rows, blocks[block].count, width, packed_inner + block * inner_stride);
        }
        barrier.wait(threads);

        const Part my_columns(y_panels, thread, threads);
        const long first_column = my_columns.first * PANEL, last_column = std::min(hidden, my_columns.last * PANEL);
        if (last_column > first_column)
            for (long row = 0; row < num_rows; row++)
                std::memset(y + row * hidden + first_column, 0, (last_column - first_column) * sizeof(float));
        for (first_of_expert = 0; first_of_expert < num_blocks;) {
            long last = first_of_expert + 1;
            while (last < num_blocks && blocks[last].expert == blocks[first_of_expert].expert) last++;
            const char* weights_of_expert = down + blocks[first_of_expert].expert * down_bytes;
            for (long panel = my_columns.first; panel < my_columns.last; panel++)
                for (long block = first_of_expert; block < last; block++) {
                    const int columns = int(std::min<long>(PANEL, hidden - panel * PANEL));
                    tile_function<Format>(blocks[block].count)(weights_of_expert + panel * Format::panel_bytes(width),
                                                               packed_inner + block * inner_stride, width, tile);
                    for (int i = 0; i < blocks[block].count; i++) {
                        const int pair = blocks[block].first_pair + i;
                        const float weight = dispatch.weights[pair];
                        float* out = y + dispatch.rows[pair] * hidden + panel * PANEL;
                        for (int column = 0; column < columns; column++) out[column] += weight * tile[i][column];
                    }
                }
            first_of_expert = last;
        }
    });
}

}  // namespace afd
