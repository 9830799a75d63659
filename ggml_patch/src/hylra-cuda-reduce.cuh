// The sum over chunks of one row of outputs, by a block on CUDA: of reduce's own launch, or beside blocks that pool.
#pragma once

#include "hylra-cuda.cuh"

#include "ggml.h"

#include <cuda_fp16.h>
#include <type_traits>

constexpr float LOG2E = 1.4426950408889634f;

// ---- a row: one head of one token

// Reference and sum of what attend left of every LANES-th chunk, from this lane's on. LANES threads know a row: a warp, or a half
template <int LANES> struct row_norms {
    static constexpr int N = HYLRA_CUDA_MAX_CHUNKS/LANES;
    float2 of[N];
};

template <int LANES> static __device__ __forceinline__ row_norms<LANES> norms_of(const hylra_cuda_job & job, int row) {
    const float2 * norms = (const float2 *) (job.scratch + job.layout.norms) + size_t(row)*job.plan.n_chunk;
    row_norms<LANES> found;
#pragma unroll
    for (int i = 0; i < found.N; ++i) {
        const int chunk = threadIdx.x%LANES + LANES*i;
        found.of[i] = chunk < job.plan.n_chunk ? norms[chunk] : make_float2(-INFINITY, 0.0f);
    }
    return found;
}

static __device__ __forceinline__ float factor_of(const float2 & norm, float ref) { return norm.x == -INFINITY ? 0.0f : exp2f(norm.x - ref); }

// The row's reference and inverted sum, known to all its lanes; the latter 0 for a row without visible cells, which gives zeros as in llama.cpp
template <int LANES> static __device__ __forceinline__ float2 total_of(const hylra_cuda_job & job, int row, const row_norms<LANES> & norms) {
    const hylra_attn & a = job.attn;
    const float sink = a.sinks ? ((const float *) a.sinks)[row%a.n_head]*LOG2E : -INFINITY;
    float ref = sink, sum = 0.0f;
#pragma unroll
    for (int i = 0; i < norms.N; ++i) {
        ref = fmaxf(ref, norms.of[i].x);
    }
    for (int mask = LANES/2; mask > 0; mask /= 2) {
        ref = fmaxf(ref, __shfl_xor_sync(0xFFFFFFFFu, ref, mask));
    }
#pragma unroll
    for (int i = 0; i < norms.N; ++i) {
        sum += factor_of(norms.of[i], ref)*norms.of[i].y;
    }
    for (int mask = LANES/2; mask > 0; mask /= 2) {
        sum += __shfl_xor_sync(0xFFFFFFFFu, sum, mask);
    }
    sum += a.sinks ? exp2f(sink - ref) : 0.0f;
    return make_float2(ref, sum > 0.0f ? 1.0f/sum : 0.0f);
}

// ---- reduce: one block per row

constexpr int REDUCE_THREADS = 512;
constexpr int REDUCE_LANES   = 128; // threads that take the same chunks and sum neighbouring dimensions
constexpr int REDUCE_BATCH   = 16;  // registers of values that a thread waits for together

// [MAX_CHUNKS] what the outputs of each chunk are multiplied by; by one warp. MEANS: they are divided by the chunk's sum already
template <bool MEANS> static __device__ void chunk_factors(const hylra_cuda_job & job, int row, float * factors) {
    const row_norms<32> norms = norms_of<32>(job, row);
    const float2 total = total_of(job, row, norms);
#pragma unroll
    for (int i = 0; i < norms.N; ++i) {
        factors[threadIdx.x + 32*i] = factor_of(norms.of[i], total.x)*total.y*(MEANS ? norms.of[i].y : 1.0f);
    }
}

// Values of every STEP-th chunk from `first` on, N at a time, of rows of `length`
template <int STEP, typename T, int BATCH>
static __device__ __forceinline__ void load_parts(const T * parts, int length, int n_chunk, int first, int at, T (&x)[BATCH]) {
    parts += size_t(min(first, n_chunk - 1))*length + min(at, length - 1);
#pragma unroll
    for (int i = 0; i < BATCH; ++i) {
        x[i] = *parts; // of the last chunk again where there are no more
        parts += first + (i + 1)*STEP < n_chunk ? STEP*length : 0;
    }
}

