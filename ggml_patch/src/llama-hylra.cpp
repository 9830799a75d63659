// Builds the attention nodes of a layer according to the policy: full, select or reuse (DESIGN §5).
// Anything it does not know how to do is left to llama.cpp: llama_hylra_attn returns nullptr and the stock node is built.
#include "llama-hylra.h"

#include "hylra-context.h"
#include "hylra-cuda-host.h"
#include "hylra-memory.h"

#include "llama-cparams.h"
#include "llama-graph.h"
#include "llama-impl.h"
#include "llama-kv-cache-iswa.h"
#include "llama-kv-cache.h"
#include "llama-memory-hybrid-iswa.h"
#include "llama-memory-hybrid.h"
#include "llama-model-loader.h"
#include "llama-model.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>

// Upstream internals that this file stands on; a change there must stop the build here.
static_assert(std::is_same_v<decltype(&llama_kv_cache::get_cells), const llama_kv_cells & (llama_kv_cache::*)(llama_seq_id) const>);
static_assert(GGML_MAX_SRC >= 8, "attend takes five sources");
static_assert(GGML_MAX_OP_PARAMS >= 64, "there is room behind ggml_custom_op_params");

constexpr size_t   SCRATCH_LIMIT_BYTES  = 256u << 20; // softmax weights of one layer; above it the batch runs stock
constexpr uint32_t KV_PADDING           = 256;        // llama_kv_cache::get_n_kv rounds up to it
constexpr int      EPOCH_PARAM          = 8;          // in op_params, behind ggml_custom_op_params
constexpr uint32_t TOKENS_PER_SEQUENCE  = 8;          // drafts of speculative decoding; more tokens are a prefill

// ---- policy and state

llama_hylra_policy_ptr llama_hylra_load(const llama_model_loader & ml, const llama_hparams & hparams) {
    return hylra_read_policy(ml.metadata, ml.kv_overrides, hparams);
}

static bool killed_by_environment() {
    const char * value = getenv("HYLRA");
    return value && strcmp(value, "0") == 0;
}

static std::string reason_of(const llama_hylra_policy_ptr & policy, const std::string & none_reason) {
    if (killed_by_environment()) { return "switched off by the environment variable HYLRA=0"; }
    if (!policy)                 { return none_reason; }
    if (!policy->problem.empty()){ return "policy refused: " + policy->problem; }
    if (!policy->enabled)        { return "switched off by hylra.enabled = false"; }
    return "";
}

void llama_hylra_context::set_policy(llama_hylra_policy_ptr next, const std::string & none_reason) {
    reason = reason_of(next, none_reason);
    policy = reason.empty() ? std::move(next) : nullptr;
    epoch += 1;
    meters.resize(policy ? size_t(policy->lists)*HYLRA_MAX_TOKENS : 0, policy ? policy->layer_count : 0);
    reset_counters();
}

void llama_hylra_context::reset_counters() {
    n_step = n_step_sparse = 0;
    device_min_context = 0;
    layer_states.assign(policy ? policy->layer_count : 0, HYLRA_LAYER_UNKNOWN);
    stock_only = false;
    meters.clear();
}

std::shared_ptr<llama_hylra_context> llama_hylra_init(const llama_model & model) {
    auto state = std::make_shared<llama_hylra_context>(model);
    state->set_policy(model.hylra, "the model file has no policy");
    if (const auto & p = state->policy) {
        LLAMA_LOG_INFO("%s: HyLRA on: %u full, %u select, %u reuse layers, top_k %u, sparse from %u cells (%s kernels)\n", __func__,
                p->count(HYLRA_FULL), p->count(HYLRA_SELECT), p->count(HYLRA_REUSE), p->top_k, p->min_context, hylra_default_isa());
    } else if (model.hylra) {
        LLAMA_LOG_WARN("%s: HyLRA off: %s\n", __func__, state->reason.c_str());
    }
    return state;
}

void llama_hylra_cache_allocated(const llama_model & model, ggml_backend_buffer * buffer) {
    if (reason_of(model.hylra, "none").empty() && ggml_backend_buffer_is_host(buffer)) {
        hylra_advise_huge_pages(ggml_backend_buffer_get_base(buffer), ggml_backend_buffer_get_size(buffer));
    }
}

// ---- graph input: state of one graph, and the sink and recent cells of each token

