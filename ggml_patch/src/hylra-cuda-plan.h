// How one attention problem is cut for CUDA and where its scratch lies: plain arithmetic, the same on host and device, tested without a GPU.
//
// A column is one query head of one token. The columns of a KV head share each K and V row that is read; eight columns are one group,
// the width of a matrix instruction. Sizes depend on shapes alone, so the graph can be planned and captured.
#pragma once

#include "hylra.h"

#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)
#    define HYLRA_HD __host__ __device__
#else
#    define HYLRA_HD
#endif

constexpr int HYLRA_CUDA_TILE       = 16;      // cells of one matrix instruction
constexpr int HYLRA_CUDA_STEP       = 64;      // cells that a block takes together; a chunk holds whole steps
constexpr int HYLRA_CUDA_WARPS      = 4;       // of a block
constexpr int HYLRA_CUDA_COLUMNS    = 8;       // of a group
constexpr int HYLRA_CUDA_BLOCKS     = 392;     // blocks that fill a large card once (H200: 132 processors, 3 blocks each)
constexpr int HYLRA_CUDA_SCORING_BLOCKS = 528; // without V a block needs fewer registers: 4 each
constexpr int HYLRA_CUDA_MLA_BLOCKS = 132;     // one each, as a block of hylra-cuda-mla.cuh takes a processor's shared memory
constexpr int HYLRA_CUDA_MAX_CHUNKS = 128;     // 16 heads of MLA make one block of columns, which 64 chunks spread over half of the card
constexpr int HYLRA_CUDA_MAX_HEADS_KV = 256;
constexpr int HYLRA_CUDA_LIST_HEADS = 256;     // query heads that share a list
constexpr int HYLRA_CUDA_MAX_TOKENS = 64;      // of a batch, all streams together
constexpr int HYLRA_CUDA_BINS       = 2048;    // of the first digit of a score, see hylra-radix.h

struct hylra_cuda_plan {
    int32_t group;        // query heads of a KV head
    int32_t n_column;     // of one KV head and stream; with a list of cells: and token
    int32_t wide;         // groups that one warp serves: 1 or 2
    int32_t mla;          // 1: rows of more than 256 values, for hylra-cuda-mla.cuh
    int32_t block_columns; // of one block
    int32_t n_block_column; // blocks that share the columns
    int32_t n_group;      // groups of eight columns, padded to whole blocks
    int32_t n_word;       // of two columns each, in which a select layer keeps a cell's weights of one group
    int32_t n_chunk, chunk_cells;
    int32_t scores_only;  // V stays unread, there are no outputs
};

HYLRA_HD inline int hylra_ceil_div(int a, int b) { return (a + b - 1)/b; }

HYLRA_HD inline hylra_cuda_plan hylra_cuda_plan_of(const hylra_attn & a, int n_listed, bool listed, bool scores_only) {
    hylra_cuda_plan p = {};
    p.group    = a.n_head/a.n_head_kv;
    p.n_column = listed ? p.group : p.group*a.n_tokens;
    p.mla      = a.n_embd_k > 256 || a.n_embd_v > 256;
    p.wide     = !p.mla && p.n_column > HYLRA_CUDA_COLUMNS ? 2 : 1;
    // one list is so short that blocks of 64 columns would not fill the card
    const bool few = listed && a.n_stream*a.n_tokens == 1;
    p.block_columns  = !p.mla ? p.wide*HYLRA_CUDA_COLUMNS : few || p.n_column <= 32 ? 32 : 64;
    p.n_block_column = hylra_ceil_div(p.n_column, p.block_columns);
    p.n_group        = p.n_block_column*p.block_columns/HYLRA_CUDA_COLUMNS;
    p.n_word         = p.n_group == 1 ? hylra_ceil_div(p.n_column, 2) : HYLRA_CUDA_COLUMNS/2;
    const int rows = a.n_head_kv*a.n_stream*(listed ? a.n_tokens : 1)*p.n_block_column;
    p.scores_only = scores_only;
    int n_chunk = (p.mla ? HYLRA_CUDA_MLA_BLOCKS : scores_only ? HYLRA_CUDA_SCORING_BLOCKS : HYLRA_CUDA_BLOCKS)/rows;
    n_chunk = n_chunk < 1 ? 1 : n_chunk > HYLRA_CUDA_MAX_CHUNKS ? HYLRA_CUDA_MAX_CHUNKS : n_chunk;
    p.chunk_cells = hylra_ceil_div(hylra_ceil_div(n_listed, n_chunk), HYLRA_CUDA_STEP)*HYLRA_CUDA_STEP;
    p.n_chunk     = hylra_ceil_div(n_listed, p.chunk_cells);
    return p;
}

// Where the parts of the scratch begin, in bytes. A row is one head of one token.
struct hylra_cuda_layout {
    size_t outputs;  // F32 [n_embd_v, n_chunk, rows] unnormalised, of MLA means in half of that (hylra_mla_halves); none if only scores are wanted
    size_t norms;    // F32 [2, n_chunk, rows] reference of the exponents (base 2) and their sum
    // of a select layer
    size_t peaks;    // F32 [8, tiles, groups] reference of the weights of a tile
    size_t weights;  // F16 [2*n_word, n_kv, groups]
    size_t bins;     // I32 [HYLRA_CUDA_BINS, lists, tokens] how many scores have which first digit
    size_t size;
};

HYLRA_HD inline size_t hylra_aligned(size_t bytes) { return (bytes + 127)/128*128; }

HYLRA_HD inline hylra_cuda_layout hylra_cuda_layout_of(const hylra_attn & a, const hylra_cuda_plan & p, int select_lists) {
    const size_t rows = size_t(a.n_head)*a.n_tokens*a.n_stream;
    const size_t groups = select_lists ? size_t(p.n_group)*a.n_head_kv*a.n_stream : 0;
    const size_t tiles = hylra_ceil_div(a.n_kv, HYLRA_CUDA_TILE);
    hylra_cuda_layout l = {};
    l.norms   = l.outputs + (p.scores_only ? 0 : hylra_aligned(rows*p.n_chunk*a.n_embd_v*sizeof(float)));
    l.peaks   = l.norms   + hylra_aligned(rows*p.n_chunk*2*sizeof(float));
    l.weights = l.peaks   + hylra_aligned(groups*tiles*HYLRA_CUDA_COLUMNS*sizeof(float));
    l.bins    = l.weights + hylra_aligned(groups*a.n_kv*p.n_word*sizeof(uint32_t));
    l.size    = l.bins    + size_t(select_lists)*a.n_tokens*a.n_stream*HYLRA_CUDA_BINS*sizeof(int32_t);
    return l;
}
