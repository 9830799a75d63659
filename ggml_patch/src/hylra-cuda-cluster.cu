// Choosing single cells from Hopper on: a cluster of eight blocks shares a row, narrows it down together and writes the ascending list.
// hylra_cuda_cluster_fits sends blocks of cells and older cards to hylra-cuda-choose.cu.
#include "hylra-cpu.h"
#include "hylra-cuda-block.cuh"
#include "hylra-cuda.cuh"
#include "hylra-radix.h"

#include <cooperative_groups.h>

namespace cg = cooperative_groups;

constexpr int CLUSTER    = 8;   // blocks per row: the most that every card with clusters takes
constexpr int THREADS    = 512;
constexpr int CANDIDATES = 512; // among which a row's last cells are chosen by comparing all with all

// Cells per block: whole words of bits
static __host__ __device__ int part_cells(int n_kv) { return hylra_ceil_div(hylra_ceil_div(n_kv, CLUSTER), 32)*32; }

// The block's cells [begin, begin + n) of the row; n is a multiple of four. chosen: a bit per cell, in shared memory
struct row_part {
    const float * scores;
    uint32_t *    chosen;
    int begin, n;
};

// What blocks of a cluster read of each other (bins) or write to each other (the rest, by rank)
struct exchange {
    int      bins[HYLRA_CUDA_BINS];
    uint64_t candidates[CLUSTER][CANDIDATES];
    int      n_candidate[CLUSTER], n_chosen[CLUSTER];
    float    mass[CLUSTER];
};

struct narrowing {
    hylra_radix_bound bound;
    int  room, n_in_bin, n_candidate;
    bool all;
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

static __device__ row_part part_of(const float * scores, int n_kv, uint32_t * chosen) {
    const int n = part_cells(n_kv), begin = int(blockIdx.x)*n;
    return { scores + begin, chosen, begin, max(0, min(n, n_kv - begin)) };
}

// ---- scores: four neighbouring cells are a quad, a thread waits for a few quads together

struct quads {
    static constexpr int N = 4;
    float4 of[N];

    // first: this thread's; what lies beyond the part is hidden
    __device__ __forceinline__ void load(const row_part & part, int first) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const int at = first + i*THREADS;
            of[i] = at < part.n/4 ? ((const float4 *) part.scores)[at] : make_float4(-1.0f, -1.0f, -1.0f, -1.0f);
        }
    }
};

// ---- narrowing

// The bin that the room ends in: each block comes to the same. counts: of this thread's bins, the uppermost first
constexpr int BINS_PER_THREAD = HYLRA_CUDA_BINS/THREADS;
static __device__ void enter_bin(const int (&counts)[BINS_PER_THREAD], narrowing & state, int * sums) {
    const int top = HYLRA_CUDA_BINS - 1 - int(threadIdx.x)*BINS_PER_THREAD, room = state.room;
    int own = 0, total;
#pragma unroll
    for (int i = 0; i < BINS_PER_THREAD; ++i) {
        own += counts[i];
    }
    int before = hylra_block_prefix<THREADS>(own, sums, &total); // all have read the room before it is changed
    if (threadIdx.x == 0) {
        state.all = total <= room;
    }
#pragma unroll
    for (int i = 0; i < BINS_PER_THREAD; ++i) {
        if (before <= room && before + counts[i] > room) { // one bin at most
            state.room     = room - before;
            state.n_in_bin = counts[i];
            state.bound    = hylra_radix_enter(state.bound, top - i);
        }
        before += counts[i];
    }
    __syncthreads();
}

// This thread's bins, over all blocks
static __device__ void cluster_counts(cg::cluster_group & cluster, exchange & mine, int (&counts)[BINS_PER_THREAD]) {
    static_assert(BINS_PER_THREAD == 4, "an int4 of bins");
    counts[0] = counts[1] = counts[2] = counts[3] = 0;
#pragma unroll
    for (int rank = 0; rank < CLUSTER; ++rank) {
        const int4 four = ((const int4 *) cluster.map_shared_rank(mine.bins, rank))[THREADS - 1 - threadIdx.x];
        counts[0] += four.w, counts[1] += four.z, counts[2] += four.y, counts[3] += four.x;
    }
}

