// One block of hylra-cuda-cluster.cu, of a cluster of N_BLOCK. Compiled into a library that the test loads once per block.
#define __CUDACC__
#include "cuda_runtime.h"

#include CLUSTER_SOURCE

extern "C" {

int threads() { return THREADS; }
const char * base() { return (const char *) &of_block; }

void begin(pthread_barrier_t * cluster, const char * const * bases) {
    pthread_barrier_init(&of_block.block, nullptr, THREADS);
    for (pthread_barrier_t & warp : of_block.warp) { pthread_barrier_init(&warp, nullptr, 32); }
    of_block.cluster = cluster;
    std::copy(bases, bases + N_BLOCK, of_block.bases);
}

// As one of the block's threads
void run(int rank, int thread, const float * scores, const int32_t * first_bins, int n_kv, int top_k, int32_t * cells, hylra_meter * meter) {
    threadIdx = dim3(thread);
    blockIdx  = dim3(rank, 0);
    choose_in_cluster_kernel<N_BLOCK>(scores, first_bins, n_kv, top_k, cells, meter);
}

}
