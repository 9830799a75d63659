// The host side of hylra-cuda-host.h: arithmetic of hylra-cuda-plan.h, compiled with and without CUDA.
#include "hylra-cuda-host.h"

#include "hylra-cuda-plan.h"

#include "ggml-backend.h"
#include "ggml.h"

#include <algorithm>
#include <cstring>

bool hylra_cuda_is_ours(ggml_backend_device * device) {
#if defined(HYLRA_CUDA)
    return device && strcmp(ggml_backend_reg_name(ggml_backend_dev_backend_reg(device)), "CUDA") == 0;
#else
    (void) device;
    return false;
#endif
}

static bool has_kernel(int type) {
    return type == GGML_TYPE_F16 || type == GGML_TYPE_BF16 || type == GGML_TYPE_F32 || type == GGML_TYPE_Q8_0 || type == GGML_TYPE_Q4_0;
}

// Rows of plain types are read 16 bytes at a time; blocks are read by halves.
static bool is_aligned(int type, const uint64_t * nb) {
    const uint64_t unit = ggml_is_quantized(ggml_type(type)) ? 2 : 16;
    return nb[1]%unit == 0 && nb[2]%unit == 0 && nb[3]%unit == 0;
}

bool hylra_cuda_fits(const hylra_attn & a, int lists) {
    const int largest = std::max(a.n_embd_k, a.n_embd_v);
    const bool size_fits = largest <= 256 || (a.n_embd_k <= 576 && a.n_embd_v <= 512);
    return has_kernel(a.type_k) && a.type_k == a.type_v && size_fits && a.n_embd_k%8 == 0 && a.n_embd_v%8 == 0 &&
           is_aligned(a.type_k, a.k_nb) && is_aligned(a.type_v, a.v_nb) && a.n_head_kv <= HYLRA_CUDA_MAX_HEADS_KV &&
           a.n_tokens*a.n_stream <= HYLRA_CUDA_MAX_TOKENS && a.n_head_kv%lists == 0;
}

size_t hylra_cuda_floats(const hylra_attn & attn, int n_listed, bool listed, int select_lists, bool scores_only) {
    const hylra_cuda_plan plan = hylra_cuda_plan_of(attn, n_listed, listed, scores_only);
    return hylra_cuda_layout_of(attn, plan, select_lists).size/sizeof(float);
}
