// After attend on CUDA: sums over chunks (reduce) and one score per cell and list (pool), which also counts the first digit of every
// score for the radix selection (hylra-cuda-choose.cu, hylra-cuda-cluster.cu). A select layer needs both: they are blocks of one launch, as each waits for attend
// alone (5.5 -> 3.4 us for 8192 cells of eight KV heads).
#include "hylra-attn.h"
#include "hylra-cuda.cuh"
#include "hylra-radix.h"

#include <cuda_fp16.h>

constexpr float LOG2E = 1.4426950408889634f;

// ---- a row: one head of one token

// Reference and sum of what attend left of every 32nd chunk, from this lane's on
constexpr int NORMS_PER_LANE = HYLRA_CUDA_MAX_CHUNKS/32;
struct row_norms { float2 of[NORMS_PER_LANE]; };

static __device__ __forceinline__ row_norms norms_of(const hylra_cuda_job & job, int row) {
    const float2 * norms = (const float2 *) (job.scratch + job.layout.norms) + size_t(row)*job.plan.n_chunk;
    row_norms found;
#pragma unroll
    for (int i = 0; i < NORMS_PER_LANE; ++i) {
        const int chunk = threadIdx.x%32 + 32*i;
        found.of[i] = chunk < job.plan.n_chunk ? norms[chunk] : make_float2(-INFINITY, 0.0f);
    }
    return found;
}

static __device__ __forceinline__ float factor_of(const float2 & norm, float ref) { return norm.x == -INFINITY ? 0.0f : exp2f(norm.x - ref); }

// The row's reference and inverted sum, known to the whole warp; the latter 0 for a row without visible cells, which gives zeros as in llama.cpp
static __device__ __forceinline__ float2 total_of(const hylra_cuda_job & job, int row, const row_norms & norms) {
    const hylra_attn & a = job.attn;
    const float sink = a.sinks ? ((const float *) a.sinks)[row%a.n_head]*LOG2E : -INFINITY;
    float ref = sink, sum = 0.0f;
#pragma unroll
    for (int i = 0; i < NORMS_PER_LANE; ++i) {
        ref = fmaxf(ref, norms.of[i].x);
    }
    for (int mask = 16; mask > 0; mask /= 2) {
        ref = fmaxf(ref, __shfl_xor_sync(0xFFFFFFFFu, ref, mask));
    }
#pragma unroll
    for (int i = 0; i < NORMS_PER_LANE; ++i) {
        sum += factor_of(norms.of[i], ref)*norms.of[i].y;
    }
    for (int mask = 16; mask > 0; mask /= 2) {
        sum += __shfl_xor_sync(0xFFFFFFFFu, sum, mask);
    }
    sum += a.sinks ? exp2f(sink - ref) : 0.0f;
    return make_float2(ref, sum > 0.0f ? 1.0f/sum : 0.0f);
}

// ---- reduce: one block per row

constexpr int REDUCE_THREADS = 512;
constexpr int REDUCE_DIMS    = 128; // that are summed side by side; the other threads take other chunks
constexpr int REDUCE_BATCH   = 16;  // chunks that a thread waits for together

// [MAX_CHUNKS] what the outputs of each chunk are multiplied by; by one warp
static __device__ void chunk_factors(const hylra_cuda_job & job, int row, float * factors) {
    const row_norms norms = norms_of(job, row);
    const float2 total = total_of(job, row, norms);
#pragma unroll
    for (int i = 0; i < NORMS_PER_LANE; ++i) {
        factors[threadIdx.x + 32*i] = factor_of(norms.of[i], total.x)*total.y;
    }
}

// One dimension of every STEP-th chunk from `first` on
template <int STEP>
static __device__ __forceinline__ void load_parts(const float * parts, int n_embd_v, int n_chunk, int first, int d, float (&x)[REDUCE_BATCH]) {
#pragma unroll
    for (int i = 0; i < REDUCE_BATCH; ++i) {
        const int chunk = min(first + i*STEP, n_chunk - 1);
        x[i] = parts[size_t(chunk)*n_embd_v + min(d, n_embd_v - 1)];
    }
}

