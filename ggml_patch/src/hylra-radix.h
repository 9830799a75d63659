// Top-k without sorting: keys are narrowed digit by digit until few candidates are left. The arithmetic that the CUDA kernel
// and its serial twin (hylra-radix.cpp, tested without a GPU) share.
//
// The key of an item is its score, then the smaller index: keys are unique, so ties end like everything else. Scores are not
// negative, hence their bits are ordered like their values.
#pragma once

#include "hylra-cuda-plan.h"

#include <cstring>

constexpr int HYLRA_RADIX_LEVELS = 7;
constexpr int HYLRA_RADIX_SCORE_LEVELS = 4; // of them: the first digit and the bits of the score

// The first digit is 64 steps per power of two of the scores from 2^-26 up, where selections end; forced cells share the last.
// The digits after it are bits of the key: 31 of the score (11, 10, 10), 32 of the index (11, 11, 10).
constexpr int HYLRA_RADIX_FIRST_STEPS = 17;                       // bits of a score below a step
constexpr int HYLRA_RADIX_FIRST_BASE  = (127 - 26) << (23 - HYLRA_RADIX_FIRST_STEPS);

HYLRA_HD inline int hylra_radix_shift(int level) {
    return level == 1 ? 52 : level == 2 ? 42 : level == 3 ? 32 : level == 4 ? 21 : level == 5 ? 10 : 0;
}

HYLRA_HD inline int hylra_radix_bins(int level) { return level == 2 || level == 3 || level == 6 ? 1024 : HYLRA_CUDA_BINS; }

HYLRA_HD inline uint32_t hylra_float_bits(float x) {
#if defined(__CUDA_ARCH__)
    return __float_as_uint(x);
#else
    uint32_t bits;
    memcpy(&bits, &x, sizeof(bits));
    return bits;
#endif
}

HYLRA_HD inline uint64_t hylra_radix_key(float score, uint32_t index) {
    return uint64_t(hylra_float_bits(score)) << 32 | (0xFFFFFFFFu - index);
}

HYLRA_HD inline int hylra_radix_first_digit(uint64_t key) {
    const int step = int(key >> (32 + HYLRA_RADIX_FIRST_STEPS)) - HYLRA_RADIX_FIRST_BASE;
    return step < 0 ? 0 : step < HYLRA_CUDA_BINS ? step : HYLRA_CUDA_BINS - 1;
}

HYLRA_HD inline int hylra_radix_digit(uint64_t key, int level) {
    return level == 0 ? hylra_radix_first_digit(key) : int(key >> hylra_radix_shift(level)) & (hylra_radix_bins(level) - 1);
}

// What is known of the least chosen key after some levels: its first digit, and its bits down to the last level's shift.
struct hylra_radix_bound {
    int      n_level; // levels that are decided
    int      first;
    uint64_t bits;
};

HYLRA_HD inline hylra_radix_bound hylra_radix_enter(hylra_radix_bound bound, int digit) {
    const int level = bound.n_level;
    if (level == 0) {
        return { 1, digit, 0 };
    }
    const uint64_t bits = level == 1 ? 0 : bound.bits << (hylra_radix_shift(level - 1) - hylra_radix_shift(level));
    return { level + 1, bound.first, bits | uint64_t(digit) };
}

// Greater: 1, not told apart yet: 0, less: -1
HYLRA_HD inline int hylra_radix_compare(uint64_t key, const hylra_radix_bound & bound) {
    if (bound.n_level == 0) {
        return 0;
    }
    const int first = hylra_radix_first_digit(key);
    if (first != bound.first || bound.n_level == 1) {
        return (first > bound.first) - (first < bound.first);
    }
    const uint64_t bits = key >> hylra_radix_shift(bound.n_level - 1);
    return (bits > bound.bits) - (bits < bound.bits);
}

// Scores whose bits are in [*low, *high) are not told apart by the bound, greater ones are chosen; only while no index digit is decided.
HYLRA_HD inline void hylra_radix_interval(const hylra_radix_bound & bound, int32_t * low, int32_t * high) {
    const int32_t step = 1 << HYLRA_RADIX_FIRST_STEPS, first = (HYLRA_RADIX_FIRST_BASE + bound.first)*step;
    *low  = bound.first == 0 ? 0 : first;
    *high = bound.first == HYLRA_CUDA_BINS - 1 ? 0x7FFFFFFF : first + step;
    if (bound.n_level > 1) {
        const int shift = hylra_radix_shift(bound.n_level - 1) - 32;
        const int32_t begin = int32_t(bound.bits << shift), end = begin + (1 << shift);
        *low  = begin > *low  ? begin : *low;
        *high = end   < *high ? end   : *high;
    }
}

// Chooses like hylra_kernels::choose.
int hylra_choose_radix(const float * scores, int n_kv, int top_k, int block_size, int32_t * out);
