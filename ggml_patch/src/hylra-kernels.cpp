// The fast kernels, compiled once per instruction set (HYLRA_ISA: base, avx2, avx512). Cells are the outer loop: a K or V
// row is read once, widened to F32 once, and used for all query heads of its group and all tokens of the batch.
// The plain statement of what each kernel computes is its twin in hylra-ref.cpp.
#include "hylra-attn.h"
#include "hylra-mask.h"
#include "hylra-simd.h"

#include <algorithm>

#ifndef HYLRA_ISA
#    define HYLRA_ISA base
#endif
#define HYLRA_CAT_(a, b) a##b
#define HYLRA_CAT(a, b) HYLRA_CAT_(a, b)
#define HYLRA_STR_(a) #a
#define HYLRA_STR(a) HYLRA_STR_(a)

namespace {

constexpr int TILE = HYLRA_TILE_CELLS;

// One block of up to TILE cells of one stream.
struct block {
    const int32_t * list; // the cells, or nullptr: first, first + 1, ...
    int first;
    int n;

    int cell(int i) const { return list ? list[i] : first + i; }
};

template<void (*ROW)(const void *, float *, int)>
void read_rows(const char * base, size_t row_bytes, const block & b, int n_embd, float * tile) {
    const int stride = hylra_padded(n_embd);
    for (int i = 0; i < b.n; ++i) {
        ROW(base + b.cell(i)*row_bytes, tile + i*stride, n_embd);
    }
}

// tile: [padded(n_embd), TILE] F32; padding dimensions and rows are zero
void read_tile(int type, hylra_to_float_t to_float, const char * base, size_t row_bytes, const block & b, int n_embd, float * tile) {
    const int stride = hylra_padded(n_embd);
    if (stride != n_embd || b.n < TILE) {
        memset(tile, 0, sizeof(float)*TILE*stride);
    }
    switch (type) {
        case GGML_TYPE_F32:  read_rows<row_f32> (base, row_bytes, b, n_embd, tile); return;
        case GGML_TYPE_F16:  read_rows<row_f16> (base, row_bytes, b, n_embd, tile); return;
        case GGML_TYPE_BF16: read_rows<row_bf16>(base, row_bytes, b, n_embd, tile); return;
        case GGML_TYPE_Q8_0: read_rows<row_q8_0>(base, row_bytes, b, n_embd, tile); return;
        case GGML_TYPE_Q4_0: read_rows<row_q4_0>(base, row_bytes, b, n_embd, tile); return;
    }
    for (int i = 0; i < b.n; ++i) {
        to_float(base + b.cell(i)*row_bytes, tile + i*stride, n_embd);
    }
}

// Rows of the next block, so that the gather does not wait for memory on every list entry.
void prefetch_rows(const char * base, size_t row_bytes, const block & b, size_t used_bytes) {
    for (int i = 0; i < b.n; ++i) {
        const char * row = base + b.cell(i)*row_bytes;
        for (size_t byte = 0; byte < used_bytes; byte += 64) {
            __builtin_prefetch(row + byte);
        }
    }
}

// s[h][cell] = q[h] . k[cell] for HEADS query heads; LANES dot products share one horizontal reduction.
template<int HEADS>
void dot_tile(const float * const * q, const float * k_tile, int n, float (*s)[TILE]) {
    constexpr int CELLS = LANES/HEADS;
    for (int cell = 0; cell < TILE; cell += CELLS) {
        vf acc[LANES] = {};
        for (int d = 0; d < n; d += LANES) {
            vf k[CELLS];
            for (int c = 0; c < CELLS; ++c) {
                k[c] = load(k_tile + (cell + c)*n + d);
            }
            for (int h = 0; h < HEADS; ++h) {
                const vf qv = load(q[h] + d);
                for (int c = 0; c < CELLS; ++c) {
                    acc[h*CELLS + c] += qv*k[c];
                }
            }
        }
        const vf sums = hsum_lanes(acc);
        for (int h = 0; h < HEADS; ++h) {
            memcpy(&s[h][cell], (const float *) &sums + h*CELLS, sizeof(float)*CELLS);
        }
    }
}

// acc[h] += sum over cells of p[h][cell] * v[cell], a strip of dimensions at a time so that the sums stay in registers
template<int HEADS>
void accumulate_tile(const float (*p)[TILE], const float * v_tile, int n_cells, int n, float * const * acc) {
    constexpr int STRIP = LANES/HEADS >= 4 ? 4 : LANES/HEADS;
    int d = 0;
    for (; d + STRIP*LANES <= n; d += STRIP*LANES) {
        vf sum[HEADS][STRIP];
        for (int h = 0; h < HEADS; ++h) {
            for (int i = 0; i < STRIP; ++i) {
                sum[h][i] = load(acc[h] + d + i*LANES);
            }
        }
        for (int cell = 0; cell < n_cells; ++cell) {
            vf v[STRIP];
            for (int i = 0; i < STRIP; ++i) {
                v[i] = load(v_tile + cell*n + d + i*LANES);
            }
            for (int h = 0; h < HEADS; ++h) {
                const vf w = splat(p[h][cell]);
                for (int i = 0; i < STRIP; ++i) {
                    sum[h][i] += w*v[i];
                }
            }
        }
        for (int h = 0; h < HEADS; ++h) {
            for (int i = 0; i < STRIP; ++i) {
                store(acc[h] + d + i*LANES, sum[h][i]);
            }
        }
    }
    for (; d < n; d += LANES) {
        for (int h = 0; h < HEADS; ++h) {
            vf sum = load(acc[h] + d);
            for (int cell = 0; cell < n_cells; ++cell) {
                sum += p[h][cell]*load(v_tile + cell*n + d);
            }
            store(acc[h] + d, sum);
        }
    }
}

// dot products -> logits: cap(scale * s) + slope * mask; hidden and absent cells become -inf
void finish_logits(const hylra_attn & a, float slope, const float * bias, float * s) {
    if (a.softcap != 0.0f) {
        for (int i = 0; i < TILE; ++i) {
            s[i] = a.softcap*tanhf(s[i]*a.scale/a.softcap) + slope*bias[i];
        }
        return;
    }
    for (int i = 0; i < TILE; i += LANES) {
        store(s + i, load(s + i)*a.scale + slope*load(bias + i));
    }
}

// Online softmax: raises the running maximum in `state` (max, sum) and turns s into weights exp(s - max).
// Returns the factor for what has been accumulated so far.
float softmax_step(float * s, float * state) {
    vf max_v = load(s);
    for (int i = LANES; i < TILE; i += LANES) {
        max_v = vmax(max_v, load(s + i));
    }
    const float max = std::max(state[0], hmax(max_v));
    const float factor = state[0] == max ? 1.0f : expf(state[0] - max);
    vf sum = vf{};
    for (int i = 0; i < TILE; i += LANES) {
        const vf p = vexp(load(s + i) - max);
        store(s + i, p);
        sum += p;
    }
    state[0] = max;
    state[1] = state[1]*factor + hsum(sum);
    return factor;
}

void scale_row(float * row, int n, float factor) {
    for (int i = 0; i < n; i += LANES) {
        store(row + i, load(row + i)*factor);
    }
}

// What one task works on: a chunk of one stream, and per KV head the tiles of the current block.
struct worker {
    const hylra_job & job;
    const hylra_attn & a;
    const int chunk;
    const int stream;
    const int n_k;   // padded head sizes
    const int n_v;
    const int group; // query heads per KV head

