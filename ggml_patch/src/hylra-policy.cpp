// Reads and checks a policy (DESIGN §4). A policy that does not fit is refused as a whole, with one line that says why.
#include "hylra-policy.h"

#include "llama-hparams.h"

#include "gguf.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

uint32_t llama_hylra_policy::top_k_at(uint32_t il, uint32_t n_kv) const {
    const uint32_t own   = layer_top_k.empty() ? top_k : layer_top_k[il];
    const uint32_t share = uint32_t(std::ceil(double(top_k_fraction)*n_kv));
    return std::min(std::max(own, share), n_kv);
}

bool llama_hylra_policy::selects_sparsely(uint32_t il, uint32_t n_kv) const {
    return !sparse_select.empty() && sparse_select[il] && n_kv > 2*top_k_at(il, n_kv);
}

uint32_t llama_hylra_policy::count(uint32_t mode) const {
    return uint32_t(std::count(layer_mode.begin(), layer_mode.end(), mode));
}

namespace {

[[noreturn]] void refuse(const std::string & line) { throw std::runtime_error(line); }

std::string num(int64_t n) { return std::to_string(n); }

// A name of the file as it may be printed: one line of ASCII, not too long.
std::string plain(std::string text) {
    std::replace_if(text.begin(), text.end(), [](unsigned char c) { return c < 0x20 || c >= 0x7f; }, '?');
    return text.size() <= 60 ? text : text.substr(0, 57) + "...";
}

// ---- checks

// First of all: the other checks, and the arrays of the C interface, count on it.
void check_counts(const llama_hylra_policy & p, const llama_hparams & hparams) {
    if (p.version != HYLRA_POLICY_VERSION) {
        refuse("hylra.version is " + num(p.version) + ", this engine knows version " + num(HYLRA_POLICY_VERSION));
    }
    uint32_t n_head_kv = 0;
    for (uint32_t il = 0; il < hparams.n_layer(); ++il) {
        n_head_kv = std::max(n_head_kv, hparams.n_head_kv(il));
    }
    if (p.layer_count != hparams.n_layer()) {
        refuse("hylra.layer_count is " + num(p.layer_count) + ", the model has " + num(hparams.n_layer()) + " layers");
    }
    if (p.head_kv_count != n_head_kv) {
        refuse("hylra.head_kv_count is " + num(p.head_kv_count) + ", the model has " + num(n_head_kv) + " KV heads");
    }
}

void check_sizes(const llama_hylra_policy & p) {
    if (p.layer_mode.size() != p.layer_count || p.layer_source.size() != p.layer_count) {
        refuse("hylra.layer_mode and hylra.layer_source must hold " + num(p.layer_count) + " values, found " +
               num(p.layer_mode.size()) + " and " + num(p.layer_source.size()));
    }
    if (!p.sparse_select.empty() && p.sparse_select.size() != p.layer_count) {
        refuse("hylra.sparse_select must hold " + num(p.layer_count) + " values, found " + num(p.sparse_select.size()));
    }
    if (!p.layer_top_k.empty() && p.layer_top_k.size() != p.layer_count) {
        refuse("hylra.layer_top_k must hold " + num(p.layer_count) + " values, found " + num(p.layer_top_k.size()));
    }
    if (!p.head_map.empty() && p.head_map.size() != size_t(p.layer_count)*p.head_kv_count) {
        refuse("hylra.head_map must hold " + num(int64_t(p.layer_count)*p.head_kv_count) + " values, found " + num(p.head_map.size()));
    }
}

void check_budget(const llama_hylra_policy & p) {
    if (p.top_k == 0 || p.top_k < uint64_t(p.sink_tokens) + p.recent_tokens) {
        refuse("hylra.top_k is " + num(p.top_k) + ", it must be at least 1 and hold the " +
               num(uint64_t(p.sink_tokens) + p.recent_tokens) + " sink and recent cells");
    }
    if (!(p.top_k_fraction >= 0.0f && p.top_k_fraction <= 1.0f)) {
        refuse("hylra.top_k_fraction is " + std::to_string(p.top_k_fraction) + ", expected 0 to 1");
    }
    if (!p.layer_top_k.empty() && p.top_k_fraction != 0.0f) {
        refuse("hylra.layer_top_k and hylra.top_k_fraction are both set, expected one of them");
    }
    const bool power = (p.block_size & (p.block_size - 1)) == 0;
    if (p.block_size != 1 && !(power && p.block_size >= 16 && p.block_size <= 128)) {
        refuse("hylra.block_size is " + num(p.block_size) + ", expected 1, 16, 32, 64 or 128");
    }
    if (p.lists != 1 && p.lists != p.head_kv_count) {
        refuse("hylra.lists is " + num(p.lists) + ", expected 1 or the number of KV heads, " + num(p.head_kv_count));
    }
    if (p.prefill != 0) {
        refuse("hylra.prefill is " + num(p.prefill) + ", this engine knows only 0 (dense prefill)");
    }
    for (int32_t head : p.head_map) {
        if (head < 0 || head >= int32_t(p.head_kv_count)) {
            refuse("hylra.head_map names KV head " + num(head) + ", expected 0 to " + num(int64_t(p.head_kv_count) - 1));
        }
    }
}

void check_layer_budget(const llama_hylra_policy & p, uint32_t il) {
    const uint32_t least = p.layer_mode[il] == HYLRA_SELECT ? std::max(1u, p.sink_tokens + p.recent_tokens) : 0;
    const uint32_t most  = p.layer_mode[il] == HYLRA_SELECT ? p.top_k : 0;
    if (p.layer_top_k[il] < least || p.layer_top_k[il] > most) {
        refuse("hylra.layer_top_k of layer " + num(il) + " is " + num(p.layer_top_k[il]) + ", expected " + num(least) + " to " + num(most));
    }
}

// Falcon-H1 marks every layer recurrent, and each has attention beside its recurrent state; elsewhere a layer is one or the other.
bool has_attention(const llama_hparams & hparams, uint32_t il) {
    uint32_t n_recr = 0;
    for (uint32_t i = 0; i < hparams.n_layer(); ++i) {
        n_recr += hparams.is_recr(i);
    }
    return hparams.n_head_kv(il) > 0 && (!hparams.is_recr(il) || n_recr == hparams.n_layer());
}

void check_layer(const llama_hylra_policy & p, const llama_hparams & hparams, uint32_t il) {
    const uint32_t mode   = p.layer_mode[il];
    const int32_t  source = p.layer_source[il];
    const std::string layer = "layer " + num(il);
    if (mode > HYLRA_REUSE) {
        refuse(layer + " has mode " + num(mode) + ", this engine knows 0 full, 1 select, 2 reuse");
    }
    if (!p.layer_top_k.empty()) {
        check_layer_budget(p, il);
    }
    if (!p.sparse_select.empty() && p.sparse_select[il] > (mode == HYLRA_SELECT)) {
        refuse(layer + " has hylra.sparse_select " + num(p.sparse_select[il]) + ", expected " + (mode == HYLRA_SELECT ? "0 or 1" : "0 for a layer that does not select"));
    }
    if (mode == HYLRA_FULL && source != -1) {
        refuse(layer + " is full, its source must be -1, found " + num(source));
    }
    if (mode == HYLRA_SELECT && source != int32_t(il)) {
        refuse(layer + " is select, its source must be itself, found " + num(source));
    }
    if (mode == HYLRA_REUSE && source == int32_t(il)) { // for comparison: its own best cells
        if (!p.layer_top_k.empty()) {
            refuse(layer + " attends to its own cells, hylra.layer_top_k has no budget for it");
        }
    } else if (mode == HYLRA_REUSE && (source < 0 || source >= int32_t(il) || p.layer_mode[source] != HYLRA_SELECT)) {
        refuse(layer + " reuses layer " + num(source) + ", which is no select layer before it");
    }
    if (mode != HYLRA_FULL && (hparams.is_swa(il) || !has_attention(hparams, il))) {
        refuse(layer + " has " + (hparams.is_swa(il) ? "sliding-window" : "no") + " attention, it must be full");
    }
    if (mode != HYLRA_FULL && hparams.n_head_kv(il) != p.head_kv_count && p.lists != 1) {
        refuse(layer + " has " + num(hparams.n_head_kv(il)) + " KV heads, lists per KV head need " + num(p.head_kv_count));
    }
}

void check(const llama_hylra_policy & p, const llama_hparams & hparams) {
    check_counts(p, hparams);
    check_sizes(p);
    check_budget(p);
    for (uint32_t il = 0; il < p.layer_count; ++il) {
        check_layer(p, hparams, il);
    }
    if (p.count(HYLRA_SELECT) > 0 && !p.layer_top_k.empty() && *std::max_element(p.layer_top_k.begin(), p.layer_top_k.end()) != p.top_k) {
        refuse("hylra.top_k is " + num(p.top_k) + ", expected the largest of hylra.layer_top_k");
    }
}

// ---- GGUF metadata

const char PREFIX[] = "hylra.";

// keys for people and tools, which the engine does not use
bool is_note(const std::string & key) {
    static const char * const NOTES[] = { "summary", "tool", "calibration", "theta", "similarity", "sensitivity", "overlap", "pad" };
    return key.rfind("measured.", 0) == 0 || std::find(std::begin(NOTES), std::end(NOTES), key) != std::end(NOTES);
}

struct reader {
    const gguf_context & metadata;
    const hylra_overrides & overrides;

