// After attend on CUDA: sums over chunks (reduce) and one score per cell and list (pool), which also counts the first digit of every
// score for the radix selection (hylra-cuda-choose.cu, hylra-cuda-cluster.cu).
#include "hylra-attn.h"
#include "hylra-cuda.cuh"
#include "hylra-radix.h"

#include <cuda_fp16.h>

constexpr float LOG2E = 1.4426950408889634f;

// ---- reduce: one block per head and token

constexpr int REDUCE_THREADS = 512;
constexpr int REDUCE_DIMS    = 128; // that are summed side by side; the other threads take other chunks

// [n_chunk] what the outputs of each chunk are multiplied by; also writes the total for pool
static __device__ void chunk_factors(const hylra_cuda_job & job, int row, float * factors) {
    const hylra_attn & a = job.attn;
    const float2 * norms = (const float2 *) (job.scratch + job.layout.norms) + size_t(row)*job.plan.n_chunk;
    const float sink = a.sinks ? ((const float *) a.sinks)[row%a.n_head]*LOG2E : -INFINITY;
    float ref = sink, sum = 0.0f;
    for (int i = threadIdx.x; i < job.plan.n_chunk; i += 32) {
        ref = fmaxf(ref, norms[i].x);
    }
    for (int mask = 16; mask > 0; mask /= 2) {
        ref = fmaxf(ref, __shfl_xor_sync(0xFFFFFFFFu, ref, mask));
    }
    for (int i = threadIdx.x; i < job.plan.n_chunk; i += 32) {
        factors[i] = norms[i].x == -INFINITY ? 0.0f : exp2f(norms[i].x - ref);
        sum += factors[i]*norms[i].y;
    }
    for (int mask = 16; mask > 0; mask /= 2) {
        sum += __shfl_xor_sync(0xFFFFFFFFu, sum, mask);
    }
    sum += a.sinks ? exp2f(sink - ref) : 0.0f;
    const float inverse = sum > 0.0f ? 1.0f/sum : 0.0f; // a row without visible cells gives zeros, as in llama.cpp
    for (int i = threadIdx.x; i < job.plan.n_chunk; i += 32) {
        factors[i] *= inverse;
    }
    if (threadIdx.x == 0) {
        ((float2 *) (job.scratch + job.layout.totals))[row] = make_float2(ref == -INFINITY ? 0.0f : ref, inverse);
    }
}

constexpr int REDUCE_LANES = REDUCE_THREADS/REDUCE_DIMS, REDUCE_PARTS = HYLRA_CUDA_MAX_CHUNKS/REDUCE_LANES;

// One dimension of every REDUCE_LANES-th chunk from `first` on
static __device__ __forceinline__ void load_parts(const float * parts, int n_embd_v, int n_chunk, int first, int d, float (&x)[REDUCE_PARTS]) {
#pragma unroll
    for (int i = 0; i < REDUCE_PARTS; ++i) {
        const int chunk = min(first + i*REDUCE_LANES, n_chunk - 1);
        x[i] = parts[size_t(chunk)*n_embd_v + min(d, n_embd_v - 1)];
    }
}

static __global__ void __launch_bounds__(REDUCE_THREADS, 2) reduce_kernel(const __grid_constant__ hylra_cuda_job job, float * out) {
    __shared__ float factors[HYLRA_CUDA_MAX_CHUNKS];
    const hylra_attn & a = job.attn;
    const int row = blockIdx.x, n_chunk = job.plan.n_chunk;
    const float * parts = (const float *) (job.scratch + job.layout.outputs) + size_t(row)*n_chunk*a.n_embd_v;
    const int lane = threadIdx.x%REDUCE_DIMS, first = threadIdx.x/REDUCE_DIMS;
    int32_t * bins = (int32_t *) (job.scratch + job.layout.bins);
    const int n_bin = job.select_lists*a.n_tokens*a.n_stream*HYLRA_CUDA_BINS;
    for (int i = row*REDUCE_THREADS + threadIdx.x; i < n_bin; i += gridDim.x*REDUCE_THREADS) {
        bins[i] = 0; // attend, which may still run, has nothing to do with them, and what came before it has ended
    }
    float x[REDUCE_PARTS];
    hylra_await();
    hylra_release();
    if (!job.plan.scores_only) {
        load_parts(parts, a.n_embd_v, n_chunk, first, lane, x); // on their way while the factors are computed
    }
    if (threadIdx.x < 32) {
        chunk_factors(job, row, factors);
    }
    if (job.plan.scores_only) {
        return;
    }
    __syncthreads();
    __shared__ float sums[REDUCE_THREADS];
    for (int begin = 0; begin < a.n_embd_v; begin += REDUCE_DIMS) {
        if (begin > 0) {
            load_parts(parts, a.n_embd_v, n_chunk, first, begin + lane, x);
        }
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < REDUCE_PARTS; ++i) {
            sum += first + i*REDUCE_LANES < n_chunk ? factors[first + i*REDUCE_LANES]*x[i] : 0.0f;
        }
        sums[threadIdx.x] = sum;
        __syncthreads();
        if (first == 0 && begin + lane < a.n_embd_v) {
            out[size_t(row)*a.n_embd_v + begin + lane] = (sums[lane] + sums[lane + REDUCE_DIMS]) + (sums[lane + 2*REDUCE_DIMS] + sums[lane + 3*REDUCE_DIMS]);
        }
        __syncthreads();
    }
}

