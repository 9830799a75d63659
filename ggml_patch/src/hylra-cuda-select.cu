// After attend on CUDA: sums over chunks (reduce) and one score per cell and list (pool), which also counts the first digit of every
// score for the radix selection (hylra-cuda-choose.cu, hylra-cuda-cluster.cu). A select layer needs both: they are blocks of one launch, as each waits for attend
// alone (5.5 -> 3.4 us for 8192 cells of eight KV heads).
#include "hylra-attn.h"
#include "hylra-cuda-reduce.cuh"
#include "hylra-radix.h"

#include <cuda_fp16.h>

template <typename PART> static __global__ void __launch_bounds__(REDUCE_THREADS, 2) reduce_kernel(const __grid_constant__ hylra_cuda_job job, float * out) {
    __shared__ __align__(16) float shared[REDUCE_DIMS<PART>*REDUCE_THREADS];
    hylra_await();
    hylra_release();
    reduce_row<REDUCE_THREADS, PART>(job, blockIdx.x, out, shared);
}

void hylra_cuda_reduce(const hylra_cuda_job & job, float * out, cudaStream_t stream) {
    with_part(job, [&](auto part) { hylra_enqueue<reduce_kernel<decltype(part)>>(dim3(rows_of(job.attn)), REDUCE_THREADS, 0, stream, job, out); });
}

// ---- pool: one block per part of the cells, list and token; a thread has four neighbouring cells, which share a tile

constexpr int POOL_THREADS     = 512;
constexpr int POOL_FEW_THREADS = 128; // of a side, where larger blocks would be too few
constexpr int POOL_MIN_BLOCKS  = 128;
constexpr int POOL_MANY_BLOCKS = 512; // from here on a thread takes two quads: one left the card waiting, 36 us for four times 131072 cells
constexpr int POOL_ALL_BLOCKS  = 132; // of 1024 threads

// One row of scores: a list of a token
struct pool_row { int stream, token, list; };

// How a block's threads lie: SIDES times the same quads, each with groups of columns of its own
template <int N_THREADS, int QUADS, int SIDES> struct pool_shape {
    static constexpr int N_SIDE = SIDES;
    static constexpr int LANES  = N_THREADS/SIDES; // threads of a side
    static constexpr int CELLS  = 4*QUADS*LANES;   // of a block
    static constexpr int TILES  = CELLS/HYLRA_CUDA_TILE;

    static __device__ __forceinline__ int lane() { return threadIdx.x%LANES; }
    static __device__ __forceinline__ int side() { return threadIdx.x/LANES; }
};

// Threads that sum the norms of a head: half a warp in small blocks, whose warps would take them in turns
template <int N_THREADS> constexpr int NORM_LANES = N_THREADS <= POOL_FEW_THREADS ? 16 : 32;

// The KV heads of a list lie together, as do the query heads of a KV head. By the host: a kernel that divides waits for it.
struct pool_list {
    int   n_head_kv, heads; // query heads of one KV head
    float share;            // of a query head in the list's mean

    // Groups of eight columns of one KV head
    __device__ __forceinline__ int n_group(int token) const { return (token*heads + heads - 1)/8 - token*heads/8 + 1; }
};

static pool_list pool_list_of(const hylra_cuda_job & job) {
    return { job.attn.n_head_kv/job.select_lists, job.plan.group, float(job.select_lists)/float(job.attn.n_head) };
}