    int64_t find(const std::string & key) const { return gguf_find_key(&metadata, (PREFIX + key).c_str()); }

    int64_t find_typed(const std::string & key, gguf_type type) const {
        const int64_t id = find(key);
        if (id >= 0 && gguf_get_kv_type(&metadata, id) != type) {
            refuse("hylra." + key + " has type " + gguf_type_name(gguf_get_kv_type(&metadata, id)) + ", expected " + gguf_type_name(type));
        }
        return id;
    }

    const llama_model_kv_override * override_of(const std::string & key) const {
        const auto it = overrides.find(PREFIX + key);
        return it == overrides.end() ? nullptr : &it->second;
    }

    void get(const std::string & key, uint32_t & out, bool required = true) const {
        if (const auto * o = override_of(key)) {
            if (o->tag != LLAMA_KV_OVERRIDE_TYPE_INT || o->val_i64 < 0 || o->val_i64 > UINT32_MAX) {
                refuse("the override of hylra." + key + " must be a whole number");
            }
            out = uint32_t(o->val_i64);
            return;
        }
        const int64_t id = find_typed(key, GGUF_TYPE_UINT32);
        if (id >= 0) {
            out = gguf_get_val_u32(&metadata, id);
        } else if (required) {
            refuse("hylra." + key + " is missing");
        }
    }