void hylra_cuda_reduce(const hylra_cuda_job & job, float * out, cudaStream_t stream) {
    const hylra_attn & a = job.attn;
    hylra_enqueue<reduce_kernel>(dim3(a.n_head*a.n_tokens*a.n_stream), REDUCE_THREADS, 0, stream, job, out);
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
    const hylra_attn & a = job.attn;
    const int heads = a.n_head/a.n_head_kv, column = threadIdx.x%8, n_tile = hylra_ceil_div(a.n_kv, HYLRA_CUDA_TILE);
    const float2 * totals = (const float2 *) (job.scratch + job.layout.totals) + (size_t(row.stream)*a.n_tokens + row.token)*a.n_head + head_kv*heads;
    const float  * peaks  = (const float *) (job.scratch + job.layout.peaks) + at*n_tile*8;
    const int head = group*8 + column - row.token*heads; // the token's first head is column token*heads
    const bool mine = head >= 0 && head < heads;
    const float2 total = totals[mine ? head : 0];
    const float share = total.y*float(job.select_lists)/float(a.n_head);
#pragma unroll
    for (int tile = threadIdx.x/8; tile < QUADS*N_THREADS/4; tile += N_THREADS/8) {
        const float peak = peaks[min(first_tile + tile, n_tile - 1)*8 + column];
        factors[tile][column] = mine ? exp2f(peak - total.x)*share : 0.0f;
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

// grid: (parts of 4*QUADS*N_THREADS cells, rows)
template <int N_THREADS, int N_WORD, int QUADS>
static __global__ void __launch_bounds__(N_THREADS, 1024/N_THREADS) pool_kernel(const __grid_constant__ hylra_cuda_job job, const int32_t * forced, int n_forced, float * scores) {
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
static void enqueue_pool(const hylra_cuda_job & job, const int32_t * forced, int n_forced, float * scores, cudaStream_t stream) {
    const hylra_attn & a = job.attn;
    const dim3 grid(hylra_ceil_div(a.n_kv, 4*QUADS*N_THREADS), job.select_lists*a.n_tokens*a.n_stream);
    hylra_enqueue<pool_kernel<N_THREADS, N_WORD, QUADS>>(grid, N_THREADS, 0, stream, job, forced, n_forced, scores);
}

template <int N_WORD>
static void enqueue_pool(const hylra_cuda_job & job, const int32_t * forced, int n_forced, float * scores, cudaStream_t stream) {
    const hylra_attn & a = job.attn;
    const int n_block = hylra_ceil_div(a.n_kv, 4*POOL_THREADS)*job.select_lists*a.n_tokens*a.n_stream;
    if (n_block >= POOL_MANY_BLOCKS) {
        enqueue_pool<POOL_THREADS, 2, N_WORD>(job, forced, n_forced, scores, stream);
    } else if (n_block >= POOL_MIN_BLOCKS) {
        enqueue_pool<POOL_THREADS, 1, N_WORD>(job, forced, n_forced, scores, stream);
    } else {
        enqueue_pool<POOL_FEW_THREADS, 1, N_WORD>(job, forced, n_forced, scores, stream);
    }
}

void hylra_cuda_pool(const hylra_cuda_job & job, const int32_t * forced, int n_forced, float * scores, cudaStream_t stream) {
    switch (job.plan.n_word) {
        case 1:  enqueue_pool<1>(job, forced, n_forced, scores, stream); break;
        case 2:  enqueue_pool<2>(job, forced, n_forced, scores, stream); break;
        case 3:  enqueue_pool<3>(job, forced, n_forced, scores, stream); break;
        default: enqueue_pool<4>(job, forced, n_forced, scores, stream);
    }
}