// References and factors of the mean of the list's heads, a few threads each. EARLY: the first norms are asked for before what else a block waits for; blocks that take
// more cells have no registers for them.
template <int N_THREADS, bool EARLY> struct pool_totals {
    static constexpr int LANES = NORM_LANES<N_THREADS>, STEP = N_THREADS/LANES;
    int n_head, row0;
    row_norms<LANES> norms;

    static __device__ __forceinline__ int first() { return threadIdx.x/32*(32/LANES); } // of whole warps
    __device__ __forceinline__ void load(const hylra_cuda_job & job, int at) { norms = norms_of<LANES>(job, row0 + min(at + int(threadIdx.x)%32/LANES, n_head - 1)); }

    __device__ __forceinline__ pool_totals(const hylra_cuda_job & job, const pool_row & row, const pool_list & list) :
        n_head(list.heads*list.n_head_kv), row0((row.stream*job.attn.n_tokens + row.token)*job.attn.n_head + row.list*n_head) {
        if (EARLY) {
            load(job, first());
        }
    }

    __device__ __forceinline__ void store(const hylra_cuda_job & job, const pool_list & list, float2 * totals) {
#pragma unroll 1
        for (int at = first(); at < n_head; at += STEP) {
            if (!EARLY || at != first()) {
                load(job, at);
            }
            const int head = at + threadIdx.x%32/LANES;
            const float2 total = total_of(job, row0 + head, norms);
            if (head < n_head && threadIdx.x%LANES == 0) {
                totals[head] = make_float2(total.x, total.y*list.share);
            }
        }
    }
};

// A group of eight columns of the list: which KV head of it, and which group of the token. Found without the divisions that each block would begin with.
struct pool_group {
    int in_list, group;

    __device__ __forceinline__ void advance(int n_group, int n) {
        for (group += n; group >= n_group; group -= n_group) {
            ++in_list;
        }
    }
};

// What the weights of the side's tiles and eight columns are multiplied by. peak: of every (LANES/8)-th tile; first_head: of column 0, below 0 where the group
// begins with another token's; heads: of the KV head
template <typename SHAPE, int N>
static __device__ __forceinline__ void pool_factors(const float (&peak)[N], int first_head, int heads, const float2 * totals, float (*factors)[8] /* [TILES] */) {
    const int column = SHAPE::lane()%8, head = first_head + column;
    const float2 total = head >= 0 && head < heads ? totals[head] : make_float2(0.0f, 0.0f);
#pragma unroll
    for (int i = 0; i < N; ++i) { // no sum: another token's head, or one that sees nothing
        factors[SHAPE::lane()/8 + i*(SHAPE::LANES/8)][column] = total.y > 0.0f ? exp2f(peak[i] - total.x)*total.y : 0.0f;
    }
}

// Adds the group's share to four scores. words: N_WORD of each cell
template <int N_WORD> static __device__ __forceinline__ void add_means(const uint4 (&raw)[N_WORD], const float * factors, float (&sums)[4]) {
    const uint32_t * words = (const uint32_t *) raw;
    float f[8];
    *(float4 *) f = ((const float4 *) factors)[0];
    *(float4 *) (f + 4) = N_WORD > 2 ? ((const float4 *) factors)[1] : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
    for (int cell = 0; cell < 4; ++cell) {
#pragma unroll
        for (int word = 0; word < N_WORD; ++word) {
            const float2 w = __half22float2(*(const half2 *) &words[cell*N_WORD + word]);
            sums[cell] += w.x*f[2*word] + w.y*f[2*word + 1];
        }
    }
}

// The sums of all sides, for the first. shared: [threads]
template <typename SHAPE> static __device__ __forceinline__ void add_sides(float (&sums)[4], float4 * shared) {
    shared[threadIdx.x] = make_float4(sums[0], sums[1], sums[2], sums[3]);
    __syncthreads();
    for (int side = 1; side < SHAPE::N_SIDE && SHAPE::side() == 0; ++side) {
        const float4 x = shared[side*SHAPE::LANES + SHAPE::lane()];
        sums[0] += x.x, sums[1] += x.y, sums[2] += x.z, sums[3] += x.w;
    }
}

// A thread's part of one group: the weights of its quads, and references of tiles for pool_factors
template <typename SHAPE, int N_WORD, int QUADS> struct pool_loads {
    uint4 raw[QUADS][N_WORD];
    float peak[2*QUADS];

    __device__ __forceinline__ pool_loads(const hylra_cuda_job & job, size_t group, int first_quad, int first_tile) {
        const int n_kv = job.attn.n_kv, n_tile = hylra_ceil_div(n_kv, HYLRA_CUDA_TILE);
        const uint4 * weights = (const uint4 *) ((const uint32_t *) (job.scratch + job.layout.weights) + group*n_kv*N_WORD);
        const float * peaks = (const float *) (job.scratch + job.layout.peaks) + group*n_tile*8 + SHAPE::lane()%8;
#pragma unroll
        for (int q = 0; q < QUADS; ++q) {
            const int known = min(first_quad + q*SHAPE::LANES, n_kv/4 - 1);
#pragma unroll
            for (int word = 0; word < N_WORD; ++word) {
                raw[q][word] = weights[size_t(known)*N_WORD + word];
            }
        }
#pragma unroll
        for (int i = 0; i < 2*QUADS; ++i) {
            peak[i] = peaks[min(first_tile + i*(SHAPE::LANES/8), n_tile - 1)*8];
        }
    }
};

