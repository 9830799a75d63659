// Attention of one chunk of cells on CUDA, over all cells or over lists: K and V rows are read once for the eight or sixteen columns of a
// warp, straight into matrix fragments. Computes S^T = K Q^T and O^T = V^T P^T, so that cells and head dimensions are the long sides
// and the columns, of which decode has few, the short one. Included once per KV type.
#pragma once

#include "hylra-cuda-mla.cuh"
#include "hylra-cuda-stage.cuh"

// ---- the cells of a tile: rows g and g+8 of the fragments

template <int WIDE> struct hylra_tile {
    int      cell[2];          // -1: none
    uint16_t mask[WIDE][2][2]; // halves, of columns 2t and 2t+1 at the two cells; as they come, since to convert one is to wait for it
};

template <int WIDE, bool LISTED>
static __device__ __forceinline__ hylra_tile<WIDE> hylra_tile_at(const hylra_attn & a, const hylra_column (&columns)[WIDE][2], const int32_t * list, int stream, int first, int end) {
    hylra_tile<WIDE> tile;
    const int g = threadIdx.x%32/4;
    for (int half_tile = 0; half_tile < 2; ++half_tile) {
        const int i = first + g + 8*half_tile;
        tile.cell[half_tile] = i < end ? (LISTED ? list[i] : i) : -1;
        for (int w = 0; w < WIDE; ++w) {
            for (int c = 0; c < 2; ++c) {
                tile.mask[w][half_tile][c] = hylra_cuda_mask<LISTED>(a, columns[w][c], stream, tile.cell[half_tile]);
            }
        }
    }
    return tile;
}

// Forgets cells that no column sees; false if there is no other.
template <int WIDE, bool LISTED> static __device__ __forceinline__ bool hylra_tile_visible(hylra_tile<WIDE> & tile) {
    const int g = threadIdx.x%32/4;
    unsigned any = 0;
    for (int half_tile = 0; half_tile < 2; ++half_tile) {
        bool seen = tile.cell[half_tile] >= 0;
        if (!LISTED) {
            seen = false;
            for (int w = 0; w < WIDE; ++w) {
                seen = seen || tile.mask[w][half_tile][0] != HYLRA_HALF_HIDDEN || tile.mask[w][half_tile][1] != HYLRA_HALF_HIDDEN;
            }
        }
        const unsigned lanes = __ballot_sync(0xFFFFFFFFu, seen);
        tile.cell[half_tile] = lanes >> 4*g & 15 ? tile.cell[half_tile] : -1;
        any |= lanes;
    }
    return any != 0;
}

// ---- the kernel

