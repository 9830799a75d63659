// What attend leaves in its scratch: outputs and softmax states of a chunk, and for a select layer the weights of its cells.
#pragma once

#include "hylra-cuda-rows.cuh"
#include "hylra-cuda.cuh"

#include <type_traits>

constexpr float HYLRA_LOG2E = 1.4426950408889634f;
// Weights are at most 2^8 instead of 1, so that small ones keep their precision as halves.
constexpr float HYLRA_CUDA_HEADROOM = 8.0f;

// What a kernel does: all cells, a list of cells, or all cells without V
enum hylra_attend_mode { HYLRA_ATTEND_ALL, HYLRA_ATTEND_LISTED, HYLRA_ATTEND_SCORES };

// Calls with the job's mode as a constant.
template <typename F> static void hylra_with_mode(const hylra_cuda_job & job, F launch) {
    if (job.attn.cells) {
        launch(std::integral_constant<hylra_attend_mode, HYLRA_ATTEND_LISTED>());
    } else if (job.plan.scores_only) {
        launch(std::integral_constant<hylra_attend_mode, HYLRA_ATTEND_SCORES>());
    } else {
        launch(std::integral_constant<hylra_attend_mode, HYLRA_ATTEND_ALL>());
    }
}

// ---- one column: a query head of a token

struct hylra_column {
    int   token, head; // head -1: padding
    float slope;       // of ALiBi, times log2(e)
};

static __device__ __forceinline__ float hylra_cuda_slope(const hylra_attn & a, int head) {
    if (a.max_bias <= 0.0f) {
        return HYLRA_LOG2E;
    }
    const int n_log2 = 1 << (31 - __clz(a.n_head));
    const float m0 = exp2f(-a.max_bias/n_log2), m1 = exp2f(-a.max_bias/2.0f/n_log2);
    return HYLRA_LOG2E*(head < n_log2 ? powf(m0, head + 1) : powf(m1, 2*(head - n_log2) + 1));
}

struct hylra_column_place { int token, in_group; };

// Which token and query head of the KV head a column is; without a division, which takes longer than the few tokens that decode has.
template <bool LISTED> static __device__ __forceinline__ hylra_column_place hylra_place_of(const hylra_cuda_plan & p, int column, int token0) {
    hylra_column_place at = { LISTED ? token0 : 0, column };
#pragma unroll 1
    for (; !LISTED && at.in_group >= p.group; at.in_group -= p.group) {
        ++at.token;
    }
    return at;
}

template <bool LISTED> static __device__ __forceinline__ hylra_column hylra_column_of(const hylra_attn & a, const hylra_cuda_plan & p, int column, int head_kv, int token0) {
    if (column >= p.n_column) {
        return { token0, -1, HYLRA_LOG2E }; // positive: a hidden cell's infinity is multiplied by it
    }
    const hylra_column_place at = hylra_place_of<LISTED>(p, column, token0);
    const int head = head_kv*p.group + at.in_group;
    return { at.token, head, hylra_cuda_slope(a, head) };
}

constexpr uint16_t HYLRA_HALF_HIDDEN = 0xFC00; // -inf

template <bool LISTED> static __device__ __forceinline__ uint16_t hylra_cuda_mask(const hylra_attn & a, const hylra_column & column, int stream, int cell) {
    if (cell < 0 || column.head < 0) {
        return HYLRA_HALF_HIDDEN;
    }
    if (!a.mask || (LISTED && a.max_bias <= 0.0f)) { // a listed cell was seen when it was chosen
        return 0;
    }
    const char * row = (const char *) a.mask + column.token*a.mask_nb[1] + stream*a.mask_nb[3];
    return ((const uint16_t *) row)[cell];
}

// State of the online softmax for two columns; weights are exp2(logit - ref).
struct hylra_softmax { float ref[2], sum[2]; };

// The lanes of a column have summed different cells.
static __device__ __forceinline__ void hylra_sum_lanes(hylra_softmax & state) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
        for (int mask = 4; mask < 32; mask *= 2) {
            state.sum[c] += __shfl_xor_sync(0xFFFFFFFFu, state.sum[c], mask);
        }
    }
}

// ---- stores

// Empties the bins that pool counts in; of none if no weights are kept.
static __device__ __forceinline__ void hylra_clear_bins(const hylra_cuda_job & job) {
    int32_t * bins = (int32_t *) (job.scratch + job.layout.bins);
    const int n_bin = job.select_lists*job.attn.n_tokens*job.attn.n_stream*HYLRA_CUDA_BINS;
    const int block = (blockIdx.z*gridDim.y + blockIdx.y)*gridDim.x + blockIdx.x, n_thread = gridDim.z*gridDim.y*gridDim.x*blockDim.x;
    for (int i = block*int(blockDim.x) + int(threadIdx.x); i < n_bin; i += n_thread) {
        bins[i] = 0;
    }
}

// For pooling: peaks and weights of a tile of a select layer
static __device__ __forceinline__ void hylra_store_weights(const hylra_cuda_job & job, size_t group, int first, const int (&cell)[2], const hylra_softmax & state, const uint32_t (&p)[2]) {
    const int g = threadIdx.x%32/4, t = threadIdx.x%4, n_kv = job.attn.n_kv;
    const int n_word = job.plan.n_word;
    uint32_t * weights = (uint32_t *) (job.scratch + job.layout.weights) + group*n_kv*n_word;
    for (int half_tile = 0; half_tile < 2; ++half_tile) {
        if (cell[half_tile] >= 0 && t < n_word) {
            hylra_store_kept(&weights[size_t(cell[half_tile])*n_word + t], p[half_tile]);
        }
    }
    if (g == 0) {
        float2 * peaks = (float2 *) (job.scratch + job.layout.peaks) + group*hylra_ceil_div(n_kv, HYLRA_CUDA_TILE)*4;
        hylra_store_kept(&peaks[first/HYLRA_CUDA_TILE*4 + t], make_float2(state.ref[0], state.ref[1]));
    }
}