// Means over the heads of the row's list, of the cells of QUADS quads; of a hidden cell: anything. Of the block's sides the first has all.
template <int N_THREADS, int N_WORD, int QUADS, int SIDES>
static __device__ __forceinline__ void pool_cells(const hylra_cuda_job & job, const pool_row & row, const pool_list & list, int first_quad, float (&sums)[QUADS][4],
                                                  float * shared) {
    using shape = pool_shape<N_THREADS, QUADS, SIDES>;
    __shared__ float2 totals[HYLRA_CUDA_LIST_HEADS];
    __shared__ __align__(16) float factors[SIDES][shape::TILES][8];
    pool_totals<N_THREADS, shape::LANES == POOL_FEW_THREADS> sums_of(job, row, list);
    const int n_group = list.n_group(row.token), column0 = row.token*list.heads, first_tile = int(blockIdx.x)*shape::TILES + shape::lane()/8;
    const int group0 = (row.stream*job.attn.n_head_kv + row.list*list.n_head_kv)*job.plan.n_group + column0/8;
    pool_group mine = { 0, 0 };
    mine.advance(n_group, shape::side());
    for (int first = 0; first < list.n_head_kv*n_group; first += SIDES) {
        const bool present = mine.in_list < list.n_head_kv;
        const pool_loads<shape, N_WORD, QUADS> loads(job, group0 + (present ? mine.in_list*job.plan.n_group + mine.group : 0), first_quad, first_tile);
        if (first == 0) {
            sums_of.store(job, list, totals);
        }
        __syncthreads();
        pool_factors<shape>(loads.peak, (column0/8 + mine.group)*8 - column0, present ? list.heads : 0, totals + mine.in_list*list.heads, factors[shape::side()]);
        __syncthreads();
#pragma unroll
        for (int q = 0; q < QUADS; ++q) {
            add_means<N_WORD>(loads.raw[q], factors[shape::side()][(q*shape::LANES + shape::lane())/4], sums[q]);
        }
        mine.advance(n_group, SIDES);
    }
    if constexpr (SIDES > 1) {
        static_assert(QUADS == 1, "sides are for few blocks");
        add_sides<shape>(sums[0], (float4 *) shared);
    }
}

// Hidden and forced cells get their scores. A sum that is a NaN, of a model that overflows, is 0: by its bits it would stand above every bound, and more cells
// than a list holds. mask: of the four cells, as halves; forced: a bit each
static __device__ __forceinline__ float4 finished(const float (&sums)[4], uint2 mask, unsigned forced) {
    float s[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const unsigned half_mask = (i < 2 ? mask.x : mask.y) >> i%2*16 & 0xFFFFu;
        s[i] = half_mask == 0xFC00u ? HYLRA_SCORE_HIDDEN : fmaxf(sums[i], 0.0f) + (forced >> i & 1 ? HYLRA_SCORE_FORCED : 0.0f);
    }
    return make_float4(s[0], s[1], s[2], s[3]);
}

// Counts first digits in a block's bins.
static __device__ __forceinline__ void count_digits(const float4 & quad, int32_t * bins) {
    for (float score : { quad.x, quad.y, quad.z, quad.w }) {
        if (score >= 0.0f) {
            atomicAdd(&bins[hylra_radix_digit(hylra_radix_key(score, 0), 0)], 1);
        }
    }
}

