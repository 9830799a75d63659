// Top-k without sorting: keys are narrowed digit by digit until few candidates are left. The arithmetic that the CUDA kernel
// and its serial twin (hylra-radix.cpp, tested without a GPU) share.
//
// The key of an item is its score, then the smaller index: keys are unique, so ties end like everything else. Scores are not
// negative, hence their bits are ordered like their values.
#pragma once

#include "hylra-cuda-plan.h"

#include <cstring>

constexpr int HYLRA_RADIX_LEVELS = 6;

// Digits from the top: 31 bits of the score (11, 10, 10), 32 of the index (11, 11, 10).
HYLRA_HD inline int hylra_radix_shift(int level) {
    return level == 0 ? 52 : level == 1 ? 42 : level == 2 ? 32 : level == 3 ? 21 : level == 4 ? 10 : 0;
}

HYLRA_HD inline int hylra_radix_bins(int level) {
    return level == 0 || level == 3 || level == 4 ? 2048 : 1024;
}

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

HYLRA_HD inline int hylra_radix_digit(uint64_t key, int level) {
    return int(key >> hylra_radix_shift(level)) & (hylra_radix_bins(level) - 1);
}

// All digits before `level`
HYLRA_HD inline uint64_t hylra_radix_prefix(uint64_t key, int level) {
    return level == 0 ? 0 : key >> hylra_radix_shift(level - 1);
}

HYLRA_HD inline uint64_t hylra_radix_extend(uint64_t prefix, int level, int digit) {
    return level == 0 ? uint64_t(digit) : prefix << (hylra_radix_shift(level - 1) - hylra_radix_shift(level)) | uint64_t(digit);
}

// Chooses like hylra_kernels::choose.
int hylra_choose_radix(const float * scores, int n_kv, int top_k, int block_size, int32_t * out);
