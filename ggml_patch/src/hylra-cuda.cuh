// One attention problem on CUDA and the launches that solve it; each only enqueues kernels, allocates nothing and waits for nothing.
#pragma once

#include "hylra-cuda-plan.h"

#include <cuda_runtime.h>

struct hylra_meter;

struct hylra_cuda_job {
    hylra_attn        attn;         // device pointers
    hylra_cuda_plan   plan;
    hylra_cuda_layout layout;
    char *            scratch;      // layout.size bytes
    int32_t           select_lists; // lists that a select layer pools into; 0: no weights are kept
    int16_t           head_list[HYLRA_CUDA_MAX_HEADS_KV]; // list that each KV head takes, if cells are listed
};

hylra_cuda_job hylra_cuda_job_of(const hylra_attn & attn, const int32_t * head_list, int select_lists, bool scores_only, void * scratch);

void hylra_cuda_attend(const hylra_cuda_job & job, cudaStream_t stream);

// out: F32 [n_embd_v, n_head, n_tokens, n_stream]
void hylra_cuda_reduce(const hylra_cuda_job & job, float * out, cudaStream_t stream);

// Attention to lists in one launch instead, from Hopper on; out as of reduce, nullptr only asks. False where attend and reduce must do it.
bool hylra_cuda_reuse(const hylra_cuda_job & job, float * out, cudaStream_t stream);

// Also does what reduce does, in the same launch, unless only scores are wanted. scores: F32 [n_kv, lists, n_tokens, n_stream];
// forced: I32 [n_forced, n_tokens*n_stream], -1 = none
void hylra_cuda_pool(const hylra_cuda_job & job, float * out, const int32_t * forced, int n_forced, float * scores, cudaStream_t stream);

// Shared memory that choose needs per block, in bytes
size_t hylra_cuda_choose_bytes(int n_kv);

// cells: I32 [top_k, n_row]; bins: those that pool counted; meters: [n_row] on the device or nullptr
void hylra_cuda_choose(const float * scores, const int32_t * bins, int n_kv, int n_row, int top_k, int block_size, int32_t * cells,
                       hylra_meter * meters, cudaStream_t stream);

// The same with four or eight blocks per row, where the device has clusters and shared memory for it.
bool hylra_cuda_cluster_fits(int n_kv, int block_size);
void hylra_cuda_choose_in_cluster(const float * scores, const int32_t * bins, int n_kv, int n_row, int top_k, int32_t * cells, hylra_meter * meters,
                                  cudaStream_t stream);

// ---- what MLA's attend leaves to reduce: halves of a row of outputs, 32 dimensions after 32

HYLRA_HD inline int hylra_mla_halves(const hylra_attn & a) { return hylra_ceil_div(a.n_embd_v, 32)*32; }

// Which dimension lies at a place: lane t of four has two values of each of four octets
HYLRA_HD inline int hylra_mla_dim(int place, bool q4_0) {
    const int octet = place%8/2, j = place%32/8*2 + place%2;
    return place/32*32 + (q4_0 ? octet*4 + (j < 4 ? j : j + 12) : octet*8 + j); // as hylra_octet_dim
}

// ---- launches that overlap: from Hopper on a kernel may start while the one before it ends

#if defined(__CUDACC__)
// Waits for the kernels before this one; nothing that they write may be read earlier.
static __device__ __forceinline__ void hylra_await() {
#    if __CUDA_ARCH__ >= 900
    cudaGridDependencySynchronize();
#    endif
}

// Lets the next kernel be put on the processors as soon as all blocks of this one have come here.
static __device__ __forceinline__ void hylra_release() {
#    if __CUDA_ARCH__ >= 900
    cudaTriggerProgrammaticLaunchCompletion();
#    endif
}

// The code that runs must hold the wait: code compiled for older cards, or PTX of theirs, does not.
template <auto KERNEL> static bool hylra_overlaps() {
    constexpr int MAX_DEVICES = 64;
    static signed char known[MAX_DEVICES] = {}; // 0: not asked yet
    int device = 0;
    if (cudaGetDevice(&device) != cudaSuccess || device >= MAX_DEVICES) {
        return false;
    }
    if (!known[device]) {
        cudaFuncAttributes attributes = {};
        known[device] = cudaFuncGetAttributes(&attributes, KERNEL) == cudaSuccess && attributes.ptxVersion >= 90 ? 1 : -1;
    }
    return known[device] > 0;
}

template <auto KERNEL, typename... Args>
static void hylra_enqueue(dim3 grid, int threads, size_t shared_bytes, cudaStream_t stream, Args... args) {
    cudaLaunchAttribute overlap = {};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = &overlap;
    config.numAttrs = hylra_overlaps<KERNEL>() ? 1 : 0;
    cudaLaunchKernelEx(&config, KERNEL, args...);
}
#endif