// The queries of a thread, as fragments shared[wide][n_embd_k/32][lane] in the end. Where they lie is known before the kernels before this one are awaited, and they
// are on their way while a thread waits for something else (12.9 -> 12.1 us for attend of QwQ-32B at 8192 cells, with what hylra_place_of and
// hylra_store_merged save). Padding reads what lies next to it: of columns that are not stored, or times zeros of K.
template <int TYPE, int EMBD, int WIDE, int N_THREADS, bool LISTED> struct hylra_queries {
    static constexpr int N = (WIDE*EMBD + N_THREADS - 1)/N_THREADS;
    const float * rows[N];
    float x[N][8];

    static __device__ __forceinline__ int fragment(int n) { return min(int(threadIdx.x) + n*N_THREADS, WIDE*EMBD - 1); }

    __device__ __forceinline__ hylra_queries(const hylra_attn & a, const hylra_cuda_plan & p, int first_column, int head_kv, int token, int stream) {
#pragma unroll
        for (int n = 0; n < N; ++n) {
            const int column = min(first_column + fragment(n)/EMBD*8 + fragment(n)%32/4, p.n_column - 1);
            const hylra_column_place at = hylra_place_of<LISTED>(p, column, token);
            rows[n] = (const float *) ((const char *) a.q + at.token*a.q_nb[1] + (head_kv*p.group + at.in_group)*a.q_nb[2] + stream*a.q_nb[3]);
        }
    }

    __device__ __forceinline__ void load(const hylra_attn & a) {
#pragma unroll
        for (int n = 0; n < N; ++n) {
            const int octet = fragment(n)/32%(EMBD/32)*4 + fragment(n)%4;
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                x[n][j] = rows[n][min(hylra_octet_dim<TYPE>(octet, j), a.n_embd_k - 1)];
            }
        }
    }

    __device__ __forceinline__ void stage(const hylra_attn & a, uint4 * shared) const {
        const float scale = a.softcap == 0.0f ? a.scale*HYLRA_LOG2E : a.scale;
#pragma unroll
        for (int n = 0; n < N; ++n) {
            const int i = int(threadIdx.x) + n*N_THREADS;
            if (i < WIDE*EMBD) {
                shared[i] = make_uint4(hylra_bits(__floats2half2_rn(x[n][0]*scale, x[n][1]*scale)), hylra_bits(__floats2half2_rn(x[n][2]*scale, x[n][3]*scale)),
                                       hylra_bits(__floats2half2_rn(x[n][4]*scale, x[n][5]*scale)), hylra_bits(__floats2half2_rn(x[n][6]*scale, x[n][7]*scale)));
            }
        }
    }
};

// The K octets of the two cells whose rows a lane holds
template <int TYPE, int EMBD, int WIDE>
static __device__ __forceinline__ void hylra_load_k(const hylra_side<TYPE, EMBD> & k, int slot, const hylra_tile<WIDE> & tile, uint4 (&rows)[EMBD/32][2]) {
    const int g = threadIdx.x%32/4, t = threadIdx.x%4;
#pragma unroll
    for (int i = 0; i < EMBD/32; ++i) {
        rows[i][0] = k.octet(slot, g,     tile.cell[0], i*4 + t);
        rows[i][1] = k.octet(slot, g + 8, tile.cell[1], i*4 + t);
    }
}

// s[wide]: += K Q^T
template <int EMBD, int WIDE>
static __device__ __forceinline__ void hylra_add_k(const uint4 (&rows)[EMBD/32][2], const uint4 * q_frags, float (&s)[WIDE][4]) {
#pragma unroll
    for (int i = 0; i < EMBD/32; ++i) {
#pragma unroll
        for (int w = 0; w < WIDE; ++w) {
            const uint4 q = q_frags[(w*(EMBD/32) + i)*32 + threadIdx.x%32];
            hylra_mma(s[w], rows[i][0].x, rows[i][1].x, rows[i][0].y, rows[i][1].y, q.x, q.y);
            hylra_mma(s[w], rows[i][0].z, rows[i][1].z, rows[i][0].w, rows[i][1].w, q.z, q.w);
        }
    }
}

// Products become logits, base 2.
template <int WIDE>
static __device__ __forceinline__ void hylra_finish_logits(const hylra_attn & a, const hylra_column (&columns)[WIDE][2], const hylra_tile<WIDE> & tile, float (&s)[WIDE][4]) {
#pragma unroll
    for (int w = 0; w < WIDE; ++w) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float x = a.softcap == 0.0f ? s[w][i] : HYLRA_LOG2E*a.softcap*tanhf(s[w][i]/a.softcap);
            s[w][i] = x + __half2float(__ushort_as_half(tile.mask[w][i/2][i%2]))*columns[w][i%2].slope;
        }
    }
}

