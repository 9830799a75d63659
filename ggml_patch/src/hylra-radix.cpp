// Serial twin of the CUDA selection: the same narrowing by digits, so that a machine without a GPU can test its arithmetic.
#include "hylra-radix.h"

#include "hylra-attn.h"

#include <algorithm>
#include <vector>

namespace {

struct item { uint64_t key; int weight; };

std::vector<item> items_of(const float * scores, int n_kv, int block_size) {
    std::vector<item> items;
    for (int first = 0; first < n_kv; first += block_size) {
        double mass = 0.0;
        int n = 0;
        for (int cell = first; cell < std::min(first + block_size, n_kv); ++cell) {
            const bool counts = scores[cell] >= 0.0f && (block_size == 1 || scores[cell] < HYLRA_SCORE_FORCED);
            mass += counts ? scores[cell] : 0.0;
            n    += counts;
        }
        if (n > 0) {
            items.push_back({ hylra_radix_key(float(mass), uint32_t(first/block_size)), n });
        }
    }
    return items;
}

// Items that compare greater are chosen; in the end the bound is the one key that does not fit, or admits all.
hylra_radix_bound last_bound(const std::vector<item> & items, int room, bool & all) {
    hylra_radix_bound bound = {};
    for (int level = 0; level < HYLRA_RADIX_LEVELS; ++level) {
        std::vector<int> weights(hylra_radix_bins(level), 0);
        for (const item & it : items) {
            if (hylra_radix_compare(it.key, bound) == 0) {
                weights[hylra_radix_digit(it.key, level)] += it.weight;
            }
        }
        int bin = int(weights.size()) - 1;
        while (bin >= 0 && weights[bin] <= room) {
            room -= weights[bin--];
        }
        all = bin < 0; // on the first level, or never
        if (all) {
            break;
        }
        bound = hylra_radix_enter(bound, bin);
    }
    return bound;
}

} // namespace

int hylra_choose_radix(const float * scores, int n_kv, int top_k, int block_size, int32_t * out) {
    block_size = std::max(block_size, 1);
    int room = top_k;
    for (int cell = 0; cell < n_kv && block_size > 1; ++cell) {
        room -= scores[cell] >= HYLRA_SCORE_FORCED;
    }
    const std::vector<item> items = items_of(scores, n_kv, block_size);
    bool all = false;
    const hylra_radix_bound bound = last_bound(items, std::max(room, 0), all);
    std::vector<char> chosen(n_kv, 0);
    for (const item & it : items) {
        const int first = int(0xFFFFFFFFu - uint32_t(it.key))*block_size;
        std::fill(chosen.begin() + first, chosen.begin() + std::min(first + block_size, n_kv), char(all || hylra_radix_compare(it.key, bound) > 0));
    }
    int n = 0;
    for (int cell = 0; cell < n_kv; ++cell) {
        if (scores[cell] >= 0.0f && (chosen[cell] || (block_size > 1 && scores[cell] >= HYLRA_SCORE_FORCED))) {
            out[n++] = cell;
        }
    }
    std::fill(out + n, out + top_k, -1);
    return n;
}
