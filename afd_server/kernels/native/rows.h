// What is done row by row between the products: norms, rotation, cache entries, the choice of experts, embeddings.
#pragma once

#include "matmul.h"

namespace afd {

constexpr long ELEMENTS_OF_A_CHUNK = 32768;

// work(row) for every row, `elements` of which are touched in all.
template <class Work>
void share_rows(long num_rows, long elements, int max_threads, const Work& work) {
    const long chunks = std::max(1L, std::min(num_rows, elements / ELEMENTS_OF_A_CHUNK));
    share(chunks, max_threads, [&](long chunk) {
        const Part mine(num_rows, chunk, chunks);
        for (long row = mine.first; row < mine.last; row++) work(row);
    });
}

inline float inverse_rms(const float* row, long size, float eps) {
    vec sums = {};
    long i = 0;
    for (; i + LANES <= size; i += LANES) sums += load(row + i) * load(row + i);
    float total = sum_of_lanes(sums);
    for (; i < size; i++) total += row[i] * row[i];
    return 1 / std::sqrt(total / float(size) + eps);
}

// x [num_rows, hidden] += delta, where there is one; normed = weight * x / rms(x).
inline void add_rms_norm(float* x, const float* delta, const float* weight, float eps, float* normed, long num_rows,
                         long hidden, int max_threads) {
    share_rows(num_rows, num_rows * hidden, max_threads, [&](long row) {
        float *in = x + row * hidden, *out = normed + row * hidden;
        if (delta)
            for (long i = 0; i < hidden; i++) in[i] += delta[row * hidden + i];
        const float scale = inverse_rms(in, hidden, eps);
        for (long i = 0; i < hidden; i++) out[i] = weight[i] * (in[i] * scale);
    });
}

// Turns one head by its position's angles; interleaved pairs come out as halves (see models/rope.py). `turned` may be `head`.
inline void rotate(const float* head, const float* cosines, const float* sines, long dim, bool interleaved, float* turned) {
    const long half = dim / 2;
    float copy[1024];
    std::memcpy(copy, head, dim * sizeof(float));
    if (interleaved) {
        for (long i = 0; i < half; i++) {
            turned[i] = copy[2 * i] * cosines[i] - copy[2 * i + 1] * sines[i];
            turned[half + i] = copy[2 * i + 1] * cosines[i] + copy[2 * i] * sines[i];
        }
        return;
    }
    for (long i = 0; i < half; i++) turned[i] = copy[i] * cosines[i] - copy[half + i] * sines[i];
    for (long i = 0; i < half; i++) turned[half + i] = copy[half + i] * cosines[i] + copy[i] * sines[i];
}

inline void norm_head(float* head, const float* weight, long dim, float eps) {
    const float scale = inverse_rms(head, dim, eps);
    for (long i = 0; i < dim; i++) head[i] = weight[i] * (head[i] * scale);
}

// Where the heads of one projection lie: [rows, heads, dim], rows row_stride floats apart. norm: [dim] or null.
struct Heads {
    float* first;
    long row_stride, count;
    const float* norm;
};

// Queries are normed and rotated in place; keys likewise on their way into the cache, and values as they are. Entry `slot` of
// the cache is [2, keys.count, dim]. cosines, sines: [rows, dim / 2].
template <class Element>
void rotate_and_write(Heads queries, Heads keys, Heads values, long num_rows, long dim, const float* cosines,
                      const float* sines, bool interleaved, float eps, Element* cache, const int64_t* slots,
                      int max_threads) {
    const long per_row = (queries.count + 2 * keys.count) * dim;
    share_rows(num_rows, num_rows * per_row, max_threads, [&](long row) {
        const float *cosine = cosines + row * dim / 2, *sine = sines + row * dim / 2;
        for (Heads heads : {queries, keys})
            for (long index = 0; index < heads.count; index++) {
                float* head = heads.first + row * heads.row_stride + index * dim;
                if (heads.norm) norm_head(head, heads.norm, dim, eps);
                rotate(head, cosine, sine, dim, interleaved, head);
            }
        Element* entry = cache + slots[row] * 2 * keys.count * dim;
        const float* key = keys.first + row * keys.row_stride;
        const float* value = values.first + row * values.row_stride;
        for (long i = 0; i < keys.count * dim; i++) assign(entry[i], key[i]);
        for (long i = 0; i < keys.count * dim; i++) assign(entry[keys.count * dim + i], value[i]);
    });
}

// The top_k best of num_experts for every row of logits, the best first, equal ones in the order of their ids, and their
// weights: softmax over all experts, or sigmoids; summing to 1 if renormalised; times scaling. correction: [num_experts],
// added for the choice alone, or null.
inline void route(const float* logits, long num_rows, long num_experts, long top_k, bool softmax, bool renormalise,
                  float scaling, const float* correction, int32_t* ids, float* weights, int max_threads) {
    const long padded = (num_experts + LANES - 1) / LANES * LANES;
    share_rows(num_rows, num_rows * padded * (1 + top_k), max_threads, [&](long row) {
        static thread_local Scratch scratch;
        float* scores = scratch.get<float>(2 * padded);
        float* ranks = scores + padded;
        const float* in = logits + row * num_experts;
        const float highest = softmax ? *std::max_element(in, in + num_experts) : 0;
        for (long i = 0; i < padded; i++) scores[i] = i < num_experts ? in[i] - highest : 0;
        float total = 0;
        for (long i = 0; i < padded; i += LANES) {
            const vec x = load(scores + i);
            store(scores + i, softmax ? exponential(x) : broadcast(1.0f) / (broadcast(1.0f) + exponential(-x)));
        }
        for (long i = 0; i < num_experts; i++) total += scores[i];
        for (long i = 0; i < num_experts; i++) {
            if (softmax) scores[i] /= total;
            ranks[i] = scores[i] + (correction ? correction[i] : 0);
        }
        float chosen_total = 0;
        for (long k = 0; k < top_k; k++) {
            const long best = std::max_element(ranks, ranks + num_experts) - ranks;
            ids[row * top_k + k] = int32_t(best);
            weights[row * top_k + k] = scores[best];
            chosen_total += scores[best];
            ranks[best] = -INFINITY;
        }
        const float scale = (renormalise ? 1 / std::max(chosen_total, 1e-20f) : 1) * scaling;
        for (long k = 0; k < top_k; k++) weights[row * top_k + k] *= scale;
    });
}

// Rows `ids` of a packed matrix [n, k], as floats: an embedding that is also the LM head is held once.
template <class Element>
void rows_of_packed(const char* w, const int64_t* ids, long num_ids, long k, float* out, int max_threads) {
    share_rows(num_ids, num_ids * k, max_threads, [&](long i) {
        const char* panel = w + ids[i] / PANEL * Floating<Element>::panel_bytes(k);
        const Element* column = reinterpret_cast<const Element*>(panel) + ids[i] % PANEL;
        for (long j = 0; j < k; j++) out[i * k + j] = to_float(column[j * PANEL]);
    });
}

}  // namespace afd