// Logits become weights; returns by how much earlier outputs shrink
static __device__ __forceinline__ float2 hylra_tile_weights(hylra_softmax & state, float (&s)[4]) {
    float shrink[2];
#pragma unroll
    for (int c = 0; c < 2; ++c) {
        float top = fmaxf(s[c], s[c + 2]);
        for (int mask = 4; mask < 32; mask *= 2) {
            top = fmaxf(top, __shfl_xor_sync(0xFFFFFFFFu, top, mask));
        }
        const float ref  = fmaxf(state.ref[c], top - HYLRA_CUDA_HEADROOM);
        const float used = ref == -INFINITY ? 0.0f : ref; // nothing seen so far
        shrink[c] = exp2f(state.ref[c] - used);
        s[c]     = exp2f(s[c]     - used);
        s[c + 2] = exp2f(s[c + 2] - used);
        state.sum[c] = state.sum[c]*shrink[c] + s[c] + s[c + 2];
        state.ref[c] = ref;
    }
    return make_float2(shrink[0], shrink[1]);
}

// Outputs so far are brought to a new reference.
template <int N> static __device__ __forceinline__ void hylra_shrink(const float2 & shrink, float (&out)[N][4]) {
    if (__any_sync(0xFFFFFFFFu, shrink.x != 1.0f || shrink.y != 1.0f)) {
#pragma unroll
        for (int m = 0; m < N; ++m) {
            out[m][0] *= shrink.x;
            out[m][1] *= shrink.y;
            out[m][2] *= shrink.x;
            out[m][3] *= shrink.y;
        }
    }
}

// A batch of V octets of the four cells whose rows a lane holds
template <int TYPE, int EMBD, int BATCH>
static __device__ __forceinline__ void hylra_load_v(const hylra_side<TYPE, EMBD> & v, int slot, const int (&cell)[4], int first, uint4 (&rows)[BATCH][4]) {
    const int g = threadIdx.x%32/4, t = threadIdx.x%4;
#pragma unroll
    for (int b = 0; b < BATCH; ++b) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            rows[b][i] = v.octet(slot, 2*t + i%2 + i/2*8, cell[i], (first + b)*8 + g);
        }
    }
}

// out[wide][4*first ...]: += V^T P^T
template <int EMBD, int WIDE, int BATCH>
static __device__ __forceinline__ void hylra_add_v(const uint4 (&rows)[BATCH][4], int first, const uint32_t (&p)[WIDE][2], float (&out)[WIDE][EMBD/16][4]) {
#pragma unroll
    for (int b = 0; b < BATCH; ++b) {
        const uint32_t * x[4] = { &rows[b][0].x, &rows[b][1].x, &rows[b][2].x, &rows[b][3].x };
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const uint32_t a0 = __byte_perm(x[0][j], x[1][j], 0x5410), a1 = __byte_perm(x[0][j], x[1][j], 0x7632);
            const uint32_t a2 = __byte_perm(x[2][j], x[3][j], 0x5410), a3 = __byte_perm(x[2][j], x[3][j], 0x7632);
#pragma unroll
            for (int w = 0; w < WIDE; ++w) {
                hylra_mma(out[w][(first + b)*4 + j], a0, a1, a2, a3, p[w][0], p[w][1]);
            }
        }
    }
}

// Blocks per processor that registers are kept few enough for
constexpr int hylra_blocks_wanted(int n_embd, int wide, hylra_attend_mode mode) {
    return mode == HYLRA_ATTEND_SCORES ? (n_embd*wide <= 256 ? 4 : 3) : n_embd*wide <= 128 ? 3 : 2;
}

