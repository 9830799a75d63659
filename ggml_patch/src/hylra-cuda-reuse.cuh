// Attention to lists in one launch, from Hopper on: the blocks that share the cells of a KV head and token are a cluster, which adds its partial
// outputs in its shared memory instead of leaving them to a second kernel. Included once per KV type; older cards run attend and reduce.
#pragma once

#include "hylra-cuda-attend.cuh"

#include <cooperative_groups.h>

constexpr int HYLRA_REUSE_WARPS = 4; // of a block; eight are slower in clusters of 16, and in those of 8 with several sequences (docs/cuda/variants-reuse.txt)

// Blocks per processor that registers are kept few enough for: with one alone, eight clusters of 16 need eight parts of the card of 16 free processors each
constexpr int hylra_reuse_blocks(int n_embd, int wide) { return n_embd*wide <= 128 ? 3 : 1; }

// Partial outputs arrive here, in slices of 32 dimensions; slice i of the group's columns belongs to block i%CLUSTER.
template <int EMBD, int WIDE, int CLUSTER> struct hylra_inbox {
    static constexpr int SLOTS = WIDE*8*(EMBD/32)/CLUSTER;
    float  parts[CLUSTER][SLOTS][32]; // by the block that sent it
    float2 norms[CLUSTER][WIDE*8];    // reference and sum of the columns
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

// One group of columns of a block is added and sent to the blocks that finish it. n_column: of the group; shared, norms: of hylra_share_outputs
template <int TYPE, int EMBD, int WIDE, int WARPS, int CLUSTER>
static __device__ void hylra_send(const hylra_softmax & state, const float (&out)[EMBD/16][4], int w, int n_column, float * shared, float2 (*norms)[8],
                                  hylra_inbox<EMBD, WIDE, CLUSTER> & inbox) {
    const auto cluster = cooperative_groups::this_cluster();
    const int lane = threadIdx.x%32, rank = blockIdx.x%CLUSTER;
    hylra_share_outputs<TYPE, EMBD>(state, out, shared, norms);
    for (int column = threadIdx.x/32; column < min(n_column, 8); column += WARPS) {
        float factor[WARPS];
        const float2 norm = hylra_merged_norm(norms, column, factor);
        if (lane < CLUSTER) {
            *cluster.map_shared_rank(&inbox.norms[rank][w*8 + column], lane) = norm;
        }
#pragma unroll
        for (int part = 0; part < EMBD/32; ++part) {
            float x = 0.0f;
#pragma unroll
            for (int i = 0; i < WARPS; ++i) {
                x += factor[i]*shared[hylra_shared_row<EMBD>(i, column) + part*32 + lane];
            }
            const int slice = (w*8 + column)*(EMBD/32) + part;
            *cluster.map_shared_rank(&inbox.parts[rank][slice/CLUSTER][lane], slice%CLUSTER) = x;
        }
    }
}

// By a warp: the sum over the blocks of one slice, whose column is `column`, for this lane's dimension. sink: of the column's head, base 2; -inf: none
template <int EMBD, int WIDE, int CLUSTER>
static __device__ __forceinline__ float hylra_finish(const hylra_inbox<EMBD, WIDE, CLUSTER> & inbox, int slot, int column, float sink) {
    const int lane = threadIdx.x%32;
    const float2 norm = inbox.norms[lane%CLUSTER][column];
    float parts[CLUSTER];
#pragma unroll
    for (int rank = 0; rank < CLUSTER; ++rank) {
        parts[rank] = inbox.parts[rank][slot][lane]; // on their way while the factors are computed
    }
    float ref = fmaxf(norm.x, sink);
#pragma unroll
    for (int mask = CLUSTER/2; mask > 0; mask /= 2) {
        ref = fmaxf(ref, __shfl_xor_sync(0xFFFFFFFFu, ref, mask));
    }
    const float factor = norm.x == -INFINITY ? 0.0f : exp2f(norm.x - ref);
    float sum = factor*norm.y, x = 0.0f;
#pragma unroll
    for (int mask = CLUSTER/2; mask > 0; mask /= 2) {
        sum += __shfl_xor_sync(0xFFFFFFFFu, sum, mask);
    }
    sum += sink == -INFINITY ? 0.0f : exp2f(sink - ref);
#pragma unroll
    for (int rank = 0; rank < CLUSTER; ++rank) {
        x += __shfl_sync(0xFFFFFFFFu, factor, rank)*parts[rank];
    }
    return sum > 0.0f ? x/sum : 0.0f; // a row without visible cells gives zeros, as in llama.cpp
}

// What a block works on: cells of one KV head and token, for the columns from column0 on
struct hylra_reuse_place { int rank, column0, head_kv, stream, token; };

template <int WIDE, int CLUSTER> static __device__ __forceinline__ hylra_reuse_place hylra_reuse_place_of(const hylra_attn & a) {
    return { int(blockIdx.x)%CLUSTER, int(blockIdx.x)/CLUSTER*WIDE*8, int(blockIdx.y), int(blockIdx.z)/a.n_tokens, int(blockIdx.z)%a.n_tokens };
}

template <int EMBD, int WIDE> struct hylra_reuse_state {
    hylra_column  columns[WIDE][2];
    hylra_softmax softmax[WIDE];
    float         out[WIDE][EMBD/16][4];
};

template <int EMBD, int WIDE>
static __device__ __forceinline__ void hylra_reuse_begin(const hylra_cuda_job & job, const hylra_reuse_place & at, hylra_reuse_state<EMBD, WIDE> & state) {
#pragma unroll
    for (int w = 0; w < WIDE; ++w) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            state.columns[w][c] = hylra_column_of<true>(job.attn, job.plan, at.column0 + 8*w + 2*(threadIdx.x%4) + c, at.head_kv, at.token);
            state.softmax[w].ref[c] = -INFINITY;
            state.softmax[w].sum[c] = 0.0f;
        }
#pragma unroll
        for (int m = 0; m < EMBD/16; ++m) {
            state.out[w][m][0] = state.out[w][m][1] = state.out[w][m][2] = state.out[w][m][3] = 0.0f;
        }
    }
}

