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

struct threshold {
    int32_t key; // the n-th largest score has this one
    int n_tie;   // how many scores of this very key are to be taken
};

// At least n scores from `low` on, fewer than n from `high` on.
struct bracket { int32_t low, high; };

constexpr bracket ALL_KEYS = { 0, 0x40800000 }; // 0 to 4, above any forced score

// Bisection over keys: each step counts at the speed of the cache. n_above: scores of the row that are not in `scores` and
// larger than all of them.
threshold bisect(const float * scores, int n_scores, int n, bracket b, int n_above) {
    int n_high = 0;
    while (b.high - b.low > 1) {
        const int32_t middle = b.low + (b.high - b.low)/2;
        const int found = n_above + count_from(scores, n_scores, middle);
        if (found == n) {
            return { middle - 1, 0 };
        }
        (found > n ? b.low : b.high) = middle;
        n_high = found > n ? n_high : found;
    }
    return { b.low, n - std::max(n_high, n_above) };
}

// Copies the scores of a bracket; -1 if there are more than fit.
int gather(const float * scores, int n_kv, bracket b, float * out, int room) {
    int n = 0, cell = 0;
#if defined(__AVX512F__)
    const __m512i low = _mm512_set1_epi32(b.low), high = _mm512_set1_epi32(b.high);
    for (; cell + LANES <= n_kv && n + LANES <= room; cell += LANES) {
        const __m512i key = _mm512_loadu_si512(scores + cell);
        const __mmask16 inside = _mm512_cmpge_epi32_mask(key, low) & _mm512_cmplt_epi32_mask(key, high);
        _mm512_mask_compressstoreu_epi32(out + n, inside, key);
        n += __builtin_popcount(inside);
    }
#endif
    for (; cell < n_kv; ++cell) {
        const int32_t key = key_of(scores[cell]);
        if (key >= b.low && key < b.high) {
            if (n == room) {
                return -1;
            }
            out[n++] = scores[cell];
        }
    }
    return n;
}

constexpr int SAMPLE = 1024;

// A guess from every (n_kv/SAMPLE)-th score, four standard errors of its rank wide on both sides.
bracket guess(const float * scores, int n_kv, int n) {
    alignas(64) float sample[SAMPLE];
    for (int i = 0; i < SAMPLE; ++i) {
        sample[i] = scores[size_t(i)*n_kv/SAMPLE];
    }
    const float rank = float(n)*SAMPLE/n_kv, margin = 4.0f*sqrtf(rank) + 2.0f;
    const int below = int(rank + margin), above = int(rank - margin), visible = count_from(sample, SAMPLE, 0);
    return { below < visible ? bisect(sample, SAMPLE, below, ALL_KEYS, 0).key : ALL_KEYS.low,
             above > 0 ? bisect(sample, SAMPLE, above, ALL_KEYS, 0).key + 1 : ALL_KEYS.high };
}

// One list of a layer is chosen by one thread while the others wait, so a long row is narrowed down first: three passes over
// it instead of some twenty.
threshold threshold_of(const float * scores, int n_kv, int n) {
    if (n_kv >= 4*SAMPLE) {
        float room[2*SAMPLE*4];
        const bracket b = guess(scores, n_kv, n);
        const int n_above = count_from(scores, n_kv, b.high);
        const int n_inside = n_above < n ? gather(scores, n_kv, b, room, int(sizeof(room)/sizeof(room[0]))) : -1;
        if (n_inside >= 0 && n_above + n_inside >= n) {
            return bisect(room, n_inside, n, b, n_above);
        }
    }
    return bisect(scores, n_kv, n, ALL_KEYS, 0);
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
