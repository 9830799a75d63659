// The fast kernels, compiled once per instruction set (HYLRA_ISA: base, avx2, avx512, avx512vnni). Cells are the outer loop: a K or V
// row is read once for all query heads of its group and all tokens of the batch.
// The plain statement of what each kernel computes is its twin in hylra-ref.cpp.
#include "hylra-attn.h"
#include "hylra-mask.h"
#include "hylra-pool.h"
#include "hylra-tile.h"
#include "hylra-topk.h"

#ifndef HYLRA_ISA
#    define HYLRA_ISA base
#endif
#define HYLRA_CAT_(a, b) a##b
#define HYLRA_CAT(a, b) HYLRA_CAT_(a, b)
#define HYLRA_STR_(a) #a
#define HYLRA_STR(a) HYLRA_STR_(a)

namespace {

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

// Online softmax: keeps the reference in `state` (reference, sum) near the running maximum and turns s into weights exp(s - reference).
// factor: for what has been accumulated so far. Only a maximum that is larger by SLACK raises the reference: a branch that waits for the dot
// products and cannot be foreseen else costs as much as the weights. They are at most exp(SLACK), which F32 holds as well as 1.
constexpr float SLACK = 8.0f;

// all heads of a pass step by step: of each, the chain of dependent instructions is long
template<int HEADS>
void softmax_step(float (*s)[TILE], float * const * state, float * factor) {
    float max[HEADS];
    for (int h = 0; h < HEADS; ++h) {
        vf found = load(s[h]);
        for (int i = LANES; i < TILE; i += LANES) {
            found = vmax(found, load(s[h] + i));
        }
        max[h] = hmax(found);
    }
    for (int h = 0; h < HEADS; ++h) {
        factor[h] = 1.0f;
        if (max[h] > state[h][0] + SLACK) {
            factor[h] = expf(state[h][0] - max[h]);
            state[h][0] = max[h];
        }
    }
    for (int h = 0; h < HEADS; ++h) {
        vf sum = vf{};
        for (int i = 0; i < TILE; i += LANES) {
            const vf p = vexp(load(s[h] + i) - state[h][0]);
            store(s[h] + i, p);
            sum += p;
        }
        state[h][1] = state[h][1]*factor[h] + hsum(sum);
    }
}

typedef void (*softmax_t)(float (*s)[TILE], float * const * state, float * factor);
constexpr softmax_t SOFTMAX[MAX_HEADS] = { softmax_step<1>, softmax_step<2>, softmax_step<3>, softmax_step<4> };

void scale_row(float * row, int n, float factor) {
    for (int i = 0; i < n; i += LANES) {
        store(row + i, load(row + i)*factor);
    }
}

// What one task works on: a chunk of one stream, and KV heads from head_begin to head_end.
struct worker {
    const hylra_job & job;
    const hylra_attn & a;
    const int chunk;
    const int stream;
    const int head_begin;
    const int head_end;
    const int n_k;   // padded head sizes
    const int n_v;
    const int group; // query heads per KV head
    const int n_tile;

    alignas(64) float q_room[MAX_HEADS*HYLRA_MAX_EMBD];
    const float * packed = nullptr; // [n_k, n_head, n_tokens] queries, those of the task, if the type of K has its own form of them
    cache_side k, v;

    // room: [2*TILE*HYLRA_MAX_EMBD], touched only by types and head sizes without kernels of their own
    worker(const hylra_job & job, const hylra_task & at, float * room) : job(job), a(job.attn), chunk(at.chunk), stream(at.stream),
        head_begin(at.head_kv_begin), head_end(at.head_kv_end),
        n_k(hylra_padded(a.n_embd_k)), n_v(hylra_padded(a.n_embd_v)), group(a.n_head/a.n_head_kv), n_tile(hylra_n_tile(a.n_kv)),
        k(a.k, a.k_nb, stream, a.type_k, a.n_embd_k, job.k_to_float, room),
        v(a.v, a.v_nb, stream, a.type_v, a.n_embd_v, job.v_to_float, room + TILE*HYLRA_MAX_EMBD) {}