// Adds a tile whose K rows, and V_EARLY its first V rows, are on their way.
template <int TYPE, int EMBD, int WIDE, bool V_EARLY, int V_BATCH>
static __device__ __forceinline__ void hylra_reuse_tile(const hylra_attn & a, const hylra_side<TYPE, EMBD> & v, int slot, const hylra_tile<WIDE> & tile, const int (&v_cell)[4],
                                                        const uint4 (&k_rows)[EMBD/32][2], uint4 (&v_rows)[V_BATCH][4], const uint4 * q, hylra_reuse_state<EMBD, WIDE> & state) {
    float s[WIDE][4] = {};
    uint32_t p_frags[WIDE][2];
    hylra_add_k<EMBD, WIDE>(k_rows, q, s);
    hylra_finish_logits(a, state.columns, tile, s);
#pragma unroll
    for (int w = 0; w < WIDE; ++w) {
        hylra_shrink(hylra_tile_weights(state.softmax[w], s[w]), state.out[w]);
        p_frags[w][0] = hylra_transpose(hylra_bits(__floats2half2_rn(s[w][0], s[w][1])));
        p_frags[w][1] = hylra_transpose(hylra_bits(__floats2half2_rn(s[w][2], s[w][3])));
    }
#pragma unroll
    for (int octets = 0; octets < EMBD/64; octets += V_BATCH) {
        if (!V_EARLY || octets > 0) {
            hylra_load_v(v, slot, v_cell, octets, v_rows);
        }
        hylra_add_v<EMBD, WIDE>(v_rows, octets, p_frags, state.out);
    }
}

// Has the second-level cache fetch the rows of a later tile, which no registers are left for: a lane one line of K or V of each of its two cells at a time.
// 7.8 -> 7.3 us for a layer of QwQ-32B at 61440 cells, eight clusters of 16; four sequences, whose tiles are many, lose by it.
template <int WIDE>
static __device__ __forceinline__ void hylra_prefetch_tile(const hylra_attn & a, const uint8_t * k, const uint8_t * v, const hylra_tile<WIDE> & tile) {
    constexpr int LINE_BYTES = 128;
    const bool of_k = threadIdx.x%4 < 2;
    const uint64_t nb = of_k ? a.k_nb[1] : a.v_nb[1], row_bytes = of_k ? a.n_embd_k*a.k_nb[0] : a.n_embd_v*a.v_nb[0];
    for (int i = 0; i < 2; ++i) {
        const uint8_t * row = (of_k ? k : v) + tile.cell[i]*nb;
        for (uint64_t at = threadIdx.x%2*LINE_BYTES; tile.cell[i] >= 0 && at < row_bytes; at += 2*LINE_BYTES) {
            hylra_prefetch(row + at);
        }
    }
}