static __device__ __forceinline__ void add_part(float (&sum)[1], float factor, float x) { sum[0] += factor*x; }
static __device__ __forceinline__ void add_part(float (&sum)[4], float factor, const float4 & x) { sum[0] += factor*x.x, sum[1] += factor*x.y, sum[2] += factor*x.z, sum[3] += factor*x.w; }
static __device__ __forceinline__ void add_part(float (&sum)[4], float factor, const uint2 & x) {
    const float2 a = __half22float2(*(const half2 *) &x.x), b = __half22float2(*(const half2 *) &x.y);
    add_part(sum, factor, make_float4(a.x, a.y, b.x, b.y));
}

// What a thread reads at once of a chunk's outputs: of MLA four means, else a value or, of rows longer than 128, four
template <typename PART> constexpr int REDUCE_DIMS = sizeof(PART) == sizeof(float) ? 1 : 4;

// By a block. PART: a constant of the kernel, as code that other shapes need takes time to arrive too (about 1 us of a layer of QwQ-32B at 61440 cells).
// out: F32 [n_embd_v, rows]; shared: [REDUCE_DIMS*N_THREADS]
template <int N_THREADS, typename PART> static __device__ void reduce_row(const hylra_cuda_job & job, int row, float * out, float * shared) {
    constexpr int DIMS = REDUCE_DIMS<PART>, LANES = N_THREADS/REDUCE_LANES, BATCH = REDUCE_BATCH*sizeof(float)/sizeof(PART);
    constexpr bool MEANS = std::is_same<PART, uint2>::value;
    __shared__ float factors[HYLRA_CUDA_MAX_CHUNKS];
    const int n_embd_v = job.attn.n_embd_v, n_chunk = job.plan.n_chunk, length = (MEANS ? hylra_mla_halves(job.attn) : n_embd_v)/DIMS;
    const PART * parts = (const PART *) (job.scratch + job.layout.outputs) + size_t(row)*n_chunk*length;
    const int lane = threadIdx.x%REDUCE_LANES, first = threadIdx.x/REDUCE_LANES;
    float sum[DIMS] = {};
#pragma unroll 1
    for (int chunk = first; chunk - first < n_chunk; chunk += LANES*BATCH) { // as often for each thread
        PART x[BATCH];
        load_parts<LANES>(parts, length, n_chunk, chunk, lane, x); // the first on their way while the factors are computed
        if (chunk == first) {
            if (threadIdx.x < 32) {
                chunk_factors<MEANS>(job, row, factors);
            }
            __syncthreads();
        }
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            add_part(sum, chunk + i*LANES < n_chunk ? factors[chunk + i*LANES] : 0.0f, x[i]);
        }
    }
    for (int j = 0; j < DIMS; ++j) {
        const int at = lane*DIMS + j;
        shared[first*REDUCE_LANES*DIMS + (MEANS ? hylra_mla_dim(at, job.attn.type_v == GGML_TYPE_Q4_0) : at)] = sum[j];
    }
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < n_embd_v; i += N_THREADS) {
        float all = 0.0f;
        for (int j = 0; j < LANES; ++j) {
            all += shared[j*REDUCE_LANES*DIMS + i];
        }
        out[size_t(row)*n_embd_v + i] = all;
    }
}

// Calls with the type as an argument
template <typename F> static void with_part(const hylra_cuda_job & job, F launch) {
    if (job.plan.mla) {
        launch(uint2());
    } else if (job.attn.n_embd_v > REDUCE_LANES) {
        launch(float4());
    } else {
        launch(float());
    }
}

static __device__ __host__ int rows_of(const hylra_attn & a) { return a.n_head*a.n_tokens*a.n_stream; }
