// The contract between graph nodes, kernels and their scalar twins: one attention problem cut into chunks of cells.
//
//   attend  one chunk of cells (all cells, or a list of cells) -> partial result per token and head, softmax weights on demand
//   reduce  partial results of all chunks                      -> attention output, softmax normaliser
//   pool    softmax weights and normaliser                     -> one score per cell and list
//   choose  one row of scores                                  -> ascending list of cells
//
// Scoring, choosing and attending are separate so that scores can come from elsewhere (DESIGN §9, sketch layers).
#pragma once

#include "hylra.h"

#include <cstddef>
#include <cstdint>

// Marks in a row of scores: attention mass is in [0, 1], so both stay apart from it.
constexpr float HYLRA_SCORE_HIDDEN = -1.0f; // the mask does not let the cell through
constexpr float HYLRA_SCORE_FORCED =  2.0f; // added to the mass of a sink or recent cell

constexpr int HYLRA_TILE_CELLS = 32;  // cells between two steps of the online softmax; their K and V fit the first-level cache
constexpr int HYLRA_MAX_CHUNKS = 32;  // a chunk holds whole tiles
constexpr int HYLRA_MAX_EMBD   = 640; // largest head size, MLA (576) included
constexpr int HYLRA_MAX_TOKENS = 64;  // largest batch that counts as decode, per stream
constexpr int HYLRA_LANES_MAX  = 16;

// A row of F32 read from a KV row of any ggml type; the fallback for types without an own reader.
typedef void (*hylra_to_float_t)(const void * row, float * out, int64_t n);

struct hylra_job {
    hylra_attn attn;
    hylra_to_float_t k_to_float, v_to_float; // nullptr for F32

    const int32_t * cells;     // attn.cells
    const int32_t * head_list; // [n_head_kv] list of cells that each KV head takes

    int32_t chunk_cells;
    int32_t n_chunk;
    int32_t n_part; // tasks that share the KV heads of a chunk

    bool scores_only; // V stays unread, partials hold the softmax state alone

    float * partials; // [hylra_partial_floats, n_head, n_tokens, n_stream, n_chunk]
    // for a select layer, else nullptr: exp(logit - peak, the reference of its tile), so that pooling needs no second exp per cell and head
    // The heads of a group lie together, so that pooling reads a tile of all of them in one go.
    float * weights;  // [HYLRA_TILE_CELLS, n_head/n_head_kv, hylra_n_tile(n_kv), n_head_kv, n_tokens, n_stream]
    float * peaks;    // [hylra_n_tile(n_kv), n_head, n_tokens, n_stream]
};

// The partial of one (chunk, token, head): the unnormalised output, then a reference near the largest logit and the sum of
// exp(logit - reference).
inline int hylra_padded(int n) { return (n + HYLRA_LANES_MAX - 1) / HYLRA_LANES_MAX * HYLRA_LANES_MAX; }
inline int hylra_partial_floats(int n_embd_v) { return hylra_padded(n_embd_v) + HYLRA_LANES_MAX; }

inline float * hylra_partial(const hylra_job & job, int chunk, int stream, int token, int head) {
    const hylra_attn & a = job.attn;
    const size_t row = ((size_t(chunk) * a.n_stream + stream) * a.n_tokens + token) * a.n_head + head;
    return job.partials + row * hylra_partial_floats(a.n_embd_v);
}

inline size_t hylra_row(const hylra_attn & a, int stream, int token, int head) {
    return (size_t(stream) * a.n_tokens + token) * a.n_head + head;
}

inline int hylra_n_tile(int n_kv) { return (n_kv + HYLRA_TILE_CELLS - 1) / HYLRA_TILE_CELLS; }

// [HYLRA_TILE_CELLS], those behind the last cell are 0; the next head of the group follows
inline float * hylra_weights(const hylra_job & job, int stream, int token, int head, int tile) {
    const hylra_attn & a = job.attn;
    const int group = a.n_head/a.n_head_kv, n_tile = hylra_n_tile(a.n_kv);
    const size_t row = (hylra_row(a, stream, token, head/group*group)*n_tile + size_t(tile)*group + head%group);
    return job.weights + row*HYLRA_TILE_CELLS;
}

inline float * hylra_peaks(const hylra_job & job, int stream, int token, int head) {
    return job.peaks + hylra_row(job.attn, stream, token, head) * hylra_n_tile(job.attn.n_kv);
}

// A task attends to a chunk with some of the KV heads. It belongs to one stream and, when cells are listed, to one token (each token has its own list).
struct hylra_task { int chunk, stream, token, head_kv_begin, head_kv_end; };

inline int hylra_n_task(const hylra_job & job) {
    return job.n_part * job.n_chunk * job.attn.n_stream * (job.cells ? job.attn.n_tokens : 1);
}

inline hylra_task hylra_task_of(const hylra_job & job, int task) {
    const int part = task % job.n_part, chunk = task/job.n_part % job.n_chunk, column = task/job.n_part/job.n_chunk;
    const int n_tokens = job.cells ? job.attn.n_tokens : 1, n_head_kv = job.attn.n_head_kv;
    return { chunk, column/n_tokens, column%n_tokens, n_head_kv*part/job.n_part, n_head_kv*(part + 1)/job.n_part };
}

// ALiBi slope of a head; see ggml_compute_forward_flash_attn_ext_f16_one_chunk in ggml-cpu/ops.cpp.
float hylra_slope(const hylra_attn & attn, int head);

// Softmax normaliser of one head over all chunks and its attention sink: P = exp(logit - max) * inv_sum.
struct hylra_norm { float max, inv_sum; };
hylra_norm hylra_normaliser(const hylra_job & job, int stream, int token, int head);

struct hylra_kernels {
    const char * isa;
    void (*attend)(const hylra_job & job, int task);
    void (*reduce)(const hylra_job & job, int stream, int token, int head, float * out); // out: [n_embd_v]
    // scores: [n_kv], cells [cell_begin, cell_end) of one list of `lists` (heads are split evenly among lists)
    void (*pool)(const hylra_job & job, int stream, int token, int list, int lists, int cell_begin, int cell_end, float * scores);
    // out: [top_k], filled with -1 at the end; returns the number of cells
    int  (*choose)(const float * scores, int n_kv, int top_k, int block_size, int32_t * out);
};

// nullptr if this build or machine does not have it; name nullptr: the fastest (environment HYLRA_ISA overrides).
const hylra_kernels * hylra_get_kernels(const char * isa);

extern const hylra_kernels hylra_kernels_ref;

// Whole blocks of block_size cells; returns how many cells were written to out[top_k].
int hylra_choose_blocks(const float * scores, int n_kv, int top_k, int block_size, int32_t * out);