static const llama_kv_cache_context * cache_of(const llama_memory_context_i * mctx) {
    if (auto * kv     = dynamic_cast<const llama_kv_cache_context *>(mctx))           { return kv; }
    if (auto * iswa   = dynamic_cast<const llama_kv_cache_iswa_context *>(mctx))      { return iswa->get_base(); }
    if (auto * hybrid = dynamic_cast<const llama_memory_hybrid_context *>(mctx))      { return hybrid->get_attn(); }
    if (auto * hyiswa = dynamic_cast<const llama_memory_hybrid_iswa_context *>(mctx)) { return hyiswa->get_attn()->get_base(); }
    return nullptr;
}

class llm_graph_input_hylra : public llm_graph_input_i {
public:
    llm_graph_input_hylra(llama_hylra_context & state, const llama_kv_cache * kv) :
        state(state), policy(state.policy), epoch(state.epoch), kv(kv),
        layer_states(policy ? policy->layer_count : 0, HYLRA_LAYER_NO_ATTENTION) {}

    void set_input(const llama_ubatch * ubatch) override {
        state.n_step        += decode_sized;
        state.n_step_sparse += n_layer_ours > 0;
        if (sparse) {
            state.layer_states = layer_states;
            state.stock_only   = std::count(layer_states.begin(), layer_states.end(), uint32_t(HYLRA_LAYER_SERVED)) == 0;
        }
        if (forced && forced->buffer) {
            for (uint32_t i = 0; i < ubatch->n_tokens; ++i) {
                set_forced(*ubatch, i, (int32_t *) forced->data + i*forced->ne[0]);
            }
        }
    }

    // Topology follows from the policy and from shapes that the KQ mask's own input compares.
    bool can_reuse(const llm_graph_params &) override { return epoch == state.epoch; }

    llama_hylra_context & state;
    const llama_hylra_policy_ptr policy; // kept alive for the graph's nodes
    const uint32_t epoch;
    const int64_t device_override = hylra_cuda_override();
    const llama_kv_cache * kv; // lives as long as the context; the memory context of a batch does not outlive it, this graph may

    bool     decode_sized  = false; // this batch is one that the policy speaks of
    bool     sparse        = false; // ... and the cache is long enough
    uint32_t n_layer_ours  = 0;
    std::vector<uint32_t> layer_states;                   // hylra_layer_state [layer_count]

    uint32_t n_sink = 0, n_recent = 0;                    // the policy's, but no more than there are cells
    ggml_tensor * forced = nullptr;                       // I32 [n_sink + n_recent, n_tokens], -1 = none
    ggml_tensor * cells[LLAMA_MAX_LAYERS] = {};           // per select layer: I32 [top_k, lists, n_tokens, n_stream]
    std::deque<hylra_op> ops;                             // a deque keeps addresses

private:
    // Sink and recent cells by position within the token's own sequence: cells may lie in any order.
    void set_forced(const llama_ubatch & ubatch, uint32_t i, int32_t * out) const {
        const llama_seq_id seq = ubatch.seq_id[i][0]; // the one that the KQ mask uses
        const auto & by_pos = kv->get_cells(seq).seq_pos_get(seq);
        const auto end = by_pos.upper_bound({ ubatch.pos[i], UINT32_MAX }); // later tokens of the batch are in the cache already
        std::fill(out, out + forced->ne[0], -1);
        uint32_t n = 0;
        for (auto it = by_pos.begin(); it != end && n < n_sink; ++it) {
            out[n++] = int32_t(it->second);
        }
        n = n_sink;
        for (auto it = end; it != by_pos.begin() && n < n_sink + n_recent; ) {
            out[n++] = int32_t((--it)->second);
        }
    }
};

// Most tokens of this batch that still count as decode.
static uint32_t max_decode_tokens(const llama_ubatch & ubatch) {
    return std::min<uint32_t>(TOKENS_PER_SEQUENCE*ubatch.n_seqs_unq, HYLRA_MAX_TOKENS);
}

static void decide(llm_graph_input_hylra & input, const llm_graph_context & graph, const llama_kv_cache_context * cache) {
    const llama_cparams & c = graph.cparams;
    // auto_fa: the probe for flash attention must see the stock node (llama_context::resolve_fused_ops)
    const bool ours    = input.policy && c.causal_attn && !c.training && !c.auto_fa && graph.ubatch.n_tokens <= max_decode_tokens(graph.ubatch);
    input.decode_sized = ours && cache;
    if (ours && !cache) {
        input.state.layer_states.assign(input.policy->layer_count, HYLRA_LAYER_MEMORY);
        input.state.stock_only = true;
    }
    if (!input.decode_sized) {
        return;
    }
    const uint32_t n_kv = cache->get_n_kv();
    input.n_sink   = std::min(input.policy->sink_tokens, n_kv);
    input.n_recent = std::min(input.policy->recent_tokens, n_kv);
    // n_kv is padded: only above min_context + padding are min_context cells surely in use
    input.sparse   = n_kv + 1 >= uint64_t(input.policy->min_context) + KV_PADDING;
}

