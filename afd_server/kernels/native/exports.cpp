// The kernels under names that ctypes finds (kernels/native_library.py declares the same signatures). Compiled once for each
// instruction set that is used. Pointers are to contiguous memory unless a stride is given; nothing is kept after a call.

#include "experts.h"
#include "hop.h"
#include "layer.h"

using namespace afd;

namespace {

enum FormatCode : long { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2 };

// Calls `body` with a value of the format's type.
template <class Body>
auto with_format(long code, const Body& body) {
    if (code == BFLOAT16) return body(BFloat16{});
    if (code == INT8) return body(Int8{});
    return body(Float32{});
}

template <class Element>
void attend(const float* queries, long query_stride, long num_heads, long num_key_heads, long key_dim, long value_dim,
            const void* cache, const long* layout, const Requests& requests, float scale, float* out, long threads) {
    const CacheLayout entries{layout[0], layout[1], layout[2], layout[3], layout[4], layout[5], layout[6]};
    PagedAttention<Element> attention{queries,   query_stride, num_heads, num_key_heads,
                                      key_dim,   value_dim,    static_cast<const Element*>(cache),
                                      entries,   requests,     scale,     out};
    attention.run_on(int(threads));
}

}  // namespace

extern "C" {

long afd_packed_bytes(long format, long n, long k, long interleaved) {
    return with_format(format, [&](auto f) { return long(panels_of(n, interleaved) * decltype(f)::panel_bytes(k)); });
}

void afd_pack(long format, const float* w, long n, long k, long interleaved, char* to) {
    with_format(format, [&](auto f) { pack<decltype(f)>(w, n, k, to, interleaved); });
}

void afd_linear(long format, const float* x, long x_stride, long m, long k, const char* w, const float* bias, long n, float* y,
                long y_stride, long threads) {
    with_format(format, [&](auto f) {
        linear<decltype(f)>(x, x_stride, m, k, w, bias, n, y, y_stride, int(threads));
    });
}

void afd_experts(long format, const float* x, long num_rows, long hidden, long width, const char* gate_up, const char* down,
                 const int32_t* ids, const float* weights, long top_k, long first_expert, long num_experts, float* y,
                 long threads) {
    with_format(format, [&](auto f) {
        experts<decltype(f)>(x, num_rows, hidden, width, gate_up, down, ids, weights, int(top_k), int(first_expert),
                             int(num_experts), y, int(threads));
    });
}

void afd_add_rms_norm(float* x, const float* delta, const float* weight, float eps, float* normed, long num_rows, long hidden,
                      long threads) {
    add_rms_norm(x, delta, weight, eps, normed, num_rows, hidden, int(threads));
}

void afd_rotate_and_write(float* queries, long query_stride, long num_heads, const float* query_norm, float* keys,
                          const float* values, long key_stride, long num_key_heads, const float* key_norm, long num_rows,
                          long dim, const float* cosines, const float* sines, long interleaved, float eps, void* cache,
                          long bfloat16_cache, const int64_t* slots, long threads) {
    const Heads q{queries, query_stride, num_heads, query_norm}, k{keys, key_stride, num_key_heads, key_norm};
    const Heads v{const_cast<float*>(values), key_stride, num_key_heads, nullptr};
    if (bfloat16_cache)
        rotate_and_write(q, k, v, num_rows, dim, cosines, sines, interleaved, eps, static_cast<bfloat16*>(cache), slots,
                         int(threads));
    else
        rotate_and_write(q, k, v, num_rows, dim, cosines, sines, interleaved, eps, static_cast<float*>(cache), slots,
                         int(threads));
}

void afd_paged_attention(const float* queries, long query_stride, long num_heads, long num_key_heads, long key_dim,
                         long value_dim, const void* cache, long bfloat16_cache, const long* layout, long num_requests,
                         const int32_t* row_starts, const int32_t* lengths, const int32_t* tables, long max_blocks,
                         float scale, float* out, long threads) {
    (bfloat16_cache ? attend<bfloat16> : attend<float>)(queries, query_stride, num_heads, num_key_heads, key_dim, value_dim,
                                                        cache, layout, {num_requests, row_starts, lengths, tables, max_blocks},
                                                        scale, out, threads);
}

void afd_route(const float* logits, long num_rows, long num_experts, long top_k, long softmax, long renormalise, float scaling,
               const float* correction, int32_t* ids, float* weights, long threads) {
    route(logits, num_rows, num_experts, top_k, softmax, renormalise, scaling, correction, ids, weights, int(threads));
}

void afd_attention_side(const GroupedQueryLayer* layer, long num_rows, float* x, const float* answer, float* normed, int32_t* ids,
                        float* weights, const float* cosines, const float* sines, long interleaved, const int64_t* slots,
                        long num_requests, const int32_t* row_starts, const int32_t* lengths, const int32_t* tables, long max_blocks, void* cache,
                        long bfloat16_cache, const long* layout, long threads) {
    const LayerRows rows{num_rows, x, answer, normed, ids, weights, cosines, sines, interleaved, slots,
                         {num_requests, row_starts, lengths, tables, max_blocks}};
    const CacheLayout entries{layout[0], layout[1], layout[2], layout[3], layout[4], layout[5], layout[6]};
    const auto linear = [threads](const Matrix& matrix, const float* from, long m, long k, float* to) {
        afd_linear(matrix.format, from, k, m, k, matrix.packed, matrix.bias, matrix.n, to, matrix.n, threads);
    };
    if (bfloat16_cache)
        attention_side(*layer, rows, static_cast<bfloat16*>(cache), entries, int(threads), linear);
    else
        attention_side(*layer, rows, static_cast<float*>(cache), entries, int(threads), linear);
}

// rows: as afd_attention_side takes them; `answer` is where the FFN side's answers lie.
void afd_run_layers(Run* run, long num_rows, float* x, const float* answer, float* normed, int32_t* ids, float* weights,
                    const float* cosines, const float* sines, long interleaved, const int64_t* slots, long num_requests,
                    const int32_t* row_starts, const int32_t* lengths, const int32_t* tables, long max_blocks, long bfloat16_cache,
                    const long* layout, long threads) {
    run_layers(*run, num_rows, answer, run->layers[0]->hidden, [&](long layer, const float* answer_before) {
        afd_attention_side(run->layers[layer], num_rows, x, answer_before, normed, ids, weights, cosines, sines, interleaved, slots,
                           num_requests, row_starts, lengths, tables, max_blocks, run->caches[layer], bfloat16_cache, layout,
                           threads);
    });
}

void afd_serve_calls(Service* service, double until) {
    serve_calls(*service, until,
                [&](const FFNLayer& layer, const float* x, long rows, long top_k, const int32_t* ids, const float* weights,
                    float* y) {
                    afd_experts(layer.format, x, rows, service->hidden, layer.width, layer.gate_up, layer.down, ids, weights,
                                top_k, layer.first_expert, layer.num_experts, y, service->threads);
                });
}

void afd_rows_of_packed(long bfloat16_weights, const char* w, const int64_t* ids, long num_ids, long k, float* out,
                        long threads) {
    (bfloat16_weights ? rows_of_packed<bfloat16> : rows_of_packed<float>)(w, ids, num_ids, k, out, int(threads));
}

}  // extern "C"
