// The attention side of a layer with grouped-query attention in one call: what the other kernels do one by one, in the same
// order and so to the same bits. Between two kernels lie nanoseconds here; in Python, whose code the weights have pushed out of
// the core's caches, tens of microseconds, in which the helper threads fall asleep.
#pragma once

#include "attention.h"

namespace afd {

// A packed matrix [n, k] with its bias, or null: packed = null where there is no matrix.
struct Matrix {
    const char* packed;
    const float* bias;
    long format, n;
};

// What a layer has: its weights, and the numbers of its attention and its router. kernels/layer.py has the same fields.
struct GroupedQueryLayer {
    const float *attention_norm, *ffn_norm, *query_norm, *key_norm;  // of queries and keys, or null
    Matrix qkv, output, router;
    const float* correction;  // see route
    long hidden, num_heads, num_key_heads, head_dim;
    long num_experts, top_k, softmax, renormalise;
    float eps, scale, routed_scaling;
};

// What a micro-batch has in one layer. x [rows, hidden] += answer, the last layer's FFN, where there is one; then += attention.
// normed [rows, hidden], ids and weights [rows, top_k]: the call of this layer.
struct LayerRows {
    long count;
    float* x;
    const float* answer;
    float* normed;
    int32_t* ids;
    float* weights;
    const float *cosines, *sines;  // [rows, head_dim / 2]
    long interleaved;
    const int64_t* slots;
    Requests requests;
};

// linear: (matrix, x, rows, k, y), with the matrix's format.
template <class Element, class Linear>
void attention_side(const GroupedQueryLayer& layer, const LayerRows& rows, Element* cache, const CacheLayout& layout,
                    int threads, const Linear& linear) {
    static thread_local Scratch qkv_scratch, attended_scratch, delta_scratch, logits_scratch;
    const long count = rows.count, hidden = layer.hidden, dim = layer.head_dim, row_size = layer.qkv.n;
    float* qkv = qkv_scratch.get<float>(count * row_size);
    float* attended = attended_scratch.get<float>(count * layer.num_heads * dim);
    float* delta = delta_scratch.get<float>(count * hidden);

    add_rms_norm(rows.x, rows.answer, layer.attention_norm, layer.eps, rows.normed, count, hidden, threads);
    linear(layer.qkv, rows.normed, count, hidden, qkv);
    const Heads queries{qkv, row_size, layer.num_heads, layer.query_norm};
    const Heads keys{qkv + layer.num_heads * dim, row_size, layer.num_key_heads, layer.key_norm};
    const Heads values{keys.first + layer.num_key_heads * dim, row_size, layer.num_key_heads, nullptr};
    rotate_and_write(queries, keys, values, count, dim, rows.cosines, rows.sines, rows.interleaved, layer.eps, cache,
                     rows.slots, threads);
    PagedAttention<Element> attention{qkv,  row_size, layer.num_heads, layer.num_key_heads, dim, dim, cache, layout,
                                      rows.requests, layer.scale, attended};
    attention.run_on(threads);
    linear(layer.output, attended, count, layer.num_heads * dim, delta);
    add_rms_norm(rows.x, delta, layer.ffn_norm, layer.eps, rows.normed, count, hidden, threads);
    if (layer.router.packed) {
        float* logits = logits_scratch.get<float>(count * layer.num_experts);
        linear(layer.router, rows.normed, count, hidden, logits);
        route(logits, count, layer.num_experts, layer.top_k, layer.softmax, layer.renormalise, layer.routed_scaling,
              layer.correction, rows.ids, rows.weights, threads);
    }
}

}  // namespace afd
