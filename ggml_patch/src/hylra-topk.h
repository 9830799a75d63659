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

// Which lanes of a vector are taken cannot be foreseen, and a branch for each costs more than all else. So they are packed in a register
// and written as a whole vector where there is room for one: mask_of and append, for instruction sets that have the means.
#if defined(__AVX512F__)
inline uint32_t mask_of(vi yes) { return _mm512_movepi32_mask((__m512i) yes); }

// Returns how many. vpcompressd straight to memory is microcode on Zen 4, where it took most of the time of a choice.
inline int append(void * out, uint32_t mask, vi values) {
    _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(__mmask16(mask), (__m512i) values));
    return __builtin_popcount(mask);
}
#elif defined(__AVX2__)
inline uint32_t mask_of(vi yes) { return uint32_t(_mm256_movemask_ps((__m256) yes)); }

// The lanes of a mask, a byte each, those that are set first.
struct packing {
    uint64_t lanes[1 << LANES] = {};

    constexpr packing() {
        for (int mask = 0; mask < 1 << LANES; ++mask) {
            for (int i = 0, n = 0; i < LANES; ++i) {
                lanes[mask] |= mask >> i & 1 ? uint64_t(i) << 8*n++ : 0;
            }
        }
    }
};

inline int append(void * out, uint32_t mask, vi values) {
    static constexpr packing PACKING;
    const __m256i lanes = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(int64_t(PACKING.lanes[mask])));
    _mm256_storeu_si256((__m256i *) out, _mm256_permutevar8x32_epi32((__m256i) values, lanes));
    return __builtin_popcount(mask);
}
#endif

// Copies the scores of a bracket; -1 if there are more than fit.
int gather(const float * scores, int n_kv, bracket b, float * out, int room) {
    int n = 0, cell = 0;
#if defined(__AVX2__)
    for (; cell + LANES <= n_kv && n + LANES <= room; cell += LANES) {
        const vi key = load_keys(scores + cell);
        n += append(out + n, mask_of((key >= b.low) & (key < b.high)), key);
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

// The first n of the bits that are set
inline uint32_t first_bits(uint32_t mask, int n) {
    uint32_t rest = mask;
    for (; n > 0 && rest; --n) {
        rest &= rest - 1;
    }
    return mask ^ rest;
}

// The cells above the threshold and the first n_tie at it, ascending: n_all, and no more where scores are NaN, which lie above every threshold.
int collect(const float * scores, int n_kv, threshold t, int n_all, int32_t * out) {
    int n = 0, cell = 0;
#if defined(__AVX2__)
    vi cells;
    for (int i = 0; i < LANES; ++i) {
        cells[i] = i;
    }
    for (; cell + LANES <= n_kv && n + LANES <= n_all; cell += LANES, cells += LANES) {
        const vi key = load_keys(scores + cell);
        const uint32_t tied = first_bits(mask_of(key == t.key), t.n_tie);
        t.n_tie -= __builtin_popcount(tied);
        n += append(out + n, mask_of(key > t.key) | tied, cells);
    }
#endif
    for (; cell < n_kv && n < n_all; ++cell) {
        const int32_t found = key_of(scores[cell]);
        if (found > t.key || (found == t.key && t.n_tie-- > 0)) {
            out[n++] = cell;
        }
    }
    return n;
}

int choose_cells(const float * scores, int n_kv, int top_k, int32_t * out) {
    const int n = std::min(top_k, count_from(scores, n_kv, 0));
    return n == 0 ? 0 : collect(scores, n_kv, threshold_of(scores, n_kv, n), n, out);
}

} // namespace