    alignas(64) float k_tile[TILE*HYLRA_MAX_EMBD];
    alignas(64) float v_tile[TILE*HYLRA_MAX_EMBD];
    alignas(64) float q_rows[4*HYLRA_MAX_EMBD];

    worker(const hylra_job & job, int chunk, int stream) : job(job), a(job.attn), chunk(chunk), stream(stream),
        n_k(hylra_padded(a.n_embd_k)), n_v(hylra_padded(a.n_embd_v)), group(a.n_head/a.n_head_kv) {}

    const char * k_head(int head_kv) const { return (const char *) a.k + head_kv*a.k_nb[2] + stream*a.k_nb[3]; }
    const char * v_head(int head_kv) const { return (const char *) a.v + head_kv*a.v_nb[2] + stream*a.v_nb[3]; }

    void read_kv(const block & b, int head_kv) {
        read_tile(a.type_k, job.k_to_float, k_head(head_kv), a.k_nb[1], b, a.n_embd_k, k_tile);
        read_tile(a.type_v, job.v_to_float, v_head(head_kv), a.v_nb[1], b, a.n_embd_v, v_tile);
    }

    // query row padded with zeros; the source itself when it needs no padding
    const float * query(int token, int head, float * room) const {
        const float * q = (const float *) ((const char *) a.q + token*a.q_nb[1] + head*a.q_nb[2] + stream*a.q_nb[3]);
        if (n_k == a.n_embd_k) {
            return q;
        }
        memcpy(room, q, sizeof(float)*a.n_embd_k);
        memset(room + a.n_embd_k, 0, sizeof(float)*(n_k - a.n_embd_k));
        return room;
    }

