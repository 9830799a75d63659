// Choosing single cells from Hopper on: a cluster of blocks shares a row, narrows it down together (hylra-cuda-narrow.cuh) and writes the ascending list.
// hylra_cuda_cluster_fits sends blocks of cells and older cards to hylra-cuda-choose.cu. What runs once should be little code, as code has to arrive too:
// pooling and choosing among 61440 cells of DeepSeek-R1 took 34 us when this was 60 KB, and 28 with the same steps in 25 (loops as loops, bits from signs).
#include "hylra-cuda-narrow.cuh"

#include <algorithm>

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

// ---- choosing

static __device__ __forceinline__ float mass_of(float score) { return score >= HYLRA_SCORE_FORCED ? score - HYLRA_SCORE_FORCED : score; }

// Tells all blocks of this thread's cells that the bound does not tell apart from others; at: a bit for each of 32 cells from `first` on
template <int CLUSTER>
static __device__ __forceinline__ void send_candidates(const row_part & part, exchange<CLUSTER> & mine, narrowing & state, int first, uint32_t at) {
    if (at) {
        int slot = atomicAdd(&state.n_candidate, __popc(at));
#pragma unroll 1
        for (; at; at &= at - 1) {
            const int cell = first + __ffs(at) - 1;
            const uint64_t key = hylra_radix_key(part.scores[cell], uint32_t(cell));
#pragma unroll
            for (int rank = 0; rank < CLUSTER; ++rank) {
                *cg::this_cluster().map_shared_rank(&mine.candidates[blockIdx.x][slot], rank) = key;
            }
            ++slot;
        }
    }
}

// This thread's cells from `first` on, at most 32: a bit for each above the bound and for each at it, and the mass of the former
struct ordered { uint32_t above, at; float mass; };

// A word of a thread is known, whose first bit is cell `first`.
template <int CLUSTER>
static __device__ __forceinline__ void end_word(const row_part & part, exchange<CLUSTER> & mine, narrowing & state, int first, ordered & sum, uint32_t *& chosen) {
    *chosen++ = sum.above;
    send_candidates(part, mine, state, first, sum.at);
    sum.above = sum.at = 0;
}

// Scores alone decide, by their bits; those of a hidden cell are negative. A score in [low, high) is at the bound.
struct score_order {
    int low, high;

    // The first quads of a thread, which has n_cell cells from there on; shift: of 32 cells, where they begin. Bits come from signs, the first cell's last.
    __device__ __forceinline__ void add(const quads & now, int n_cell, int shift, ordered & sum) const {
#pragma unroll
        for (int i = 0; i < now.N; ++i) {
            if (4*i < n_cell) {
                uint32_t not_above = 0, below = 0;
#pragma unroll
                for (float score : { now.of[i].x, now.of[i].y, now.of[i].z, now.of[i].w }) {
                    const int bits = max(__float_as_int(score), -1); // so that nothing overflows
                    not_above = __funnelshift_l(uint32_t(bits - high), not_above, 1);
                    below     = __funnelshift_l(uint32_t(bits - low), below, 1);
                    sum.mass += bits >= high ? mass_of(score) : 0.0f;
                }
                sum.above |= __brev(~not_above << 28) << (shift + 4*i);
                sum.at    |= __brev((not_above & ~below) << 28) << (shift + 4*i);
            }
        }
    }
};

// Sets the bits of this thread's cells above the bound, whose mass it returns, and sends those at it. now: its first quads
template <int CLUSTER> static __device__ __forceinline__ float choose_by_score(const row_part & part, exchange<CLUSTER> & mine, narrowing & state, quads & now) {
    static_assert(4*now.N == 16, "two loads make a word");
    score_order order = { 0, 0 };
    if (!state.all) {
        hylra_radix_interval(state.bound, &order.low, &order.high);
    }
    order.low = state.room > 0 ? order.low : order.high; // else nothing is at the bound
    const int begin = part.first(threadIdx.x), end = part.end_of(threadIdx.x);
    uint32_t * chosen = part.words(threadIdx.x);
    ordered sum = {};
#pragma unroll 1
    for (int first = begin; first < end; first += 16) {
        const int shift = (first - begin)%32; // 0 or 16
        order.add(now, end - first, shift, sum);
        now.load(part, first + 16, end);
        if (shift != 0 || first + 16 >= end) { // a word is full, or the last
            end_word(part, mine, state, first - shift, sum, chosen);
        }
    }
    return sum.mass;
}