    void get(const std::string & key, float & out) const {
        const int64_t id = find_typed(key, GGUF_TYPE_FLOAT32);
        if (const auto * o = override_of(key)) {
            if (o->tag != LLAMA_KV_OVERRIDE_TYPE_FLOAT) {
                refuse("the override of hylra." + key + " must be a number with a point");
            }
            out = float(o->val_f64);
        } else if (id >= 0) {
            out = gguf_get_val_f32(&metadata, id);
        }
    }

    void get(const std::string & key, bool & out) const {
        const int64_t id = find_typed(key, GGUF_TYPE_BOOL);
        if (const auto * o = override_of(key)) {
            if (o->tag != LLAMA_KV_OVERRIDE_TYPE_BOOL) {
                refuse("the override of hylra." + key + " must be true or false");
            }
            out = o->val_bool;
        } else if (id >= 0) {
            out = gguf_get_val_bool(&metadata, id);
        }
    }

    template<typename T>
    void get(const std::string & key, gguf_type type, std::vector<T> & out, bool required) const {
        const int64_t id = find_typed(key, GGUF_TYPE_ARRAY);
        if (id < 0) {
            if (required) {
                refuse("hylra." + key + " is missing");
            }
            return;
        }
        if (gguf_get_arr_type(&metadata, id) != type) {
            refuse("hylra." + key + " holds " + gguf_type_name(gguf_get_arr_type(&metadata, id)) + ", expected " + gguf_type_name(type));
        }
        const T * data = (const T *) gguf_get_arr_data(&metadata, id);
        out.assign(data, data + gguf_get_arr_n(&metadata, id));
    }
};

void refuse_unknown_keys(const gguf_context & metadata) {
    static const char * const KEYS[] = { "version", "enabled", "layer_count", "head_kv_count", "layer_mode", "layer_source", "head_map", "lists",
        "sparse_select", "top_k", "layer_top_k", "top_k_fraction", "block_size", "sink_tokens", "recent_tokens", "min_context", "prefill" };
    for (int64_t id = 0; id < gguf_get_n_kv(&metadata); ++id) {
        const std::string name = gguf_get_key(&metadata, id);
        if (name.rfind(PREFIX, 0) != 0) {
            continue;
        }
        const std::string key = name.substr(strlen(PREFIX));
        if (!is_note(key) && std::find(std::begin(KEYS), std::end(KEYS), key) == std::end(KEYS)) {
            refuse("unknown key " + plain(name));
        }
    }
}

void read_all(const reader & r, llama_hylra_policy & p) {
    r.get("enabled", p.enabled);
    r.get("layer_count", p.layer_count);
    r.get("head_kv_count", p.head_kv_count);
    r.get("layer_mode", GGUF_TYPE_UINT32, p.layer_mode, true);
    r.get("layer_source", GGUF_TYPE_INT32, p.layer_source, true);
    r.get("head_map", GGUF_TYPE_INT32, p.head_map, false);
    r.get("sparse_select", GGUF_TYPE_UINT32, p.sparse_select, false);
    r.get("lists", p.lists);
    r.get("top_k", p.top_k);
    r.get("layer_top_k", GGUF_TYPE_UINT32, p.layer_top_k, false);
    r.get("top_k_fraction", p.top_k_fraction);
    r.get("block_size", p.block_size);
    r.get("sink_tokens", p.sink_tokens);
    r.get("recent_tokens", p.recent_tokens);
    r.get("min_context", p.min_context);
    r.get("prefill", p.prefill, false);
}

bool has_keys(const gguf_context & metadata) {
    for (int64_t id = 0; id < gguf_get_n_kv(&metadata); ++id) {
        if (strncmp(gguf_get_key(&metadata, id), PREFIX, strlen(PREFIX)) == 0) {
            return true;
        }
    }
    return false;
}

} // namespace

