// CUDA threads as threads of this machine, so that a kernel can be run without a GPU: as much of the language as hylra-cuda-cluster.cu,
// hylra-cuda-select.cu and hylra-cuda-reuse.cuh speak. A block is one loaded copy of the library that is compiled from it: what is __shared__ is static, hence the block's own.
#pragma once

#include <pthread.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#define __CUDA_ARCH__ 900
#define __global__
#define __device__
#define __host__
#define __forceinline__
#define __noinline__
#define __shared__ static
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))

using std::max;
using std::min;

struct dim3 { unsigned x, y, z; dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {} };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline float4 make_float4(float x, float y, float z, float w) { return { x, y, z, w }; }
inline int4 make_int4(int x, int y, int z, int w) { return { x, y, z, w }; }
inline float2 make_float2(float x, float y) { return { x, y }; }
inline uint2 make_uint2(unsigned x, unsigned y) { return { x, y }; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return { x, y, z, w }; }

inline thread_local dim3 threadIdx, blockIdx, gridDim, blockDim;

template <typename To, typename From> To bits_as(From from) { To to; static_assert(sizeof(to) == sizeof(from), ""); memcpy(&to, &from, sizeof(to)); return to; }
inline int __float_as_int(float x) { return bits_as<int>(x); }
inline uint32_t __float_as_uint(float x) { return bits_as<uint32_t>(x); }
inline float __uint_as_float(uint32_t x) { return bits_as<float>(x); }
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __ffs(uint32_t x) { return __builtin_ffs(int(x)); }
inline uint32_t __brev(uint32_t x) { uint32_t out = 0; for (int i = 0; i < 32; ++i) { out |= (x >> i & 1) << (31 - i); } return out; }
inline uint32_t __funnelshift_l(uint32_t low, uint32_t high, int n) { return n == 0 ? high : high << n | low >> (32 - n); }
inline unsigned __float2uint_rn(float x) { return unsigned(std::nearbyint(x)); }
inline int __clz(int x) { return __builtin_clz(unsigned(x)); }
template <typename T> T __ldcg(const T * p) { return *p; }

inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t bytes = uint64_t(b) << 32 | a;
    uint32_t out = 0;
    for (int i = 0; i < 4; ++i) { out |= uint32_t(bytes >> (selector >> 4*i & 7)*8 & 255) << 8*i; }
    return out;
}

template <typename T> T atomicAdd(T * to, T x) { return __atomic_fetch_add(to, x, __ATOMIC_RELAXED); }
inline double atomicAdd(double * to, double x) { const double before = *to; *to += x; return before; } // one thread of a row alone
inline unsigned atomicOr(unsigned * to, unsigned x) { return __atomic_fetch_or(to, x, __ATOMIC_RELAXED); }

// ---- waiting for the block, for the warp, for the cluster

struct shared_by_block {
    pthread_barrier_t block, warp[32];
    uint64_t lanes[32][32];
    uint32_t fragments[32][32][6]; // of a product of matrices
    const void * rows[32][32];     // of matrices in shared memory
    int any;
    pthread_barrier_t * cluster;
    const char * bases[16]; // where each block's copy of `of_block` lies
};
inline shared_by_block of_block;

inline void __syncthreads() { pthread_barrier_wait(&of_block.block); }
inline void __syncwarp() { pthread_barrier_wait(&of_block.warp[threadIdx.x/32]); }

inline int __syncthreads_or(int x) {
    if (x) { __atomic_store_n(&of_block.any, 1, __ATOMIC_RELAXED); }
    __syncthreads();
    const int any = __atomic_load_n(&of_block.any, __ATOMIC_RELAXED);
    __syncthreads();
    if (threadIdx.x == 0) { of_block.any = 0; }
    __syncthreads();
    return any;
}

template <typename T> T lane_of(T x, int lane) { // what another lane gives
    uint64_t * lanes = of_block.lanes[threadIdx.x/32];
    memcpy(&lanes[threadIdx.x%32], &x, sizeof(x));
    __syncwarp();
    memcpy(&x, &lanes[lane], sizeof(x));
    __syncwarp();
    return x;
}
template <typename T> T __shfl_xor_sync(unsigned, T x, int mask) { return lane_of(x, int(threadIdx.x%32) ^ mask); }
template <typename T> T __shfl_up_sync(unsigned, T x, int step) { return lane_of(x, std::max(int(threadIdx.x%32) - step, 0)); }
template <typename T> T __shfl_sync(unsigned, T x, int lane) { return lane_of(x, lane); }
inline unsigned __ballot_sync(unsigned, bool x) {
    unsigned all = 0;
    for (int lane = 0; lane < 32; ++lane) { all |= unsigned(lane_of(int(x), lane)) << lane; }
    return all;
}
template <typename T> T __reduce_add_sync(unsigned, T x) {
    uint64_t * lanes = of_block.lanes[threadIdx.x/32];
    T sum = 0;
    lanes[threadIdx.x%32] = uint64_t(x);
    __syncwarp();
    for (int lane = 0; lane < 32; ++lane) { sum += T(lanes[lane]); }
    __syncwarp();
    return sum;
}
inline bool __any_sync(unsigned mask, bool x) { return __ballot_sync(mask, x) != 0; }

// ---- launches: the test starts the threads itself

typedef void * cudaStream_t;
enum { cudaSuccess, cudaLaunchAttributeProgrammaticStreamSerialization, cudaLaunchAttributeClusterDimension, cudaFuncAttributeNonPortableClusterSizeAllowed, cudaFuncAttributeMaxDynamicSharedMemorySize,
       cudaDevAttrMaxSharedMemoryPerBlockOptin };
struct cudaFuncAttributes { int ptxVersion; };
struct cudaLaunchAttribute { int id; struct { int programmaticStreamSerializationAllowed; dim3 clusterDim; } val; };
struct cudaLaunchConfig_t { dim3 gridDim, blockDim; size_t dynamicSmemBytes; cudaStream_t stream; cudaLaunchAttribute * attrs; int numAttrs; };
inline int cudaGetDevice(int * device) { *device = 0; return cudaSuccess; }
template <typename F> int cudaFuncGetAttributes(cudaFuncAttributes * attributes, F) { attributes->ptxVersion = 90; return cudaSuccess; }
template <typename F, typename... Args> int cudaLaunchKernelEx(const cudaLaunchConfig_t *, F, Args...) { return cudaSuccess; }
template <typename F> int cudaFuncSetAttribute(F, int, int) { return cudaSuccess; }
template <typename F> int cudaOccupancyMaxActiveClusters(int * n, F, const cudaLaunchConfig_t *) { *n = 1; return cudaSuccess; }
inline int cudaDeviceGetAttribute(int *, int, int) { return cudaSuccess; }
inline int cudaGetLastError() { return cudaSuccess; }
inline void cudaGridDependencySynchronize() {}
inline void cudaTriggerProgrammaticLaunchCompletion() {}