// The same where many scores are equal and indices decide
template <int CLUSTER> static __noinline__ __device__ float choose_by_key(const row_part & part, exchange<CLUSTER> & mine, narrowing & state) {
    const int begin = part.first(threadIdx.x), end = part.end_of(threadIdx.x);
    uint32_t * chosen = part.words(threadIdx.x);
    ordered sum = {};
#pragma unroll 1
    for (int cell = begin; cell < end; ++cell) {
        const float score = part.scores[cell];
        const int order = score < 0.0f ? -1 : hylra_radix_compare(hylra_radix_key(score, uint32_t(cell)), state.bound), bit = (cell - begin)%32;
        sum.above |= order > 0 ? 1u << bit : 0u;
        sum.at    |= order == 0 && state.room > 0 ? 1u << bit : 0u;
        sum.mass  += order > 0 ? mass_of(score) : 0.0f;
        if (bit == 31 || cell + 1 == end) {
            end_word(part, mine, state, cell - bit, sum, chosen);
        }
    }
    return sum.mass;
}

// The candidates that a lane compares with: of each block the first that is its own, 0 if there is none
template <int CLUSTER> struct rivals {
    uint64_t first[CLUSTER];
    int      n[CLUSTER], most;

    __device__ __forceinline__ rivals(const exchange<CLUSTER> & mine) : most(0) {
#pragma unroll
        for (int rank = 0; rank < CLUSTER; ++rank) {
            n[rank]     = mine.n_candidate[rank];
            most        = max(most, n[rank]);
            first[rank] = int(threadIdx.x%32) < n[rank] ? mine.candidates[rank][threadIdx.x%32] : 0;
        }
    }

    // By a warp: how many are greater
    __device__ __forceinline__ int count_greater(const exchange<CLUSTER> & mine, uint64_t key) const {
        int found = 0;
#pragma unroll
        for (int rank = 0; rank < CLUSTER; ++rank) {
            found += first[rank] > key;
        }
#pragma unroll 1
        for (int i = threadIdx.x%32 + 32; i < most; i += 32) {
#pragma unroll
            for (int rank = 0; rank < CLUSTER; ++rank) {
                found += i < n[rank] && mine.candidates[rank][i] > key;
            }
        }
        return hylra_warp_sum(found);
    }
};

// Of all blocks' candidates the `room` greatest are chosen; each block marks its own, a warp one at a time: a block has few, and a thread that compares one
// with all waits for each of them (with one wait for the cluster less, 9.5 -> 6.4 us for 61440 cells then). Returns the mass of this thread's.
template <int CLUSTER> static __device__ float choose_candidates(const row_part & part, const exchange<CLUSTER> & mine, const narrowing & state) {
    float mass = 0.0f;
    const rivals<CLUSTER> others(mine);
    const float per_cell = 1.0f/float(part.per_thread); // exact enough for a block's cells, and a division less to wait for
#pragma unroll 1
    for (int own = threadIdx.x/32; own < state.n_candidate; own += THREADS/32) {
        const uint64_t key = mine.candidates[blockIdx.x][own];
        if (others.count_greater(mine, key) < state.room && threadIdx.x%32 == 0) {
            const int i = int(0xFFFFFFFFu - uint32_t(key)) - part.begin, thread = int((float(i) + 0.5f)*per_cell), in_thread = i - thread*part.per_thread;
            atomicOr(&part.words(thread)[in_thread/32], 1u << in_thread%32);
            mass += mass_of(__uint_as_float(uint32_t(key >> 32)));
        }
    }
    return mass;
}

static __device__ __forceinline__ void add_mass(float mass, narrowing & state) {
    const unsigned all = __reduce_add_sync(0xFFFFFFFFu, __float2uint_rn(mass*MASS_ONE));
    if (threadIdx.x%32 == 0) {
        atomicAdd(&state.mass, all);
    }
}

// ---- the list

// How many cells the threads before this one chose; *total: the block
static __device__ int chosen_before(const row_part & part, int * sums, int * total) {
    const uint32_t * chosen = part.words(threadIdx.x);
    int n = 0;
#pragma unroll 1
    for (int cell = part.first(threadIdx.x), end = part.end_of(threadIdx.x); cell < end; cell += 32) {
        n += __popc(*chosen++);
    }
    return hylra_block_prefix<THREADS>(n, sums, total);
}

// The block's part of the ascending list; the last block also writes what follows the list. at: chosen_before
template <int CLUSTER> static __device__ void write_list(const row_part & part, const exchange<CLUSTER> & mine, int at, int top_k, int32_t * out) {
    int total = 0;
    for (int rank = 0; rank < CLUSTER; ++rank) {
        at    += rank < int(blockIdx.x) ? mine.tallies[rank].n_chosen : 0;
        total += mine.tallies[rank].n_chosen;
    }
    const uint32_t * chosen = part.words(threadIdx.x);
#pragma unroll 1
    for (int cell = part.first(threadIdx.x), end = part.end_of(threadIdx.x); cell < end; cell += 32) {
#pragma unroll 1
        for (uint32_t rest = *chosen++; rest; rest &= rest - 1) {
            out[at++] = cell + __ffs(rest) - 1;
        }
    }
    if (blockIdx.x == CLUSTER - 1) {
#pragma unroll 1
        for (int i = total + threadIdx.x; i < top_k; i += THREADS) {
            out[i] = -1;
        }
    }
}

