// Attention of one chunk of cells on CUDA where a row holds more than 256 values (MLA: K of 576, whose first 512 are V, for up to 128 heads of one KV head).
// Unlike in hylra-cuda-attend.cuh, a block reads each row once into shared memory, where all its columns find it: S^T = K Q^T, then O = P V with the
// outputs of 16 to 64 columns spread over the registers of the block. Included once per KV type.
#pragma once

#include "hylra-cuda-mla-shared.cuh"

// ---- what a warp computes: first 16 cells and half of the columns, then all columns and a part of the dimensions

// Two octets of the warp's cells and columns as ldmatrix gives them: of K cells 0-7 and 8-15 of one octet, then of the next; of Q both octets of eight
// columns, then of the next eight
template <int COLUMNS> struct hylra_mla_fragments {
    static constexpr int N = COLUMNS > 16 ? COLUMNS/32 : 1;
    uint32_t k[4], q[N][4];

    __device__ __forceinline__ void load(const uint4 * k_row, const uint4 (*q_rows)[HYLRA_MLA_OCTETS_K], int octet) {
        const int lane = threadIdx.x%32;
        hylra_ldmatrix(k, k_row + hylra_mla_place(lane, octet + lane/16));
#pragma unroll
        for (int n = 0; n < N; ++n) {
            hylra_ldmatrix(q[n], q_rows[16*n] + hylra_mla_place(lane, octet + lane/8%2));
        }
    }

    __device__ __forceinline__ void multiply(float (&s)[COLUMNS/16][4]) const {
#pragma unroll
        for (int n = 0; n < COLUMNS/16; ++n) {
            hylra_mma(s[n], k[0], k[1], k[2], k[3], q[n/2][n%2*2], q[n/2][n%2*2 + 1]);
        }
    }
};

// s: += K Q^T. Each pair of octets is on its way while the one before it is multiplied.
template <int COLUMNS, int CELLS>
static __device__ __forceinline__ void hylra_mla_logits(const hylra_mla_shared<COLUMNS, CELLS> & shared, const uint4 (*tile)[HYLRA_MLA_OCTETS_K], int cell0, int column0,
                                                        float (&s)[COLUMNS/16][4]) {
    const int lane = threadIdx.x%32;
    const uint4 * k_row = tile[cell0 + lane%16];
    const auto q_rows = &shared.q[column0 + (COLUMNS > 16 ? lane/16*8 : 0) + lane%8];
    hylra_mla_fragments<COLUMNS> fragments[2];
    fragments[0].load(k_row, q_rows, 0);
#pragma unroll 4
    for (int pair = 0; pair < HYLRA_MLA_OCTETS_K/2; ++pair) {
        if (pair + 1 < HYLRA_MLA_OCTETS_K/2) {
            fragments[(pair + 1)%2].load(k_row, q_rows, 2*pair + 2);
        }
        fragments[pair%2].multiply(s);
    }
}

// Products become logits, base 2; hidden ones -inf. cell: of rows g and g+8. A cell that one column of a token sees is seen by all of them, so that no mask is
// read again; columns of padding get logits too, which nobody reads.
template <int COLUMNS, int CELLS, bool LISTED>
static __device__ __forceinline__ void hylra_mla_finish_logits(const hylra_attn & a, const hylra_mla_shared<COLUMNS, CELLS> & shared, const hylra_mla_block & at,
                                                               const int (&cell)[2], int column0, float (&s)[COLUMNS/16][4]) {
    const bool exact = a.softcap != 0.0f || a.max_bias > 0.0f || (!LISTED && a.mask && a.n_tokens > 1);
    if (!exact) {
#pragma unroll
        for (int i = 0; i < COLUMNS/4; ++i) {
            s[i/4][i%4] = cell[i%4/2] < 0 ? -INFINITY : s[i/4][i%4];
        }
        return;
    }
#pragma unroll
    for (int n = 0; n < COLUMNS/16; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const hylra_column of = shared.columns[column0 + 8*n + 2*(threadIdx.x%4) + i%2];
            const uint16_t mask = hylra_cuda_mask<LISTED>(a, of, at.stream, cell[i/2]);
            s[n][i] = (a.softcap == 0.0f ? s[n][i] : HYLRA_LOG2E*a.softcap*tanhf(s[n][i]/a.softcap)) + __half2float(__ushort_as_half(mask))*of.slope;
        }
    }
}

