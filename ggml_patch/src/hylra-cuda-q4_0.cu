// The attention kernels for Q4_0 KV caches; one file per type, so that they compile side by side.
#include "hylra-cuda-reuse.cuh"

void hylra_cuda_attend_q4_0(const hylra_cuda_job & job, cudaStream_t stream) { hylra_attend_type<GGML_TYPE_Q4_0>(job, stream); }
bool hylra_cuda_reuse_q4_0(const hylra_cuda_job & job, float * out, cudaStream_t stream) { return hylra_reuse_type<GGML_TYPE_Q4_0>(job, out, stream); }