// grid: (blocks of columns * chunks, KV heads, streams or with lists streams * tokens)
template <int TYPE, int EMBD, int WIDE, hylra_attend_mode MODE>
static __global__ void __launch_bounds__(32*HYLRA_CUDA_WARPS, hylra_blocks_wanted(EMBD, WIDE, MODE)) hylra_attend_kernel(const __grid_constant__ hylra_cuda_job job) {
    constexpr bool LISTED = MODE == HYLRA_ATTEND_LISTED, SCORES = MODE == HYLRA_ATTEND_SCORES;
    constexpr int  V_BATCH = EMBD <= 128 ? EMBD/64 : 2;
    using sides_t = hylra_sides<TYPE, EMBD, SCORES ? 1 : 2, hylra_stage_shape<TYPE, EMBD>::STAGES>;
    constexpr bool STAGED = sides_t::STAGED, V_EARLY = EMBD*WIDE <= 128 && !STAGED; // V under way while K is computed: where registers allow
    constexpr int  STAGES = sides_t::STAGES, MERGE_BYTES = SCORES ? 16 : 4*HYLRA_CUDA_WARPS*HYLRA_SHARED_FLOATS<EMBD>;
    __shared__ uint4  q[WIDE*EMBD];
    __shared__ __align__(16) uint8_t room[hylra_room_bytes(HYLRA_CUDA_WARPS*sides_t::WARP_BYTES, MERGE_BYTES)];
    __shared__ float2 norms[HYLRA_CUDA_WARPS][8];

    const hylra_attn & a = job.attn;
    const hylra_cuda_plan & p = job.plan;
    const int warp = threadIdx.x/32, t = threadIdx.x%4;
    const int block_column = blockIdx.x%p.n_block_column, chunk = blockIdx.x/p.n_block_column, head_kv = blockIdx.y;
    const int stream = LISTED ? blockIdx.z/a.n_tokens : blockIdx.z, token0 = LISTED ? blockIdx.z%a.n_tokens : 0;
    const int group0 = block_column*WIDE, column0 = group0*8;

    hylra_column columns[WIDE][2];
    hylra_softmax state[WIDE];
    float out[WIDE][EMBD/16][4] = {};
#pragma unroll
    for (int w = 0; w < WIDE; ++w) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            columns[w][c] = hylra_column_of<LISTED>(a, p, column0 + 8*w + 2*t + c, head_kv, token0);
            state[w].ref[c] = -INFINITY;
            state[w].sum[c] = 0.0f;
        }
    }

    const sides_t sides(a, head_kv, stream, room);
    const int32_t * list = LISTED ? (const int32_t *) a.cells + ((size_t(stream)*a.n_tokens + token0)*a.lists + job.head_list[head_kv])*a.n_cells : nullptr;
    const int n_listed = LISTED ? a.n_cells : a.n_kv;
    const int end = min((chunk + 1)*p.chunk_cells, n_listed);
    int first = chunk*p.chunk_cells + warp*HYLRA_CUDA_TILE;
    hylra_queries<TYPE, EMBD, WIDE, 32*HYLRA_CUDA_WARPS, LISTED> queries(a, p, column0, head_kv, token0, stream);

    hylra_await(); // as late as possible: what comes before overlaps with the kernels before this one
    hylra_release();
    hylra_tile<WIDE> next = hylra_tile_at<WIDE, LISTED>(a, columns, list, stream, first, end);
    if constexpr (STAGED && STAGES > 1) {
        sides.copy(0, next.cell);
    }
    queries.load(a);
    if (!LISTED) {
        hylra_clear_bins(job);
    }
    queries.stage(a, q);
    __syncthreads();
    for (int slot = 0; first < end; first += HYLRA_CUDA_STEP, slot ^= STAGES - 1) {
        hylra_tile<WIDE> tile = next;
        next = hylra_tile_at<WIDE, LISTED>(a, columns, list, stream, first + HYLRA_CUDA_STEP, end); // its mask arrives while this tile is computed
        if constexpr (STAGED) {
            __syncwarp(); // all lanes are done with what the slot held
            sides.copy(slot ^ (STAGES - 1), STAGES > 1 ? next.cell : tile.cell);
            hylra_copy_wait<STAGES - 1>();
            __syncwarp();
        }
        if (!hylra_tile_visible<WIDE, LISTED>(tile)) {
            continue;
        }
        const int v_cell[4] = { __shfl_sync(0xFFFFFFFFu, tile.cell[0], 8*t), __shfl_sync(0xFFFFFFFFu, tile.cell[0], 8*t + 4),
                                __shfl_sync(0xFFFFFFFFu, tile.cell[1], 8*t), __shfl_sync(0xFFFFFFFFu, tile.cell[1], 8*t + 4) };
        float s[WIDE][4] = {};
        uint32_t weights[WIDE][2], p_frags[WIDE][2];
        uint4 rows[V_BATCH][4], k_rows[EMBD/32][2];
        if constexpr (V_EARLY && !SCORES) {
            hylra_load_v(sides.v, slot, v_cell, 0, rows);
        }
        hylra_load_k(sides.k, slot, tile, k_rows);
        hylra_add_k<EMBD, WIDE>(k_rows, q, s);
        hylra_finish_logits(a, columns, tile, s);
#pragma unroll
        for (int w = 0; w < WIDE; ++w) {
            const float2 shrink = hylra_tile_weights(state[w], s[w]);
            if constexpr (!SCORES) {
                hylra_shrink(shrink, out[w]);
            }
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                weights[w][i] = hylra_bits(__floats2half2_rn(s[w][2*i], s[w][2*i + 1]));
                p_frags[w][i] = SCORES ? 0u : hylra_transpose(weights[w][i]);
            }
        }