// Quantised rows of both tiles are under way at once where that fits static shared memory beside the inbox.
template <int TYPE, int EMBD, int WIDE> using hylra_reuse_sides = hylra_sides<TYPE, EMBD, 2, WIDE == 1 ? hylra_stage_shape<TYPE, EMBD>::STAGES : 1>;

// The warp's tiles of the block's cells: the rows of the first are asked for as soon as the list is there, before the queries are.
// A warp without cells goes through it once too: nothing that it adds counts. What the arguments alone say is computed before the kernels before
// this one are awaited, while they still run: 8.6 -> 7.9 us for a layer of QwQ-32B at 61440 cells.
template <int TYPE, int EMBD, int WIDE, int WARPS, int CLUSTER>
static __device__ __forceinline__ void hylra_reuse_tiles(const hylra_cuda_job & job, const hylra_reuse_place & at, uint4 * q, uint8_t * room, hylra_reuse_state<EMBD, WIDE> & state) {
    constexpr int  V_BATCH = EMBD <= 128 ? EMBD/64 : 2;
    using sides_t = hylra_reuse_sides<TYPE, EMBD, WIDE>;
    constexpr bool STAGED = sides_t::STAGED, V_EARLY = EMBD*WIDE <= 128 && !STAGED;
    constexpr int  STAGES = sides_t::STAGES;
    const hylra_attn & a = job.attn;
    const int t = threadIdx.x%4;
    const sides_t sides(a, at.head_kv, at.stream, room);
    const int32_t * list = (const int32_t *) a.cells + (size_t(blockIdx.z)*a.lists + job.head_list[at.head_kv])*a.n_cells;
    const int per_block = hylra_ceil_div(a.n_cells, CLUSTER*HYLRA_CUDA_TILE)*HYLRA_CUDA_TILE, end = min((at.rank + 1)*per_block, a.n_cells);
    int first = at.rank*per_block + int(threadIdx.x)/32*HYLRA_CUDA_TILE;
    hylra_queries<TYPE, EMBD, WIDE, 32*WARPS, true> queries(a, job.plan, at.column0, at.head_kv, at.token, at.stream);
    hylra_await();
    hylra_release();
    const auto look = [&](int from) { return hylra_tile_at<WIDE, true>(a, state.columns, list, at.stream, from, end); };
    hylra_tile<WIDE> tile = look(first), next = look(first + HYLRA_CUDA_TILE*WARPS);
    if constexpr (STAGED) {
        sides.copy(0, tile.cell);
    }
    queries.load(a);
    int slot = 0;
    for (bool staged = false;; staged = true, slot ^= STAGES - 1) {
        const int v_cell[4] = { __shfl_sync(0xFFFFFFFFu, tile.cell[0], 8*t), __shfl_sync(0xFFFFFFFFu, tile.cell[0], 8*t + 4),
                                __shfl_sync(0xFFFFFFFFu, tile.cell[1], 8*t), __shfl_sync(0xFFFFFFFFu, tile.cell[1], 8*t + 4) };
        uint4 k_rows[EMBD/32][2], v_rows[V_BATCH][4];
        if constexpr (!STAGED) {
            hylra_load_k(sides.k, slot, tile, k_rows);
        } else if (STAGES > 1) {
            sides.copy(slot ^ 1, next.cell);
        }
        if constexpr (V_EARLY) {
            hylra_load_v(sides.v, slot, v_cell, 0, v_rows);
        }
        if constexpr (CLUSTER > 8 && !STAGED) {
            hylra_prefetch_tile(a, sides.k.base, sides.v.base, next);
        }
        if (!staged) {
            queries.stage(a, q);
            __syncthreads();
        }
        if constexpr (STAGED) {
            hylra_copy_wait<STAGES - 1>();
            __syncwarp();
            hylra_load_k(sides.k, slot, tile, k_rows);
        }
        first += HYLRA_CUDA_TILE*WARPS;
        const hylra_tile<WIDE> later = look(first + HYLRA_CUDA_TILE*WARPS);
        hylra_reuse_tile<TYPE, EMBD, WIDE, V_EARLY, V_BATCH>(a, sides.v, slot, tile, v_cell, k_rows, v_rows, q, state);
        if (first >= end) {
            return;
        }
        if constexpr (STAGED) {
            __syncwarp(); // all lanes are done with what the slot held
            if (STAGES == 1) {
                sides.copy(0, next.cell);
            }
        }
        tile = next;
        next = later;
    }
}