// Counts the next digit of the cells that the bound does not tell apart.
static __noinline__ __device__ void count_digits(const row_part & part, const hylra_radix_bound & bound, int * bins) {
    for (int i = threadIdx.x; i < HYLRA_CUDA_BINS; i += THREADS) {
        bins[i] = 0;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < part.n; i += THREADS) {
        const float score = part.scores[i];
        const uint64_t key = hylra_radix_key(fmaxf(score, 0.0f), uint32_t(part.begin + i));
        if (score >= 0.0f && hylra_radix_compare(key, bound) == 0) {
            atomicAdd(&bins[hylra_radix_digit(key, bound.n_level)], 1);
        }
    }
}

// Until the bin that the room ends in holds few cells. first_bins: of the row, counted by pool
static __device__ void narrow_down(cg::cluster_group & cluster, const row_part & part, const int32_t * first_bins, exchange & mine, narrowing & state, int * sums) {
    const int4 four = ((const int4 *) first_bins)[THREADS - 1 - threadIdx.x];
    int counts[BINS_PER_THREAD] = { four.w, four.z, four.y, four.x };
    for (;;) {
        enter_bin(counts, state, sums);
        if (state.all || state.room <= 0 || state.n_in_bin <= CANDIDATES) {
            return;
        }
        count_digits(part, state.bound, mine.bins);
        cluster.sync();
        cluster_counts(cluster, mine, counts);
        cluster.sync(); // all have read the bins
    }
}

// ---- choosing

static __device__ __forceinline__ float mass_of(float score) { return score >= HYLRA_SCORE_FORCED ? score - HYLRA_SCORE_FORCED : score; }

// Tells all blocks of a quad's cells that the bound does not tell apart from others; at: a bit for each
static __device__ __forceinline__ void send_candidates(exchange & mine, narrowing & state, const float (&scores)[4], int first_cell, uint32_t at) {
    for (; at; at &= at - 1) {
        const int i = __ffs(at) - 1, slot = atomicAdd(&state.n_candidate, 1);
        const uint64_t key = hylra_radix_key(i == 0 ? scores[0] : i == 1 ? scores[1] : i == 2 ? scores[2] : scores[3], uint32_t(first_cell + i));
#pragma unroll
        for (int rank = 0; rank < CLUSTER; ++rank) {
            *cg::this_cluster().map_shared_rank(&mine.candidates[blockIdx.x][slot], rank) = key;
        }
    }
}

// Sets the bits of a quad's cells above the bound, whose mass it returns, and sends those at it. By whole warps.
// order_of(score, cell): 1 above, 0 at, -1 below
template <typename F>
static __device__ __forceinline__ float choose_quad(const row_part & part, exchange & mine, narrowing & state, bool has_room, int quad, const float4 & four, const F & order_of) {
    const float scores[4] = { four.x, four.y, four.z, four.w };
    uint32_t bits = 0, at = 0;
    float mass = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int order = order_of(scores[i], part.begin + 4*quad + i);
        bits |= order > 0 ? 1u << i : 0u;
        at   |= order == 0 ? 1u << i : 0u;
        mass += order > 0 ? mass_of(scores[i]) : 0.0f;
    }
    if (at && has_room) {
        send_candidates(mine, state, scores, part.begin + 4*quad, at);
    }
    __syncwarp();
    bits <<= quad%8*4;
    for (int lanes = 1; lanes < 8; lanes *= 2) {
        bits |= __shfl_xor_sync(0xFFFFFFFFu, bits, lanes);
    }
    if (threadIdx.x%8 == 0 && 4*quad < part.n) {
        part.chosen[quad/8] = bits;
    }
    return mass;
}

// Scores alone decide, by their bits; those of a hidden cell are negative. now: the thread's first quads
static __device__ __forceinline__ float choose_by_score(const row_part & part, exchange & mine, narrowing & state, quads & now) {
    const bool has_room = state.room > 0, all = state.all;
    const int n_quad = part.n/4, lane = threadIdx.x%32;
    int low = 0, high = 0;
    if (!all) {
        hylra_radix_interval(state.bound, &low, &high);
    }
    float mass = 0.0f;
    const auto order_of = [=](float score, int) { return (__float_as_int(score) >= high) - (__float_as_int(score) < low); };
    for (int first = threadIdx.x; first - lane < n_quad; first += quads::N*THREADS) {
        if (first >= THREADS) {
            now.load(part, first);
        }
#pragma unroll
        for (int i = 0; i < quads::N; ++i) {
            if (first + i*THREADS - lane < n_quad) {
                mass += choose_quad(part, mine, state, has_room, first + i*THREADS, now.of[i], order_of);
            }
        }
    }
    return mass;
}

