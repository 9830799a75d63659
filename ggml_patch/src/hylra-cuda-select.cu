// After attend on CUDA: sums over chunks (reduce) and one score per cell and list (pool), which also counts the first digit of every
// score for the radix selection in hylra-cuda-choose.cu.
#include "hylra-attn.h"
#include "hylra-cuda.cuh"
#include "hylra-radix.h"

#include <cuda_fp16.h>

constexpr float LOG2E = 1.4426950408889634f;

// ---- reduce: one block per head and token

constexpr int REDUCE_THREADS = 128;

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

static __global__ void __launch_bounds__(REDUCE_THREADS) reduce_kernel(const __grid_constant__ hylra_cuda_job job, float * out) {
    __shared__ float factors[HYLRA_CUDA_MAX_CHUNKS];
    const hylra_attn & a = job.attn;
    const int row = blockIdx.x, n_chunk = job.plan.n_chunk;
    if (threadIdx.x < 32) {
        chunk_factors(job, row, factors);
    }
    int32_t * bins = (int32_t *) (job.scratch + job.layout.bins);
    const int n_bin = job.select_lists*a.n_tokens*a.n_stream*HYLRA_CUDA_BINS;
    for (int i = row*REDUCE_THREADS + threadIdx.x; i < n_bin; i += gridDim.x*REDUCE_THREADS) {
        bins[i] = 0;
    }
    __syncthreads();
    const float * parts = (const float *) (job.scratch + job.layout.outputs) + size_t(row)*n_chunk*a.n_embd_v;
    for (int d = threadIdx.x; d < a.n_embd_v; d += REDUCE_THREADS) {
        float x = 0.0f;
#pragma unroll 8
        for (int i = 0; i < n_chunk; ++i) {
            x += factors[i] == 0.0f ? 0.0f : factors[i]*parts[size_t(i)*a.n_embd_v + d];
        }
        out[size_t(row)*a.n_embd_v + d] = x;
    }
}

void hylra_cuda_reduce(const hylra_cuda_job & job, float * out, cudaStream_t stream) {
    const hylra_attn & a = job.attn;
    reduce_kernel<<<a.n_head*a.n_tokens*a.n_stream, REDUCE_THREADS, 0, stream>>>(job, out);
}

// ---- pool: one block per part of the cells, list and token

constexpr int POOL_THREADS = 256;
constexpr int POOL_CELLS   = 2048;

static __device__ bool is_hidden(const hylra_attn & a, int stream, int token, int cell) {
    const char * row = (const char *) a.mask + token*a.mask_nb[1] + stream*a.mask_nb[3];
    return a.mask && ((const uint16_t *) row)[cell] == 0xFC00;
}

// Sum over the heads of a list. column0: of the token's first head in the group of columns of a KV head
static __device__ float pooled(const hylra_cuda_job & job, int stream, int token, int list, int cell) {
    const hylra_attn & a = job.attn;
    const int heads = a.n_head/a.n_head_kv, kv_per_list = a.n_head_kv/job.select_lists, column0 = token*heads;
    const int n_tile = hylra_ceil_div(a.n_kv, HYLRA_CUDA_TILE);
    const float2 * totals = (const float2 *) (job.scratch + job.layout.totals) + (size_t(stream)*a.n_tokens + token)*a.n_head;
    float sum = 0.0f;
    for (int head_kv = list*kv_per_list; head_kv < (list + 1)*kv_per_list; ++head_kv) {
        for (int group = column0/8; group <= (column0 + heads - 1)/8; ++group) {
            const size_t at = (size_t(stream)*a.n_head_kv + head_kv)*job.plan.n_group + group;
            const half  * weights = (const half *) (job.scratch + job.layout.weights) + (at*a.n_kv + cell)*8;
            const float * peaks   = (const float *) (job.scratch + job.layout.peaks) + (at*n_tile + cell/HYLRA_CUDA_TILE)*8;
            const uint4 packed = *(const uint4 *) weights;
            const half * w = (const half *) &packed;
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const int head = group*8 + i - column0;
                if (head >= 0 && head < heads) {
                    const float2 total = totals[head_kv*heads + head];
                    sum += __half2float(w[i])*exp2f(peaks[i] - total.x)*total.y;
                }
            }
        }
    }
    return sum/(kv_per_list*heads);
}

static __global__ void __launch_bounds__(POOL_THREADS) pool_kernel(const __grid_constant__ hylra_cuda_job job, const int32_t * forced, int n_forced, float * scores) {
    __shared__ float   part[POOL_CELLS];
    __shared__ int32_t bins[HYLRA_CUDA_BINS];
    const hylra_attn & a = job.attn;
    const int row = blockIdx.y, list = row%job.select_lists, column = row/job.select_lists; // column: token of the batch
    const int begin = blockIdx.x*POOL_CELLS, n = min(POOL_CELLS, a.n_kv - begin);
    for (int i = threadIdx.x; i < HYLRA_CUDA_BINS; i += POOL_THREADS) {
        bins[i] = 0;
    }
    for (int i = threadIdx.x; i < n; i += POOL_THREADS) {
        const int stream = column/a.n_tokens, token = column%a.n_tokens;
        part[i] = is_hidden(a, stream, token, begin + i) ? HYLRA_SCORE_HIDDEN : pooled(job, stream, token, list, begin + i);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < n_forced; i += POOL_THREADS) {
        const int at = forced[size_t(column)*n_forced + i] - begin;
        if (at >= 0 && at < n && part[at] >= 0.0f && part[at] < HYLRA_SCORE_FORCED) {
            part[at] += HYLRA_SCORE_FORCED; // a cell that is forced twice: both threads write the same value
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += POOL_THREADS) {
        scores[size_t(row)*a.n_kv + begin + i] = part[i];
        if (part[i] >= 0.0f) {
            atomicAdd(&bins[hylra_radix_digit(hylra_radix_key(part[i], 0), 0)], 1);
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
    const dim3 grid(hylra_ceil_div(a.n_kv, POOL_CELLS), job.select_lists*a.n_tokens*a.n_stream);
    pool_kernel<<<grid, POOL_THREADS, 0, stream>>>(job, forced, n_forced, scores);
}
