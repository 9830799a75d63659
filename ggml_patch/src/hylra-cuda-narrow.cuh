// A row of scores shared by a cluster of blocks: what each has of it, what they tell each other, and how they narrow down where its selection ends.
#pragma once

#include "hylra-cpu.h"
#include "hylra-cuda-block.cuh"
#include "hylra-cuda.cuh"
#include "hylra-radix.h"

#include <cooperative_groups.h>

namespace cg = cooperative_groups;

constexpr int THREADS    = 512;
constexpr int CANDIDATES = 512; // among which a row's last cells are chosen by comparing all with all

// Cells of a thread: neighbours, whole quads, a word of bits or whole words
static __host__ __device__ int thread_cells(int n_kv, int n_thread) {
    const int n = hylra_ceil_div(n_kv, n_thread);
    return n <= 32 ? hylra_ceil_div(n, 4)*4 : hylra_ceil_div(n, 32)*32;
}

static __host__ __device__ int words_of(int n_cell) { return hylra_ceil_div(n_cell, 32); }

// The block's cells [begin, end) of the row. chosen: a bit per cell, each thread's words after the other's, in shared memory
struct row_part {
    const float * scores; // [n_kv] of the row
    uint32_t *    chosen;
    int begin, end, per_thread;

    __device__ __forceinline__ int first(int thread) const { return begin + thread*per_thread; }
    __device__ __forceinline__ int end_of(int thread) const { return min(first(thread) + per_thread, end); }
    __device__ __forceinline__ uint32_t * words(int thread) const { return chosen + thread*words_of(per_thread); }
};

constexpr float MASS_ONE = float(1 << 30); // mass in whole numbers, which add up to the same in any order: scores are shares of a row's attention, whose sum is 1

struct tally { int n_chosen; unsigned mass; };

// What blocks of a cluster read of each other (bins) or write to each other (the rest, by rank)
template <int CLUSTER> struct exchange {
    int      bins[HYLRA_CUDA_BINS];
    uint64_t candidates[CLUSTER][CANDIDATES];
    int      n_candidate[CLUSTER];
    tally    tallies[CLUSTER];
};

struct narrowing {
    hylra_radix_bound bound;
    int      room, n_in_bin, n_candidate;
    unsigned mass; // of the block's chosen cells
    bool     all;
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

static __device__ row_part part_of(const float * scores, int n_kv, int per_thread, uint32_t * chosen) {
    const int begin = int(blockIdx.x)*THREADS*per_thread;
    return { scores, chosen, begin, max(begin, min(begin + THREADS*per_thread, n_kv)), per_thread };
}

// Writes to each block's of_rank[CLUSTER] what this one has to say.
template <int CLUSTER, typename T> static __device__ __forceinline__ void tell_all(T (&of_rank)[CLUSTER], const T & x) {
    if (threadIdx.x < CLUSTER) {
        cg::this_cluster().map_shared_rank(of_rank, threadIdx.x)[blockIdx.x] = x;
    }
}

// ---- scores: four neighbouring cells are a quad, a thread waits for a few quads together

struct quads {
    static constexpr int N = 4;
    float4 of[N];

    // What lies behind `end` is hidden.
    __device__ __forceinline__ void load(const row_part & part, int first, int end) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
            of[i] = first + 4*i < end ? *(const float4 *) (part.scores + first + 4*i) : make_float4(-1.0f, -1.0f, -1.0f, -1.0f);
        }
    }
};

// ---- narrowing

constexpr int N_BINS = HYLRA_CUDA_BINS/THREADS; // of a thread

static __device__ __forceinline__ void add_bins(const int * bins, int (&counts)[N_BINS]) {
#pragma unroll
    for (int i = 0; i < N_BINS; i += 4) {
        const int4 four = ((const int4 *) bins)[(HYLRA_CUDA_BINS - int(threadIdx.x)*N_BINS - i)/4 - 1];
        counts[i] += four.w, counts[i + 1] += four.z, counts[i + 2] += four.y, counts[i + 3] += four.x;
    }
}

// The bin that the room ends in: each block comes to the same. counts: of this thread's bins, the uppermost first
static __device__ void enter_bin(const int (&counts)[N_BINS], narrowing & state, int * sums) {
    const int room = state.room;
    int own = 0, total, found = -1, left = 0, n_in_bin = 0;
#pragma unroll
    for (int i = 0; i < N_BINS; ++i) {
        own += counts[i];
    }
    int before = hylra_block_prefix<THREADS>(own, sums, &total); // all have read the room before it is changed
#pragma unroll
    for (int i = 0; i < N_BINS; ++i) {
        if (before <= room && before + counts[i] > room) { // one bin at most
            found = HYLRA_CUDA_BINS - 1 - int(threadIdx.x)*N_BINS - i, left = room - before, n_in_bin = counts[i];
        }
        before += counts[i];
    }
    if (threadIdx.x == 0) {
        state.all = total <= room;
    }
    if (found >= 0) {
        state.room     = left;
        state.n_in_bin = n_in_bin;
        state.bound    = hylra_radix_enter(state.bound, found);
    }
    __syncthreads();
}

// Counts the next digit of the cells that the bound does not tell apart.
static __noinline__ __device__ void count_digits(const row_part & part, const hylra_radix_bound & bound, int * bins) {
#pragma unroll 1
    for (int i = threadIdx.x; i < HYLRA_CUDA_BINS; i += THREADS) {
        bins[i] = 0;
    }
    __syncthreads();
#pragma unroll 1
    for (int cell = part.begin + threadIdx.x; cell < part.end; cell += THREADS) {
        const float score = part.scores[cell];
        const uint64_t key = hylra_radix_key(fmaxf(score, 0.0f), uint32_t(cell));
        if (score >= 0.0f && hylra_radix_compare(key, bound) == 0) {
            atomicAdd(&bins[hylra_radix_digit(key, bound.n_level)], 1);
        }
    }
}

// Until the bin that the room ends in holds few cells. first_bins: of the row, counted by pool
template <int CLUSTER> static __device__ void narrow_down(const row_part & part, const int32_t * first_bins, exchange<CLUSTER> & mine, narrowing & state, int * sums) {
    int counts[N_BINS] = {};
    add_bins(first_bins, counts);
    for (;;) {
        enter_bin(counts, state, sums);
        if (state.all || state.room <= 0 || state.n_in_bin <= CANDIDATES) {
            return;
        }
        count_digits(part, state.bound, mine.bins);
        cg::this_cluster().sync();
        for (int & count : counts) {
            count = 0;
        }
#pragma unroll 1
        for (int rank = 0; rank < CLUSTER; ++rank) {
            add_bins(cg::this_cluster().map_shared_rank(mine.bins, rank), counts);
        }
        cg::this_cluster().sync(); // all have read the bins
    }
}

#endif
