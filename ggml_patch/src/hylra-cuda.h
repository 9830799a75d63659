// The door between llama.cpp's CUDA backend and our kernels. Weak: the unpatched twin links the same ggml without them.
#pragma once

#include "ggml-backend.h"

struct ggml_tensor;

#if defined(__CUDACC__)
// True for a HyLRA node whose cache lies on `dev`, CUDA device number `device`.
__attribute__((weak)) bool hylra_cuda_supports(ggml_backend_dev_t dev, int device, const ggml_tensor * node);

// Enqueues a node that hylra_cuda_supports accepted.
__attribute__((weak)) void hylra_cuda_compute(ggml_tensor * node, cudaStream_t stream);
#endif
