// The host side of hylra-cuda-host.h: arithmetic of hylra-cuda-plan.h, compiled with and without CUDA.
#include "hylra-cuda-host.h"

#include "hylra-cuda-plan.h"

#include "ggml-backend.h"
#include "ggml.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

// On a GPU a reuse layer takes its 10 us however short the cache is; llama.cpp's dense kernel takes twice that at 16M values of K and V
// (8192 cells of 8 KV heads of 128), so that even with one select layer in three nothing is lost (docs/cuda.md).
constexpr uint64_t WORTH_VALUES         = 1u << 24;
// MLA: dense attention of DeepSeek-R1's shape takes 33 us for 9M values already, and with one select layer of eight a layer takes 18
constexpr uint64_t WORTH_VALUES_MLA     = 1u << 23;
constexpr int      LARGEST_PLAIN_HEAD   = 256;
constexpr uint64_t WORTH_SKIPPED_VALUES = 12u << 20; // of V, that pay for the second attend of a select layer that skips them

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

// Rows of plain types are read 16 bytes at a time, quantised rows of MLA by halves. Others pass through the room of hylra-cuda-stage.cuh, which holds a row that
// begins where it can if rows lie behind each other.
static bool is_aligned(int type, int n_embd, const uint64_t * nb) {
    const uint64_t row = ggml_row_size(ggml_type(type), n_embd), unit = !ggml_is_quantized(ggml_type(type)) ? 16 : n_embd > LARGEST_PLAIN_HEAD ? 2 : row & -row;
    return (nb[1] | nb[2] | nb[3])%std::min<uint64_t>(unit, 16) == 0;
}

bool hylra_cuda_fits(const hylra_attn & a, int lists) {
    const int largest = std::max(a.n_embd_k, a.n_embd_v);
    const bool size_fits = largest <= LARGEST_PLAIN_HEAD || (a.n_embd_k <= 576 && a.n_embd_v <= 512);
    return has_kernel(a.type_k) && a.type_k == a.type_v && size_fits && a.n_embd_k%8 == 0 && a.n_embd_v%8 == 0 &&
           is_aligned(a.type_k, a.n_embd_k, a.k_nb) && is_aligned(a.type_v, a.n_embd_v, a.v_nb) && a.n_kv%4 == 0 && a.n_head_kv <= HYLRA_CUDA_MAX_HEADS_KV &&
           a.n_tokens*a.n_stream <= HYLRA_CUDA_MAX_TOKENS && a.n_head_kv%lists == 0 && a.n_head/lists <= HYLRA_CUDA_LIST_HEADS;
}

size_t hylra_cuda_floats(const hylra_attn & attn, int n_listed, bool listed, int select_lists, bool scores_only) {
    const hylra_cuda_plan plan = hylra_cuda_plan_of(attn, n_listed, listed, scores_only);
    return hylra_cuda_layout_of(attn, plan, select_lists).size/sizeof(float);
}

int64_t hylra_cuda_override() {
    const char * value = getenv("HYLRA_DEVICE_MIN_CONTEXT");
    return value && *value ? atoll(value) : -1;
}

uint32_t hylra_cuda_min_context(const hylra_attn & a, int64_t override_cells) {
    const uint64_t values_per_cell = uint64_t(a.n_embd_k + a.n_embd_v)*a.n_head_kv*a.n_stream;
    const uint64_t needed = a.n_embd_k > LARGEST_PLAIN_HEAD ? WORTH_VALUES_MLA : WORTH_VALUES;
    return uint32_t(override_cells >= 0 ? override_cells : (needed + values_per_cell - 1)/values_per_cell);
}

bool hylra_cuda_skipping_pays(const hylra_attn & a, int64_t override_cells) {
    return override_cells >= 0 || uint64_t(a.n_kv)*a.n_embd_v*a.n_head_kv*a.n_stream >= WORTH_SKIPPED_VALUES;
}
