// What the graph builder needs to know of the CUDA kernels, without CUDA: is a device one of theirs, which problems they take,
// how much scratch a node has, from which length on they gain.
#pragma once

#include "hylra.h"

#include <cstddef>
#include <cstdint>

struct ggml_backend_device;

// A CUDA device, and this library was built with -DGGML_CUDA=ON.
bool hylra_cuda_is_ours(ggml_backend_device * device);

// Types, sizes and alignments; `lists`: of the policy.
bool hylra_cuda_fits(const hylra_attn & attn, int lists);

size_t hylra_cuda_floats(const hylra_attn & attn, int n_listed, bool listed, int select_lists, bool scores_only);

// The environment variable HYLRA_DEVICE_MIN_CONTEXT: cells that replace the rule below; -1: not set.
int64_t hylra_cuda_override();

// Cells from which on a layer of ours is faster than llama.cpp's.
uint32_t hylra_cuda_min_context(const hylra_attn & attn, int64_t override_cells);

// Whether a select layer gains by reading the V of its own selection only.
bool hylra_cuda_skipping_pays(const hylra_attn & attn, int64_t override_cells);
