// From the partial results of chunks and the weights of tiles to attention mass per cell. Included by hylra-kernels.cpp only; the twins
// are hylra_normaliser in hylra-cpu.cpp and pool_ref in hylra-ref.cpp.
#pragma once

#include "hylra-attn.h"
#include "hylra-mask.h"
#include "hylra-rows.h"

#include <algorithm>

namespace {

constexpr int MAX_CHUNKS = HYLRA_MAX_CHUNKS;
constexpr int POOL_HEADS = 16; // heads of a group whose sums stay in registers

// What a head's chunks weigh in its softmax: out[chunk] = exp(max of the chunk - max of all). out: [MAX_CHUNKS]
hylra_norm chunk_weights(const hylra_job & job, int stream, int token, int head, float * out) {
    alignas(64) float sum[MAX_CHUNKS] = {};
    const int n_v = hylra_padded(job.attn.n_embd_v);
    const float * sinks = (const float *) job.attn.sinks;
    float max = sinks ? sinks[head] : -INFINITY;
    std::fill(out, out + MAX_CHUNKS, -INFINITY);
    for (int chunk = 0; chunk < job.n_chunk; ++chunk) {
        const float * state = hylra_partial(job, chunk, stream, token, head) + n_v;
        out[chunk] = state[0];
        sum[chunk] = state[1];
        max = std::max(max, state[0]);
    }
    if (max == -INFINITY) { // a row without visible cells gives zeros, as in llama.cpp
        std::fill(out, out + MAX_CHUNKS, 0.0f);
        return { 0.0f, 0.0f };
    }
    vf total = vf{};
    for (int i = 0; i < MAX_CHUNKS; i += LANES) {
        const vf w = vexp(load(out + i) - max);
        store(out + i, w);
        total += w*load(sum + i);
    }
    return { max, 1.0f/(hsum(total) + (sinks ? expf(sinks[head] - max) : 0.0f)) };
}

// Adds up the weights of one group of heads, or of a part of it, for the cells of a list.
struct pooler {
    const hylra_job & job;
    const int stream, token, head, n; // head: the first of n <= POOL_HEADS
    const int n_tile;
    hylra_norm norm[POOL_HEADS];

    // share: what a head counts in the mean
    pooler(const hylra_job & job, int stream, int token, int head, int n, float share) : job(job), stream(stream), token(token),
        head(head), n(n), n_tile(hylra_n_tile(job.attn.n_kv)) {
        alignas(64) float unused[MAX_CHUNKS];
        for (int h = 0; h < n; ++h) {
            norm[h] = chunk_weights(job, stream, token, head + h, unused);
            norm[h].inv_sum *= share;
        }
    }

    // What the weights of LANES tiles are to be multiplied with; one exp for all of them. out: [n, LANES]
    void factors(int first, float (*out)[LANES]) const {
        for (int h = 0; h < n; ++h) {
            const float * peaks = hylra_peaks(job, stream, token, head + h) + first;
            alignas(64) float peak[LANES];
            for (int i = 0; i < LANES; ++i) {
                peak[i] = first + i < n_tile ? peaks[i] : -INFINITY;
            }
            store(out[h], vexp(load(peak) - norm[h].max)*norm[h].inv_sum);
        }
    }

    // out: [HYLRA_TILE_CELLS], += if `add`
    void tile(int tile, const float (*factor)[LANES], bool add, float * out) const {
        const float * w = hylra_weights(job, stream, token, head, tile);
        vf sum[HYLRA_TILE_CELLS/LANES];
        for (int i = 0; i < HYLRA_TILE_CELLS/LANES; ++i) {
            sum[i] = add ? load(out + i*LANES) : vf{};
        }
        for (int h = 0; h < n; ++h, w += HYLRA_TILE_CELLS) {
            const vf f = splat(factor[h][tile%LANES]);
            for (int i = 0; i < HYLRA_TILE_CELLS/LANES; ++i) {
                sum[i] += f*load(w + i*LANES);
            }
        }
        for (int i = 0; i < HYLRA_TILE_CELLS/LANES; ++i) {
            store(out + i*LANES, vmax(sum[i], vf{})); // 0 instead of a NaN, of a model that overflows: by its bits it would stand above all
        }
    }

    // scores: [n_kv]; cell_begin: the first of a tile
    void add_to(float * scores, int cell_begin, int cell_end, bool add) const {
        alignas(64) float factor[POOL_HEADS][LANES];
        for (int cell = cell_begin; cell < cell_end; cell += HYLRA_TILE_CELLS) {
            const int t = cell/HYLRA_TILE_CELLS;
            if (cell == cell_begin || t%LANES == 0) {
                factors(t/LANES*LANES, factor);
            }
            if (cell + HYLRA_TILE_CELLS <= cell_end) {
                tile(t, factor, add, scores + cell);
                continue;
            }
            alignas(64) float last[HYLRA_TILE_CELLS]; // scores end where the cells end
            std::copy(scores + cell, scores + cell_end, last);
            tile(t, factor, add, last);
            std::copy(last, last + cell_end - cell, scores + cell);
        }
    }
};

void mark_hidden(const ggml_fp16_t * mask, int cell, int cell_end, float * scores) {
    for (; cell + LANES <= cell_end; cell += LANES) {
        const vf hidden = splat(HYLRA_SCORE_HIDDEN);
        store(scores + cell, load_f16(mask + cell) == -INFINITY ? hidden : load(scores + cell));
    }
    for (; cell < cell_end; ++cell) {
        scores[cell] = mask[cell] == HYLRA_MASK_HIDDEN ? HYLRA_SCORE_HIDDEN : scores[cell];
    }
}

void pool(const hylra_job & job, int stream, int token, int list, int lists, int cell_begin, int cell_end, float * scores) {
    const int n_head = job.attn.n_head/lists, group = job.attn.n_head/job.attn.n_head_kv, begin = list*n_head, end = begin + n_head;
    for (int head = begin, n; head < end; head += n) { // weights of one group lie behind each other
        n = std::min({ POOL_HEADS, group - head%group, end - head });
        pooler(job, stream, token, head, n, 1.0f/n_head).add_to(scores, cell_begin, cell_end, head != begin);
    }
    if (const ggml_fp16_t * mask = hylra_mask_row(job.attn, stream, token)) {
        mark_hidden(mask, cell_begin, cell_end, scores);
    }
}

} // namespace
