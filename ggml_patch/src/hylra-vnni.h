// Dot products of Q8_0 and Q4_0 K rows in whole numbers, by VNNI. Included by hylra-tile.h for the instruction sets that have it.
//
// K stays in bytes: vpdpbusd multiplies 64 of them with bytes of q, where a multiplication of F32 takes 16 numbers. One byte of q would
// lose what sums of F32 keep, so q is fixed-point numbers in digits of 8, 7 and 7 bits, of a unit as small as 32 bits allow for the sum of a
// block, which is exact. That is 20 bits of its largest number and up to 22 if the others are smaller; Q8_0 has left 8 of K.
//
// A lane is a cell: the bytes of 16 rows are turned for each pass of query heads. Then no sum goes across lanes, and one conversion to
// F32 and one multiplication with the scale serve 16 cells; left in rows, each cell would need both for each block.
#pragma once

#include "hylra-rows.h"

#include <algorithm>

namespace {

constexpr int BLOCK      = 32; // values with one scale
constexpr int QUADS      = BLOCK/4;
constexpr int DIGITS     = 3;
constexpr int DIGIT_BITS = 7;
constexpr int FIXED_MAX  = (1 << 21) - 1; // the highest digit has 8 bits

// 32 values of q, in the room of their F32: digit[d][i] holds the digits of values 4*i .. 4*i + 3, the highest digits first.
struct query_block {
    int32_t digit[DIGITS][QUADS];
    int32_t offset; // what the unsigned bytes of K add to the sum, negative
    float   unit;
    float   unused[BLOCK - DIGITS*QUADS - 2];
};
static_assert(sizeof(query_block) == BLOCK*sizeof(float), "a query takes no more room than in F32");

// The digits of 16 fixed-point numbers; the highest one has the sign.
inline void write_digits(__m512i x, query_block & out, int quad) {
    for (int d = DIGITS - 1; d >= 0; --d) {
        const __m512i digit = d == 0 ? x : _mm512_and_si512(x, _mm512_set1_epi32((1 << DIGIT_BITS) - 1));
        _mm_storeu_si128((__m128i *) &out.digit[d][quad], _mm512_cvtepi32_epi8(digit));
        x = _mm512_srai_epi32(x, DIGIT_BITS);
    }
}

// LANES values of q as whole numbers of its unit; what is not finite as 0, so that sums stay in bounds
inline __m512i fixed_point(const float * q, float per_unit) {
    const vf x = load(q)*per_unit;
    return _mm512_cvtps_epi32((__m512) (x == x ? x : vf{}));
}

inline vf vabs(vf x) { return vmax(x, -x); }

// q: [n] -> out: [n/BLOCK] query blocks, all of one unit. If a number or the sum is not finite, neither is the unit, and every logit
// becomes NaN. zero: what stands for 0 in the bytes of K, and the farthest from 0 that they reach
void pack_query(const float * q, int n, int zero, float * out) {
    vf largest = vf{}, widest = vf{}, nan_or_0 = vf{}; // widest: its sum is at least that of any block
    for (int i = 0; i < n; i += BLOCK) {
        const vf low = vabs(load(q + i)), high = vabs(load(q + i + LANES));
        largest   = vmax(largest, vmax(low, high));
        widest    = vmax(widest, low + high);
        nan_or_0 += (low + high)*0.0f;
    }
    const float max = hmax(largest), sum = hsum(widest + nan_or_0), nan = sum*0.0f; // nan: or 0, if all is finite
    const float most = float(INT32_MAX/zero - BLOCK); // BLOCK: for rounding
    const bool  any  = max > 1e-30f; // below, the unit would vanish, and so do the logits
    const float per_unit = any && nan == 0.0f ? std::min(FIXED_MAX/max, most/sum) : 0.0f;
    const float unit     = any ? 1.0f/per_unit : nan;
    for (int i = 0; i < n; i += BLOCK) {
        query_block & to = ((query_block *) out)[i/BLOCK];
        const __m512i low = fixed_point(q + i, per_unit), high = fixed_point(q + i + LANES, per_unit);
        write_digits(low, to, 0);
        write_digits(high, to, QUADS/2);
        to.offset = -zero*_mm512_reduce_add_epi32(_mm512_add_epi32(low, high));
        to.unit   = unit;
    }
}

// A quad is 4 bytes. In each of the 4 lanes of 128 bits, a[i] holds 4 quads of a row -> out[quad] holds that quad of the 4 rows.
inline void turn_quads(const __m512i * a, __m512i * out) {
    const __m512i low01 = _mm512_unpacklo_epi32(a[0], a[1]), high01 = _mm512_unpackhi_epi32(a[0], a[1]);
    const __m512i low23 = _mm512_unpacklo_epi32(a[2], a[3]), high23 = _mm512_unpackhi_epi32(a[2], a[3]);
    out[0] = _mm512_unpacklo_epi64(low01, low23);
    out[1] = _mm512_unpackhi_epi64(low01, low23);
    out[2] = _mm512_unpacklo_epi64(high01, high23);
    out[3] = _mm512_unpackhi_epi64(high01, high23);
}

template<int... I>
inline vf row_scales(const char * const * row, int byte, std::integer_sequence<int, I...>) {
    typedef uint16_t vh __attribute__((vector_size(LANES*sizeof(uint16_t))));
    const auto half = [&](int i) { uint16_t h; memcpy(&h, row[i] + byte, sizeof(h)); return h; };
    return (vf) _mm512_cvtph_ps((__m256i) vh{ half(I)... });
}

// The scales of a block of LANES rows.
inline vf row_scales(const char * const * row, int byte) { return row_scales(row, byte, std::make_integer_sequence<int, LANES>{}); }

// Readers of one block of 16 rows: out[i] are values 4*i .. 4*i + 3 of each row, as bytes without a sign.
struct bytes_q8_0 {
    static constexpr int BYTES = 34, ZERO = 128;
    static void read(const char * const * row, int byte, __m512i * out) {
        __m512i a[8], turned[8];
        for (int i = 0; i < 8; ++i) { // a row fills two lanes; with row i goes row i + 4, so that they come out in order below
            const char * const * from = row + i/4*8 + i%4;
            const __m256i low  = _mm256_loadu_si256((const __m256i *) (from[0] + byte));
            const __m256i high = _mm256_loadu_si256((const __m256i *) (from[4] + byte));
            a[i] = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
        }
        turn_quads(a, turned);
        turn_quads(a + 4, turned + 4);
        for (int i = 0; i < 4; ++i) { // in turned, lanes of quad i and of quad i + 4 alternate
            const __m512i even = _mm512_shuffle_i32x4(turned[i], turned[i + 4], 0x88);
            const __m512i odd  = _mm512_shuffle_i32x4(turned[i], turned[i + 4], 0xdd);
            out[i]     = _mm512_xor_si512(even, _mm512_set1_epi8(-128));
            out[i + 4] = _mm512_xor_si512(odd,  _mm512_set1_epi8(-128));
        }
    }
};

struct bytes_q4_0 {
    static constexpr int BYTES = 18, ZERO = 8;
    static void read(const char * const * row, int byte, __m512i * out) {
        __m512i a[4], turned[4];
        const auto at = [&](int i) { return _mm_loadu_si128((const __m128i *) (row[i] + byte)); };
        for (int i = 0; i < 4; ++i) {
            a[i] = _mm512_castsi128_si512(at(i));
            a[i] = _mm512_inserti32x4(a[i], at(i + 4), 1);
            a[i] = _mm512_inserti32x4(a[i], at(i + 8), 2);
            a[i] = _mm512_inserti32x4(a[i], at(i + 12), 3);
        }
        turn_quads(a, turned);
        for (int i = 0; i < 4; ++i) {
            out[i]     = _mm512_and_si512(turned[i], _mm512_set1_epi8(15));
            out[i + 4] = _mm512_and_si512(_mm512_srli_epi16(turned[i], 4), _mm512_set1_epi8(15));
        }
    }
};

// The sum of one query block with a block of LANES rows, k, in units of q and of the scales.
struct fixed_sum {
    __m512i sum[DIGITS]; // one for each digit: chains of dependent instructions stay short enough to fill two multipliers

