// The fast kernels, compiled once per instruction set (HYLRA_ISA: base, avx2, avx512). Cells are the outer loop: a K or V
// row is converted to F32 in registers and used for up to four query heads of its group at once.
// The plain statement of what each kernel computes is its twin in hylra-ref.cpp.
#include "hylra-attn.h"
#include "hylra-mask.h"
#include "hylra-rows.h"

#include <algorithm>

#ifndef HYLRA_ISA
#    define HYLRA_ISA base
#endif
#define HYLRA_CAT_(a, b) a##b
#define HYLRA_CAT(a, b) HYLRA_CAT_(a, b)
#define HYLRA_STR_(a) #a
#define HYLRA_STR(a) HYLRA_STR_(a)

namespace {

constexpr int TILE      = HYLRA_TILE_CELLS;
constexpr int MAX_HEADS = 4; // query heads per pass: 16 sums and their inputs fit 32 registers

// One tile of up to TILE cells of one stream.
struct block {
    const int32_t * list; // the cells, or nullptr: first, first + 1, ...
    int first;
    int n;

    int cell(int i) const { return list ? list[i] : first + i; }
};

// The rows of a tile in one cache, for one KV head: row i starts at base + offset[i]. Rows behind the end repeat the last
// one, since their logits are hidden afterwards. While a tile is computed, the rows that come after it are fetched: without
// that one thread read 9 GB/s here, with it 24.
struct tile_rows {
    const char * base;
    const size_t * offset;
    const char * next_base;
    const size_t * next_offset;
    int row_bytes;

    const char * at(int i) const { return base + offset[i]; }

    void fetch_next(int i) const {
        const char * row = next_base + next_offset[i];
        for (int byte = 0; byte < row_bytes; byte += 64) {
            __builtin_prefetch(row + byte, 0, 2);
        }
    }

    void fetch_next_all() const {
        for (int i = 0; i < TILE; ++i) {
            fetch_next(i);
        }
    }
};

void find_rows(const block & b, size_t row_bytes, size_t * offset) {
    for (int i = 0; i < TILE; ++i) {
        offset[i] = b.n == 0 ? 0 : b.cell(std::min(i, b.n - 1))*row_bytes;
    }
}

// s[h][cell] = q[h] . k[cell] for HEADS query heads. CELLS cells at a time: their sums stay in registers, then are folded so
// that LANES cells share one horizontal reduction.
template<class READER, int HEADS>
void dot_tile(const float * const * q, const tile_rows & k, int n_step, float (*s)[TILE]) {
    constexpr int CELLS = LANES >= 16 ? 4 : 2;
    for (int cell = 0; cell < TILE; cell += LANES) {
        vf part[HEADS][LANES/CELLS];
        for (int p = 0; p < LANES/CELLS; ++p) {
            const char * row[CELLS];
            for (int c = 0; c < CELLS; ++c) {
                row[c] = k.at(cell + p*CELLS + c);
                k.fetch_next(cell + p*CELLS + c);
            }
            vf acc[HEADS][CELLS] = {};
            for (int i = 0; i < n_step; ++i) {
                vf kv[CELLS];
                for (int c = 0; c < CELLS; ++c) {
                    kv[c] = READER::at(row[c], i);
                }
                for (int h = 0; h < HEADS; ++h) {
                    const vf qv = load(q[h] + i*LANES);
                    for (int c = 0; c < CELLS; ++c) {
                        acc[h][c] += qv*kv[c];
                    }
                }
            }
            for (int h = 0; h < HEADS; ++h) {
                part[h][p] = fold_all<1, CELLS>(acc[h]);
            }
        }
        for (int h = 0; h < HEADS; ++h) {
            store(s[h] + cell, fold_all<CELLS, LANES/CELLS>(part[h]));
        }
    }
}

// acc[h][d0..] += sum over cells of p[h][cell]*v[cell][d0..] for STEPS vectors of dimensions, whose sums stay in registers
template<class READER, int HEADS, int STEPS>
void accumulate_strip(const float (*p)[TILE], const tile_rows & v, int n_cells, int step, float * const * acc) {
    vf sum[HEADS][STEPS];
    for (int h = 0; h < HEADS; ++h) {
        for (int i = 0; i < STEPS; ++i) {
            sum[h][i] = load(acc[h] + (step + i)*LANES);
        }
    }
    for (int cell = 0; cell < n_cells; ++cell) {
        const char * row = v.at(cell);
        if (step == 0) {
            v.fetch_next(cell);
        }
        vf w[HEADS];
        for (int h = 0; h < HEADS; ++h) {
            w[h] = splat(p[h][cell]);
        }
        for (int i = 0; i < STEPS; ++i) {
            const vf vv = READER::at(row, step + i);
            for (int h = 0; h < HEADS; ++h) {
                sum[h][i] += w[h]*vv;
            }
        }
    }
    for (int h = 0; h < HEADS; ++h) {
        for (int i = 0; i < STEPS; ++i) {
            store(acc[h] + (step + i)*LANES, sum[h][i]);
        }
    }
}

template<class READER, int HEADS>
void accumulate_tile(const float (*p)[TILE], const tile_rows & v, int n_cells, int n_step, float * const * acc) {
    constexpr int LONG = LANES >= 16 && HEADS <= 3 ? 8 : LANES >= 16 || HEADS <= 2 ? 4 : 2;
    int step = 0;
    for (; step + LONG <= n_step; step += LONG) {
        accumulate_strip<READER, HEADS, LONG>(p, v, n_cells, step, acc);
    }
    for (; step + 2 <= n_step; step += 2) {
        accumulate_strip<READER, HEADS, 2>(p, v, n_cells, step, acc);
    }
    for (; step < n_step; ++step) {
        accumulate_strip<READER, HEADS, 1>(p, v, n_cells, step, acc);
    }
}

typedef void (*dot_t)(const float * const * q, const tile_rows & k, int n_step, float (*s)[TILE]);
typedef void (*accumulate_t)(const float (*p)[TILE], const tile_rows & v, int n_cells, int n_step, float * const * acc);

// The kernels of one KV type, by number of query heads.
struct type_kernels {
    dot_t        dot[MAX_HEADS];
    accumulate_t accumulate[MAX_HEADS];
};

template<class READER>
constexpr type_kernels kernels_of = {
    { dot_tile<READER, 1>, dot_tile<READER, 2>, dot_tile<READER, 3>, dot_tile<READER, 4> },
    { accumulate_tile<READER, 1>, accumulate_tile<READER, 2>, accumulate_tile<READER, 3>, accumulate_tile<READER, 4> },
};

// nullptr: rows of this type or size go through a padded F32 copy
const type_kernels * direct_kernels(int type, int n_embd) {
    if (n_embd % LANES != 0) {
        return nullptr;
    }
    switch (type) {
        case GGML_TYPE_F32:  return &kernels_of<reader_f32>;
        case GGML_TYPE_F16:  return &kernels_of<reader_f16>;
        case GGML_TYPE_BF16: return &kernels_of<reader_bf16>;
        case GGML_TYPE_Q8_0: return &kernels_of<reader_q8_0>;
        case GGML_TYPE_Q4_0: return &kernels_of<reader_q4_0>;
    }
    return nullptr;
}

// One of the two caches as a task reads it.
struct cache_side {
    const char * data;        // of the stream
    size_t cell_bytes, head_bytes;
    int    type, n_embd, n_step;
    const type_kernels * kernels;
    bool   direct;
    hylra_to_float_t to_float;
    float * copy;             // [padded(n_embd), TILE] if not direct
    size_t offset[2][TILE];   // of the cells of this tile and the next
    size_t copy_offset[TILE];
    int    now = 0;

