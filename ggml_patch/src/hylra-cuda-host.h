// What the graph builder needs to know of the CUDA kernels, without CUDA: is a device one of theirs, which problems they take,
// how much scratch a node has.
#pragma once

#include "hylra.h"

#include <cstddef>

struct ggml_backend_device;

// A CUDA device, and this library was built with -DGGML_CUDA=ON.
bool hylra_cuda_is_ours(ggml_backend_device * device);

// Types, sizes and alignments; `lists`: of the policy.
bool hylra_cuda_fits(const hylra_attn & attn, int lists);

size_t hylra_cuda_floats(const hylra_attn & attn, int n_listed, bool listed, int select_lists, bool scores_only);