// The largest logit of each column among the warp's 16 cells, for the other warps. Lanes that differ in g hold the same columns: each step they share them out
// by halves, so that N columns take N - 1 exchanges instead of three each.
template <int COLUMNS, int CELLS>
static __device__ __forceinline__ void hylra_mla_share_peaks(hylra_mla_shared<COLUMNS, CELLS> & shared, const float (&s)[COLUMNS/16][4], int tile16, int column0) {
    constexpr int N = COLUMNS/8; // columns of a lane
    const int lane = threadIdx.x%32;
    float top[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
        top[i] = fmaxf(s[i/2][i%2], s[i/2][i%2 + 2]);
    }
    int first = 0; // of the columns that this lane keeps
#pragma unroll
    for (int left = N, mask = 16; mask >= 4; mask /= 2, left = max(left/2, 1)) {
        const bool upper = lane & mask;
        if (left == 1) {
            top[0] = fmaxf(top[0], __shfl_xor_sync(0xFFFFFFFFu, top[0], mask));
            continue;
        }
#pragma unroll
        for (int i = 0; i < N/2; ++i) {
            if (i < left/2) {
                const float other = __shfl_xor_sync(0xFFFFFFFFu, upper ? top[i] : top[i + left/2], mask);
                top[i] = fmaxf(upper ? top[i + left/2] : top[i], other);
            }
        }
        first += upper ? left/2 : 0;
    }
    shared.peaks[tile16][column0 + first/2*8 + 2*(lane%4) + first%2] = top[0]; // the same value from all lanes that are left with it
}

// Logits become weights, as halves: words of two columns of a cell, SHARED in shared memory too. All warps of the same columns compute the same references.
template <bool SHARED, int COLUMNS, int CELLS>
static __device__ __forceinline__ void hylra_mla_weights(hylra_mla_shared<COLUMNS, CELLS> & shared, hylra_softmax (&state)[COLUMNS/16], const float (&s)[COLUMNS/16][4],
                                                         int tile16, int column0, uint32_t (&words)[COLUMNS/16][2]) {
    const int g = threadIdx.x%32/4, t = threadIdx.x%4;
#pragma unroll
    for (int n = 0; n < COLUMNS/16; ++n) {
        const int column = column0 + 8*n + 2*t;
        float2 top = make_float2(-INFINITY, -INFINITY);
#pragma unroll
        for (int i = 0; i < CELLS/16; ++i) {
            const float2 one = *(const float2 *) &shared.peaks[i][column];
            top = make_float2(fmaxf(top.x, one.x), fmaxf(top.y, one.y));
        }
        float shrink[2], weights[4];
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            const float ref  = fmaxf(state[n].ref[c], (c ? top.y : top.x) - HYLRA_CUDA_HEADROOM);
            const float used = ref == -INFINITY ? 0.0f : ref; // nothing seen so far
            shrink[c] = ref == state[n].ref[c] ? 1.0f : exp2f(state[n].ref[c] - used);
            weights[c]     = hylra_exp2(s[n][c]     - used);
            weights[c + 2] = hylra_exp2(s[n][c + 2] - used);
            state[n].sum[c] = state[n].sum[c]*shrink[c] + weights[c] + weights[c + 2];
            state[n].ref[c] = ref;
        }
        for (int i = 0; i < 2; ++i) {
            words[n][i] = hylra_bits(__floats2half2_rn(weights[2*i], weights[2*i + 1]));
            if constexpr (SHARED) {
                ((uint32_t *) &shared.weight(tile16*16 + g + 8*i, column/8))[t] = words[n][i];
            }
        }
        if (tile16 == 0 && g == 0) {
            *(float2 *) &shared.shrink[column] = make_float2(shrink[0], shrink[1]);
        }
    }
}

// out[columns/16][octets]: columns g and g+8, dimensions 2t and 2t+1 of an octet
template <int COLUMNS, int CELLS, int OCTETS>
static __device__ __forceinline__ void hylra_mla_shrink(const hylra_mla_shared<COLUMNS, CELLS> & shared, float (&out)[COLUMNS/16][OCTETS][4]) {
    const int g = threadIdx.x%32/4;
#pragma unroll
    for (int m = 0; m < COLUMNS/16; ++m) {
        const float shrink[2] = { shared.shrink[16*m + g], shared.shrink[16*m + g + 8] };
        if (__any_sync(0xFFFFFFFFu, shrink[0] != 1.0f || shrink[1] != 1.0f)) {
#pragma unroll
            for (int n = 0; n < OCTETS; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    out[m][n][i] *= shrink[i/2];
                }
            }
        }
    }
}

