// The exported C functions of hylra.h: thin doors to the engine's state, to attention nodes and to the kernels under test.
#include "hylra.h"

#include "hylra-context.h"
#include "hylra-cpu.h"
#include "hylra-radix.h"

#include "llama-context.h"
#include "llama-model.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <vector>

#ifndef HYLRA_VERSION
#    define HYLRA_VERSION "unknown"
#endif

static llama_hylra_context & state_of(const llama_context * ctx) { return *ctx->hylra; }

// Waits for the batch that is being computed: its kernels still count.
static void settle(const llama_context * ctx) { llama_synchronize(const_cast<llama_context *>(ctx)); }

const char * hylra_version(void) { return HYLRA_VERSION; }

const char * hylra_isa(void) { return hylra_default_isa(); }

int hylra_set_policy(llama_context * ctx, const hylra_policy * policy, char * error, size_t error_bytes) {
    settle(ctx);
    llama_hylra_context & state = state_of(ctx);
    const auto copy = policy ? hylra_copy_policy(*policy, state.model.hparams) : nullptr;
    state.set_policy(copy, "switched off at run time");
    ctx->hylra_policy_changed();
    if (error_bytes > 0) {
        snprintf(error, error_bytes, "%s", copy ? copy->problem.c_str() : "");
    }
    return copy && !copy->problem.empty() ? -1 : 0;
}

int hylra_use_model_policy(llama_context * ctx) {
    settle(ctx);
    llama_hylra_context & state = state_of(ctx);
    state.set_policy(state.model.hylra, "the model file has no policy");
    ctx->hylra_policy_changed();
    return state.policy != nullptr;
}

static bool flash_attention(const llama_context * ctx) { return ctx->get_cparams().flash_attn; }

void hylra_get_status(const llama_context * ctx, hylra_status * out) {
    const llama_hylra_context & state = state_of(ctx);
    *out = {};
    out->on            = state.policy && flash_attention(ctx) && !state.stock_only;
    out->n_layer       = state.model.hparams.n_layer();
    out->n_step        = state.n_step;
    out->n_step_sparse = state.n_step_sparse;
    out->device_min_context = state.device_min_context;
    if (const auto & p = state.policy) {
        out->n_full      = p->count(HYLRA_FULL);
        out->n_select    = p->count(HYLRA_SELECT);
        out->n_reuse     = p->count(HYLRA_REUSE);
        out->top_k       = p->top_k;
        out->min_context = p->min_context;
    }
}

// Of the first layer that the policy has something to do with.
static const char * stock_reason(const llama_hylra_context & state) {
    static thread_local std::string line;
    const auto & mode = state.policy->layer_mode;
    const size_t il = size_t(std::find_if(mode.begin(), mode.end(), [](uint32_t m) { return m != HYLRA_FULL; }) - mode.begin());
    line = std::string("no layer can be served: ") + hylra_layer_text(state.layer_states[il < mode.size() ? il : 0]);
    return line.c_str();
}

const char * hylra_reason(const llama_context * ctx) {
    const llama_hylra_context & state = state_of(ctx);
    if (state.policy && !flash_attention(ctx)) {
        return "flash attention is off: create the context with flash_attn=True";
    }
    if (state.stock_only) {
        return stock_reason(state);
    }
    return state.reason.c_str();
}

void hylra_captured_mass(const llama_context * ctx, double * mass, uint64_t * n, size_t n_layer) {
    settle(ctx);
    for (size_t il = 0; il < n_layer; ++il) {
        const hylra_meter sum = state_of(ctx).meters.sum(il);
        mass[il] = sum.mass;
        n[il]    = sum.n;
    }
}

void hylra_layer_states(const llama_context * ctx, uint32_t * state, size_t n_layer) {
    const auto & states = state_of(ctx).layer_states;
    for (size_t il = 0; il < n_layer; ++il) {
        state[il] = il < states.size() ? states[il] : uint32_t(HYLRA_LAYER_UNKNOWN);
    }
}

const char * hylra_layer_text(uint32_t state) {
    static const char * const TEXTS[] = {
        "not known before a batch has run sparse",
        "served",
        "no attention over the KV cache",
        "sliding-window attention",
        "sparse by training",
        "attention without a KV cache",
        "its KV cache lies on a device without HyLRA kernels",
        "a head size, head count or mask that no kernel takes",
        "the batch needs too much memory",
        "its source layer was not served",
        "a kind of KV cache that the engine does not serve",
    };
    return state < sizeof(TEXTS)/sizeof(*TEXTS) ? TEXTS[state] : "unknown";
}

void hylra_reset_counters(llama_context * ctx) {
    settle(ctx);
    state_of(ctx).reset_counters();
}

// ---- tracing

static int query_layer(const ggml_tensor * q) {
    int layer = -1;
    return sscanf(q->name, HYLRA_TRACED_Q, &layer) == 1 ? layer : -1;
}

