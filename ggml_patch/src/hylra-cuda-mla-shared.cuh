// What a block of hylra-cuda-mla.cuh keeps in shared memory, and how queries and rows get there: whole rows of halves, whatever the KV type.
#pragma once

#include "hylra-cuda-store.cuh"

constexpr int HYLRA_MLA_OCTETS_K = 576/8, HYLRA_MLA_OCTETS_V = 512/8; // of a row at most

template <int CELLS> constexpr int HYLRA_MLA_WARPS = CELLS/8; // half of the columns of 16 cells each, later a part of the dimensions

// An octet's place in its row: the rows that a warp reads together begin at the same bank, so each shuffles its octets differently.
static __device__ __forceinline__ int hylra_mla_place(int row, int octet) { return octet ^ row%8; }

template <int COLUMNS, int CELLS> struct hylra_mla_shared {
    uint4 q[COLUMNS][HYLRA_MLA_OCTETS_K];
    uint4 weights[CELLS][COLUMNS/8];
    float peaks[CELLS/16][COLUMNS]; // of a tile; at the end sums of weights
    float shrink[COLUMNS];          // by how much earlier outputs shrink; at the end references
    hylra_column columns[COLUMNS];
    int   cells[2][CELLS];          // of this tile and the next; -1: none that any column sees
    uint4 tiles[1][CELLS][HYLRA_MLA_OCTETS_K]; // as many as there are stages

    static constexpr int N_THREADS = 32*HYLRA_MLA_WARPS<CELLS>;
    static constexpr size_t bytes(int stages) { return sizeof(hylra_mla_shared) + (stages - 1)*sizeof(tiles); }

    __device__ __forceinline__ uint4 & weight(int cell, int octet) { // the same for shorter rows
        constexpr int N = COLUMNS/8;
        return weights[cell][octet ^ cell/(8/N)%N];
    }
};

// What a block works on
struct hylra_mla_block { int chunk, column0, head_kv, stream, token, begin, end; };

template <int COLUMNS, bool LISTED> static __device__ __forceinline__ hylra_mla_block hylra_mla_at(const hylra_cuda_job & job) {
    const hylra_attn & a = job.attn;
    const int n_block_column = job.plan.n_group*8/COLUMNS, chunk = blockIdx.x/n_block_column, begin = chunk*job.plan.chunk_cells;
    return { chunk, int(blockIdx.x)%n_block_column*COLUMNS, int(blockIdx.y), LISTED ? int(blockIdx.z)/a.n_tokens : int(blockIdx.z), LISTED ? int(blockIdx.z)%a.n_tokens : 0,
             begin, min(begin + job.plan.chunk_cells, LISTED ? a.n_cells : a.n_kv) };
}

// ---- what is read