template <int CLUSTER> static __device__ void meter_mass(const exchange<CLUSTER> & mine, hylra_meter & meter) {
    unsigned sum = 0;
    for (int rank = 0; rank < CLUSTER; ++rank) {
        sum += mine.tallies[rank].mass;
    }
    atomicAdd(&meter.mass, double(sum)*(1.0/double(MASS_ONE))); // atomic not against others, there are none, but so that nothing waits for the old value
    atomicAdd((unsigned long long *) &meter.n, 1ull);
}

#endif

// grid: (CLUSTER, rows). scores: F32 [n_kv, rows]; first_bins: I32 [HYLRA_CUDA_BINS, rows]; cells: I32 [top_k, rows]
template <int CLUSTER>
static __global__ void __launch_bounds__(THREADS, 2) choose_in_cluster_kernel(const float * scores, const int32_t * first_bins, int n_kv, int top_k, int32_t * cells,
                                                                             hylra_meter * meters) {
#if __CUDA_ARCH__ >= 900
    extern __shared__ uint32_t chosen[];
    __shared__ __align__(16) exchange<CLUSTER> mine;
    __shared__ int sums[32];
    __shared__ narrowing state;
    cg::this_cluster().barrier_arrive(); // waited for before another block's memory is used: by then all have begun
    const int row = blockIdx.y;
    const row_part part = part_of(scores + size_t(row)*n_kv, n_kv, thread_cells(n_kv, CLUSTER*THREADS), chosen);
    if (threadIdx.x == 0) {
        state = {};
        state.room = top_k;
    }
    __syncthreads();
    hylra_await();
    hylra_release();
    quads first_quads;
    first_quads.load(part, part.first(threadIdx.x), part.end_of(threadIdx.x)); // under way while the bound is found
    cg::this_cluster().barrier_wait();
    narrow_down(part, first_bins + size_t(row)*HYLRA_CUDA_BINS, mine, state, sums);
    const bool scores_decide = state.all || state.bound.n_level <= HYLRA_RADIX_SCORE_LEVELS;
    float mass = scores_decide ? choose_by_score(part, mine, state, first_quads) : choose_by_key(part, mine, state);
    __syncthreads();
    tell_all(mine.n_candidate, state.n_candidate);
    cg::this_cluster().sync(); // candidates have arrived
    mass += choose_candidates(part, mine, state);
    if (meters) {
        add_mass(mass, state);
    }
    __syncthreads();
    int total;
    const int before = chosen_before(part, sums, &total);
    tell_all(mine.tallies, tally{ total, state.mass });
    cg::this_cluster().sync(); // nothing of another block is used after this
    write_list(part, mine, before, top_k, cells + size_t(row)*top_k);
    if (meters && blockIdx.x == 0 && threadIdx.x == 0) {
        meter_mass(mine, meters[row]);
    }
#endif
}

// ---- launch

// Four blocks per row where a row is short (a select layer of QwQ-32B at 8192 cells took 21.1 us, with eight 22.8) or rows are many (32 of 61440: 280.0 and 281.6).
constexpr int SHORT_ROW = 32768, MANY_ROWS = 30;

template <int CLUSTER> static size_t bits_bytes(int n_kv) { return THREADS*words_of(thread_cells(n_kv, CLUSTER*THREADS))*sizeof(uint32_t); }

template <int CLUSTER>
static void enqueue_choose(const float * scores, const int32_t * bins, int n_kv, int n_row, int top_k, int32_t * cells, hylra_meter * meters, cudaStream_t stream) {
    cudaLaunchAttribute attributes[2] = {};
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim = { CLUSTER, 1, 1 };
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(CLUSTER, n_row);
    config.blockDim = dim3(THREADS);
    config.dynamicSmemBytes = bits_bytes<CLUSTER>(n_kv);
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = 2;
    cudaLaunchKernelEx(&config, choose_in_cluster_kernel<CLUSTER>, scores, bins, n_kv, top_k, cells, meters);
}

bool hylra_cuda_cluster_fits(int n_kv, int block_size) {
    constexpr size_t PLAIN_BYTES = 48u << 10; // of shared memory, that every card gives without asking
    return block_size <= 1 && hylra_overlaps<choose_in_cluster_kernel<8>>() && // code for Hopper or later
           std::max(bits_bytes<4>(n_kv) + sizeof(exchange<4>), bits_bytes<8>(n_kv) + sizeof(exchange<8>)) + sizeof(narrowing) + 32*sizeof(int) <= PLAIN_BYTES;
}

void hylra_cuda_choose_in_cluster(const float * scores, const int32_t * bins, int n_kv, int n_row, int top_k, int32_t * cells, hylra_meter * meters,
                                  cudaStream_t stream) {
    n_kv <= SHORT_ROW || n_row > MANY_ROWS ? enqueue_choose<4>(scores, bins, n_kv, n_row, top_k, cells, meters, stream)
                                           : enqueue_choose<8>(scores, bins, n_kv, n_row, top_k, cells, meters, stream);
}
