// Vectors of float for one instruction set, chosen by the compiler's flags: 16 lanes with AVX-512, 8 with AVX2, 4 else.
//
// GCC's and Clang's vector extensions give the same source for all of them; intrinsics stand only where an instruction
// has no other spelling (matmul.h). Every sum runs in an order that does not depend on how many rows are computed at once,
// so a request's result does not depend on what else is in its batch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace afd {

#if defined(__AVX512F__)
constexpr int LANES = 16;
constexpr int MAX_ROWS = 12;  // of a tile: 24 sums, 2 weights and 1 activation fill 27 of 32 registers
#elif defined(__AVX2__)
constexpr int LANES = 8;
constexpr int MAX_ROWS = 6;  // 12 sums, 2 weights and 1 activation fill 15 of 16 registers
#else
constexpr int LANES = 4;
constexpr int MAX_ROWS = 6;
#endif

typedef float vec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint32_t uvec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint16_t hvec __attribute__((vector_size(LANES * 2), aligned(2), may_alias));

struct bfloat16 {
    uint16_t bits;
};

inline vec load(const float* from) { return *reinterpret_cast<const vec*>(from); }
inline void store(float* to, vec value) { *reinterpret_cast<vec*>(to) = value; }
inline vec broadcast(float value) { return value - vec{}; }  // not 0 + value: that is another number for -0

inline vec load(const bfloat16* from) {  // a bfloat16 is the upper half of a float
    return reinterpret_cast<vec>(__builtin_convertvector(*reinterpret_cast<const hvec*>(from), uvec) << 16);
}

inline float to_float(float value) { return value; }
inline float to_float(bfloat16 value) {
    uint32_t bits = uint32_t(value.bits) << 16;
    float result;
    std::memcpy(&result, &bits, 4);
    return result;
}

inline void assign(float& to, float value) { to = value; }
inline void assign(bfloat16& to, float value) {  // rounded to nearest, ties to even; a NaN stays one
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    to.bits = value != value ? uint16_t(bits >> 16 | 0x40) : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// The lanes' sum, by halves: 16 lanes are added as 8 and 8, these as 4 and 4.
inline float sum_of_lanes(vec value) {
    typedef float four __attribute__((vector_size(16)));
#if defined(__AVX512F__)
    typedef float eight __attribute__((vector_size(32)));
    const eight both = __builtin_shufflevector(value, value, 0, 1, 2, 3, 4, 5, 6, 7) +
                       __builtin_shufflevector(value, value, 8, 9, 10, 11, 12, 13, 14, 15);
    const four sums = __builtin_shufflevector(both, both, 0, 1, 2, 3) + __builtin_shufflevector(both, both, 4, 5, 6, 7);
#elif defined(__AVX2__)
    const four sums = __builtin_shufflevector(value, value, 0, 1, 2, 3) + __builtin_shufflevector(value, value, 4, 5, 6, 7);
#else
    const four sums = value;
#endif
    const four pairs = sums + __builtin_shufflevector(sums, sums, 2, 3, 0, 1);
    return pairs[0] + pairs[1];
}

// e**x within about 2 units in the last place. Below -87 it is 0, and so it is for minus infinity; above 88 it stays e**88.
inline vec exponential(vec x) {
    const vec lowest = broadcast(-87.0f), highest = broadcast(88.0f);
    const ivec vanishes = x < lowest;
    x = vanishes ? lowest : x;
    x = x > highest ? highest : x;
    const vec magic = broadcast(12582912.0f);  // 1.5 * 2**23: adding it rounds to an integer, in the low bits
    const vec shifted = x * broadcast(1.44269504088896341f) + magic;
    const vec n = shifted - magic;
    const vec r = (x - n * broadcast(0.693359375f)) - n * broadcast(-2.12194440e-4f);  // ln 2 in two parts
    vec p = broadcast(1.0f / 5040);  // Taylor's series: |r| <= ln(2) / 2, the next term is below 6e-9
    p = p * r + broadcast(1.0f / 720);
    p = p * r + broadcast(1.0f / 120);
    p = p * r + broadcast(1.0f / 24);
    p = p * r + broadcast(1.0f / 6);
    p = p * r + broadcast(0.5f);
    p = p * r + broadcast(1.0f);
    p = p * r + broadcast(1.0f);
    const ivec exponent = (reinterpret_cast<ivec>(shifted) - reinterpret_cast<ivec>(magic) + 127) << 23;
    p = p * reinterpret_cast<vec>(exponent);
    return vanishes ? vec{} : p;
}

inline vec silu(vec x) { return x / (broadcast(1.0f) + exponential(-x)); }

}  // namespace afd