template <bool ALIGNED> static __device__ __forceinline__ float4 hylra_mla_floats(const float * x, bool present) {
    if constexpr (ALIGNED) {
        return present ? *(const float4 *) x : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
    return present ? make_float4(x[0], x[1], x[2], x[3]) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
}

// A thread's part of the queries, on its way while the first rows are looked up: their list and they would wait for memory one after the other
template <int TYPE, int COLUMNS, int CELLS> struct hylra_mla_queries {
    using shared_t = hylra_mla_shared<COLUMNS, CELLS>;
    static constexpr int N = 9, ROUNDS = COLUMNS*HYLRA_MLA_OCTETS_K/shared_t::N_THREADS/N;
    float4 x[N][2];

    static __device__ __forceinline__ int place(int round, int n) { return (round*N + n)*shared_t::N_THREADS + threadIdx.x; }

    template <bool ALIGNED> __device__ __forceinline__ void load_octets(const hylra_attn & a, const hylra_mla_block & at, const shared_t & shared, int round) {
#pragma unroll
        for (int n = 0; n < N; ++n) {
            const int column = place(round, n)/HYLRA_MLA_OCTETS_K, octet = place(round, n)%HYLRA_MLA_OCTETS_K;
            const hylra_column of = shared.columns[column];
            const bool present = of.head >= 0 && octet < a.n_embd_k/8;
            const float * q = (const float *) ((const char *) a.q + of.token*a.q_nb[1] + max(of.head, 0)*a.q_nb[2] + at.stream*a.q_nb[3]);
            x[n][0] = hylra_mla_floats<ALIGNED>(q + hylra_octet_dim<TYPE>(octet, 0), present); // four values and four lie together in every type
            x[n][1] = hylra_mla_floats<ALIGNED>(q + hylra_octet_dim<TYPE>(octet, 4), present);
        }
    }

    __device__ __forceinline__ void load(const hylra_attn & a, const hylra_mla_block & at, const shared_t & shared, int round) {
        if ((uintptr_t(a.q) | a.q_nb[1] | a.q_nb[2] | a.q_nb[3])%16 == 0) {
            load_octets<true>(a, at, shared, round);
        } else {
            load_octets<false>(a, at, shared, round);
        }
    }

    __device__ __forceinline__ void stage(const hylra_attn & a, shared_t & shared, int round) const {
        const float scale = a.softcap == 0.0f ? a.scale*HYLRA_LOG2E : a.scale;
#pragma unroll
        for (int n = 0; n < N; ++n) {
            const int column = place(round, n)/HYLRA_MLA_OCTETS_K, octet = place(round, n)%HYLRA_MLA_OCTETS_K;
            shared.q[column][hylra_mla_place(column, octet)] =
                make_uint4(hylra_bits(__floats2half2_rn(x[n][0].x*scale, x[n][0].y*scale)), hylra_bits(__floats2half2_rn(x[n][0].z*scale, x[n][0].w*scale)),
                           hylra_bits(__floats2half2_rn(x[n][1].x*scale, x[n][1].y*scale)), hylra_bits(__floats2half2_rn(x[n][1].z*scale, x[n][1].w*scale)));
        }
    }
};

// A cell and the mask of the block's first token there; as they come, since to look at them is to wait for them
struct hylra_mla_row { int cell; uint16_t mask; };

static __device__ __forceinline__ uint16_t hylra_mla_mask(const hylra_attn & a, int token, int stream, int cell) {
    return ((const uint16_t *) ((const char *) a.mask + token*a.mask_nb[1] + stream*a.mask_nb[3]))[cell];
}

template <bool LISTED>
static __device__ __forceinline__ hylra_mla_row hylra_mla_row_of(const hylra_attn & a, const hylra_mla_block & at, const int32_t * list, int i) {
    const bool present = i < at.end;
    const int first_token = at.column0/(a.n_head/a.n_head_kv);
    return { !present ? -1 : LISTED ? list[i] : i, !LISTED && present && a.mask ? hylra_mla_mask(a, first_token, at.stream, i) : uint16_t(0) };
}

// The row's cell, -1 if no column of the block sees it
template <int COLUMNS> static __device__ __forceinline__ int hylra_mla_seen(const hylra_attn & a, const hylra_cuda_plan & p, const hylra_mla_block & at, const hylra_mla_row & row) {
    const int group = a.n_head/a.n_head_kv, last = min(at.column0 + COLUMNS, p.n_column) - 1;
    bool seen = row.mask != HYLRA_HALF_HIDDEN;
    for (int token = at.column0/group + 1; !seen && token <= last/group; ++token) {
        seen = hylra_mla_mask(a, token, at.stream, row.cell) != HYLRA_HALF_HIDDEN;
    }
    return seen ? row.cell : -1;
}

// Rows of K or V of a tile, on their way: to be waited for. Four threads take a row, so that each looks up one cell and steps through it by constants.
// n_octet: of a row; zeros behind it and where there is no cell
template <int TYPE, int OCTETS>
static __device__ __forceinline__ void hylra_mla_load(const uint8_t * rows, uint64_t nb, int n_octet, const int * cells, uint4 (*tile)[HYLRA_MLA_OCTETS_K]) {
    const int row = threadIdx.x/4, part = threadIdx.x%4, cell = cells[row];
    const uint8_t * from = rows + max(cell, 0)*nb;
    uint4 * to[2] = { &tile[row][hylra_mla_place(row, part)], &tile[row][hylra_mla_place(row, part + 4)] };
#pragma unroll
    for (int i = 0; i < OCTETS/4; ++i) {
        const int octet = 4*i + part;
        const bool present = cell >= 0 && octet < n_octet;
        if constexpr (TYPE == GGML_TYPE_F16) {
            hylra_copy_async(to[i%2] + i/2*8, (const uint4 *) from + (present ? octet : 0), present ? 16 : 0);
        } else {
            to[i%2][i/2*8] = hylra_octet<TYPE, false>(from, octet, present);
        }
    }
    hylra_copy_commit();
}
