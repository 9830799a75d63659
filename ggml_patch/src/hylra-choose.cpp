// Chooses the top-k cells of a row of scores: forced cells, then the best of the rest. The twin is choose_ref in hylra-ref.cpp.
#include "hylra-attn.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

namespace {

// Radix select works on the bits of the scores, which order like the values because visible scores are >= 0

constexpr int RADIX_BITS[3]  = { 11, 11, 10 };
constexpr int RADIX_SHIFT[3] = { 21, 10, 0 };

uint32_t score_key(float score) {
    uint32_t bits;
    memcpy(&bits, &score, sizeof(bits));
    return bits;
}

// The key of the n-th largest visible score (n >= 1) and, in `n`, how many scores with this very key are to be taken.
uint32_t nth_key(const float * scores, int n_kv, int & n) {
    uint32_t prefix = 0, mask = 0;
    for (int pass = 0; pass < 3; ++pass) {
        int count[1 << 11] = {};
        const int shift = RADIX_SHIFT[pass], digits = 1 << RADIX_BITS[pass];
        for (int cell = 0; cell < n_kv; ++cell) {
            const uint32_t key = score_key(scores[cell]);
            if (!(key >> 31) && (key & mask) == prefix) {
                ++count[(key >> shift) & (digits - 1)];
            }
        }
        int digit = digits - 1;
        for (; digit > 0 && count[digit] < n; --digit) {
            n -= count[digit];
        }
        prefix |= uint32_t(digit) << shift;
        mask   |= uint32_t(digits - 1) << shift;
    }
    return prefix;
}

int choose_cells(const float * scores, int n_kv, int top_k, int32_t * out) {
    int n_visible = 0;
    for (int cell = 0; cell < n_kv; ++cell) {
        n_visible += scores[cell] >= 0.0f;
    }
    int n_tie = std::min(top_k, n_visible);
    const uint32_t threshold = n_tie == 0 ? 0 : nth_key(scores, n_kv, n_tie);
    int n = 0;
    for (int cell = 0; cell < n_kv && n < top_k; ++cell) {
        const uint32_t key = score_key(scores[cell]);
        if (key >> 31) {
            continue;
        }
        if (key > threshold || (key == threshold && n_tie-- > 0)) {
            out[n++] = cell;
        }
    }
    return n;
}

int choose_blocks(const float * scores, int n_kv, int top_k, int block_size, int32_t * out) {
    const int n_block = (n_kv + block_size - 1)/block_size;
    std::vector<double>  mass(n_block, 0.0);
    std::vector<int32_t> size(n_block, 0), order(n_block);
    std::vector<bool>    taken(n_block, false);
    int room = top_k;
    for (int cell = 0; cell < n_kv; ++cell) {
        const bool forced = scores[cell] >= HYLRA_SCORE_FORCED;
        room -= forced;
        if (!forced && scores[cell] >= 0.0f) {
            mass[cell/block_size] += scores[cell];
            size[cell/block_size] += 1;
        }
    }
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return mass[a] > mass[b]; });
    for (size_t i = 0; i < order.size() && size[order[i]] <= room; ++i) {
        taken[order[i]] = true;
        room -= size[order[i]];
    }
    int n = 0;
    for (int cell = 0; cell < n_kv; ++cell) {
        if (scores[cell] >= HYLRA_SCORE_FORCED || (scores[cell] >= 0.0f && taken[cell/block_size])) {
            out[n++] = cell;
        }
    }
    return n;
}

} // namespace

int hylra_choose(const float * scores, int n_kv, int top_k, int block_size, int32_t * out) {
    const int n = block_size > 1 ? choose_blocks(scores, n_kv, top_k, block_size, out)
                                 : choose_cells (scores, n_kv, top_k, out);
    std::fill(out + n, out + top_k, -1);
    return n;
}

