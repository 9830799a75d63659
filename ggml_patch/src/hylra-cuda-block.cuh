// Sums over a block of threads, for the kernels that choose cells; at most 32 warps.
#pragma once

#include <cuda_runtime.h>

// Sum over a warp, known to all of its lanes
static __device__ __forceinline__ int hylra_warp_sum(int x) {
#if __CUDA_ARCH__ >= 800
    return __reduce_add_sync(0xFFFFFFFFu, x);
#else
    for (int mask = 16; mask > 0; mask /= 2) {
        x += __shfl_xor_sync(0xFFFFFFFFu, x, mask);
    }
    return x;
#endif
}

// Sum over the threads before this one; *total: over all. `shared` holds 32 values.
template <int N_THREADS> static __device__ __forceinline__ int hylra_block_prefix(int x, int * shared, int * total) {
    const int lane = threadIdx.x%32, warp = threadIdx.x/32;
    int sum = x;
    for (int step = 1; step < 32; step *= 2) {
        const int before = __shfl_up_sync(0xFFFFFFFFu, sum, step);
        sum += lane >= step ? before : 0;
    }
    __syncthreads();
    if (lane == 31) {
        shared[warp] = sum;
    }
    __syncthreads();
    const int of_warp = lane < N_THREADS/32 ? shared[lane] : 0;
    *total = hylra_warp_sum(of_warp);
    return hylra_warp_sum(lane < warp ? of_warp : 0) + sum - x;
}

// Sum over the block, known to all of its threads
template <int N_THREADS> static __device__ __forceinline__ int hylra_block_sum(int x, int * shared) {
    x = hylra_warp_sum(x);
    __syncthreads();
    if (threadIdx.x%32 == 0) {
        shared[threadIdx.x/32] = x;
    }
    __syncthreads();
    return hylra_warp_sum(threadIdx.x%32 < N_THREADS/32 ? shared[threadIdx.x%32] : 0);
}
