// The attention kernels for Q8_0 KV caches; one file per type, so that they compile side by side.
#include "hylra-cuda-attend.cuh"

void hylra_cuda_attend_q8_0(const hylra_cuda_job & job, cudaStream_t stream) { hylra_attend_type<GGML_TYPE_Q8_0>(job, stream); }