// Adds a block's bins to the row's; a thread waits for its own together (1650 -> 830 cycles of 128 threads, by timers in the kernel).
template <int N_THREADS> static __device__ __forceinline__ void add_to_row(const int32_t * bins, int32_t * totals) {
    constexpr int N = HYLRA_CUDA_BINS/N_THREADS;
    int32_t own[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
        own[i] = bins[i*N_THREADS + threadIdx.x];
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
        if (own[i]) {
            atomicAdd(&totals[i*N_THREADS + threadIdx.x], own[i]);
        }
    }
}

// A block that reduces: (x, y, z) counts on from the blocks that pool. Blocks without a row wait too: they keep the kernel that chooses from crowding on the first
// processors that are free (1 us at 61440 cells).
template <int N_THREADS, typename PART> static __device__ __forceinline__ void reduce_beside(const hylra_cuda_job & job, int n_pooled, float * out, float * shared) {
    const int row = ((int(blockIdx.z) - n_pooled)*int(gridDim.y) + int(blockIdx.y))*int(gridDim.x) + int(blockIdx.x);
    hylra_await();
    hylra_release();
    if (row < rows_of(job.attn)) {
        reduce_row<N_THREADS, PART>(job, row, out, shared);
    }
}

// Blocks per processor that registers are kept few enough for
constexpr int pool_blocks(int n_threads) { return n_threads > POOL_THREADS ? 1 : n_threads == POOL_THREADS ? 2 : 4; }

// grid: (parts of pool_shape::CELLS cells, lists, tokens of all streams and as many as it takes for one block per row of out)
template <int N_THREADS, int N_WORD, int QUADS, int SIDES, typename PART>
static __global__ void __launch_bounds__(N_THREADS, pool_blocks(N_THREADS)) pool_kernel(const __grid_constant__ hylra_cuda_job job, const pool_list list, float * out, const int32_t * forced,
                                                                                int n_forced, float * scores) {
    __shared__ __align__(16) float shared[(SIDES > 1 ? 4 : REDUCE_DIMS<PART>)*N_THREADS]; // add_sides takes four of each thread
    const int n_pooled = job.attn.n_tokens*job.attn.n_stream;
    if (int(blockIdx.z) >= n_pooled) {
        return reduce_beside<N_THREADS, PART>(job, n_pooled, out, shared);
    }
    using shape = pool_shape<N_THREADS, QUADS, SIDES>;
    constexpr int CELLS = shape::CELLS;
    __shared__ uint32_t marks[CELLS/32]; // forced cells
    __shared__ __align__(16) int32_t bins[HYLRA_CUDA_BINS];
#pragma unroll 1 // here and below: what runs once should be little code, as code has to arrive too
    for (int i = threadIdx.x; i < HYLRA_CUDA_BINS/4; i += N_THREADS) {
        ((int4 *) bins)[i] = make_int4(0, 0, 0, 0);
    }
#pragma unroll 1
    for (int i = threadIdx.x; i < CELLS/32; i += N_THREADS) {
        marks[i] = 0;
    }
    const hylra_attn & a = job.attn;
    const int column = blockIdx.z; // token of the batch
    pool_row row = { 0, column, int(blockIdx.y) };
#pragma unroll 1 // instead of a division
    for (; row.token >= a.n_tokens; row.token -= a.n_tokens) {
        ++row.stream;
    }
    const size_t of_scores = size_t(column)*gridDim.y + blockIdx.y;
    const int first_quad = blockIdx.x*(CELLS/4) + shape::lane(), n_quad = a.n_kv/4, begin = blockIdx.x*CELLS;
    const uint2 * mask = (const uint2 *) ((const char *) a.mask + row.token*a.mask_nb[1] + row.stream*a.mask_nb[3]);
    uint2 masked[QUADS];
    hylra_await();
#pragma unroll
    for (int i = 0; i < QUADS; ++i) {
        masked[i] = a.mask ? mask[min(first_quad + i*shape::LANES, n_quad - 1)] : make_uint2(0, 0);
    }
    int mark = threadIdx.x < n_forced ? forced[size_t(column)*n_forced + threadIdx.x] : -1; // both on their way early
    float sums[QUADS][4] = {};
    pool_cells<N_THREADS, N_WORD, QUADS, SIDES>(job, row, list, first_quad, sums, shared);
    hylra_release(); // later than elsewhere: the kernel that chooses would take processors that blocks of this one could have
#pragma unroll 1
    for (int i = threadIdx.x; i < n_forced; i += N_THREADS) {
        const int at = mark - begin;
        if (mark >= 0 && at >= 0 && at < CELLS) {
            atomicOr(&marks[at/32], 1u << at%32); // a cell may be forced twice
        }
        mark = i + N_THREADS < n_forced ? forced[size_t(column)*n_forced + i + N_THREADS] : -1;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < QUADS; ++i) {
        const int quad = first_quad + i*shape::LANES, in_block = i*shape::LANES + shape::lane();
        if (quad < n_quad && shape::side() == 0) {
            const float4 score = finished(sums[i], masked[i], marks[in_block/8] >> in_block%8*4);
            ((float4 *) (scores + of_scores*a.n_kv))[quad] = score;
            count_digits(score, bins);
        }
    }
    __syncthreads();
    add_to_row<N_THREADS>(bins, (int32_t *) (job.scratch + job.layout.bins) + of_scores*HYLRA_CUDA_BINS);
}

