// The C interface that the patched libllama adds to llama.h: policy, status, tracing, kernels under test.
// Plain data only, so that cffi and ctypes can mirror it; nothing in llama.h changes.
#pragma once

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#    define HYLRA_API __declspec(dllexport)
#else
#    define HYLRA_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

struct llama_context;
struct ggml_tensor;

#define HYLRA_POLICY_VERSION 1

enum hylra_mode {
    HYLRA_FULL   = 0, // dense attention, selects nothing
    HYLRA_SELECT = 1, // scores all cells, emits the top-k; attends to all, or with sparse_select only to those
    HYLRA_REUSE  = 2, // attends only to the cells that its source layer selected; its own source: scores all cells, attends to its best
};

// A policy handed over at run time; the arrays are copied. Fields are the keys of the GGUF metadata.
struct hylra_policy {
    uint32_t        version;
    uint32_t        enabled;
    uint32_t        layer_count;
    uint32_t        head_kv_count;
    const uint32_t * layer_mode;   // [layer_count]
    const int32_t  * layer_source; // [layer_count]
    const int32_t  * head_map;     // [layer_count * head_kv_count] or NULL
    uint32_t        lists;
    uint32_t        top_k;
    const uint32_t * sparse_select; // [layer_count] 1: a select layer that attends only to what it selects; NULL: none
    const uint32_t * layer_top_k;  // [layer_count] cells that a select layer emits, 0 for other layers; NULL: top_k in each
    float           top_k_fraction; // 0: unused
    uint32_t        block_size;
    uint32_t        sink_tokens;
    uint32_t        recent_tokens;
    uint32_t        min_context;
    uint32_t        prefill;
};

struct hylra_status {
    int32_t  on;             // 1: batches of decode size run sparse once the cache holds min_context cells
    uint32_t n_layer;
    uint32_t n_full;
    uint32_t n_select;
    uint32_t n_reuse;
    uint32_t top_k;
    uint32_t min_context;
    uint64_t n_step;         // decode-sized batches computed while on
    uint64_t n_step_sparse;  // of these, batches whose graph held HyLRA nodes
    uint32_t device_min_context; // cells below which a cache on a GPU is too short to gain and runs stock; 0: in host memory, or not known yet
};

HYLRA_API const char * hylra_version(void);

// Instruction set of the CPU kernels: avx512vnni, avx512, avx2 or base. The fastest here, unless HYLRA_ISA in the environment names another that runs.
HYLRA_API const char * hylra_isa(void);

// Makes `policy` the one of this context; NULL: dense. Returns 0, or -1 and one line in `error`: then the
// context runs dense. Not while a batch is being computed.
HYLRA_API int hylra_set_policy(struct llama_context * ctx, const struct hylra_policy * policy, char * error, size_t error_bytes);

// Back to the policy that the model file carries, if any. Returns 1 if it has a valid one, else 0.
HYLRA_API int hylra_use_model_policy(struct llama_context * ctx);

HYLRA_API void hylra_get_status(const struct llama_context * ctx, struct hylra_status * out);

// Why the context is dense: one line, or "" while HyLRA is on. Valid until the next call of this thread.
HYLRA_API const char * hylra_reason(const struct llama_context * ctx);

// Fills mass[il] with the sum, over the tokens and lists that layer il has selected for, of the attention mass
// on its own selection, and n[il] with their number. Both hold `n_layer` values.
HYLRA_API void hylra_captured_mass(const struct llama_context * ctx, double * mass, uint64_t * n, size_t n_layer);

// What became of a layer in the last graph that ran sparse; all but the first two: left to llama.cpp.
enum hylra_layer_state {
    HYLRA_LAYER_UNKNOWN       = 0, // no graph ran sparse so far
    HYLRA_LAYER_SERVED        = 1, // its attention is ours
    HYLRA_LAYER_NO_ATTENTION  = 2, // recurrent, or its attention goes around the KV cache that the policy speaks of
    HYLRA_LAYER_SLIDING       = 3,
    HYLRA_LAYER_OWN_SELECTION = 4, // sparse by training
    HYLRA_LAYER_NO_CACHE      = 5,
    HYLRA_LAYER_DEVICE        = 6, // its KV cache lies where we have no kernels
    HYLRA_LAYER_SHAPE         = 7,
    HYLRA_LAYER_SCRATCH       = 8, // batch times cache needs too much memory
    HYLRA_LAYER_SOURCE        = 9, // its source layer was left to llama.cpp or looks at other cells
    HYLRA_LAYER_MEMORY        = 10, // the model's kind of KV cache is not one that the engine serves
};