// out: F32 [n_embd_v, rows]
template <int N_THREADS> static __device__ void reduce_row(const hylra_cuda_job & job, int row, float * out) {
    constexpr int LANES = N_THREADS/REDUCE_DIMS;
    __shared__ float factors[HYLRA_CUDA_MAX_CHUNKS];
    __shared__ float sums[LANES][REDUCE_DIMS];
    const int n_embd_v = job.attn.n_embd_v, n_chunk = job.plan.n_chunk;
    const float * parts = (const float *) (job.scratch + job.layout.outputs) + size_t(row)*n_chunk*n_embd_v;
    const int lane = threadIdx.x%REDUCE_DIMS, first = threadIdx.x/REDUCE_DIMS;
    float x[REDUCE_BATCH];
    load_parts<LANES>(parts, n_embd_v, n_chunk, first, lane, x); // on their way while the factors are computed
    if (threadIdx.x < 32) {
        chunk_factors(job, row, factors);
    }
    __syncthreads();
    for (int begin = 0; begin < n_embd_v; begin += REDUCE_DIMS) {
        float sum = 0.0f;
        for (int chunk = first; chunk < n_chunk; chunk += LANES*REDUCE_BATCH) {
            if (begin > 0 || chunk > first) {
                load_parts<LANES>(parts, n_embd_v, n_chunk, chunk, begin + lane, x);
            }
#pragma unroll
            for (int i = 0; i < REDUCE_BATCH; ++i) {
                sum += chunk + i*LANES < n_chunk ? factors[chunk + i*LANES]*x[i] : 0.0f;
            }
        }
        sums[first][lane] = sum;
        __syncthreads();
        if (first == 0 && begin + lane < n_embd_v) {
            for (int i = 1; i < LANES; ++i) {
                sum += sums[i][lane];
            }
            out[size_t(row)*n_embd_v + begin + lane] = sum;
        }
        __syncthreads();
    }
}

static __device__ __host__ int rows_of(const hylra_attn & a) { return a.n_head*a.n_tokens*a.n_stream; }

static __global__ void __launch_bounds__(REDUCE_THREADS, 2) reduce_kernel(const __grid_constant__ hylra_cuda_job job, float * out) {
    hylra_await();
    hylra_release();
    reduce_row<REDUCE_THREADS>(job, blockIdx.x, out);
}

void hylra_cuda_reduce(const hylra_cuda_job & job, float * out, cudaStream_t stream) {
    hylra_enqueue<reduce_kernel>(dim3(rows_of(job.attn)), REDUCE_THREADS, 0, stream, job, out);
}

// ---- pool: one block per part of the cells, list and token; a thread has four neighbouring cells, which share a tile

constexpr int POOL_THREADS     = 512;
constexpr int POOL_FEW_THREADS = 128; // where larger blocks would be too few
constexpr int POOL_MIN_BLOCKS  = 128;
constexpr int POOL_MANY_BLOCKS = 512; // from here on a thread takes two quads: one left the card waiting, 36 us for four times 131072 cells

// One row of scores: a list of a token
struct pool_row { int stream, token, list; };