static int cache_layer(const ggml_tensor * k) {
    int layer = -1;
    return k->view_src && sscanf(k->view_src->name, "cache_k_l%d", &layer) == 1 ? layer : -1;
}

static void set_dst(hylra_attn & out, const ggml_tensor * node) {
    out.dst = node->data;
    for (int i = 0; i < 4; ++i) {
        out.dst_nb[i] = node->nb[i];
    }
}

static int trace_stock(const ggml_tensor * node, hylra_attn & out) {
    out = hylra_attn_of(node->src[0], node->src[1], node->src[2], node->src[3], node->src[4]);
    float params[3]; // scale, max_bias, softcap: ggml_flash_attn_ext in ggml.c
    memcpy(params, node->op_params, sizeof(params));
    out.layer    = query_layer(node->src[0]);
    out.scale    = params[0];
    out.max_bias = params[1];
    out.softcap  = params[2];
    set_dst(out, node);
    return HYLRA_TRACE_STOCK;
}

static int trace_reduce(const ggml_tensor * node, const hylra_op & op, hylra_attn & out) {
    out = {};
    out.layer    = op.layer;
    out.n_embd_v = int32_t(node->ne[0]);
    out.n_head   = int32_t(node->ne[1]);
    out.n_tokens = int32_t(node->ne[2]);
    out.n_stream = int32_t(node->ne[3]);
    out.sinks    = node->src[1] ? node->src[1]->data : nullptr;
    set_dst(out, node);
    return HYLRA_TRACE_REDUCE;
}

static int trace_choose(const ggml_tensor * node, const hylra_op & op, hylra_attn & out) {
    out = {};
    out.layer    = op.layer;
    out.cells    = node->data;
    out.n_cells  = int32_t(node->ne[0]);
    out.lists    = int32_t(node->ne[1]);
    out.n_tokens = int32_t(node->ne[2]);
    out.n_stream = int32_t(node->ne[3]);
    return HYLRA_TRACE_CHOOSE;
}

static int trace_custom(const ggml_tensor * node, hylra_attn & out) {
    const hylra_node_ref ref = hylra_node_of(node);
    if (ref.run == hylra_node_attend) {
        out = hylra_attn_of_node(*ref.op, node, nullptr);
        return HYLRA_TRACE_ATTEND;
    }
    return ref.run == hylra_node_reduce ? trace_reduce(node, *ref.op, out) :
           ref.run == hylra_node_choose ? trace_choose(node, *ref.op, out) : HYLRA_TRACE_NONE;
}

int hylra_trace_node(const ggml_tensor * node, hylra_attn * out) {
    if (node->op == GGML_OP_FLASH_ATTN_EXT && cache_layer(node->src[1]) >= 0) {
        return trace_stock(node, *out);
    }
    return node->op == GGML_OP_CUSTOM ? trace_custom(node, *out) : HYLRA_TRACE_NONE;
}

// ---- kernels under test

static void run_scores(const hylra_kernels & kernels, const hylra_job & job, float * scores, int lists) {
    const hylra_attn & a = job.attn;
    for (int column = 0; column < a.n_tokens*a.n_stream; ++column) {
        for (int list = 0; list < lists; ++list) {
            kernels.pool(job, column/a.n_tokens, column%a.n_tokens, list, lists, 0, a.n_kv, scores + (size_t(column)*lists + list)*a.n_kv);
        }
    }
}

int hylra_test_attend(const char * isa, const hylra_attn * attn, const int32_t * head_list, float * out, float * scores, int32_t score_lists, int32_t n_threads) {
    const hylra_kernels * kernels = hylra_get_kernels(isa);
    if (!kernels) {
        return -1;
    }
    hylra_job job = hylra_job_of(*attn, head_list);
    hylra_share_heads(job, n_threads);
    const int n_listed = job.cells ? attn->n_cells : attn->n_kv;
    std::vector<float> scratch(hylra_attend_floats(*attn, n_listed, scores != nullptr), NAN); // poisoned: what is not written shows
    hylra_place(job, scratch.data(), scores != nullptr);
    job.scores_only = out == nullptr;
    for (int task = 0; task < hylra_n_task(job); ++task) {
        kernels->attend(job, task);
    }
    for (int row = 0; out && row < attn->n_head*attn->n_tokens*attn->n_stream; ++row) {
        kernels->reduce(job, row/attn->n_head/attn->n_tokens, row/attn->n_head%attn->n_tokens, row%attn->n_head, out + size_t(row)*attn->n_embd_v);
    }
    if (scores) {
        run_scores(*kernels, job, scores, score_lists);
    }
    return 0;
}

int hylra_test_choose(const char * isa, const float * scores, int32_t n_kv, int32_t top_k, int32_t block_size, int32_t * out) {
    if (strcmp(isa, "radix") == 0) {
        return hylra_choose_radix(scores, n_kv, top_k, block_size, out);
    }
    const hylra_kernels * kernels = hylra_get_kernels(isa);
    return kernels ? kernels->choose(scores, n_kv, top_k, block_size, out) : -1;
}