// Fills state[il]; it holds `n_layer` values.
HYLRA_API void hylra_layer_states(const struct llama_context * ctx, uint32_t * state, size_t n_layer);

// The state in words: a few, without a point.
HYLRA_API const char * hylra_layer_text(uint32_t state);

HYLRA_API void hylra_reset_counters(struct llama_context * ctx);

// One attention problem over a KV cache; ggml order (first index fastest), strides in bytes.
//   q    F32     [n_embd_k, n_tokens, n_head,    n_stream]
//   k    type_k  [n_embd_k, n_kv,     n_head_kv, n_stream]
//   v    type_v  [n_embd_v, n_kv,     n_head_kv, n_stream]
//   mask F16     [n_kv,     n_tokens, 1,         n_stream]   0 or -inf, or minus the ALiBi distance; may be NULL
//   sinks F32    [n_head] or NULL
//   dst  F32     [n_embd_v, n_head,   n_tokens,  n_stream]
//   cells I32    [n_cells,  lists,    n_tokens,  n_stream]   contiguous, -1 = none; NULL: all cells
struct hylra_attn {
    int32_t layer;            // -1 if unknown
    int32_t type_k, type_v;   // ggml_type
    int32_t n_embd_k, n_embd_v, n_head, n_head_kv, n_kv, n_tokens, n_stream; // n_tokens: per stream
    float   scale, max_bias, softcap;
    const void * q;
    const void * k;
    const void * v;
    const void * mask;
    const void * sinks;
    const void * dst;
    uint64_t q_nb[4], k_nb[4], v_nb[4], mask_nb[4], dst_nb[4];
    const void * cells;
    int32_t n_cells, lists;
};

enum hylra_trace {
    HYLRA_TRACE_NONE   = 0,
    HYLRA_TRACE_STOCK  = 1, // llama.cpp's flash-attention node on the KV cache: all fields but cells
    HYLRA_TRACE_ATTEND = 2, // our attention before the sum over chunks: all fields but dst and sinks; cells: what a reuse layer attends to
    HYLRA_TRACE_REDUCE = 3, // its output: only layer, dst, sinks and the sizes behind dst are valid
    HYLRA_TRACE_CHOOSE = 4, // the selection of a select layer: only layer, cells, n_cells, lists, n_tokens, n_stream are valid
};

// Says what `node` is, for a ggml_backend_sched_eval_callback, and fills `out` with the pointers of its tensors.
HYLRA_API int hylra_trace_node(const struct ggml_tensor * node, struct hylra_attn * out);

// ---- kernels under test: `isa` is "ref" (scalar twins), "base", "avx2", "avx512" or "avx512vnni"; return 0, or -1 if this build or
// machine does not have it.

// out: F32 [n_embd_v, n_head, n_tokens, n_stream], contiguous; NULL: scores alone, V is not read.
// head_list: I32 [n_head_kv] list of attn->cells taken by each KV head; unused if attn->cells is NULL.
// scores: F32 [n_kv, score_lists, n_tokens, n_stream] or NULL: attention mass per cell, averaged over the heads of a list.
// n_threads: the work is cut into tasks as for that many, and done by one.
HYLRA_API int hylra_test_attend(const char * isa, const struct hylra_attn * attn, const int32_t * head_list,
                                float * out, float * scores, int32_t score_lists, int32_t n_threads);

// Chooses from one row of scores (see hylra-attn.h for the marks); returns the number of cells written to out[top_k].
HYLRA_API int hylra_test_choose(const char * isa, const float * scores, int32_t n_kv, int32_t top_k, int32_t block_size, int32_t * out);

#ifdef __cplusplus
}
#endif
