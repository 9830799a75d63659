// The attention kernels for BF16 KV caches; one file per type, so that they compile side by side.
#include "hylra-cuda-attend.cuh"

void hylra_cuda_attend_bf16(const hylra_cuda_job & job, cudaStream_t stream) { hylra_attend_type<GGML_TYPE_BF16>(job, stream); }
