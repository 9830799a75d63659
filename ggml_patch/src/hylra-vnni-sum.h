// Weighted sums of Q8_0 V rows in whole numbers, by VNNI. Included by hylra-tile.h for the instruction sets that have it.
//
// V stays in bytes: vpdpbusd multiplies 64 of them, of 4 cells, with bytes of their weights, where a multiplication of F32 takes 16 numbers and
// each has to be converted first. The weight of a cell and the scale of its block are one number, in three bytes without a sign; its unit is
// as small as 32 bits allow for the sum of a tile, which is exact. That is 24 bits of what a tile weighs in all, as many as F32 has.
// Two bytes would save 7 % of a layer, and lose 1e-5 to 9e-5 where three lose below 1e-6 of ordinary rows.
#pragma once

#include "hylra-vnni.h"

namespace {

constexpr int SUM_ROWS   = 2*LANES; // cells of a tile
constexpr int SUM_DIGITS = 3;
constexpr int SUM_BLOCKS = HYLRA_MAX_EMBD/BLOCK;
constexpr float SUM_MAX  = (1 << 24) - 4*SUM_ROWS; // of the weights of a tile: times 128 below 2^31. Less than 2^24 for rounding

// Lane i: the sum of the lanes of x[i % 4].
inline vf sums_of_four(vf * x) {
    const auto all = std::make_integer_sequence<int, LANES>{};
    const vf part = fold_all<1, 4>(x), half = part + rotated<8>(part, all);
    return half + rotated<4>(half, all);
}

// The scales of a block of a tile's rows, as shares of the largest one.
struct block_scales {
    vf share[2];
    float largest; // of cells that count; negative if one is, not finite if one is not
};

inline block_scales read_scales(const char * const * row, int byte, const __mmask16 * counts) {
    block_scales s = { { row_scales(row, byte), row_scales(row + LANES, byte) }, 0.0f };
    // as whole numbers without a sign, infinity, NaN and what is negative come last
    const __m512i low = _mm512_maskz_mov_epi32(counts[0], (__m512i) s.share[0]), high = _mm512_maskz_mov_epi32(counts[1], (__m512i) s.share[1]);
    const uint32_t largest = _mm512_reduce_max_epu32(_mm512_max_epu32(low, high));
    memcpy(&s.largest, &largest, sizeof(largest));
    const float inverse = largest ? 1.0f/s.largest : 0.0f;
    s.share[0] *= inverse;
    s.share[1] *= inverse;
    return s;
}

// The weights of a tile for HEADS query heads, without the scales of V: what cells do not count, all as shares of SUM_MAX, and the unit.
template<int HEADS>
struct tile_weights {
    vf share[HEADS][2];
    __mmask16 counts[2] = {};
    alignas(64) float unit[LANES]; // of head i % 4

    explicit tile_weights(const float (*p)[SUM_ROWS]) {
        vf sum[4] = {};
        for (int h = 0; h < HEADS; ++h) {
            share[h][0] = load(p[h]);
            share[h][1] = load(p[h] + LANES);
            sum[h] = share[h][0] + share[h][1];
            for (int i = 0; i < 2; ++i) { // a hidden cell may hold anything
                counts[i] |= _mm512_cmp_ps_mask((__m512) share[h][i], _mm512_setzero_ps(), _CMP_NEQ_UQ);
            }
        }
        const vf all = sums_of_four(sum);
        alignas(64) float per_unit[LANES];
        store(per_unit, all > 1e-30f ? SUM_MAX/all : vf{}); // below, the unit would vanish, and so does the sum
        store(unit, all*(1.0f/SUM_MAX));
        for (int h = 0; h < HEADS; ++h) {
            share[h][0] *= per_unit[h];
            share[h][1] *= per_unit[h];
        }
    }
};

// digit[h][i]: the bytes of the weights of cells 4*i .. 4*i + 3, the highest ones first, then 0
template<int HEADS>
inline void write_weights(const tile_weights<HEADS> & w, const block_scales & scales, int32_t (*digit)[SUM_ROWS/4][4]) {
    const __m512i by_digit = _mm512_set4_epi32(0x0f0b0703, 0x0c080400, 0x0d090501, 0x0e0a0602);
    for (int h = 0; h < HEADS; ++h) {
        for (int i = 0; i < 2; ++i) {
            const __m512i fixed = _mm512_cvtps_epi32((__m512) (w.share[h][i]*scales.share[i]));
            _mm512_store_si512(digit[h][i*LANES/4], _mm512_shuffle_epi8(fixed, by_digit));
        }
    }
}

// A block of 4 rows -> the bytes of each dimension beside each other: dimensions 0-7 and 16-23 in out[0], 8-15 and 24-31 in out[1]
inline void turn_rows(const char * const * row, int byte, __m512i * out) {
    alignas(64) static constexpr uint16_t PAIRS[32] = { 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,
                                                        8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31 };
    const auto two = [&](int i, int j) {
        const __m256i low = _mm256_loadu_si256((const __m256i *) (row[i] + byte)), high = _mm256_loadu_si256((const __m256i *) (row[j] + byte));
        return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
    };
    const __m512i even = two(0, 2), odd = two(1, 3), pairs = _mm512_load_si512(PAIRS);
    out[0] = _mm512_permutexvar_epi16(pairs, _mm512_unpacklo_epi8(even, odd));
    out[1] = _mm512_permutexvar_epi16(pairs, _mm512_unpackhi_epi8(even, odd));
}

// sum += the products of bytes, 4 to a lane. Around the intrinsic, GCC 12 copies each sum twice and runs out of registers.
inline void add_products(__m512i & sum, __m512i without_sign, __m512i with_sign) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(without_sign), "v"(with_sign));
}

// acc[h][at..] += the weighted sum of a block of SUM_ROWS rows; unit: [HEADS], fetch: called for every 4 rows
template<int HEADS, class FETCH>
inline void sum_bytes(const int32_t (*digit)[SUM_ROWS/4][4], const char * const * row, int byte, const float * unit, int at,
                      float * const * acc, FETCH & fetch) {
    __m512i sum[HEADS][SUM_DIGITS][2];
    for (int h = 0; h < HEADS; ++h) {
        for (int d = 0; d < SUM_DIGITS; ++d) {
            sum[h][d][0] = sum[h][d][1] = _mm512_setzero_si512();
        }
    }
    for (int i = 0; i < SUM_ROWS/4; ++i) {
        __m512i v[2];
        turn_rows(row + 4*i, byte, v);
        fetch();
        for (int h = 0; h < HEADS; ++h) {
            for (int d = 0; d < SUM_DIGITS; ++d) {
                const __m512i weight = _mm512_set1_epi32(digit[h][i][d]);
                add_products(sum[h][d][0], weight, v[0]);
                add_products(sum[h][d][1], weight, v[1]);
            }
        }
    }
    for (int h = 0; h < HEADS; ++h) {
        __m512 half[2];
        for (int i = 0; i < 2; ++i) {
            const __m512i all = _mm512_add_epi32(_mm512_slli_epi32(sum[h][0][i], 8), sum[h][1][i]);
            half[i] = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(all, 8), sum[h][2][i]));
        }
        float * to = acc[h] + at;
        store(to,         load(to)         + unit[h]*(vf) _mm512_shuffle_f32x4(half[0], half[1], 0x44));
        store(to + LANES, load(to + LANES) + unit[h]*(vf) _mm512_shuffle_f32x4(half[0], half[1], 0xee));
    }
}

} // namespace