    const float * source_query(int token, int head) const {
        return (const float *) ((const char *) a.q + token*a.q_nb[1] + head*a.q_nb[2] + stream*a.q_nb[3]);
    }

    // Once per task: tiles are the outer loop, and each needs all queries again.
    void pack_queries(int begin, int end) {
        if (!k.kernels->pack) {
            return;
        }
        static thread_local thread_room kept;
        float * room = kept.of(size_t(n_k)*a.n_head*a.n_tokens);
        for (int token = begin; token < end; ++token) {
            for (int head = head_begin*group; head < head_end*group; ++head) {
                k.kernels->pack(source_query(token, head), n_k, room + (size_t(token)*a.n_head + head)*n_k);
            }
        }
        packed = room;
    }

    // query row as `dot` wants it: packed, or padded with zeros, or the source itself
    const float * query(int token, int head, float * room) const {
        if (packed) {
            return packed + (size_t(token)*a.n_head + head)*n_k;
        }
        const float * q = source_query(token, head);
        if (n_k == a.n_embd_k) {
            return q;
        }
        memcpy(room, q, sizeof(float)*a.n_embd_k);
        memset(room + a.n_embd_k, 0, sizeof(float)*(n_k - a.n_embd_k));
        return room;
    }

    // of n heads of one group, which lie behind each other
    void write_weights(const float (*s)[TILE], float * const * state, int token, int head, int n, int tile) const {
        float * w = hylra_weights(job, stream, token, head, tile), * peak = hylra_peaks(job, stream, token, head) + tile;
        for (int h = 0; h < n; ++h, w += TILE, peak += n_tile) {
            memcpy(w, s[h], sizeof(float)*TILE);
            *peak = state[h][0];
            for (int i = 0; i < TILE; i += 16) { // where the next tile's go: a store that misses holds up those behind it
                __builtin_prefetch(w + group*TILE + i, 1, 2);
            }
        }
    }

    // n query heads of one group against a tile; bias: [TILE]
    void attend_heads(const block & b, const tile_rows & k_rows, const tile_rows & v_rows, int token, int head, int n, const float * bias) {
        alignas(64) float s[MAX_HEADS][TILE];
        const float * q[MAX_HEADS];
        float * acc[MAX_HEADS], * state[MAX_HEADS], factor[MAX_HEADS];
        for (int h = 0; h < n; ++h) {
            q[h]     = query(token, head + h, q_room + h*HYLRA_MAX_EMBD);
            acc[h]   = hylra_partial(job, chunk, stream, token, head + h);
            state[h] = acc[h] + n_v;
        }
        k.kernels->dot[n - 1](q, k_rows, k.n_step, s);
        for (int h = 0; h < n; ++h) {
            finish_logits(a, hylra_slope(a, head + h), bias, s[h]);
        }
        SOFTMAX[n - 1](s, state, factor);
        for (int h = 0; h < n; ++h) {
            if (factor[h] != 1.0f && !job.scores_only) {
                scale_row(acc[h], n_v, factor[h]);
            }
        }
        if (job.weights) {
            write_weights(s, state, token, head, n, b.first/TILE);
        }
        if (!job.scores_only) {
            v.kernels->accumulate[n - 1](s, v_rows, b.n, v.n_step, acc);
        }
    }

    // the group in passes of equal size, none above MAX_HEADS
    void attend_group(const block & b, const tile_rows & k_rows, const tile_rows & v_rows, int token, int head_kv, const float * bias) {
        const int n_pass = (group + MAX_HEADS - 1)/MAX_HEADS;
        for (int pass = 0; pass < n_pass; ++pass) {
            const int begin = group*pass/n_pass, end = group*(pass + 1)/n_pass;
            attend_heads(b, k_rows, v_rows, token, head_kv*group + begin, end - begin, bias);
        }
    }