// Of this graph; made by its first attention layer.
static llm_graph_input_hylra & input_of(const llm_graph_context & graph) {
    for (auto & input : graph.res->inputs) {
        if (auto * found = dynamic_cast<llm_graph_input_hylra *>(input.get())) {
            return *found;
        }
    }
    const llama_kv_cache_context * cache = cache_of(graph.mctx);
    auto input = std::make_unique<llm_graph_input_hylra>(*graph.cparams.hylra, cache ? cache->get_kv() : nullptr);
    decide(*input, graph, cache);
    return *static_cast<llm_graph_input_hylra *>(graph.res->add_input(std::move(input)));
}

// ---- nodes of a layer

// Cache views are allocated when the graph is built, the K of an uncached or cross attention is not.
static ggml_backend_buffer_t cache_buffer(const ggml_tensor * t) { return t->view_src ? t->view_src->buffer : nullptr; }

// Where the nodes of a layer run: next to its cache.
struct place {
    bool known;               // host memory, or a device that we have kernels for
    ggml_backend_dev_t device; // nullptr: host memory
};

static place place_of(const ggml_tensor * k, const ggml_tensor * v) {
    const ggml_backend_buffer_t on_k = cache_buffer(k), on_v = cache_buffer(v);
    if (ggml_backend_buffer_get_type(on_k) != ggml_backend_buffer_get_type(on_v)) {
        return { false, nullptr };
    }
    if (ggml_backend_buffer_is_host(on_k)) {
        return { true, nullptr };
    }
    const ggml_backend_dev_t device = ggml_backend_buft_get_device(ggml_backend_buffer_get_type(on_k));
    return { hylra_cuda_is_ours(device), device };
}

static bool shapes_fit(const ggml_tensor * q, const ggml_tensor * k, const ggml_tensor * v) {
    return k->ne[0] <= HYLRA_MAX_EMBD && v->ne[0] <= HYLRA_MAX_EMBD && q->ne[1] <= HYLRA_MAX_TOKENS && q->type == GGML_TYPE_F32 &&
           q->ne[2] % k->ne[2] == 0 && v->ne[2] == k->ne[2] && q->nb[0] == sizeof(float) &&
           k->nb[0] == ggml_type_size(k->type) && v->nb[0] == ggml_type_size(v->type);
}

struct layer_builder {
    const llm_graph_context & graph;
    llm_graph_input_hylra   & input;
    const llama_hylra_policy & policy;
    ggml_tensor * q, * k, * v, * kq_mask, * sinks;
    const int il;
    const ggml_backend_dev_t device;

    ggml_tensor * custom(const char * name, ggml_type type, const int64_t (&ne)[4], std::initializer_list<ggml_tensor *> src,
                         ggml_custom_op_t run, hylra_op & op) const {
        std::vector<ggml_tensor *> args(src);
        ggml_tensor * node = ggml_custom_4d(graph.ctx0, type, ne[0], ne[1], ne[2], ne[3], args.data(), int(args.size()), run, GGML_N_TASKS_MAX, &op);
        ggml_format_name(node, "hylra_%s-%d", name, il);
        // CUDA graphs are replayed while nodes compare equal, and what `op` holds is not compared: it follows from the epoch
        node->op_params[EPOCH_PARAM] = int32_t(input.epoch);
        return node;
    }

    hylra_op & new_op(float kq_scale, bool weights) const {
        hylra_op op = {};
        op.layer      = il;
        op.scale      = kq_scale;
        op.max_bias   = graph.hparams.f_max_alibi_bias;
        op.softcap    = graph.hparams.attn_soft_cap ? graph.hparams.f_attn_logit_softcapping : 0.0f;
        op.weights    = weights;
        op.block_size = int32_t(policy.block_size);
        op.lists      = int32_t(policy.lists);
        op.device     = device;
        op.meters     = op.weights ? input.state.meters.layer(il, cache_buffer(k)) : nullptr;
        for (int64_t head = 0; head < k->ne[2]; ++head) {
            const bool own = policy.head_map.empty() || policy.layer_mode[il] == HYLRA_SELECT;
            const int32_t mapped = own ? int32_t(head) : policy.head_map[il*policy.head_kv_count + head];
            op.head_list.push_back(policy.lists == 1 ? 0 : mapped);
        }
        input.ops.push_back(std::move(op));
        return input.ops.back();
    }