    // HEADS query heads of one group against the tiles
    template<int HEADS>
    void attend_heads(const block & b, int token, int head, const float * bias) {
        alignas(64) float s[HEADS][TILE];
        const float * q[HEADS];
        float * acc[HEADS];
        for (int h = 0; h < HEADS; ++h) {
            q[h]   = query(token, head + h, q_rows + h*HYLRA_MAX_EMBD);
            acc[h] = hylra_partial(job, chunk, stream, token, head + h);
        }
        dot_tile<HEADS>(q, k_tile, n_k, s);
        for (int h = 0; h < HEADS; ++h) {
            finish_logits(a, hylra_slope(a, head + h), bias, s[h]);
            if (job.logits) {
                memcpy(hylra_logits(job, stream, token, head + h) + b.first, s[h], sizeof(float)*b.n);
            }
            const float factor = softmax_step(s[h], acc[h] + n_v);
            if (factor != 1.0f) {
                scale_row(acc[h], n_v, factor);
            }
        }
        accumulate_tile<HEADS>(s, v_tile, b.n, n_v, acc);
    }

    void attend_group(const block & b, int token, int head_kv, const float * bias) {
        int head = head_kv*group;
        const int end = head + group;
        for (; head + 4 <= end; head += 4) {
            attend_heads<4>(b, token, head, bias);
        }
        for (; head + 2 <= end; head += 2) {
            attend_heads<2>(b, token, head, bias);
        }
        if (head < end) {
            attend_heads<1>(b, token, head, bias);
        }
    }

    // mask values of the block, -inf behind its end; false if no cell is visible
    bool read_bias(const block & b, int token, float * bias) const {
        const ggml_fp16_t * row = hylra_mask_row(a, stream, token);
        ggml_fp16_t mask[TILE];
        bool visible = false;
        for (int i = 0; i < TILE; ++i) {
            mask[i] = i >= b.n ? HYLRA_MASK_HIDDEN : row ? row[b.cell(i)] : ggml_fp16_t(0);
            visible = visible || mask[i] != HYLRA_MASK_HIDDEN;
        }
        row_f16(mask, bias, TILE);
        return visible;
    }

    void clear_partials(int token) {
        for (int head = 0; head < a.n_head; ++head) {
            float * p = hylra_partial(job, chunk, stream, token, head);
            memset(p, 0, sizeof(float)*hylra_partial_floats(a.n_embd_v));
            p[n_v] = -INFINITY;
        }
    }

    void hide_logits(const block & b, int token) {
        for (int head = 0; job.logits && head < a.n_head; ++head) {
            float * l = hylra_logits(job, stream, token, head) + b.first;
            std::fill(l, l + b.n, -INFINITY);
        }
    }

    // one block for the tokens that see any of its cells
    void attend_block(const block & b) {
        alignas(64) float bias[HYLRA_MAX_TOKENS][TILE];
        int tokens[HYLRA_MAX_TOKENS];
        int n = 0;
        for (int token = 0; token < a.n_tokens; ++token) {
            if (read_bias(b, token, bias[n])) {
                tokens[n++] = token;
            } else {
                hide_logits(b, token);
            }
        }
        for (int head_kv = 0; n > 0 && head_kv < a.n_head_kv; ++head_kv) {
            read_kv(b, head_kv);
            for (int i = 0; i < n; ++i) {
                attend_group(b, tokens[i], head_kv, bias[i]);
            }
        }
    }

    // all cells of the chunk, all tokens of the stream: a tile is read once for all of them
    void attend_all() {
        const int begin = chunk*job.chunk_cells;
        const int end   = std::min(begin + job.chunk_cells, int(a.n_kv));
        for (int token = 0; token < a.n_tokens; ++token) {
            clear_partials(token);
        }
        for (int cell = begin; cell < end; cell += TILE) {
            attend_block({ nullptr, cell, std::min(TILE, end - cell) });
        }
    }