template <int N_THREADS, int QUADS, int SIDES, int N_WORD>
static void enqueue_pool(const hylra_cuda_job & job, float * out, const int32_t * forced, int n_forced, float * scores, cudaStream_t stream) {
    const hylra_attn & a = job.attn;
    const int n_part = hylra_ceil_div(a.n_kv, pool_shape<N_THREADS, QUADS, SIDES>::CELLS), n_reduced = job.plan.scores_only ? 0 : hylra_ceil_div(rows_of(a), n_part*job.select_lists);
    const dim3 grid(n_part, job.select_lists, a.n_tokens*a.n_stream + n_reduced);
    with_part(job, [&](auto part) {
        if constexpr (N_WORD == 4 || !std::is_same<decltype(part), uint2>::value) { // MLA's columns fill words
            hylra_enqueue<pool_kernel<N_THREADS, N_WORD, QUADS, SIDES, decltype(part)>>(grid, N_THREADS, 0, stream, job, pool_list_of(job), out, forced, n_forced, scores);
        }
    });
}

template <int N_WORD>
static void enqueue_pool(const hylra_cuda_job & job, float * out, const int32_t * forced, int n_forced, float * scores, cudaStream_t stream) {
    const hylra_attn & a = job.attn;
    const int n_block = hylra_ceil_div(a.n_kv, 4*POOL_THREADS)*job.select_lists*a.n_tokens*a.n_stream;
    const int n_group = hylra_ceil_div(job.plan.group, 8)*(a.n_head_kv/job.select_lists); // MLA: 16, which few blocks take side by side
    if (n_block >= POOL_MANY_BLOCKS) {
        enqueue_pool<POOL_THREADS, 2, 1, N_WORD>(job, out, forced, n_forced, scores, stream);
    } else if (n_block >= POOL_MIN_BLOCKS) {
        enqueue_pool<POOL_THREADS, 1, 1, N_WORD>(job, out, forced, n_forced, scores, stream);
    } else if (n_group >= 16 && 4*n_block <= POOL_ALL_BLOCKS) {
        enqueue_pool<8*POOL_FEW_THREADS, 1, 8, N_WORD>(job, out, forced, n_forced, scores, stream);
    } else if (n_group >= 4) {
        enqueue_pool<4*POOL_FEW_THREADS, 1, 4, N_WORD>(job, out, forced, n_forced, scores, stream);
    } else {
        enqueue_pool<POOL_FEW_THREADS, 1, 1, N_WORD>(job, out, forced, n_forced, scores, stream);
    }
}

void hylra_cuda_pool(const hylra_cuda_job & job, float * out, const int32_t * forced, int n_forced, float * scores, cudaStream_t stream) {
    switch (job.plan.n_word) {
        case 1:  enqueue_pool<1>(job, out, forced, n_forced, scores, stream); break;
        case 2:  enqueue_pool<2>(job, out, forced, n_forced, scores, stream); break;
        case 3:  enqueue_pool<3>(job, out, forced, n_forced, scores, stream); break;
        default: enqueue_pool<4>(job, out, forced, n_forced, scores, stream);
    }
}