// out: += P V. Matrices are read transposed: of P 8 cells and 8 columns, then the next columns, then the next cells; of V the next cells, then the next octet
template <int COLUMNS, int CELLS, int OCTETS>
static __device__ __forceinline__ void hylra_mla_add_v(hylra_mla_shared<COLUMNS, CELLS> & shared, const uint4 (*tile)[HYLRA_MLA_OCTETS_K], int octet0,
                                                       float (&out)[COLUMNS/16][OCTETS][4]) {
    const int lane = threadIdx.x%32;
#pragma unroll
    for (int first = 0; first < CELLS; first += 16) {
        uint32_t p[COLUMNS/16][4];
#pragma unroll
        for (int m = 0; m < COLUMNS/16; ++m) {
            hylra_ldmatrix<true>(p[m], &shared.weight(first + lane/16*8 + lane%8, 2*m + lane/8%2));
        }
        const int cell = first + lane%16;
#pragma unroll
        for (int n = 0; n < OCTETS; n += 2) {
            uint32_t v[4];
            hylra_ldmatrix<true>(v, &tile[cell][hylra_mla_place(cell, octet0 + n + lane/16)]);
#pragma unroll
            for (int m = 0; m < COLUMNS/16; ++m) {
                hylra_mma(out[m][n],     p[m][0], p[m][1], p[m][2], p[m][3], v[0], v[1]);
                hylra_mma(out[m][n + 1], p[m][0], p[m][1], p[m][2], p[m][3], v[2], v[3]);
            }
        }
    }
}

// ---- what is stored

// For pooling: peaks and weights of the warp's 16 cells, group after group
template <int COLUMNS>
static __device__ __forceinline__ void hylra_mla_store_weights(const hylra_cuda_job & job, size_t group0, int first, const int (&cell)[2], const hylra_softmax (&state)[COLUMNS/16],
                                                               const uint32_t (&words)[COLUMNS/16][2]) {
    const int g = threadIdx.x%32/4, t = threadIdx.x%4, n_kv = job.attn.n_kv, n_tile = hylra_ceil_div(n_kv, HYLRA_CUDA_TILE);
    uint32_t * weights = (uint32_t *) (job.scratch + job.layout.weights) + (group0*n_kv + first + g)*4 + t;
    float2 * peaks = (float2 *) (job.scratch + job.layout.peaks) + (group0*n_tile + first/HYLRA_CUDA_TILE)*4 + t;
#pragma unroll
    for (int n = 0; n < COLUMNS/16; ++n, weights += 4*size_t(n_kv), peaks += 4*n_tile) {
        for (int i = 0; i < 2; ++i) {
            if (cell[i] >= 0) {
                hylra_store_kept(weights + 32*i, words[n][i]);
            }
        }
        if (g == 0) {
            hylra_store_kept(peaks, make_float2(state[n].ref[0], state[n].ref[1]));
        }
    }
}

// References and sums of the columns, to which all warps of their cells add; leaves what outputs are divided by
template <int COLUMNS, int CELLS>
static __device__ __forceinline__ void hylra_mla_store_norms(const hylra_cuda_job & job, const hylra_mla_block & at, hylra_mla_shared<COLUMNS, CELLS> & shared,
                                                             hylra_softmax (&state)[COLUMNS/16], int tile16, int column0) {
    __syncthreads();
#pragma unroll
    for (int n = 0; n < COLUMNS/16; ++n) {
        const int column = column0 + 8*n + 2*(threadIdx.x%4);
        hylra_sum_lanes(state[n]);
        if (threadIdx.x%32 < 4) {
            *(float2 *) &shared.peaks[tile16][column] = make_float2(state[n].sum[0], state[n].sum[1]);
            *(float2 *) &shared.shrink[column] = make_float2(state[n].ref[0], state[n].ref[1]); // the same of all
        }
    }
    __syncthreads();
    if (threadIdx.x < COLUMNS) {
        float sum = 0.0f;
        for (int i = 0; i < CELLS/16; ++i) {
            sum += shared.peaks[i][threadIdx.x];
        }
        if (shared.columns[threadIdx.x].head >= 0) {
            hylra_store_norm(job, at.chunk, at.stream, shared.columns[threadIdx.x], shared.shrink[threadIdx.x], sum);
        }
        shared.shrink[threadIdx.x] = sum > 0.0f ? 1.0f/sum : 0.0f;
    }
}