    // F32 scratch: partial results, and the softmax weights of a select layer
    ggml_tensor * attend(hylra_op & op, ggml_tensor * cells) const {
        const int n_listed = int(cells ? cells->ne[0] : k->ne[1]);
        const hylra_attn attn = hylra_attn_of(q, k, v, kq_mask, sinks);
        const int64_t n = int64_t(device ? hylra_cuda_floats(attn, n_listed, cells != nullptr, op.weights ? op.lists : 0, op.scores_only)
                                         : hylra_attend_floats(attn, n_listed, op.weights));
        return custom("attend", GGML_TYPE_F32, { n, 1, 1, 1 }, { q, k, v, kq_mask, cells }, hylra_node_attend, op);
    }

    // A device may attend to cells only here, in one launch: what it reads must not make room for the output before.
    ggml_tensor * reduce(hylra_op & op, ggml_tensor * attended, ggml_tensor * cells) const {
        const bool late = device && cells;
        return custom("reduce", GGML_TYPE_F32, { v->ne[0], q->ne[2], q->ne[1], q->ne[3] },
                      { attended, sinks, late ? q : nullptr, late ? kq_mask : nullptr, late ? cells : nullptr }, hylra_node_reduce, op);
    }

    ggml_tensor * forced_cells() const {
        if (!input.forced) {
            const int64_t n = std::max<int64_t>(1, int64_t(input.n_sink) + input.n_recent);
            input.forced = ggml_new_tensor_2d(graph.ctx0, GGML_TYPE_I32, n, graph.ubatch.n_tokens);
            ggml_set_input(input.forced);
            ggml_set_name(input.forced, "hylra_forced");
        }
        return input.forced;
    }

    // I32 [top_k, lists, n_tokens, n_stream]. out: of reduce if anything is output, which a device computes together with pool
    ggml_tensor * choose(hylra_op & op, ggml_tensor * attended, ggml_tensor * out) const {
        const int64_t lists = policy.lists, n_kv = k->ne[1];
        ggml_tensor * pooled = custom("pool", GGML_TYPE_F32, { n_kv, lists, q->ne[1], q->ne[3] },
                                      { attended, sinks, forced_cells(), out, kq_mask }, hylra_node_pool, op); // the mask is read again
        return custom("choose", GGML_TYPE_I32, { policy.top_k_at(il, uint32_t(n_kv)), lists, q->ne[1], q->ne[3] },
                      { pooled, attended }, hylra_node_choose, op);
    }
};

// The source's cells if they lie in the same cache view, else nullptr.
static ggml_tensor * source_cells(const llm_graph_input_hylra & input, const ggml_tensor * q, const ggml_tensor * k, int il) {
    const int source = input.policy->layer_source[il];
    ggml_tensor * cells = input.cells[source];
    const bool fits = cells && cells->ne[2] == q->ne[1] && cells->ne[3] == k->ne[3];
    return fits ? cells : nullptr;
}

static hylra_attn shapes_of(const ggml_tensor * q, const ggml_tensor * k, const ggml_tensor * v) {
    return hylra_attn_of(q, k, v, nullptr, nullptr);
}

static bool skipping_pays(const layer_builder & b) {
    return hylra_cuda_skipping_pays(shapes_of(b.q, b.k, b.v), b.input.device_override);
}

static bool fits_device(const llm_graph_input_hylra & input, const ggml_tensor * q, const ggml_tensor * k, const ggml_tensor * v) {
    return hylra_cuda_fits(shapes_of(q, k, v), int(input.policy->lists));
}

