// Top-k of all rows of scores in one launch, one block per row: radix narrowing, a bit per chosen cell, then an ordered list. From Hopper on
// single cells are pooled and chosen by hylra-cuda-cluster.cu instead. The serial twin is hylra_choose_radix; blocks of cells are items like cells, weighing as many as they hold.
#include "hylra-cpu.h"
#include "hylra-cuda-block.cuh"
#include "hylra-cuda.cuh"
#include "hylra-radix.h"

constexpr int THREADS    = 1024;
constexpr int CANDIDATES = 1024; // one per thread

struct item { uint64_t key; int weight; }; // weight: cells; negative: cannot be chosen

static __device__ item item_at(const float * scores, int n_kv, int block_size, int index) {
    if (block_size <= 1) {
        const float s = scores[index];
        return { hylra_radix_key(fmaxf(s, 0.0f), index), s >= 0.0f ? 1 : -1 };
    }
    double mass = 0.0;
    int n = 0;
    for (int cell = index*block_size; cell < min((index + 1)*block_size, n_kv); ++cell) {
        const float s = scores[cell];
        if (s >= 0.0f && s < HYLRA_SCORE_FORCED) {
            mass += s;
            n += 1;
        }
    }
    return { hylra_radix_key(float(mass), index), n };
}

struct narrowing { // shared by the block
    hylra_radix_bound bound;
    int room, n_in_bin, digit;
    bool all;
};

// Enters the bin that the room ends in. weights, counts: [n_bin], counted from the top.
static __device__ void enter_bin(const int * weights, const int * counts, narrowing & state, int * shared) {
    const int n_bin = hylra_radix_bins(state.bound.n_level), per_thread = n_bin > THREADS ? 2 : 1;
    const int top = n_bin - 1 - int(threadIdx.x)*per_thread; // this thread's first bin
    int mine = 0;
    for (int i = 0; i < per_thread && top - i >= 0; ++i) {
        mine += max(weights[top - i], 0);
    }
    int total;
    int before = hylra_block_prefix<THREADS>(mine, shared, &total);
    const int room = state.room;
    __syncthreads();
    if (threadIdx.x == 0) {
        state.all = total <= room;
    }
    for (int i = 0; i < per_thread && top - i >= 0; ++i) {
        const int bin = top - i, weight = weights[bin];
        if (before <= room && before + weight > room) { // one bin at most
            state.digit    = bin;
            state.room     = room - before;
            state.n_in_bin = counts[bin];
        }
        before += weight;
    }
    __syncthreads();
}

constexpr int IN_FLIGHT       = 8; // scores that a thread waits for together
constexpr int QUADS_IN_FLIGHT = 8;

// visit(index, item) for all items, by all threads together: items beyond the last cannot be chosen
template <typename F> static __device__ void for_each_item(const float * scores, int n_kv, int block_size, int n_item, const F & visit) {
    if (block_size > 1) {
        for (int index = threadIdx.x; index - int(threadIdx.x) < n_item; index += THREADS) {
            visit(index, index < n_item ? item_at(scores, n_kv, block_size, index) : item{ 0, -1 });
        }
        return;
    }
    for (int first = threadIdx.x; first - int(threadIdx.x) < n_item; first += IN_FLIGHT*THREADS) {
        float s[IN_FLIGHT];
#pragma unroll
        for (int i = 0; i < IN_FLIGHT; ++i) {
            s[i] = first + i*THREADS < n_item ? scores[first + i*THREADS] : HYLRA_SCORE_HIDDEN;
        }
#pragma unroll
        for (int i = 0; i < IN_FLIGHT; ++i) {
            visit(first + i*THREADS, { hylra_radix_key(fmaxf(s[i], 0.0f), first + i*THREADS), s[i] >= 0.0f ? 1 : -1 });
        }
    }
}