    // mask values of the tile, -inf behind its end; false if no cell is visible
    bool read_bias(const block & b, int token, float * bias) const {
        const ggml_fp16_t * row = hylra_mask_row(a, stream, token);
        alignas(64) ggml_fp16_t mask[TILE];
        if (row && !b.list && b.n == TILE) {
            memcpy(mask, row + b.first, sizeof(mask));
        } else {
            std::fill(mask, mask + TILE, HYLRA_MASK_HIDDEN);
            for (int i = 0; i < b.n; ++i) {
                mask[i] = row ? row[b.cell(i)] : ggml_fp16_t(0);
            }
        }
        int n_hidden = 0;
        for (int i = 0; i < TILE; ++i) {
            n_hidden += mask[i] == HYLRA_MASK_HIDDEN;
        }
        for (int i = 0; i < TILE; i += LANES) {
            store(bias + i, load_f16(mask + i));
        }
        return n_hidden < TILE;
    }

    void clear_partials(int token) {
        for (int head = head_begin*group; head < head_end*group; ++head) {
            float * p = hylra_partial(job, chunk, stream, token, head);
            memset(p, 0, sizeof(float)*hylra_partial_floats(a.n_embd_v));
            p[n_v] = -INFINITY;
        }
    }

    void hide_weights(const block & b, int token) {
        for (int head = head_begin*group; job.weights && head < head_end*group; ++head) {
            float * w = hylra_weights(job, stream, token, head, b.first/TILE);
            std::fill(w, w + TILE, 0.0f);
            hylra_peaks(job, stream, token, head)[b.first/TILE] = -INFINITY;
        }
    }

    // Nobody has fetched a thread's first rows: all at once, so that their latencies overlap.
    void start(const block & first) {
        for (cache_side * side : { &k, &v }) {
            side->advance(first);
            if (!side->direct || (side == &v && job.scores_only)) {
                continue; // copied rows are read when they are needed
            }
            for (int head_kv = head_begin; head_kv < (job.cells && job.attn.lists > 1 ? head_begin + 1 : head_end); ++head_kv) {
                side->rows(first, 0, head_kv).fetch_next_all();
            }
        }
    }

    // one tile, the KV heads of the task, for those tokens from begin to end that see any of its cells; next: the tile after it
    void attend_block(const block & b, const block & next, int begin, int end) {
        alignas(64) float bias[HYLRA_MAX_TOKENS][TILE];
        int tokens[HYLRA_MAX_TOKENS];
        int n = 0;
        for (int token = begin; token < end; ++token) {
            if (read_bias(b, token, bias[n])) {
                tokens[n++] = token;
            } else {
                hide_weights(b, token);
            }
        }
        k.advance(next);
        if (!job.scores_only) {
            v.advance(next);
        }
        for (int head_kv = head_begin; n > 0 && head_kv < head_end; ++head_kv) {
            const tile_rows k_rows = k.rows(b, head_kv, head_kv), v_rows = job.scores_only ? tile_rows{} : v.rows(b, head_kv, head_kv);
            if (b.list && head_kv == head_begin) {
                k_rows.translate_next_all();
                v_rows.translate_next_all();
            }
            for (int i = 0; i < n; ++i) {
                attend_group(b, k_rows, v_rows, tokens[i], head_kv, bias[i]);
            }
        }
    }

    // all cells of the chunk, all tokens of the stream
    void attend_all() {
        const int begin = chunk*job.chunk_cells;
        const int end   = std::min(begin + job.chunk_cells, int(a.n_kv));
        for (int token = 0; token < a.n_tokens; ++token) {
            clear_partials(token);
        }
        pack_queries(0, a.n_tokens);
        const auto tile = [&](int cell) { return block{ nullptr, cell, std::max(0, std::min(TILE, a.n_kv - cell)) }; };
        start(tile(begin));
        for (int cell = begin; cell < end; cell += TILE) {
            attend_block(tile(cell), tile(cell + TILE), 0, a.n_tokens);
        }
    }

