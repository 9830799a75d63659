// The sum over chunks of one row of outputs, by a block on CUDA: of reduce's own launch, or beside blocks that pool.
#pragma once

#include "hylra-cuda.cuh"

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
constexpr int REDUCE_LANES   = 128; // threads that take the same chunks and sum neighbouring dimensions
constexpr int REDUCE_BATCH   = 16;  // values that a thread waits for together

// [MAX_CHUNKS] what the outputs of each chunk are multiplied by; by one warp
static __device__ void chunk_factors(const hylra_cuda_job & job, int row, float * factors) {
    const row_norms norms = norms_of(job, row);
    const float2 total = total_of(job, row, norms);
#pragma unroll
    for (int i = 0; i < NORMS_PER_LANE; ++i) {
        factors[threadIdx.x + 32*i] = factor_of(norms.of[i], total.x)*total.y;
    }
}

// DIMS dimensions of every STEP-th chunk from `first` on
template <int STEP, int DIMS>
static __device__ __forceinline__ void load_parts(const float * parts, int n_embd_v, int n_chunk, int first, int d, float (&x)[REDUCE_BATCH/DIMS][DIMS]) {
#pragma unroll
    for (int i = 0; i < REDUCE_BATCH/DIMS; ++i) {
        const float * from = parts + size_t(min(first + i*STEP, n_chunk - 1))*n_embd_v + min(d, n_embd_v - DIMS);
        if constexpr (DIMS == 4) {
            *(float4 *) x[i] = *(const float4 *) from;
        } else {
            x[i][0] = *from;
        }
    }
}

// DIMS: of a thread, so many that all are summed at once. out: F32 [n_embd_v, rows]; shared: [N_THREADS/REDUCE_LANES][REDUCE_LANES*DIMS]
template <int N_THREADS, int DIMS> static __device__ void reduce_dims(const hylra_cuda_job & job, int row, float * out, float * shared) {
    constexpr int LANES = N_THREADS/REDUCE_LANES, BATCH = REDUCE_BATCH/DIMS;
    __shared__ float factors[HYLRA_CUDA_MAX_CHUNKS];
    const int n_embd_v = job.attn.n_embd_v, n_chunk = job.plan.n_chunk;
    const float * parts = (const float *) (job.scratch + job.layout.outputs) + size_t(row)*n_chunk*n_embd_v;
    const int d = threadIdx.x%REDUCE_LANES*DIMS, first = threadIdx.x/REDUCE_LANES;
    __align__(16) float x[BATCH][DIMS];
    load_parts<LANES>(parts, n_embd_v, n_chunk, first, d, x); // on their way while the factors are computed
    if (threadIdx.x < 32) {
        chunk_factors(job, row, factors);
    }
    __syncthreads();
    float sum[DIMS] = {};
    for (int chunk = first; chunk < n_chunk; chunk += LANES*BATCH) {
        if (chunk > first) {
            load_parts<LANES>(parts, n_embd_v, n_chunk, chunk, d, x);
        }
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            const float factor = chunk + i*LANES < n_chunk ? factors[chunk + i*LANES] : 0.0f;
            for (int j = 0; j < DIMS; ++j) {
                sum[j] += factor*x[i][j];
            }
        }
    }
    for (int j = 0; j < DIMS; ++j) {
        shared[first*REDUCE_LANES*DIMS + d + j] = sum[j];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < n_embd_v; i += N_THREADS) {
        float all = 0.0f;
        for (int lane = 0; lane < LANES; ++lane) {
            all += shared[lane*REDUCE_LANES*DIMS + i];
        }
        out[size_t(row)*n_embd_v + i] = all;
    }
}

// shared: [4*N_THREADS]
template <int N_THREADS> static __device__ void reduce_row(const hylra_cuda_job & job, int row, float * out, float * shared) {
    if (job.attn.n_embd_v <= REDUCE_LANES) {
        reduce_dims<N_THREADS, 1>(job, row, out, shared);
    } else {
        reduce_dims<N_THREADS, 4>(job, row, out, shared);
    }
}

static __device__ __host__ int rows_of(const hylra_attn & a) { return a.n_head*a.n_tokens*a.n_stream; }