static __device__ void count_digits(const float * scores, int n_kv, int block_size, int n_item, const narrowing & state, int * weights, int * counts) {
    for (int i = threadIdx.x; i < HYLRA_CUDA_BINS; i += THREADS) {
        weights[i] = counts[i] = 0;
    }
    __syncthreads();
    const hylra_radix_bound bound = state.bound;
    for_each_item(scores, n_kv, block_size, n_item, [&](int, const item & it) {
        if (it.weight >= 0 && hylra_radix_compare(it.key, bound) == 0) {
            atomicAdd(&weights[hylra_radix_digit(it.key, bound.n_level)], it.weight);
            atomicAdd(&counts[hylra_radix_digit(it.key, bound.n_level)], 1);
        }
    });
    __syncthreads();
}

// Sets the bits of chosen items: those above the bound, and of those at it as many as there is room for.
static __device__ void choose_items(const float * scores, int n_kv, int block_size, int n_item, const narrowing & state,
                                    uint32_t * bits, item * candidates, int * n_candidate) {
    const hylra_radix_bound bound = state.bound;
    const bool all = state.all, has_room = state.room > 0;
    for_each_item(scores, n_kv, block_size, n_item, [&](int index, const item & it) {
        const int order = all ? 1 : hylra_radix_compare(it.key, bound);
        const unsigned chosen = __ballot_sync(0xFFFFFFFFu, it.weight >= 0 && order > 0);
        if (threadIdx.x%32 == 0 && index < n_item) {
            bits[index/32] = chosen;
        }
        if (it.weight >= 0 && order == 0 && has_room) {
            candidates[atomicAdd(n_candidate, 1)] = it;
        }
    });
}

// The same for cells while scores alone decide, four at a time: two lanes make a byte of bits.
static __device__ void choose_cells(const float * scores, int n_kv, const hylra_radix_bound & bound, bool has_room, uint32_t * bits,
                                    item * candidates, int * n_candidate) {
    int low, high;
    hylra_radix_interval(bound, &low, &high);
    low = has_room ? low : high;
    const int4 none = make_int4(-1, -1, -1, -1); // negative like a hidden cell's score
    for (int first = threadIdx.x; first - int(threadIdx.x) < n_kv/4; first += QUADS_IN_FLIGHT*THREADS) {
        int4 quads[QUADS_IN_FLIGHT];
#pragma unroll
        for (int i = 0; i < QUADS_IN_FLIGHT; ++i) {
            const int at = first + i*THREADS;
            quads[i] = at < n_kv/4 ? ((const int4 *) scores)[at] : none;
        }
#pragma unroll
        for (int i = 0; i < QUADS_IN_FLIGHT; ++i) {
            const int at = first + i*THREADS, s[4] = { quads[i].x, quads[i].y, quads[i].z, quads[i].w };
            unsigned nibble = 0;
            bool some = false;
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                nibble |= s[j] >= high ? 1u << j : 0u;
                some = some || (s[j] >= low && s[j] < high);
            }
            const unsigned neighbour = __shfl_xor_sync(0xFFFFFFFFu, nibble, 1);
            if (threadIdx.x%2 == 0 && at < n_kv/4) {
                ((uint8_t *) bits)[at/2] = uint8_t(nibble | neighbour << 4);
            }
            for (int j = 0; some && j < 4; ++j) {
                if (s[j] >= low && s[j] < high) {
                    candidates[atomicAdd(n_candidate, 1)] = { hylra_radix_key(__int_as_float(s[j]), 4*at + j), 1 };
                }
            }
        }
    }
}

// Of the candidates, those that fit into the room in the order of their keys
static __device__ void choose_candidates(const item * candidates, int n, int room, uint32_t * bits) {
    __syncthreads();
    if (int(threadIdx.x) < n) {
        const item mine = candidates[threadIdx.x];
        int before = 0;
#pragma unroll 8
        for (int i = 0; i < n; ++i) {
            before += candidates[i].key > mine.key ? candidates[i].weight : 0;
        }
        if (before + mine.weight <= room) {
            const int index = int(0xFFFFFFFFu - uint32_t(mine.key));
            atomicOr(&bits[index/32], 1u << index%32);
        }
    }
    __syncthreads();
}

