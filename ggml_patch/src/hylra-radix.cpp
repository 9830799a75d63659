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

// The smallest key that is chosen: all from there up fit into `room`.
uint64_t threshold(const std::vector<item> & items, int room) {
    uint64_t prefix = 0;
    for (int level = 0; level < HYLRA_RADIX_LEVELS; ++level) {
        std::vector<int> weights(hylra_radix_bins(level), 0);
        for (const item & it : items) {
            if (hylra_radix_prefix(it.key, level) == prefix) {
                weights[hylra_radix_digit(it.key, level)] += it.weight;
            }
        }
        int bin = int(weights.size()) - 1;
        while (bin >= 0 && weights[bin] <= room) {
            room -= weights[bin--];
        }
        if (bin < 0) {
            return 0; // there is room for all: level 0 only
        }
        prefix = hylra_radix_extend(prefix, level, bin);
    }
    return prefix + 1; // the item that does not fit is left out
}

} // namespace

int hylra_choose_radix(const float * scores, int n_kv, int top_k, int block_size, int32_t * out) {
    block_size = std::max(block_size, 1);
    int room = top_k;
    for (int cell = 0; cell < n_kv && block_size > 1; ++cell) {
        room -= scores[cell] >= HYLRA_SCORE_FORCED;
    }
    const std::vector<item> items = items_of(scores, n_kv, block_size);
    const uint64_t least = threshold(items, std::max(room, 0));
    std::vector<char> chosen(n_kv, 0);
    for (const item & it : items) {
        const int first = int(0xFFFFFFFFu - uint32_t(it.key))*block_size;
        std::fill(chosen.begin() + first, chosen.begin() + std::min(first + block_size, n_kv), char(it.key >= least));
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
