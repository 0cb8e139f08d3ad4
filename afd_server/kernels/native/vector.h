// Vectors of float for one instruction set, chosen by the compiler's flags: 16 lanes with AVX-512, 8 with AVX2, 4 else.
//
// GCC's and Clang's vector extensions give the same source for all of them; intrinsics stand only where an instruction
// has no other spelling (matmul.h). Every sum runs in an order that does not depend on how many rows are computed at once,
// so a request's result does not depend on what else is in its batch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

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

typedef float four __attribute__((vector_size(16), aligned(4), may_alias));

// The lanes brought together by halves: 16 as 8 and 8, these as 4 and 4, with `both` of two vectors.
template <class Both>
inline float fold(vec value, const Both& both) {
#if defined(__AVX512F__)
    const auto eight = both(__builtin_shufflevector(value, value, 0, 1, 2, 3, 4, 5, 6, 7),
                            __builtin_shufflevector(value, value, 8, 9, 10, 11, 12, 13, 14, 15));
    const four lanes = both(__builtin_shufflevector(eight, eight, 0, 1, 2, 3), __builtin_shufflevector(eight, eight, 4, 5, 6, 7));
#elif defined(__AVX2__)
    const four lanes = both(__builtin_shufflevector(value, value, 0, 1, 2, 3), __builtin_shufflevector(value, value, 4, 5, 6, 7));
#else
    const four lanes = value;
#endif
    const four pairs = both(lanes, __builtin_shufflevector(lanes, lanes, 2, 3, 0, 1));
    return both(pairs, __builtin_shufflevector(pairs, pairs, 1, 0, 3, 2))[0];
}

inline float sum_of_lanes(vec value) {
    return fold(value, [](auto a, auto b) { return a + b; });
}

inline float largest_lane(vec value) {
    return fold(value, [](auto a, auto b) { return a > b ? a : b; });
}

// sums[row][column]'s lanes added up, for 4 rows and 4 columns, to to[row * stride + column].
__attribute__((always_inline)) inline void sums_of_lanes(const vec (&sums)[4][4], float* to, long stride) {
#if defined(__AVX512F__)
    // A transposition that adds on its way: 16 vectors become 8, then 4 with a row each, then one with everything.
    vec rows[4];
#pragma GCC unroll 4
    for (int row = 0; row < 4; row++) {
        vec pairs[2];
#pragma GCC unroll 2
        for (int i = 0; i < 2; i++) {
            const vec a = sums[row][2 * i], b = sums[row][2 * i + 1];
            pairs[i] = __builtin_shufflevector(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
                       __builtin_shufflevector(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
        }
        const vec a = pairs[0], b = pairs[1];
        rows[row] = __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
                    __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    }
    vec halves[2];
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
        const vec a = rows[2 * i], b = rows[2 * i + 1];
        halves[i] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
                    __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    }
    const vec a = halves[0], b = halves[1];
    const vec all = __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
                    __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    *reinterpret_cast<four*>(to) = __builtin_shufflevector(all, all, 0, 1, 2, 3);
    *reinterpret_cast<four*>(to + stride) = __builtin_shufflevector(all, all, 4, 5, 6, 7);
    *reinterpret_cast<four*>(to + 2 * stride) = __builtin_shufflevector(all, all, 8, 9, 10, 11);
    *reinterpret_cast<four*>(to + 3 * stride) = __builtin_shufflevector(all, all, 12, 13, 14, 15);
#else
    for (int row = 0; row < 4; row++)
        for (int column = 0; column < 4; column++) to[row * stride + column] = sum_of_lanes(sums[row][column]);
#endif
}

template <int... I>
inline void interleave(vec a, vec b, vec& low, vec& high, std::integer_sequence<int, I...>) {
    low = __builtin_shufflevector(a, b, (I / 2 + I % 2 * LANES)...);
    high = __builtin_shufflevector(a, b, (LANES / 2 + I / 2 + I % 2 * LANES)...);
}

// A square's rows become its columns: each pass interleaves its upper half with its lower one.
__attribute__((always_inline)) inline void transpose(vec (&square)[LANES]) {
#pragma GCC unroll 4
    for (int pass = 1; pass < LANES; pass *= 2) {
        vec next[LANES];
#pragma GCC unroll 8
        for (int i = 0; i < LANES / 2; i++)
            interleave(square[i], square[i + LANES / 2], next[2 * i], next[2 * i + 1],
                       std::make_integer_sequence<int, LANES>{});
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) square[i] = next[i];
    }
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