// Cells [32*word, 32*word + 32) that are chosen, a bit each
static __device__ uint32_t chosen_cells(const float * scores, int n_kv, int block_size, const uint32_t * bits, int word) {
    if (block_size <= 1) {
        return bits[word];
    }
    uint32_t cells = 0;
    for (int i = 0; i < 32 && word*32 + i < n_kv; ++i) {
        const float s = scores[word*32 + i];
        const int block = (word*32 + i)/block_size;
        cells |= s >= HYLRA_SCORE_FORCED || (s >= 0.0f && (bits[block/32] >> block%32 & 1)) ? 1u << i : 0u;
    }
    return cells;
}

// The list in ascending order; returns how many cells it has.
static __device__ int write_list(const float * scores, int n_kv, int block_size, const uint32_t * bits, int top_k, int32_t * out, int * shared) {
    const int n_word = hylra_ceil_div(n_kv, 32), per_thread = hylra_ceil_div(n_word, THREADS);
    const int begin = min(int(threadIdx.x)*per_thread, n_word), end = min(begin + per_thread, n_word);
    int n = 0;
    for (int word = begin; word < end; ++word) {
        n += __popc(chosen_cells(scores, n_kv, block_size, bits, word));
    }
    int total;
    int at = hylra_block_prefix<THREADS>(n, shared, &total);
    total = min(total, top_k);
    for (int word = begin; word < end && n > 0; ++word) {
        for (uint32_t rest = chosen_cells(scores, n_kv, block_size, bits, word); rest && at < top_k; rest &= rest - 1) {
            out[at++] = word*32 + __ffs(rest) - 1;
        }
    }
    for (int i = total + threadIdx.x; i < top_k; i += THREADS) {
        out[i] = -1;
    }
    __syncthreads();
    return total;
}

static __device__ void add_mass(const float * scores, const int32_t * cells, int n, hylra_meter & meter, float * shared) {
    float mass = 0.0f;
    for (int i = threadIdx.x; i < n; i += THREADS) {
        const float s = scores[cells[i]];
        mass += s >= HYLRA_SCORE_FORCED ? s - HYLRA_SCORE_FORCED : s;
    }
    for (int mask = 16; mask > 0; mask /= 2) {
        mass += __shfl_xor_sync(0xFFFFFFFFu, mass, mask);
    }
    if (threadIdx.x%32 == 0) {
        shared[threadIdx.x/32] = mass;
    }
    __syncthreads();
    if (threadIdx.x < 32) {
        double sum = shared[threadIdx.x];
        for (int mask = 16; mask > 0; mask /= 2) {
            sum += __shfl_xor_sync(0xFFFFFFFFu, sum, mask);
        }
        if (threadIdx.x == 0) { // atomic not against others, there are none, but so that nothing waits for the old value
            atomicAdd(&meter.mass, sum);
            atomicAdd((unsigned long long *) &meter.n, 1ull);
        }
    }
}

static __device__ int count_forced(const float * scores, int n_kv, int * shared) {
    int n = 0;
    for (int i = threadIdx.x; i < n_kv; i += THREADS) {
        n += scores[i] >= HYLRA_SCORE_FORCED;
    }
    return hylra_block_sum<THREADS>(n, shared);
}

// Until the bin that the room ends in holds few items
static __device__ void narrow_down(const float * scores, const int32_t * first_bins, int n_kv, int block_size, int n_item, narrowing & state,
                                   int * weights, int * counts, int * sums) {
    for (int level = 0; ; ++level) {
        if (level == 0 && block_size <= 1) { // pool has counted already
            for (int i = threadIdx.x; i < HYLRA_CUDA_BINS; i += THREADS) {
                weights[i] = counts[i] = first_bins[i];
            }
            __syncthreads();
        } else {
            count_digits(scores, n_kv, block_size, n_item, state, weights, counts);
        }
        enter_bin(weights, counts, state, sums);
        const bool done = state.all || state.room <= 0 || state.n_in_bin <= CANDIDATES;
        __syncthreads();
        if (threadIdx.x == 0 && !state.all) {
            state.bound = hylra_radix_enter(state.bound, state.digit);
        }
        __syncthreads();
        if (done) {
            return;
        }
    }
}