static __device__ __forceinline__ size_t hylra_cuda_row(const hylra_attn & a, int stream, const hylra_column & column) {
    return (size_t(stream)*a.n_tokens + column.token)*a.n_head + column.head;
}

static __device__ __forceinline__ void hylra_store_norm(const hylra_cuda_job & job, int chunk, int stream, const hylra_column & column, float ref, float sum) {
    ((float2 *) (job.scratch + job.layout.norms))[hylra_cuda_row(job.attn, stream, column)*job.plan.n_chunk + chunk] = make_float2(ref, sum);
}

static __device__ __forceinline__ float * hylra_outputs(const hylra_cuda_job & job, int chunk, int stream, const hylra_column & column) {
    return (float *) (job.scratch + job.layout.outputs) + (hylra_cuda_row(job.attn, stream, column)*job.plan.n_chunk + chunk)*job.attn.n_embd_v;
}

// Where a warp's outputs of a column begin in shared memory. Odd columns come after even ones, and rows are two values longer than a head: so the stores
// of half a warp, of two dimensions each, fall into different banks.
template <int EMBD_V> constexpr int HYLRA_SHARED_FLOATS = 8*(EMBD_V + 2); // of a warp
template <int EMBD_V> static __device__ __forceinline__ int hylra_shared_row(int warp, int column) { return (warp*8 + column%2*4 + column/2)*(EMBD_V + 2); }

// The warps of a block have seen different cells: their states and outputs of one group of columns go where the block can add them.
template <int TYPE, int EMBD_V>
static __device__ __forceinline__ void hylra_share_outputs(const hylra_softmax & state, const float (&out)[EMBD_V/16][4], float * shared, float2 (*norms)[8] /* [warps] */) {
    const int lane = threadIdx.x%32, warp = threadIdx.x/32, g = lane/4, t = lane%4;
    __syncthreads();
    if (g == 0) {
        norms[warp][2*t]     = make_float2(state.ref[0], state.sum[0]);
        norms[warp][2*t + 1] = make_float2(state.ref[1], state.sum[1]);
    }
#pragma unroll
    for (int m = 0; m < EMBD_V/16; ++m) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            *(float2 *) &shared[hylra_shared_row<EMBD_V>(warp, 2*t + c) + hylra_octet_dim<TYPE>(m/4*8 + g, m%4*2)] = make_float2(out[m][c], out[m][2 + c]);
        }
    }
    __syncthreads();
}

// One reference for a column's outputs of all warps, their sum of weights, and what each warp's outputs are multiplied by
template <int WARPS> static __device__ __forceinline__ float2 hylra_merged_norm(const float2 (*norms)[8], int column, float (&factor)[WARPS]) {
    float ref = -INFINITY, sum = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
        ref = fmaxf(ref, norms[w][column].x);
    }
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
        factor[w] = ref == -INFINITY ? 0.0f : exp2f(norms[w][column].x - ref);
        sum += factor[w]*norms[w][column].y;
    }
    return make_float2(ref, sum);
}

// One group of columns of a block
template <bool LISTED, int TYPE, int EMBD_V>
static __device__ void hylra_store_merged(const hylra_cuda_job & job, int chunk, int stream, int head_kv, int token0, int first_column, const hylra_softmax & state,
                                          const float (&out)[EMBD_V/16][4], float * shared, float2 (*norms)[8]) {
    hylra_share_outputs<TYPE, EMBD_V>(state, out, shared, norms);
    const int column_in_group = threadIdx.x/16, part = threadIdx.x%16; // 16 threads write one column
    const hylra_column column = hylra_column_of<LISTED>(job.attn, job.plan, first_column + column_in_group, head_kv, token0);
    if (column.head < 0) {
        return;
    }
    float factor[HYLRA_CUDA_WARPS];
    const float2 norm = hylra_merged_norm(norms, column_in_group, factor);
    float * to = hylra_outputs(job, chunk, stream, column);
#pragma unroll
    for (int first = 0; first < EMBD_V; first += 16) {
        const int d = first + part;
        float x = 0.0f;
#pragma unroll
        for (int w = 0; w < HYLRA_CUDA_WARPS; ++w) {
            x += factor[w]*shared[hylra_shared_row<EMBD_V>(w, column_in_group) + d];
        }
        if (d < job.attn.n_embd_v) {
            to[d] = x;
        }
    }
    if (part == 0) {
        hylra_store_norm(job, chunk, stream, column, norm.x, norm.y);
    }
}

// The softmax states of one group of columns alone, for a layer of which only scores are wanted
static __device__ __forceinline__ void hylra_store_state(const hylra_cuda_job & job, int chunk, int stream, int head_kv, int first_column, const hylra_softmax & state,
                                                         float2 (*norms)[8] /* [warps] */) {
    const int warp = threadIdx.x/32, g = threadIdx.x%32/4, t = threadIdx.x%4;
    __syncthreads();
    if (g == 0) {
        norms[warp][2*t]     = make_float2(state.ref[0], state.sum[0]);
        norms[warp][2*t + 1] = make_float2(state.ref[1], state.sum[1]);
    }
    __syncthreads();
    const int at = threadIdx.x;
    const hylra_column column = hylra_column_of<false>(job.attn, job.plan, at < 8 ? first_column + at : job.plan.n_column, head_kv, 0);
    if (column.head < 0) {
        return;
    }
    float factor[HYLRA_CUDA_WARPS];
    const float2 norm = hylra_merged_norm(norms, at, factor);
    hylra_store_norm(job, chunk, stream, column, norm.x, norm.y);
}