// The same where many scores are equal and indices decide
static __noinline__ __device__ float choose_by_key(const row_part & part, exchange & mine, narrowing & state) {
    const hylra_radix_bound bound = state.bound;
    const auto order_of = [=](float score, int cell) { return score < 0.0f ? -1 : hylra_radix_compare(hylra_radix_key(score, uint32_t(cell)), bound); };
    float mass = 0.0f;
    for (int quad = threadIdx.x; quad - int(threadIdx.x%32) < part.n/4; quad += THREADS) {
        const float4 four = quad < part.n/4 ? ((const float4 *) part.scores)[quad] : make_float4(-1.0f, -1.0f, -1.0f, -1.0f);
        mass += choose_quad(part, mine, state, state.room > 0, quad, four, order_of);
    }
    return mass;
}

// The candidates that a lane compares with: of each block the first that is its own, 0 if there is none
struct rivals {
    uint64_t first[CLUSTER];

    __device__ __forceinline__ rivals(const exchange & mine) {
#pragma unroll
        for (int rank = 0; rank < CLUSTER; ++rank) {
            first[rank] = int(threadIdx.x%32) < mine.n_candidate[rank] ? mine.candidates[rank][threadIdx.x%32] : 0;
        }
    }
};

// By a warp: how many of all blocks' candidates are greater
static __device__ __forceinline__ int count_greater(const exchange & mine, const rivals & others, uint64_t key) {
    int n = 0;
#pragma unroll
    for (int rank = 0; rank < CLUSTER; ++rank) {
        n += others.first[rank] > key;
        for (int i = threadIdx.x%32 + 32; i < mine.n_candidate[rank]; i += 32) {
            n += mine.candidates[rank][i] > key;
        }
    }
    for (int mask = 16; mask > 0; mask /= 2) {
        n += __shfl_xor_sync(0xFFFFFFFFu, n, mask);
    }
    return n;
}

// Of all blocks' candidates the `room` greatest are chosen; each block marks its own, a warp one at a time: a block has few, and a thread that compares one
// with all waits for each of them (with one wait for the cluster less, 9.5 -> 6.4 us for 61440 cells). Returns the mass of this thread's.
static __device__ float choose_candidates(const row_part & part, const exchange & mine, const narrowing & state) {
    float mass = 0.0f;
    const rivals others(mine);
    for (int own = threadIdx.x/32; own < state.n_candidate; own += THREADS/32) {
        const uint64_t key = mine.candidates[blockIdx.x][own];
        if (count_greater(mine, others, key) < state.room && threadIdx.x%32 == 0) {
            const int i = int(0xFFFFFFFFu - uint32_t(key)) - part.begin;
            atomicOr(&part.chosen[i/32], 1u << i%32);
            mass += mass_of(__uint_as_float(uint32_t(key >> 32)));
        }
    }
    return mass;
}

// ---- the list: each thread has neighbouring words of bits

struct words { int begin, end, at, total; }; // at: how many cells the threads before chose; total: the block

static __device__ words words_of(const row_part & part, int * sums) {
    const int n_word = hylra_ceil_div(part.n, 32), per_thread = hylra_ceil_div(n_word, THREADS);
    words mine;
    mine.begin = min(int(threadIdx.x)*per_thread, n_word);
    mine.end   = min(mine.begin + per_thread, n_word);
    int n = 0;
    for (int word = mine.begin; word < mine.end; ++word) {
        n += __popc(part.chosen[word]);
    }
    mine.at = hylra_block_prefix<THREADS>(n, sums, &mine.total);
    return mine;
}

// The block's part of the ascending list; the last block also writes what follows the list.
static __device__ void write_words(const row_part & part, const exchange & mine, const words & words, int top_k, int32_t * out) {
    int at = words.at, total = 0;
    for (int rank = 0; rank < CLUSTER; ++rank) {
        at    += rank < int(blockIdx.x) ? mine.n_chosen[rank] : 0;
        total += mine.n_chosen[rank];
    }
    for (int word = words.begin; word < words.end; ++word) {
        for (uint32_t rest = part.chosen[word]; rest; rest &= rest - 1) {
            out[at++] = part.begin + word*32 + __ffs(rest) - 1;
        }
    }
    if (blockIdx.x == CLUSTER - 1) {
        for (int i = total + threadIdx.x; i < top_k; i += THREADS) {
            out[i] = -1;
        }
    }
}