// BLOCKS false: single cells, with less code to fetch
template <bool BLOCKS>
static __global__ void __launch_bounds__(THREADS) choose_kernel(const float * scores, const int32_t * first_bins, int n_kv, int top_k, int cells_per_block,
                                                                int32_t * cells, hylra_meter * meters) {
    const int block_size = BLOCKS ? cells_per_block : 1;
    extern __shared__ uint32_t bits[]; // one per item
    __shared__ union { int bins[2][HYLRA_CUDA_BINS]; item candidates[CANDIDATES]; } shared; // first the one, then the other
    __shared__ int sums[32], n_candidate;
    __shared__ narrowing state;
    int * const weights = shared.bins[0], * const counts = shared.bins[1];
    hylra_await();
    hylra_release();
    const int row = blockIdx.x, n_item = block_size > 1 ? hylra_ceil_div(n_kv, block_size) : n_kv;
    scores += size_t(row)*n_kv;
    cells  += size_t(row)*top_k;
    const int room = block_size > 1 ? max(0, top_k - count_forced(scores, n_kv, sums)) : top_k;
    if (threadIdx.x == 0) {
        state = { {}, room, 0, 0, false };
        n_candidate = 0;
    }
    __syncthreads();
    narrow_down(scores, first_bins + size_t(row)*HYLRA_CUDA_BINS, n_kv, block_size, n_item, state, weights, counts, sums);
    if (block_size <= 1 && n_kv%32 == 0 && !state.all && state.bound.n_level <= HYLRA_RADIX_SCORE_LEVELS) {
        choose_cells(scores, n_kv, state.bound, state.room > 0, bits, shared.candidates, &n_candidate);
    } else {
        choose_items(scores, n_kv, block_size, n_item, state, bits, shared.candidates, &n_candidate);
    }
    __syncthreads();
    choose_candidates(shared.candidates, n_candidate, state.room, bits);
    const int n = write_list(scores, n_kv, block_size, bits, top_k, cells, sums);
    if (meters) {
        add_mass(scores, cells, n, meters[row], (float *) sums);
    }
}

// Bytes of shared memory that a block may need
size_t hylra_cuda_choose_bytes(int n_kv) { return sizeof(uint32_t)*hylra_ceil_div(n_kv, 32) + (18u << 10); }

template <bool BLOCKS>
static void enqueue_choose(const float * scores, const int32_t * bins, int n_kv, int n_row, int top_k, int block_size, int bits_bytes, int32_t * cells,
                           hylra_meter * meters, cudaStream_t stream) {
    if (hylra_cuda_choose_bytes(n_kv) > 48u << 10) {
        cudaFuncSetAttribute(choose_kernel<BLOCKS>, cudaFuncAttributeMaxDynamicSharedMemorySize, bits_bytes);
    }
    hylra_enqueue<choose_kernel<BLOCKS>>(dim3(n_row), THREADS, bits_bytes, stream, scores, bins, n_kv, top_k, block_size, cells, meters);
}

void hylra_cuda_choose(const float * scores, const int32_t * bins, int n_kv, int n_row, int top_k, int block_size, int32_t * cells,
                       hylra_meter * meters, cudaStream_t stream) {
    const int n_item = block_size > 1 ? hylra_ceil_div(n_kv, block_size) : n_kv;
    const int bits_bytes = hylra_ceil_div(n_item, 32)*int(sizeof(uint32_t));
    block_size > 1 ? enqueue_choose<true> (scores, bins, n_kv, n_row, top_k, block_size, bits_bytes, cells, meters, stream)
                   : enqueue_choose<false>(scores, bins, n_kv, n_row, top_k, block_size, bits_bytes, cells, meters, stream);
}