    // up to TILE list entries of one KV head, without the padding, which stands at the end of a list
    block list_block(int token, int head_kv, int begin, int end) const {
        const size_t row = (size_t(stream)*a.n_tokens + token)*job.attn.lists + job.head_list[head_kv];
        const int32_t * list = job.cells + row*job.attn.n_cells + begin;
        int n = std::max(0, std::min(TILE, end - begin));
        while (n > 0 && list[n - 1] < 0) {
            --n;
        }
        return { list, 0, n };
    }

    void attend_list(int token) {
        const int begin = chunk*job.chunk_cells;
        const int end   = std::min(begin + job.chunk_cells, int(job.attn.n_cells));
        clear_partials(token);
        pack_queries(token, token + 1);
        start(list_block(token, head_begin, begin, end));
        if (job.attn.lists == 1) {
            for (int i = begin; i < end; i += TILE) {
                attend_block(list_block(token, 0, i, end), list_block(token, 0, i + TILE, a.n_cells), token, token + 1);
            }
            return;
        }
        for (int head_kv = head_begin; head_kv < head_end; ++head_kv) {
            for (int i = begin; i < end; i += TILE) {
                // after the last tile comes the next head, after the last head the next chunk
                const bool last = i + TILE >= end, done = last && head_kv + 1 == a.n_head_kv;
                const int next_head = done ? 0 : head_kv + last;
                const block next = list_block(token, next_head, last && !done ? begin : i + TILE, done ? a.n_cells : end);
                attend_entries(list_block(token, head_kv, i, end), next, token, head_kv, next_head);
            }
        }
    }

    void attend_entries(const block & b, const block & next, int token, int head_kv, int next_head) {
        alignas(64) float bias[TILE];
        k.advance(next);
        v.advance(next);
        const tile_rows k_rows = k.rows(b, head_kv, next_head), v_rows = v.rows(b, head_kv, next_head);
        k_rows.translate_next_all();
        v_rows.translate_next_all();
        if (b.n > 0 && read_bias(b, token, bias)) {
            attend_group(b, k_rows, v_rows, token, head_kv, bias);
        }
    }
};

void attend(const hylra_job & job, int task) {
    alignas(64) float room[2*TILE*HYLRA_MAX_EMBD];
    const hylra_task at = hylra_task_of(job, task);
    worker work(job, at, room);
    if (job.cells) {
        work.attend_list(at.token);
    } else {
        work.attend_all();
    }
}

void reduce(const hylra_job & job, int stream, int token, int head, float * out) {
    const int n = job.attn.n_embd_v;
    const int n_v = hylra_padded(n);
    alignas(64) float weight[MAX_CHUNKS];
    alignas(64) float sum[HYLRA_MAX_EMBD];
    std::fill(sum, sum + n_v, 0.0f);
    const hylra_norm norm = chunk_weights(job, stream, token, head, weight);
    for (int chunk = 0; chunk < job.n_chunk; ++chunk) {
        const float * p = hylra_partial(job, chunk, stream, token, head);
        const float w = weight[chunk]*norm.inv_sum;
        for (int d = 0; w != 0.0f && d < n_v; d += LANES) {
            store(sum + d, load(sum + d) + w*load(p + d));
        }
    }
    memcpy(out, sum, sizeof(float)*n);
}

int choose(const float * scores, int n_kv, int top_k, int block_size, int32_t * out) {
    const int n = block_size > 1 ? hylra_choose_blocks(scores, n_kv, top_k, block_size, out) : choose_cells(scores, n_kv, top_k, out);
    std::fill(out + n, out + top_k, -1);
    return n;
}

} // namespace

extern const hylra_kernels HYLRA_CAT(hylra_kernels_, HYLRA_ISA);
const hylra_kernels HYLRA_CAT(hylra_kernels_, HYLRA_ISA) = { HYLRA_STR(HYLRA_ISA), attend, reduce, pool, choose };