    explicit fixed_sum(const query_block & q) {
        for (int d = 0; d < DIGITS - 1; ++d) {
            sum[d] = _mm512_setzero_si512();
        }
        sum[DIGITS - 1] = _mm512_set1_epi32(q.offset);
    }

    vf value() const { // parts may leave the 32 bits, the whole does not
        __m512i all = sum[0];
        for (int d = 1; d < DIGITS; ++d) {
            all = _mm512_add_epi32(_mm512_slli_epi32(all, DIGIT_BITS), sum[d]);
        }
        return (vf) _mm512_cvtepi32_ps(all);
    }
};

constexpr int BYTES_ROWS = 2*LANES; // two vectors of rows to each load of a digit: with one, loads were as scarce as multipliers

// s[h][i] = q[h] . row[i] for HEADS queries that pack_query has made and BYTES_ROWS rows of n_block blocks. fetch: called for each
// head and block
template<class BYTES_OF, int HEADS, class FETCH>
void dot_bytes(const float * const * q, const char * const * row, int n_block, float (*s)[BYTES_ROWS], FETCH & fetch) {
    vf low[HEADS] = {}, high[HEADS] = {}; // sums of the first and the last LANES rows
    for (int b = 0; b < n_block; ++b) {
        const int byte = b*BYTES_OF::BYTES;
        __m512i k_low[QUADS], k_high[QUADS];
        BYTES_OF::read(row, byte + 2, k_low);
        BYTES_OF::read(row + LANES, byte + 2, k_high);
        const vf scale_low  = row_scales(row, byte), scale_high = row_scales(row + LANES, byte);
        for (int h = 0; h < HEADS; ++h) {
            const query_block & to = ((const query_block *) q[h])[b];
            fixed_sum sum_low(to), sum_high(to);
            fetch();
            for (int i = 0; i < QUADS; ++i) {
                for (int d = 0; d < DIGITS; ++d) {
                    const __m512i digit = _mm512_set1_epi32(to.digit[d][i]);
                    sum_low.sum[d]  = _mm512_dpbusd_epi32(sum_low.sum[d],  k_low[i],  digit);
                    sum_high.sum[d] = _mm512_dpbusd_epi32(sum_high.sum[d], k_high[i], digit);
                }
            }
            low[h]  += sum_low.value()*scale_low;
            high[h] += sum_high.value()*scale_high;
        }
    }
    for (int h = 0; h < HEADS; ++h) {
        const float unit = ((const query_block *) q[h])->unit;
        store(s[h], low[h]*unit);
        store(s[h] + LANES, high[h]*unit);
    }
}

} // namespace