// What the weights of the block's tiles and eight columns are multiplied by: factors[QUADS*N_THREADS/4][8]
template <int N_THREADS, int QUADS>
static __device__ __forceinline__ void pool_factors(const hylra_cuda_job & job, const pool_row & row, size_t at, int group, int head_kv, int first_tile, float (*factors)[8]) {
    __shared__ float2 totals[8];
    const hylra_attn & a = job.attn;
    const int heads = a.n_head/a.n_head_kv, n_tile = hylra_ceil_div(a.n_kv, HYLRA_CUDA_TILE);
    const int first_head = group*8 - row.token*heads; // of column 0; the token's first head is column token*heads
    const float * peaks = (const float *) (job.scratch + job.layout.peaks) + at*n_tile*8;
    float peak[2*QUADS];
#pragma unroll
    for (int i = 0; i < 2*QUADS; ++i) {
        peak[i] = peaks[min(first_tile + int(threadIdx.x/8) + i*(N_THREADS/8), n_tile - 1)*8 + threadIdx.x%8];
    }
    for (int column = threadIdx.x/32; column < 8; column += N_THREADS/32) { // a warp each
        const int head = first_head + column, at_row = (row.stream*a.n_tokens + row.token)*a.n_head + head_kv*heads + head;
        const bool mine = head >= 0 && head < heads;
        const float2 total = mine ? total_of(job, at_row, norms_of(job, at_row)) : make_float2(0.0f, 0.0f);
        totals[column] = make_float2(total.x, total.y*float(job.select_lists)/float(a.n_head));
    }
    __syncthreads();
    const float2 total = totals[threadIdx.x%8];
#pragma unroll
    for (int i = 0; i < 2*QUADS; ++i) { // no sum: another token's head, or one that sees nothing
        factors[threadIdx.x/8 + i*(N_THREADS/8)][threadIdx.x%8] = total.y > 0.0f ? exp2f(peak[i] - total.x)*total.y : 0.0f;
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

// Means over the heads of the row's list, of the cells of QUADS quads; of a hidden cell: anything
template <int N_THREADS, int N_WORD, int QUADS>
static __device__ __forceinline__ void pool_cells(const hylra_cuda_job & job, const pool_row & row, int first_quad, float (*factors)[8], float (&sums)[QUADS][4]) {
    const hylra_attn & a = job.attn;
    const int heads = a.n_head/a.n_head_kv, kv_per_list = a.n_head_kv/job.select_lists, column0 = row.token*heads;
    for (int head_kv = row.list*kv_per_list; head_kv < (row.list + 1)*kv_per_list; ++head_kv) {
        for (int group = column0/8; group <= (column0 + heads - 1)/8; ++group) {
            const size_t at = (size_t(row.stream)*a.n_head_kv + head_kv)*job.plan.n_group + group;
            const uint4 * weights = (const uint4 *) ((const uint32_t *) (job.scratch + job.layout.weights) + at*a.n_kv*N_WORD);
            uint4 raw[QUADS][N_WORD];
#pragma unroll
            for (int i = 0; i < QUADS; ++i) {
                const int known = min(first_quad + i*N_THREADS, a.n_kv/4 - 1);
#pragma unroll
                for (int word = 0; word < N_WORD; ++word) {
                    raw[i][word] = weights[size_t(known)*N_WORD + word]; // under way while factors are computed
                }
            }
            __syncthreads();
            pool_factors<N_THREADS, QUADS>(job, row, at, group, head_kv, int(blockIdx.x)*(QUADS*N_THREADS/4), factors);
            __syncthreads();
#pragma unroll
            for (int i = 0; i < QUADS; ++i) {
                add_means<N_WORD>(raw[i], factors[(i*N_THREADS + threadIdx.x)/4], sums[i]);
            }
        }
    }
}

// Hidden and forced cells get their scores. mask: of the four cells, as halves; forced: a bit each
static __device__ __forceinline__ float4 finished(const float (&sums)[4], uint2 mask, unsigned forced) {
    float s[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const unsigned half_mask = (i < 2 ? mask.x : mask.y) >> i%2*16 & 0xFFFFu;
        s[i] = half_mask == 0xFC00u ? HYLRA_SCORE_HIDDEN : sums[i] + (forced >> i & 1 ? HYLRA_SCORE_FORCED : 0.0f);
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

// A block that reduces: (x, y) counts on from the blocks that pool
template <int N_THREADS> static __device__ __forceinline__ void reduce_beside(const hylra_cuda_job & job, int n_pooled, float * out) {
    const int row = (int(blockIdx.y) - n_pooled)*int(gridDim.x) + int(blockIdx.x);
    hylra_await();
    hylra_release();
    if (row < rows_of(job.attn)) {
        reduce_row<N_THREADS>(job, row, out);
    }
}

// grid: (parts of 4*QUADS*N_THREADS cells, rows of scores, then as many as it takes for one block per row of out)
template <int N_THREADS, int N_WORD, int QUADS>
static __global__ void __launch_bounds__(N_THREADS, 1024/N_THREADS) pool_kernel(const __grid_constant__ hylra_cuda_job job, float * out, const int32_t * forced, int n_forced,
                                                                                float * scores) {
    const int n_pooled = job.select_lists*job.attn.n_tokens*job.attn.n_stream;
    if (int(blockIdx.y) >= n_pooled) {
        return reduce_beside<N_THREADS>(job, n_pooled, out);
    }
    constexpr int CELLS = 4*QUADS*N_THREADS;
    __shared__ __align__(16) float factors[CELLS/HYLRA_CUDA_TILE][8];
    __shared__ uint32_t marks[CELLS/32]; // forced cells
    __shared__ int32_t  bins[HYLRA_CUDA_BINS];
    for (int i = threadIdx.x; i < HYLRA_CUDA_BINS; i += N_THREADS) {
        bins[i] = 0;
    }
    for (int i = threadIdx.x; i < CELLS/32; i += N_THREADS) {
        marks[i] = 0;
    }
    const hylra_attn & a = job.attn;
    const int column = blockIdx.y/job.select_lists; // token of the batch
    const pool_row row = { column/a.n_tokens, column%a.n_tokens, int(blockIdx.y)%job.select_lists };
    const int first_quad = blockIdx.x*QUADS*N_THREADS + threadIdx.x, n_quad = a.n_kv/4, begin = blockIdx.x*CELLS;
    const uint2 * mask = (const uint2 *) ((const char *) a.mask + row.token*a.mask_nb[1] + row.stream*a.mask_nb[3]);
    uint2 masked[QUADS];
    hylra_await();
    hylra_release();
#pragma unroll
    for (int i = 0; i < QUADS; ++i) {
        masked[i] = a.mask ? mask[min(first_quad + i*N_THREADS, n_quad - 1)] : make_uint2(0, 0);
    }
    int mark = threadIdx.x < n_forced ? forced[size_t(column)*n_forced + threadIdx.x] : -1; // both on their way early
    float sums[QUADS][4] = {};
    pool_cells<N_THREADS, N_WORD, QUADS>(job, row, first_quad, factors, sums);
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
        const int quad = first_quad + i*N_THREADS, in_block = i*N_THREADS + threadIdx.x;
        if (quad < n_quad) {
            const float4 score = finished(sums[i], masked[i], marks[in_block/8] >> in_block%8*4);
            ((float4 *) (scores + size_t(blockIdx.y)*a.n_kv))[quad] = score;
            count_digits(score, bins);
        }
    }
    __syncthreads();
    int32_t * totals = (int32_t *) (job.scratch + job.layout.bins) + size_t(blockIdx.y)*HYLRA_CUDA_BINS;
    for (int i = threadIdx.x; i < HYLRA_CUDA_BINS; i += N_THREADS) {
        if (bins[i]) {
            atomicAdd(&totals[i], bins[i]);
        }
    }
}

template <int N_THREADS, int QUADS, int N_WORD>
static void enqueue_pool(const hylra_cuda_job & job, float * out, const int32_t * forced, int n_forced, float * scores, cudaStream_t stream) {
    const hylra_attn & a = job.attn;
    const int n_part = hylra_ceil_div(a.n_kv, 4*QUADS*N_THREADS), n_reduced = job.plan.scores_only ? 0 : hylra_ceil_div(rows_of(a), n_part);
    const dim3 grid(n_part, job.select_lists*a.n_tokens*a.n_stream + n_reduced);
    hylra_enqueue<pool_kernel<N_THREADS, N_WORD, QUADS>>(grid, N_THREADS, 0, stream, job, out, forced, n_forced, scores);
}

template <int N_WORD>
static void enqueue_pool(const hylra_cuda_job & job, float * out, const int32_t * forced, int n_forced, float * scores, cudaStream_t stream) {
    const hylra_attn & a = job.attn;
    const int n_block = hylra_ceil_div(a.n_kv, 4*POOL_THREADS)*job.select_lists*a.n_tokens*a.n_stream;
    if (n_block >= POOL_MANY_BLOCKS) {
        enqueue_pool<POOL_THREADS, 2, N_WORD>(job, out, forced, n_forced, scores, stream);
    } else if (n_block >= POOL_MIN_BLOCKS) {
        enqueue_pool<POOL_THREADS, 1, N_WORD>(job, out, forced, n_forced, scores, stream);
    } else {
        enqueue_pool<POOL_FEW_THREADS, 1, N_WORD>(job, out, forced, n_forced, scores, stream);
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