// The warp's slices of the output: where they go, and the sinks of their heads, is known before anything is computed.
template <int EMBD, int WIDE, int WARPS, int CLUSTER> struct hylra_results {
    using inbox_t = hylra_inbox<EMBD, WIDE, CLUSTER>;
    static constexpr int N = (inbox_t::SLOTS + WARPS - 1)/WARPS;
    bool    used[N]; // by a column, the same for all lanes
    float * to[N];   // nullptr: the lane has no dimension of the head
    float   sink[N];

    static __device__ __forceinline__ int slot(int n) { return int(threadIdx.x)/32 + n*WARPS; }
    static __device__ __forceinline__ int slice(int n, int rank) { return slot(n)*CLUSTER + rank; }

    __device__ __forceinline__ hylra_results(const hylra_cuda_job & job, const hylra_reuse_place & at, float * output) {
        const hylra_attn & a = job.attn;
#pragma unroll
        for (int n = 0; n < N; ++n) {
            const int column = slice(n, at.rank)/(EMBD/32), d = slice(n, at.rank)%(EMBD/32)*32 + threadIdx.x%32;
            const hylra_column of = hylra_column_of<true>(a, job.plan, at.column0 + column, at.head_kv, at.token);
            used[n] = slot(n) < inbox_t::SLOTS && of.head >= 0;
            to[n]   = used[n] && d < a.n_embd_v ? output + hylra_cuda_row(a, at.stream, of)*a.n_embd_v + d : nullptr;
            sink[n] = used[n] && a.sinks ? ((const float *) a.sinks)[of.head]*HYLRA_LOG2E : -INFINITY;
        }
    }

    __device__ __forceinline__ void store(const inbox_t & inbox, int rank) const {
#pragma unroll
        for (int n = 0; n < N; ++n) {
            if (used[n]) {
                const float x = hylra_finish(inbox, slot(n), slice(n, rank)/(EMBD/32), sink[n]);
                if (to[n]) {
                    *to[n] = x;
                }
            }
        }
    }
};

#endif

// grid: (CLUSTER * blocks of columns, KV heads, streams * tokens). output: F32 [n_embd_v, n_head, n_tokens, n_stream]
template <int TYPE, int EMBD, int WIDE, int WARPS, int CLUSTER>
static __global__ void __launch_bounds__(32*WARPS, hylra_reuse_blocks(EMBD, WIDE)) hylra_reuse_kernel(const __grid_constant__ hylra_cuda_job job, float * output) {
#if __CUDA_ARCH__ >= 900
    __shared__ uint4  q[WIDE*EMBD];
    __shared__ __align__(16) uint8_t room[hylra_room_bytes(WARPS*hylra_reuse_sides<TYPE, EMBD, WIDE>::WARP_BYTES, 4*WARPS*HYLRA_SHARED_FLOATS<EMBD>)];
    __shared__ float2 norms[WARPS][8];
    __shared__ hylra_inbox<EMBD, WIDE, CLUSTER> inbox;
    const auto cluster = cooperative_groups::this_cluster();
    cluster.barrier_arrive(); // waited for where another block's memory is written first: by then all have begun
    const hylra_reuse_place at = hylra_reuse_place_of<WIDE, CLUSTER>(job.attn);
    hylra_reuse_state<EMBD, WIDE> state;
    hylra_reuse_begin(job, at, state);
    const hylra_results<EMBD, WIDE, WARPS, CLUSTER> results(job, at, output);
    hylra_reuse_tiles<TYPE, EMBD, WIDE, WARPS, CLUSTER>(job, at, q, room, state);
    cluster.barrier_wait();
#pragma unroll
    for (int w = 0; w < WIDE; ++w) {
        hylra_sum_lanes(state.softmax[w]);
        hylra_send<TYPE, EMBD, WIDE, WARPS, CLUSTER>(state.softmax[w], state.out[w], w, job.plan.n_column - at.column0 - 8*w, (float *) room, norms, inbox);
    }
    cluster.sync(); // all has arrived; nothing of another block is used after this
    results.store(inbox, at.rank);
#endif
}