    // the list entries [begin, end) of one KV head without the padding, which stands at the end of a list
    block list_block(int token, int head_kv, int begin, int end) const {
        const size_t row = (size_t(stream)*a.n_tokens + token)*job.attn.lists + job.head_list[head_kv];
        const int32_t * list = job.cells + row*job.attn.n_cells + begin;
        int n = std::max(0, end - begin);
        while (n > 0 && list[n - 1] < 0) {
            --n;
        }
        return { list, 0, n };
    }

    void attend_list(int token) {
        const int begin = chunk*job.chunk_cells;
        const int end   = std::min(begin + job.chunk_cells, int(job.attn.n_cells));
        const size_t k_bytes = a.k_nb[2], v_bytes = a.v_nb[2];
        alignas(64) float bias[TILE];
        clear_partials(token);
        for (int i = begin; i < end; i += TILE) {
            for (int head_kv = 0; head_kv < a.n_head_kv; ++head_kv) {
                const block b = list_block(token, head_kv, i, std::min(i + TILE, end));
                if (b.n == 0 || !read_bias(b, token, bias)) {
                    continue;
                }
                read_kv(b, head_kv);
                const block next = list_block(token, head_kv, i + TILE, std::min(i + 2*TILE, end));
                prefetch_rows(k_head(head_kv), a.k_nb[1], next, k_bytes);
                prefetch_rows(v_head(head_kv), a.v_nb[1], next, v_bytes);
                attend_group(b, token, head_kv, bias);
            }
        }
    }
};

void attend(const hylra_job & job, int task) {
    const int chunk = task % job.n_chunk;
    const int rest  = task / job.n_chunk;
    if (job.cells) {
        worker(job, chunk, rest/job.attn.n_tokens).attend_list(rest%job.attn.n_tokens);
    } else {
        worker(job, chunk, rest).attend_all();
    }
}

void reduce(const hylra_job & job, int stream, int token, int head, float * out) {
    const int n = job.attn.n_embd_v;
    const int n_v = hylra_padded(n);
    const hylra_norm norm = hylra_normaliser(job, stream, token, head);
    alignas(64) float sum[HYLRA_MAX_EMBD] = {};
    for (int chunk = 0; chunk < job.n_chunk; ++chunk) {
        const float * p = hylra_partial(job, chunk, stream, token, head);
        const float weight = p[n_v] == -INFINITY ? 0.0f : expf(p[n_v] - norm.max)*norm.inv_sum;
        for (int d = 0; weight != 0.0f && d < n_v; d += LANES) {
            store(sum + d, load(sum + d) + weight*load(p + d));
        }
    }
    memcpy(out, sum, sizeof(float)*n);
}

void pool(const hylra_job & job, int stream, int token, int list, int lists, int cell_begin, int cell_end, float * scores) {
    const int n_head = job.attn.n_head/lists;
    std::fill(scores + cell_begin, scores + cell_end, 0.0f);
    for (int head = list*n_head; head < (list + 1)*n_head; ++head) {
        const hylra_norm norm = hylra_normaliser(job, stream, token, head);
        const float * logits = hylra_logits(job, stream, token, head);
        const float weight = norm.inv_sum/n_head;
        int cell = cell_begin;
        for (; cell + LANES <= cell_end; cell += LANES) {
            store(scores + cell, load(scores + cell) + weight*vexp(load(logits + cell) - norm.max));
        }
        for (; cell < cell_end; ++cell) {
            scores[cell] += weight*expf(logits[cell] - norm.max);
        }
    }
    const ggml_fp16_t * mask = hylra_mask_row(job.attn, stream, token);
    for (int cell = cell_begin; mask && cell < cell_end; ++cell) {
        scores[cell] = mask[cell] == HYLRA_MASK_HIDDEN ? HYLRA_SCORE_HIDDEN : scores[cell];
    }
}

} // namespace

extern const hylra_kernels HYLRA_CAT(hylra_kernels_, HYLRA_ISA);
const hylra_kernels HYLRA_CAT(hylra_kernels_, HYLRA_ISA) = { HYLRA_STR(HYLRA_ISA), attend, reduce, pool, hylra_choose };