// SERVED, or why the layer stays llama.cpp's.
static hylra_layer_state judge(const llm_graph_input_hylra & input, const llm_graph_context & graph, const ggml_tensor * q, const ggml_tensor * k,
                               const ggml_tensor * v, const ggml_tensor * kq_mask, int64_t n_kv_max, int il) {
    const size_t weights_bytes = sizeof(float)*k->ne[1]*q->ne[2]*q->ne[1]*q->ne[3];
    const bool mask_fits = kq_mask && kq_mask->type == GGML_TYPE_F16 && kq_mask->ne[2] == 1;
    if (graph.hparams.is_swa(il))                { return HYLRA_LAYER_SLIDING; }
    if (n_kv_max != 0)                           { return HYLRA_LAYER_OWN_SELECTION; }
    if (!cache_buffer(k) || !cache_buffer(v))    { return HYLRA_LAYER_NO_CACHE; }
    const place at = place_of(k, v);
    if (!at.known)                               { return HYLRA_LAYER_DEVICE; }
    if (!mask_fits || !shapes_fit(q, k, v))      { return HYLRA_LAYER_SHAPE; }
    if (at.device && !fits_device(input, q, k, v)) { return HYLRA_LAYER_SHAPE; }
    return weights_bytes > SCRATCH_LIMIT_BYTES ? HYLRA_LAYER_SCRATCH : HYLRA_LAYER_SERVED;
}

// Attention to the layer's own best cells; only their V is read. cells: what it chose
static ggml_tensor * build_own(layer_builder & b, float kq_scale, ggml_tensor *& cells) {
    hylra_op & scoring = b.new_op(kq_scale, true);
    scoring.scores_only = true;
    ggml_tensor * attended = b.attend(scoring, nullptr);
    cells = b.choose(scoring, attended, nullptr);
    hylra_op & op = b.new_op(kq_scale, false);
    return b.reduce(op, b.attend(op, cells), cells);
}

static ggml_tensor * build(layer_builder & b, float kq_scale) {
    const uint32_t mode = b.policy.layer_mode[b.il];
    if (mode == HYLRA_REUSE && b.policy.layer_source[b.il] == b.il) {
        ggml_tensor * unused;
        return build_own(b, kq_scale, unused);
    }
    if (mode == HYLRA_SELECT && b.policy.selects_sparsely(b.il, uint32_t(b.k->ne[1])) && (!b.device || skipping_pays(b))) {
        return build_own(b, kq_scale, b.input.cells[b.il]);
    }
    ggml_tensor * cells = mode == HYLRA_REUSE ? source_cells(b.input, b.q, b.k, b.il) : nullptr;
    if (mode == HYLRA_REUSE && !cells) {
        return nullptr;
    }
    hylra_op & op = b.new_op(kq_scale, mode == HYLRA_SELECT);
    ggml_tensor * attended = b.attend(op, cells);
    ggml_tensor * out = b.reduce(op, attended, cells);
    if (mode == HYLRA_SELECT) {
        b.input.cells[b.il] = b.choose(op, attended, out);
        ggml_build_forward_expand(b.graph.gf, out);
        ggml_build_forward_expand(b.graph.gf, b.input.cells[b.il]); // no ancestor of the output: nothing else would compute it
    }
    return out;
}

ggml_tensor * llama_hylra_attn(const llm_graph_context & graph, ggml_tensor * q, ggml_tensor * k, ggml_tensor * v,
                               ggml_tensor * kq_mask, ggml_tensor * sinks, int64_t n_kv_max, float kq_scale, int il) {
    if (!graph.cparams.hylra) {
        return nullptr;
    }
    if (graph.cparams.cb_eval) {
        ggml_format_name(q, HYLRA_TRACED_Q, il);
    }
    llm_graph_input_hylra & input = input_of(graph);
    if (!input.sparse) {
        return nullptr;
    }
    if (il < 0 || il >= int(input.policy->layer_count)) {
        return nullptr; // a draft layer behind the trunk
    }
    hylra_layer_state state = judge(input, graph, q, k, v, kq_mask, n_kv_max, il);
    ggml_tensor * out = nullptr;
    if (state == HYLRA_LAYER_SERVED) {
        const ggml_backend_dev_t device = place_of(k, v).device;
        const uint32_t least = device ? hylra_cuda_min_context(shapes_of(q, k, v), input.device_override) : 0;
        input.state.device_min_context = std::max(input.state.device_min_context, least);
        if (k->ne[1] < least) {
            input.layer_states[il] = state;
            return nullptr;
        }
        llama_hylra_want_kept_mask(kq_mask);
        if (device && input.policy->layer_mode[il] == HYLRA_FULL) {
            input.layer_states[il] = state;
            return nullptr; // llama.cpp's own dense kernel is as good there
        }
        layer_builder builder = { graph, input, *input.policy, q, k, v, kq_mask, sinks, il, device };
        out = build(builder, kq_scale);
        state = out ? state : HYLRA_LAYER_SOURCE;
    }
    input.layer_states[il] = state;
    input.n_layer_ours += out != nullptr;
    return out;
}
