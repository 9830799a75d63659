// After attend on CUDA: sums over chunks (reduce) and one score per cell and list (pool), which also counts the first digit of every
// score for the radix selection in hylra-cuda-choose.cu.
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
    hylra_await();
    hylra_release();
    const hylra_attn & a = job.attn;
    const int row = blockIdx.x, n_chunk = job.plan.n_chunk;
    const float * parts = (const float *) (job.scratch + job.layout.outputs) + size_t(row)*n_chunk*a.n_embd_v;
    const int lane = threadIdx.x%REDUCE_DIMS, first = threadIdx.x/REDUCE_DIMS;
    float x[REDUCE_PARTS];
    if (!job.plan.scores_only) {
        load_parts(parts, a.n_embd_v, n_chunk, first, lane, x); // on their way while the factors are computed
    }
    if (threadIdx.x < 32) {
        chunk_factors(job, row, factors);
    }
    int32_t * bins = (int32_t *) (job.scratch + job.layout.bins);
    const int n_bin = job.select_lists*a.n_tokens*a.n_stream*HYLRA_CUDA_BINS;
    for (int i = row*REDUCE_THREADS + threadIdx.x; i < n_bin; i += gridDim.x*REDUCE_THREADS) {
        bins[i] = 0;
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

// ---- pool: one block per part of the cells, list and token

constexpr int POOL_THREADS   = 512;
constexpr int POOL_STEPS     = 2;   // cells per thread, if that leaves enough blocks
constexpr int POOL_MIN_BLOCKS = 128;

static __device__ bool is_hidden(const hylra_attn & a, int stream, int token, int cell) {
    const char * row = (const char *) a.mask + token*a.mask_nb[1] + stream*a.mask_nb[3];
    return a.mask && ((const uint16_t *) row)[cell] == 0xFC00;
}

// What the weights of a tile and column are multiplied by: factors[tiles of the part][8]
static __device__ void pool_factors(const hylra_cuda_job & job, int stream, int token, int head_kv, size_t at, int group, int begin, int n_cell, float (*factors)[8]) {
    const hylra_attn & a = job.attn;
    const int heads = a.n_head/a.n_head_kv, n_tile = hylra_ceil_div(a.n_kv, HYLRA_CUDA_TILE), n_pooled = a.n_head/job.select_lists;
    const float2 * totals = (const float2 *) (job.scratch + job.layout.totals) + (size_t(stream)*a.n_tokens + token)*a.n_head + head_kv*heads;
    const float  * peaks  = (const float *) (job.scratch + job.layout.peaks) + (at*n_tile + begin/HYLRA_CUDA_TILE)*8;
    const int n = min(n_cell/HYLRA_CUDA_TILE, n_tile - begin/HYLRA_CUDA_TILE)*8;
    for (int i = threadIdx.x; i < n; i += POOL_THREADS) {
        const int head = group*8 + i%8 - token*heads; // the token's first head is column token*heads
        const bool mine = head >= 0 && head < heads;
        const float2 total = totals[mine ? head : 0];
        factors[i/8][i%8] = mine ? exp2f(peaks[i] - total.x)*total.y/n_pooled : 0.0f;
    }
}

static __device__ __forceinline__ float weighted(uint4 packed, const float * factors) {
    const float4 lo = ((const float4 *) factors)[0], hi = ((const float4 *) factors)[1];
    const half2 * w = (const half2 *) &packed;
    const float2 a = __half22float2(w[0]), b = __half22float2(w[1]), c = __half22float2(w[2]), d = __half22float2(w[3]);
    return (a.x*lo.x + a.y*lo.y) + (b.x*lo.z + b.y*lo.w) + (c.x*hi.x + c.y*hi.y) + (d.x*hi.z + d.y*hi.w);
}

// Mean over the heads of a list, of the cells begin + thread + i*POOL_THREADS; of a hidden cell: anything
template <int STEPS>
static __device__ void pool_cells(const hylra_cuda_job & job, int stream, int token, int list, int begin, float (*factors)[8], float (&sums)[STEPS]) {
    const hylra_attn & a = job.attn;
    const int heads = a.n_head/a.n_head_kv, kv_per_list = a.n_head_kv/job.select_lists, column0 = token*heads;
    for (int head_kv = list*kv_per_list; head_kv < (list + 1)*kv_per_list; ++head_kv) {
        for (int group = column0/8; group <= (column0 + heads - 1)/8; ++group) {
            const size_t at = (size_t(stream)*a.n_head_kv + head_kv)*job.plan.n_group + group;
            const uint4 * weights = (const uint4 *) (job.scratch + job.layout.weights) + at*a.n_kv;
            uint4 w[STEPS];
#pragma unroll
            for (int i = 0; i < STEPS; ++i) {
                w[i] = weights[min(begin + i*POOL_THREADS + int(threadIdx.x), a.n_kv - 1)];
            }
            __syncthreads();
            pool_factors(job, stream, token, head_kv, at, group, begin, STEPS*POOL_THREADS, factors);
            __syncthreads();
#pragma unroll
            for (int i = 0; i < STEPS; ++i) {
                sums[i] += weighted(w[i], factors[(i*POOL_THREADS + threadIdx.x)/HYLRA_CUDA_TILE]);
            }
        }
    }
}

template <int STEPS> static __global__ void __launch_bounds__(POOL_THREADS, 3) pool_kernel(const __grid_constant__ hylra_cuda_job job, const int32_t * forced, int n_forced, float * scores) {
    constexpr int CELLS = STEPS*POOL_THREADS;
    __shared__ float   part[CELLS];
    __shared__ int32_t bins[HYLRA_CUDA_BINS];
    __shared__ uint32_t marks[CELLS/32]; // forced cells
    __shared__ __align__(16) float factors[CELLS/HYLRA_CUDA_TILE][8];
    hylra_await();
    hylra_release();
    const hylra_attn & a = job.attn;
    const int row = blockIdx.y, list = row%job.select_lists, column = row/job.select_lists; // column: token of the batch
    const int begin = blockIdx.x*CELLS, n = min(CELLS, a.n_kv - begin);
    for (int i = threadIdx.x; i < HYLRA_CUDA_BINS; i += POOL_THREADS) {
        bins[i] = 0;
    }
    if (threadIdx.x < CELLS/32) {
        marks[threadIdx.x] = 0;
    }
    const int stream = column/a.n_tokens, token = column%a.n_tokens;
    bool hidden[STEPS];
#pragma unroll
    for (int i = 0; i < STEPS; ++i) {
        hidden[i] = is_hidden(a, stream, token, min(begin + i*POOL_THREADS + int(threadIdx.x), a.n_kv - 1));
    }
    int mark = threadIdx.x < n_forced ? forced[size_t(column)*n_forced + threadIdx.x] : -1; // both on their way early
    float sums[STEPS] = {};
    pool_cells<STEPS>(job, stream, token, list, begin, factors, sums);
#pragma unroll
    for (int i = 0; i < STEPS; ++i) {
        const int at = i*POOL_THREADS + threadIdx.x;
        part[at] = hidden[i] ? HYLRA_SCORE_HIDDEN : sums[i];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < n_forced; i += POOL_THREADS) {
        const int at = mark - begin;
        if (at >= 0 && at < n) {
            atomicOr(&marks[at/32], 1u << at%32); // a cell may be forced twice
        }
        mark = i + POOL_THREADS < n_forced ? forced[size_t(column)*n_forced + i + POOL_THREADS] : -1;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += POOL_THREADS) {
        const bool marked = marks[i/32] >> i%32 & 1;
        const float score = part[i] >= 0.0f && marked ? part[i] + HYLRA_SCORE_FORCED : part[i];
        scores[size_t(row)*a.n_kv + begin + i] = score;
        if (score >= 0.0f) {
            atomicAdd(&bins[hylra_radix_digit(hylra_radix_key(score, 0), 0)], 1);
        }
    }
    __syncthreads();
    int32_t * totals = (int32_t *) (job.scratch + job.layout.bins) + size_t(row)*HYLRA_CUDA_BINS;
    for (int i = threadIdx.x; i < HYLRA_CUDA_BINS; i += POOL_THREADS) {
        if (bins[i]) {
            atomicAdd(&totals[i], bins[i]);
        }
    }
}

void hylra_cuda_pool(const hylra_cuda_job & job, const int32_t * forced, int n_forced, float * scores, cudaStream_t stream) {
    const hylra_attn & a = job.attn;
    const int n_row = job.select_lists*a.n_tokens*a.n_stream, n_part = hylra_ceil_div(a.n_kv, POOL_STEPS*POOL_THREADS);
    if (n_part*n_row >= POOL_MIN_BLOCKS) {
        hylra_enqueue<pool_kernel<POOL_STEPS>>(dim3(n_part, n_row), POOL_THREADS, 0, stream, job, forced, n_forced, scores);
    } else {
        hylra_enqueue<pool_kernel<1>>(dim3(hylra_ceil_div(a.n_kv, POOL_THREADS), n_row), POOL_THREADS, 0, stream, job, forced, n_forced, scores);
    }
}