static __device__ void add_mass(const exchange & mine, hylra_meter & meter) {
    double sum = 0.0;
    for (int rank = 0; rank < CLUSTER; ++rank) {
        sum += mine.mass[rank];
    }
    atomicAdd(&meter.mass, sum); // atomic not against others, there are none, but so that nothing waits for the old value
    atomicAdd((unsigned long long *) &meter.n, 1ull);
}

#endif

// grid: (CLUSTER, rows). scores: F32 [n_kv, rows]; first_bins: I32 [HYLRA_CUDA_BINS, rows]; cells: I32 [top_k, rows]
// BLOCKS: per processor that registers are kept few enough for
template <int BLOCKS>
static __global__ void __launch_bounds__(THREADS, BLOCKS) choose_in_cluster_kernel(const float * scores, const int32_t * first_bins, int n_kv,
                                                                              int top_k, int32_t * cells, hylra_meter * meters) {
#if __CUDA_ARCH__ >= 900
    extern __shared__ uint32_t chosen[];
    __shared__ __align__(16) exchange mine;
    __shared__ int   sums[32];
    __shared__ float masses[32];
    __shared__ narrowing state;
    cg::cluster_group cluster = cg::this_cluster();
    cluster.barrier_arrive(); // waited for before another block's memory is used: by then all have begun
    const int row = blockIdx.y, rank = blockIdx.x;
    const row_part part = part_of(scores + size_t(row)*n_kv, n_kv, chosen);
    if (threadIdx.x == 0) {
        state = { {}, top_k, 0, 0, false };
    }
    __syncthreads();
    hylra_await();
    hylra_release();
    quads first_quads;
    first_quads.load(part, threadIdx.x); // under way while the bound is found
    cluster.barrier_wait();
    narrow_down(cluster, part, first_bins + size_t(row)*HYLRA_CUDA_BINS, mine, state, sums);
    const bool scores_decide = state.all || state.bound.n_level <= HYLRA_RADIX_SCORE_LEVELS;
    float mass = scores_decide ? choose_by_score(part, mine, state, first_quads) : choose_by_key(part, mine, state);
    __syncthreads();
    if (threadIdx.x < CLUSTER) {
        cluster.map_shared_rank(mine.n_candidate, threadIdx.x)[rank] = state.n_candidate;
    }
    cluster.sync(); // candidates have arrived
    mass += choose_candidates(part, mine, state);
    __syncthreads();
    const words words = words_of(part, sums);
    if (threadIdx.x < CLUSTER) {
        cluster.map_shared_rank(mine.n_chosen, threadIdx.x)[rank] = words.total;
    }
    if (meters) {
        mass = hylra_block_sum<THREADS>(mass, masses);
        if (threadIdx.x == 0) {
            cluster.map_shared_rank(mine.mass, 0)[rank] = mass;
        }
    }
    cluster.sync(); // nothing of another block is used after this
    write_words(part, mine, words, top_k, cells + size_t(row)*top_k);
    if (meters && rank == 0 && threadIdx.x == 0) {
        add_mass(mine, meters[row]);
    }
#endif
}

// ---- launch

// With two blocks per processor an H200 holds some 30 clusters of eight, with three 45 (reckoned from its parts, not asked): 15.5 and 12.4 us for 32 rows of
// 61440 cells, 7.6 and 8.0 for eight.
constexpr int ROWS_BY_TWO = 30;

static size_t bits_bytes(int n_kv) { return part_cells(n_kv)/32*sizeof(uint32_t); }

bool hylra_cuda_cluster_fits(int n_kv, int block_size) {
    constexpr size_t PLAIN_BYTES = 48u << 10; // of shared memory, that every card gives without asking
    return block_size <= 1 && hylra_overlaps<choose_in_cluster_kernel<2>>() && // code for Hopper or later
           bits_bytes(n_kv) + sizeof(exchange) + sizeof(narrowing) + 64*sizeof(int) <= PLAIN_BYTES;
}

void hylra_cuda_choose_in_cluster(const float * scores, const int32_t * bins, int n_kv, int n_row, int top_k, int32_t * cells, hylra_meter * meters,
                                  cudaStream_t stream) {
    cudaLaunchAttribute attributes[2] = {};
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim = { CLUSTER, 1, 1 };
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(CLUSTER, n_row);
    config.blockDim = dim3(THREADS);
    config.dynamicSmemBytes = bits_bytes(n_kv);
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = 2;
    cudaLaunchKernelEx(&config, n_row <= ROWS_BY_TWO ? choose_in_cluster_kernel<2> : choose_in_cluster_kernel<3>, scores, bins, n_kv, top_k, cells, meters);
}
