// One block of the attention kernels for F16 and Q8_0 rows of up to 128 values, or F16 rows of 576 (MLA). Compiled into a library that the test loads once per block of a cluster.
#define __CUDACC__
#include "cuda_runtime.h"

#include "hylra-cuda-reuse.cuh"
#include "hylra-cuda-select.cu"

constexpr int CLUSTER = 16, WARPS = 4;
enum { ATTEND, REDUCE, POOL, REUSE, MLA_32, MLA_64, MLA_16 };
constexpr int N_THREADS[] = { 32*HYLRA_CUDA_WARPS, REDUCE_THREADS, POOL_FEW_THREADS, 32*WARPS, 256, 256, 128 };

struct work { int kind, grid[3], n_forced; hylra_cuda_job job; float * out; const int32_t * forced; float * scores; };

template <int TYPE, int WIDE> static void run_wide(const work & w) {
    if (w.kind == REUSE) {
        hylra_reuse_kernel<TYPE, 128, WIDE, WARPS, CLUSTER>(w.job, w.out);
    } else {
        hylra_with_mode(w.job, [&](auto mode) { hylra_attend_kernel<TYPE, 128, WIDE, decltype(mode)::value>(w.job); });
    }
}

template <int TYPE> static void run_type(const work & w) { w.job.plan.wide == 2 ? run_wide<TYPE, 2>(w) : run_wide<TYPE, 1>(w); }

template <int COLUMNS, int CELLS> static void run_mla(const work & w, int stages) {
    hylra_with_mode(w.job, [&](auto mode) { hylra_mla_kernel<GGML_TYPE_F16, COLUMNS, CELLS, decltype(mode)::value>(w.job, stages); });
}

template <int N_WORD> static void run_pool(const work & w) {
    with_part(w.job, [&](auto part) { pool_kernel<POOL_FEW_THREADS, N_WORD, 1, 1, decltype(part)>(w.job, pool_list_of(w.job), w.out, w.forced, w.n_forced, w.scores); });
}

extern "C" {

int threads(int kind) { return N_THREADS[kind]; }
const char * base() { return (const char *) &of_block; }

void begin(int kind, pthread_barrier_t * cluster, const char * const * bases, int n_block) {
    pthread_barrier_init(&of_block.block, nullptr, N_THREADS[kind]);
    for (pthread_barrier_t & warp : of_block.warp) { pthread_barrier_init(&warp, nullptr, 32); }
    of_block.cluster = cluster;
    std::copy(bases, bases + n_block, of_block.bases);
}

// As one of the block's threads
void run(const work & w, int x, int y, int z, int thread) {
    threadIdx = dim3(thread), blockIdx = dim3(x, y, z);
    gridDim = dim3(w.grid[0], w.grid[1], w.grid[2]), blockDim = dim3(N_THREADS[w.kind]);
    if (w.kind == REDUCE) {
        with_part(w.job, [&](auto part) { reduce_kernel<decltype(part)>(w.job, w.out); });
    } else if (w.kind == POOL) {
        w.job.plan.n_word == 1 ? run_pool<1>(w) : w.job.plan.n_word == 2 ? run_pool<2>(w) : w.job.plan.n_word == 3 ? run_pool<3>(w) : run_pool<4>(w);
    } else if (w.kind == MLA_32) {
        run_mla<32, 64>(w, 2);
    } else if (w.kind == MLA_64) {
        run_mla<64, 64>(w, 1);
    } else if (w.kind == MLA_16) {
        run_mla<16, 32>(w, 1);
    } else {
        w.job.attn.type_k == GGML_TYPE_Q8_0 ? run_type<GGML_TYPE_Q8_0>(w) : run_type<GGML_TYPE_F16>(w);
    }
}

}
