// Chooses the top-k cells of a row of scores. Included by hylra-kernels.cpp only; the twin is choose_ref in hylra-ref.cpp.
#pragma once

#include "hylra-attn.h"
#include "hylra-simd.h"

#include <algorithm>

namespace {

// The bits of a score as an integer: they order like the values, and hidden scores (negative) lie below all others.
inline int32_t key_of(float score) {
    int32_t bits;
    memcpy(&bits, &score, sizeof(bits));
    return bits;
}

inline vi load_keys(const float * scores) { vi v; memcpy(&v, scores, sizeof(v)); return v; }

// How many scores have this key or a larger one.
int count_from(const float * scores, int n_kv, int32_t key) {
    vi count = vi{};
    int cell = 0;
    for (; cell + LANES <= n_kv; cell += LANES) {
        count -= load_keys(scores + cell) >= key;
    }
    int n = 0;
    for (int i = 0; i < LANES; ++i) {
        n += count[i];
    }
    for (; cell < n_kv; ++cell) {
        n += key_of(scores[cell]) >= key;
    }
    return n;
}

// Bisection over keys: each step counts at the speed of the cache, where a histogram takes one step per score.
struct threshold {
    int32_t key; // the n-th largest score has this one
    int n_tie;   // how many scores of this very key are to be taken
};

threshold threshold_of(const float * scores, int n_kv, int n) {
    int32_t low = 0, high = key_of(HYLRA_SCORE_FORCED + 2.0f); // at least n scores from `low` on, fewer than n from `high` on
    int n_high = 0;
    while (high - low > 1) {
        const int32_t middle = low + (high - low)/2;
        const int found = count_from(scores, n_kv, middle);
        if (found == n) {
            return { middle - 1, 0 };
        }
        (found > n ? low : high) = middle;
        n_high = found > n ? n_high : found;
    }
    return { low, n - n_high };
}

// The cells above the threshold and the first n_tie at it, ascending.
int collect(const float * scores, int n_kv, threshold t, int32_t * out) {
    int n = 0, cell = 0;
#if defined(__AVX512F__)
    const __m512i key = _mm512_set1_epi32(t.key), step = _mm512_set1_epi32(LANES);
    __m512i cells = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (; t.n_tie == 0 && cell + LANES <= n_kv; cell += LANES) {
        const __mmask16 above = _mm512_cmpgt_epi32_mask(_mm512_loadu_si512(scores + cell), key);
        _mm512_mask_compressstoreu_epi32(out + n, above, cells);
        n += __builtin_popcount(above);
        cells = _mm512_add_epi32(cells, step);
    }
#endif
    for (; cell < n_kv; ++cell) {
        const int32_t found = key_of(scores[cell]);
        if (found > t.key || (found == t.key && t.n_tie-- > 0)) {
            out[n++] = cell;
        }
    }
    return n;
}

int choose_cells(const float * scores, int n_kv, int top_k, int32_t * out) {
    const int n = std::min(top_k, count_from(scores, n_kv, 0));
    return n == 0 ? 0 : collect(scores, n_kv, threshold_of(scores, n_kv, n), out);
}

} // namespace