    cache_side(const void * data, const uint64_t * nb, int stream, int type, int n_embd, hylra_to_float_t to_float, float * copy) :
        data((const char *) data + stream*nb[3]), cell_bytes(nb[1]), head_bytes(nb[2]), type(type), n_embd(n_embd),
        n_step((n_embd + LANES - 1)/LANES), kernels(direct_kernels(type, n_embd)), direct(kernels != nullptr), to_float(to_float), copy(copy) {
        if (!direct) {
            kernels = &kernels_of<reader_f32>;
        }
    }

    // Before the first tile with what it holds, then at each tile with the one that follows it.
    void advance(const block & next) {
        now ^= 1;
        find_rows(next, cell_bytes, offset[now ^ 1]);
    }

    // next_head: the KV head that is read after this one, in the same tile or in the next
    tile_rows rows(const block & b, int head_kv, int next_head, bool next_is_here) {
        const char * head = data + head_kv*head_bytes;
        if (!direct) {
            return converted(b, head);
        }
        return { head, offset[now], data + next_head*head_bytes, offset[next_is_here ? now : now ^ 1], int(head_bytes) };
    }

    // stride of the copy: whole vectors, so that kernels need no tail
    tile_rows converted(const block & b, const char * head) {
        for (int i = 0; i < TILE; ++i) {
            float * row = copy + i*hylra_padded(n_embd);
            copy_offset[i] = i*hylra_padded(n_embd)*sizeof(float);
            memset(row, 0, sizeof(float)*hylra_padded(n_embd));
            const char * source = head + offset[now][i];
            if (i < b.n && to_float) {
                to_float(source, row, n_embd);
            } else if (i < b.n) {
                memcpy(row, source, sizeof(float)*n_embd);
            }
        }
        return { (const char *) copy, copy_offset, (const char *) copy, copy_offset, 0 };
    }
};

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

// What one task works on: a chunk of one stream.
struct worker {
    const hylra_job & job;
    const hylra_attn & a;
    const int chunk;
    const int stream;
    const int n_k;   // padded head sizes
    const int n_v;
    const int group; // query heads per KV head