#pragma unroll
        for (int octets = 0; octets < (SCORES ? 0 : EMBD/64); octets += V_BATCH) {
            if (!V_EARLY || octets > 0) {
                hylra_load_v(sides.v, slot, v_cell, octets, rows);
            }
            hylra_add_v<EMBD, WIDE, V_BATCH>(rows, octets, p_frags, out);
        }
        if (!LISTED && job.select_lists) {
#pragma unroll
            for (int w = 0; w < WIDE; ++w) {
                hylra_store_weights(job, (size_t(stream)*a.n_head_kv + head_kv)*p.n_group + group0 + w, first, tile.cell, state[w], weights[w]);
            }
        }
    }

#pragma unroll
    for (int w = 0; w < WIDE; ++w) {
        hylra_sum_lanes(state[w]);
        if constexpr (SCORES) {
            hylra_store_state(job, chunk, stream, head_kv, column0 + 8*w, state[w], norms);
        } else {
            hylra_store_merged<LISTED, TYPE, EMBD>(job, chunk, stream, head_kv, token0, column0 + 8*w, state[w], out[w], (float *) room, norms);
        }
    }
}

// ---- launch

template <int TYPE, int EMBD, int WIDE> static void hylra_launch(const hylra_cuda_job & job, cudaStream_t stream) {
    const hylra_attn & a = job.attn;
    const dim3 grid(job.plan.n_block_column*job.plan.n_chunk, a.n_head_kv, a.cells ? a.n_stream*a.n_tokens : a.n_stream);
    const auto enqueue = [&](auto mode) {
        hylra_enqueue<hylra_attend_kernel<TYPE, EMBD, WIDE, decltype(mode)::value>>(grid, 32*HYLRA_CUDA_WARPS, 0, stream, job);
    };
    hylra_with_mode(job, enqueue);
}

template <int TYPE, int EMBD> static void hylra_launch_wide(const hylra_cuda_job & job, cudaStream_t stream) {
    job.plan.wide == 2 ? hylra_launch<TYPE, EMBD, 2>(job, stream) : hylra_launch<TYPE, EMBD, 1>(job, stream);
}

template <int TYPE> static void hylra_attend_type(const hylra_cuda_job & job, cudaStream_t stream) {
    const int n_embd = job.attn.n_embd_k > job.attn.n_embd_v ? job.attn.n_embd_k : job.attn.n_embd_v;
    if (job.plan.mla) {
        hylra_mla_launch<TYPE>(job, stream);
    } else if (n_embd <= 64) {
        hylra_launch_wide<TYPE, 64>(job, stream);
    } else if (n_embd <= 128) {
        hylra_launch_wide<TYPE, 128>(job, stream);
    } else {
        hylra_launch_wide<TYPE, 256>(job, stream);
    }
}