// ---- launch

// Whether this card runs code of ours for Hopper and takes clusters of that size; asked once per card
template <auto KERNEL, int CLUSTER> static bool hylra_takes_cluster(cudaLaunchConfig_t & config) {
    static signed char known[64] = {};
    int device = 0, n_cluster = 0;
    if (!hylra_overlaps<KERNEL>() || cudaGetDevice(&device) != cudaSuccess) {
        return false; // hylra_overlaps is false beyond 64 devices
    }
    if (!known[device]) {
        const bool may = CLUSTER <= 8 || cudaFuncSetAttribute(KERNEL, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) == cudaSuccess;
        known[device] = may && cudaOccupancyMaxActiveClusters(&n_cluster, KERNEL, &config) == cudaSuccess && n_cluster > 0 ? 1 : -1;
        cudaGetLastError(); // a refusal is an answer, not an error
    }
    return known[device] > 0;
}

// False if the card cannot; output nullptr only asks.
template <int TYPE, int EMBD, int WIDE, int WARPS, int CLUSTER> static bool hylra_enqueue_reuse(const hylra_cuda_job & job, float * output, cudaStream_t stream) {
    constexpr auto KERNEL = hylra_reuse_kernel<TYPE, EMBD, WIDE, WARPS, CLUSTER>;
    cudaLaunchAttribute attributes[2] = {};
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim = { CLUSTER, 1, 1 };
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(CLUSTER*job.plan.n_block_column, job.attn.n_head_kv, job.attn.n_stream*job.attn.n_tokens);
    config.blockDim = dim3(32*WARPS);
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = 1;
    if (!hylra_takes_cluster<KERNEL, CLUSTER>(config)) {
        return false;
    }
    config.numAttrs = 2;
    if (output) {
        cudaLaunchKernelEx(&config, KERNEL, job, output);
    }
    return true;
}

// One sequence of eight KV heads makes eight clusters: of 16 blocks they fill the card. Four sequences fill it with clusters of eight; from there on attend and
// reduce are faster (us on an H200, 61440 or 65536 cells, two launches / 16 blocks / 8 blocks: 10.1 / 9.2 / 9.6; 18.0 / 21.3 / 16.5; 26.7 / 37.2 / 30.8).
constexpr int HYLRA_REUSE_FEW = 8, HYLRA_REUSE_MANY = 32;

template <int TYPE, int EMBD, int WIDE> static bool hylra_reuse_sized(const hylra_cuda_job & job, float * output, cudaStream_t stream) {
    const int n_cluster = job.plan.n_block_column*job.attn.n_head_kv*job.attn.n_stream*job.attn.n_tokens;
    if (n_cluster > HYLRA_REUSE_MANY) {
        return false;
    }
    return (n_cluster <= HYLRA_REUSE_FEW && hylra_enqueue_reuse<TYPE, EMBD, WIDE, HYLRA_REUSE_WARPS, 16>(job, output, stream)) ||
           hylra_enqueue_reuse<TYPE, EMBD, WIDE, HYLRA_REUSE_WARPS, 8>(job, output, stream);
}

// False where attend and reduce do it: MLA, two groups of columns of 256 dimensions, many rows, cards before Hopper; and quantised rows of 256, for which shared memory
// holds one tile (12.1 us for 11.6)
template <int TYPE> static bool hylra_reuse_type(const hylra_cuda_job & job, float * output, cudaStream_t stream) {
    const int n_embd = job.attn.n_embd_k > job.attn.n_embd_v ? job.attn.n_embd_k : job.attn.n_embd_v;
    if (job.plan.mla || (n_embd > 128 && job.plan.wide > 1)) {
        return false;
    }
    if (n_embd > 128) {
        if constexpr (hylra_stage_shape<TYPE, 256>::USED) {
            return false;
        } else {
            return hylra_reuse_sized<TYPE, 256, 1>(job, output, stream);
        }
    }
    if (n_embd > 64) {
        return job.plan.wide > 1 ? hylra_reuse_sized<TYPE, 128, 2>(job, output, stream) : hylra_reuse_sized<TYPE, 128, 1>(job, output, stream);
    }
    return job.plan.wide > 1 ? hylra_reuse_sized<TYPE, 64, 2>(job, output, stream) : hylra_reuse_sized<TYPE, 64, 1>(job, output, stream);
}