    alignas(64) float q_room[MAX_HEADS*HYLRA_MAX_EMBD];
    cache_side k, v;

    // room: [2*TILE*HYLRA_MAX_EMBD], touched only by types and head sizes without kernels of their own
    worker(const hylra_job & job, int chunk, int stream, float * room) : job(job), a(job.attn), chunk(chunk), stream(stream),
        n_k(hylra_padded(a.n_embd_k)), n_v(hylra_padded(a.n_embd_v)), group(a.n_head/a.n_head_kv),
        k(a.k, a.k_nb, stream, a.type_k, a.n_embd_k, job.k_to_float, room),
        v(a.v, a.v_nb, stream, a.type_v, a.n_embd_v, job.v_to_float, room + TILE*HYLRA_MAX_EMBD) {}

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

    // n query heads of one group against a tile; bias: [TILE]
    void attend_heads(const block & b, const tile_rows & k_rows, const tile_rows & v_rows, int token, int head, int n, const float * bias) {
        alignas(64) float s[MAX_HEADS][TILE];
        const float * q[MAX_HEADS];
        float * acc[MAX_HEADS];
        for (int h = 0; h < n; ++h) {
            q[h]   = query(token, head + h, q_room + h*HYLRA_MAX_EMBD);
            acc[h] = hylra_partial(job, chunk, stream, token, head + h);
        }
        k.kernels->dot[n - 1](q, k_rows, k.n_step, s);
        for (int h = 0; h < n; ++h) {
            finish_logits(a, hylra_slope(a, head + h), bias, s[h]);
            if (job.logits) {
                memcpy(hylra_logits(job, stream, token, head + h) + b.first, s[h], sizeof(float)*b.n);
            }
            const float factor = softmax_step(s[h], acc[h] + n_v);
            if (factor != 1.0f) {
                scale_row(acc[h], n_v, factor);
            }
        }
        v.kernels->accumulate[n - 1](s, v_rows, b.n, v.n_step, acc);
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
        std::fill(mask, mask + TILE, HYLRA_MASK_HIDDEN);
        for (int i = 0; i < b.n; ++i) {
            mask[i] = row ? row[b.cell(i)] : ggml_fp16_t(0);
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

    // Nobody has fetched the first rows of a chunk: all at once, so that their latencies overlap.
    void start(const block & first) {
        for (cache_side * side : { &k, &v }) {
            side->advance(first);
            side->rows(first, 0, 0, false).fetch_next_all();
        }
    }

    // one tile for the tokens that see any of its cells; next: the tile after it
    void attend_block(const block & b, const block & next) {
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
        k.advance(next);
        v.advance(next);
        for (int head_kv = 0; n > 0 && head_kv < a.n_head_kv; ++head_kv) {
            const int next_head = (head_kv + 1)%a.n_head_kv;
            const tile_rows k_rows = k.rows(b, head_kv, next_head, next_head != 0), v_rows = v.rows(b, head_kv, next_head, next_head != 0);
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
        const auto tile = [&](int cell) { return block{ nullptr, cell, std::max(0, std::min(TILE, end - cell)) }; };
        start(tile(begin));
        for (int cell = begin; cell < end; cell += TILE) {
            attend_block(tile(cell), tile(cell + TILE));
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
        block b = list_block(token, 0, begin, end);
        start(b);
        for (int i = begin; i < end; i += TILE) {
            for (int head_kv = 0; head_kv < a.n_head_kv; ++head_kv) {
                const int next_head = (head_kv + 1)%a.n_head_kv;
                const block next = list_block(token, next_head, next_head == 0 ? i + TILE : i, end);
                attend_entries(b, next, token, head_kv, next_head);
                b = next;
            }
        }
    }

    void attend_entries(const block & b, const block & next, int token, int head_kv, int next_head) {
        alignas(64) float bias[TILE];
        k.advance(next);
        v.advance(next);
        if (b.n > 0 && read_bias(b, token, bias)) {
            attend_group(b, k.rows(b, head_kv, next_head, false), v.rows(b, head_kv, next_head, false), token, head_kv, bias);
        }
    }
};

void attend(const hylra_job & job, int task) {
    alignas(64) float room[2*TILE*HYLRA_MAX_EMBD];
    const int chunk = task % job.n_chunk;
    const int rest  = task / job.n_chunk;
    if (job.cells) {
        worker(job, chunk, rest/job.attn.n_tokens, room).attend_list(rest%job.attn.n_tokens);
    } else {
        worker(job, chunk, rest, room).attend_all();
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