// Means over the chunk's cells, as halves in the order of hylra_mla_dim: half the bytes that reduce has to read
template <int COLUMNS, int CELLS, int OCTETS>
static __device__ __forceinline__ void hylra_mla_store_outputs(const hylra_cuda_job & job, const hylra_mla_block & at, const hylra_mla_shared<COLUMNS, CELLS> & shared,
                                                               int octet0, const float (&out)[COLUMNS/16][OCTETS][4]) {
    const int g = threadIdx.x%32/4, t = threadIdx.x%4, n_half = hylra_mla_halves(job.attn);
    __syncthreads();
#pragma unroll
    for (int m = 0; m < COLUMNS/16; ++m) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int column = 16*m + g + 8*i;
            const hylra_column of = shared.columns[column];
            if (of.head < 0) {
                continue;
            }
            const float factor = shared.shrink[column];
            half * to = (half *) (job.scratch + job.layout.outputs) + (hylra_cuda_row(job.attn, at.stream, of)*job.plan.n_chunk + at.chunk)*n_half;
#pragma unroll
            for (int n = 0; n < OCTETS; n += 4) {
                uint32_t words[4];
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    words[j] = hylra_bits(__floats2half2_rn(out[m][n + j][2*i]*factor, out[m][n + j][2*i + 1]*factor));
                }
                if ((octet0 + n)*8 < n_half) {
                    *(uint4 *) &to[(octet0 + n)*8 + t*8] = make_uint4(words[0], words[1], words[2], words[3]);
                }
            }
        }
    }
}

// ---- the kernel

// grid: (blocks of columns * chunks, KV heads, streams or with lists streams * tokens). stages: tiles that shared memory holds, 2 so that one arrives while the other is computed
template <int TYPE, int COLUMNS, int CELLS, hylra_attend_mode MODE>
static __global__ void __launch_bounds__(32*HYLRA_MLA_WARPS<CELLS>, 1) hylra_mla_kernel(const __grid_constant__ hylra_cuda_job job, int stages) {
    constexpr bool LISTED = MODE == HYLRA_ATTEND_LISTED, SCORES = MODE == HYLRA_ATTEND_SCORES;
    constexpr int  OCTETS = HYLRA_MLA_OCTETS_V/HYLRA_MLA_WARPS<CELLS>; // of V that a warp sums
    auto & shared = *(hylra_mla_shared<COLUMNS, CELLS> *) hylra_dynamic_shared();
    const hylra_attn & a = job.attn;
    const hylra_mla_block at = hylra_mla_at<COLUMNS, LISTED>(job);
    const int warp = threadIdx.x/32, g = threadIdx.x%32/4, tile16 = warp/2, column0 = warp%2*(COLUMNS/2), octet0 = warp*OCTETS;
    const uint8_t * k = (const uint8_t *) a.k + at.head_kv*a.k_nb[2] + at.stream*a.k_nb[3];
    const uint8_t * v = (const uint8_t *) a.v + at.head_kv*a.v_nb[2] + at.stream*a.v_nb[3];
    const bool v_in_k = SCORES || (k == v && a.k_nb[1] == a.v_nb[1]);
    const int32_t * list = LISTED ? (const int32_t *) a.cells + (size_t(blockIdx.z)*a.lists + job.head_list[at.head_kv])*a.n_cells : nullptr;
    for (int i = threadIdx.x; i < COLUMNS; i += 32*HYLRA_MLA_WARPS<CELLS>) {
        shared.columns[i] = hylra_column_of<LISTED>(a, job.plan, at.column0 + i, at.head_kv, at.token);
    }
    __syncthreads();
    hylra_softmax state[COLUMNS/16];
    float out[COLUMNS/16][OCTETS][4] = {};
#pragma unroll
    for (int n = 0; n < COLUMNS/16; ++n) {
        state[n].ref[0] = state[n].ref[1] = -INFINITY;
        state[n].sum[0] = state[n].sum[1] = 0.0f;
    }
    const auto look = [&](int first) { return hylra_mla_row_of<LISTED>(a, at, list, threadIdx.x < CELLS ? first + threadIdx.x : at.end); };
    const auto find = [&](const hylra_mla_row & row, int slot) { // the cells of a tile; true if there is one
        const int cell = hylra_mla_seen<COLUMNS>(a, job.plan, at, row);
        if (threadIdx.x < CELLS) {
            shared.cells[slot][threadIdx.x] = cell;
        }
        return __syncthreads_or(cell >= 0) != 0;
    };
    const auto load = [&](int slot) {
        hylra_mla_load<TYPE, HYLRA_MLA_OCTETS_K>(k, a.k_nb[1], a.n_embd_k/8, shared.cells[slot], shared.tiles[stages > 1 ? slot : 0]);
    };

    hylra_await();
    hylra_release();
    const hylra_mla_row rows[2] = { look(at.begin), look(at.begin + CELLS) };
    hylra_mla_queries<TYPE, COLUMNS, CELLS> queries;
    queries.load(a, at, shared, 0);
    bool here = find(rows[0], 0), next = find(rows[1], 1);
    if (here) {
        load(0);
    }
    queries.stage(a, shared, 0);
    for (int round = 1; round < queries.ROUNDS; ++round) {
        queries.load(a, at, shared, round);
        queries.stage(a, shared, round);
    }
    if (!LISTED) {
        hylra_clear_bins(job);
    }
    for (int first = at.begin, slot = 0; first < at.end; first += CELLS, slot ^= 1) {
        const hylra_mla_row later = look(first + 2*CELLS);
        if (next && stages > 1) {
            load(slot ^ 1);
            hylra_copy_wait<1>();
        } else {
            hylra_copy_wait<0>();
        }
        __syncthreads();
        uint4 (*tile)[HYLRA_MLA_OCTETS_K] = shared.tiles[stages > 1 ? slot : 0];
        if (here) {
            const int cell[2] = { shared.cells[slot][tile16*16 + g], shared.cells[slot][tile16*16 + g + 8] };
            float s[COLUMNS/16][4] = {};
            uint32_t words[COLUMNS/16][2];
            hylra_mla_logits(shared, tile, tile16*16, column0, s);
            hylra_mla_finish_logits<COLUMNS, CELLS, LISTED>(a, shared, at, cell, column0, s);
            hylra_mla_share_peaks(shared, s, tile16, column0);
            __syncthreads();
            hylra_mla_weights<!SCORES>(shared, state, s, tile16, column0, words);
            if (!LISTED && job.select_lists && first + tile16*16 < at.end) {
                const size_t group0 = (size_t(at.stream)*a.n_head_kv + at.head_kv)*job.plan.n_group + (at.column0 + column0)/8;
                hylra_mla_store_weights<COLUMNS>(job, group0, first + tile16*16, cell, state, words);
            }
            if (!v_in_k) {
                hylra_mla_load<TYPE, HYLRA_MLA_OCTETS_V>(v, a.v_nb[1], a.n_embd_v/8, shared.cells[slot], tile);
                hylra_copy_wait<0>();
            }
            if constexpr (!SCORES) {
                __syncthreads();
                hylra_mla_shrink(shared, out);
                hylra_mla_add_v(shared, tile, octet0, out);
            }
        }
        here = next;
        next = find(later, slot); // also waits until all have read the tile
        if (here && stages == 1) {
            load(slot ^ 1);
        }
    }
    hylra_mla_store_norms(job, at, shared, state, tile16, column0);
    if constexpr (!SCORES) {
        hylra_mla_store_outputs(job, at, shared, octet0, out);
    }
}