llama_hylra_policy_ptr hylra_read_policy(const gguf_context * metadata, const hylra_overrides & overrides, const llama_hparams & hparams) {
    if (!metadata || !has_keys(*metadata)) {
        return nullptr;
    }
    auto policy = std::make_shared<llama_hylra_policy>();
    try {
        const reader r = { *metadata, overrides };
        r.get("version", policy->version); // first: a newer schema may know other keys
        if (policy->version == HYLRA_POLICY_VERSION) {
            refuse_unknown_keys(*metadata);
            read_all(r, *policy);
        }
        check(*policy, hparams);
    } catch (const std::exception & e) {
        policy->problem = e.what();
    }
    return policy;
}

// Only after check_counts: until then nothing says that the arrays are as long as the counts.
static void copy_arrays(const hylra_policy & in, llama_hylra_policy & p) {
    if (!in.layer_mode || !in.layer_source) {
        refuse("layer_mode and layer_source must not be NULL");
    }
    p.layer_mode.assign(in.layer_mode, in.layer_mode + in.layer_count);
    p.layer_source.assign(in.layer_source, in.layer_source + in.layer_count);
    if (in.layer_top_k) {
        p.layer_top_k.assign(in.layer_top_k, in.layer_top_k + in.layer_count);
    }
    if (in.sparse_select) {
        p.sparse_select.assign(in.sparse_select, in.sparse_select + in.layer_count);
    }
    if (in.head_map) {
        p.head_map.assign(in.head_map, in.head_map + size_t(in.layer_count)*in.head_kv_count);
    }
}

llama_hylra_policy_ptr hylra_copy_policy(const hylra_policy & in, const llama_hparams & hparams) {
    auto p = std::make_shared<llama_hylra_policy>();
    p->version        = in.version;
    p->enabled        = in.enabled != 0;
    p->layer_count    = in.layer_count;
    p->head_kv_count  = in.head_kv_count;
    p->lists          = in.lists;
    p->top_k          = in.top_k;
    p->top_k_fraction = in.top_k_fraction;
    p->block_size     = in.block_size;
    p->sink_tokens    = in.sink_tokens;
    p->recent_tokens  = in.recent_tokens;
    p->min_context    = in.min_context;
    p->prefill        = in.prefill;
    try {
        check_counts(*p, hparams);
        copy_arrays(in, *p);
        check(*p, hparams);
    } catch (const std::exception & e) {
        p->problem = e.what();
    }
    return p;
}
