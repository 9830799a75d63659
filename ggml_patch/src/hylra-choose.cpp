// Chooses whole blocks of cells by their summed scores. One for all instruction sets; the twin is choose_ref in hylra-ref.cpp.
#include "hylra-attn.h"

#include <algorithm>
#include <numeric>
#include <vector>

int hylra_choose_blocks(const float * scores, int n_kv, int top_k, int block_size, int32_t * out) {
    // kept by the thread, so that a token allocates nothing
    static thread_local std::vector<double>  mass;
    static thread_local std::vector<int32_t> size, order;
    static thread_local std::vector<char>    taken;
    const int n_block = (n_kv + block_size - 1)/block_size;
    mass.assign(n_block, 0.0);
    size.assign(n_block, 0);
    taken.assign(n_block, 0);
    order.resize(n_block);
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
    // not std::stable_sort, which allocates
    std::sort(order.begin(), order.end(), [&](int a, int b) { return mass[a] != mass[b] ? mass[a] > mass[b] : a < b; });
    for (size_t i = 0; i < order.size() && size[order[i]] <= room; ++i) {
        taken[order[i]] = 1;
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