// ---- launch

template <int TYPE, int COLUMNS, int CELLS> static void hylra_mla_enqueue(const hylra_cuda_job & job, size_t shared_bytes, int stages, cudaStream_t stream) {
    const hylra_attn & a = job.attn;
    const dim3 grid(job.plan.n_group*8/COLUMNS*job.plan.n_chunk, a.n_head_kv, a.cells ? a.n_stream*a.n_tokens : a.n_stream);
    hylra_with_mode(job, [&](auto mode) {
        constexpr auto KERNEL = hylra_mla_kernel<TYPE, COLUMNS, CELLS, decltype(mode)::value>;
        cudaFuncSetAttribute(KERNEL, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)); // no node of a graph
        hylra_enqueue<KERNEL>(grid, 32*HYLRA_MLA_WARPS<CELLS>, shared_bytes, stream, job, stages);
    });
}

// False if the card has less shared memory than that: 227 KB per block from Hopper on, 163 on an A100, 99 on other cards since Ampere, 64 on Turing
template <int TYPE, int COLUMNS, int CELLS> static bool hylra_mla_fits(const hylra_cuda_job & job, cudaStream_t stream) {
    using shared_t = hylra_mla_shared<COLUMNS, CELLS>;
    int device = 0, most_bytes = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&most_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    const int stages = shared_t::bytes(2) <= size_t(most_bytes) ? 2 : 1;
    if (shared_t::bytes(stages) > size_t(most_bytes)) {
        return false;
    }
    hylra_mla_enqueue<TYPE, COLUMNS, CELLS>(job, shared_t::bytes(stages), stages, stream);
    return true;
}

template <int TYPE> static void hylra_mla_launch(const hylra_cuda_job & job, cudaStream_t stream) {
    if (!(job.plan.block_columns > 32 ? hylra_mla_fits<TYPE, 64, 64>(job, stream) : hylra_mla_fits<TYPE, 32, 64>(job, stream))) {
        hylra_mla_fits<TYPE, 16, 32>(job, stream);
    }
}
