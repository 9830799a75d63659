// Fuzz target: the policy reader of the engine, from GGUF bytes, from typed keys and overrides, and through the C interface.
//
// Byte 0 of an input says which of the three, byte 1 for which model (SHAPES); the rest is the content. What a reader accepts
// is checked again here in other words, and what it refuses must be one line of ASCII; anything else aborts.
#include "hylra-policy.h"

#include "llama-hparams.h"

#include "ggml.h"
#include "gguf.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

// accepted policies by kind of input: a target that is never past the refusals tests little
extern "C" { long hylra_fuzz_accepted[3] = {}; }

namespace {

struct shape {
    uint32_t n_layer, n_nextn, n_head_kv;
    uint32_t swa_every, recr_every, narrow_every; // 0: none; narrow layers have half the KV heads
};

const shape SHAPES[] = {
    { 4, 0, 2, 0, 0, 0 }, { 4, 0, 2, 2, 0, 0 }, { 6, 1, 4, 0, 3, 2 }, { 1, 0, 1, 0, 0, 0 }, { 61, 0, 1, 0, 1, 0 }, { 64, 0, 8, 6, 0, 0 },
};

const llama_hparams & hparams_of(uint8_t number) {
    static std::vector<llama_hparams> all;
    for (const shape & s : SHAPES) {
        if (all.size() == std::size(SHAPES)) { break; }
        llama_hparams & h = all.emplace_back();
        h.n_layer_all   = s.n_layer + s.n_nextn;
        h.n_layer_nextn = s.n_nextn;
        for (uint32_t il = 0; il < h.n_layer_all; ++il) {
            h.n_head_kv_arr[il] = s.narrow_every && il % s.narrow_every == 0 ? s.n_head_kv/2 : s.n_head_kv;
            h.is_swa_impl[il]   = s.swa_every && il % s.swa_every == 0;
            h.is_recr_impl[il]  = s.recr_every && il % s.recr_every == 0;
        }
    }
    return all[number % all.size()];
}

// ---- bytes of the input, zeros behind its end

struct bytes {
    const uint8_t * data;
    size_t size;

    template<typename T> T take() {
        T out = {};
        const size_t n = std::min(size, sizeof(T));
        if (n > 0) { memcpy(&out, data, n); } // an empty input has no data
        data += n;
        size -= n;
        return out;
    }
};

// ---- what must hold

void must(bool holds, const char * what) {
    if (!holds) {
        fprintf(stderr, "policy_target: %s\n", what);
        abort();
    }
}

// As the engine has it: where every layer is recurrent, each has attention beside its state.
bool may_be_sparse(const llama_hparams & hparams, uint32_t il) {
    bool all_recurrent = true;
    for (uint32_t i = 0; i < hparams.n_layer(); ++i) {
        all_recurrent = all_recurrent && hparams.is_recr(i);
    }
    return hparams.n_head_kv(il) > 0 && !hparams.is_swa(il) && (all_recurrent || !hparams.is_recr(il));
}

void check_list_of_layer(const llama_hylra_policy & p, const llama_hparams & hparams, uint32_t il) {
    const uint32_t mode   = p.layer_mode[il];
    const int32_t  source = p.layer_source[il];
    must(mode <= HYLRA_REUSE, "a mode that the engine does not know");
    must(mode != HYLRA_FULL || source == -1, "a full layer with a source");
    must(mode == HYLRA_FULL || (source >= 0 && source <= int32_t(il)), "a source that does not come before its layer");
    must(mode == HYLRA_FULL || source == int32_t(il) || p.layer_mode[source] == HYLRA_SELECT, "a source that is no select layer");
    must(mode == HYLRA_FULL || may_be_sparse(hparams, il), "a layer that cannot be served");
    must(p.sparse_select.empty() || p.sparse_select[il] == 0 || (p.sparse_select[il] == 1 && mode == HYLRA_SELECT), "sparse, but no select layer");
    must(mode == HYLRA_FULL || p.lists == 1 || p.lists == hparams.n_head_kv(il), "a list per head that is not there");
    for (uint32_t n_kv : { 1u, 255u, 256u, 131072u, 1u << 30 }) {
        const uint32_t k = p.top_k_at(il, n_kv);
        const bool chooses = source == int32_t(il); // a select layer, or one that attends to its own cells
        must(k <= n_kv && (k > 0 || !chooses), "a budget outside the cache");
        must(!p.selects_sparsely(il, n_kv) || k < n_kv, "a sparse select layer that selects every cell");
        must(!chooses || uint64_t(k) >= std::min<uint64_t>(n_kv, uint64_t(p.sink_tokens) + p.recent_tokens), "no room for sink and recent cells");
    }
}

void check_accepted(const llama_hylra_policy & p, const llama_hparams & hparams) {
    must(p.version == HYLRA_POLICY_VERSION && p.prefill == 0, "an unknown version");
    must(p.layer_count == hparams.n_layer() && p.layer_mode.size() == p.layer_count && p.layer_source.size() == p.layer_count, "a wrong number of layers");
    must(p.block_size >= 1 && p.block_size <= 128 && p.lists >= 1, "a wrong block size or number of lists");
    must(p.layer_top_k.empty() || p.layer_top_k.size() == p.layer_count, "budgets of other layers");
    must(p.sparse_select.empty() || p.sparse_select.size() == p.layer_count, "sparse select layers of another model");
    must(p.head_map.empty() || p.head_map.size() == size_t(p.layer_count)*p.head_kv_count, "a head map of another size");
    for (int32_t head : p.head_map) {
        must(head >= 0 && head < int32_t(p.head_kv_count), "a head that is not there");
    }
    for (uint32_t il = 0; il < p.layer_count; ++il) {
        check_list_of_layer(p, hparams, il);
    }
}

void check_result(const llama_hylra_policy_ptr & policy, const llama_hparams & hparams, int kind) {
    if (!policy) {
        return;
    }
    if (policy->problem.empty()) {
        check_accepted(*policy, hparams);
        hylra_fuzz_accepted[kind] += 1;
    }
    must(policy->problem.size() < 512, "a reason longer than the buffer of the C interface");
    for (unsigned char c : policy->problem) {
        must(c >= 0x20 && c < 0x7f, "a reason that is not one line of ASCII");
    }
}

// ---- the three inputs

hylra_overrides take_overrides(bytes & in) {
    static const char * const KEYS[] = { "hylra.enabled", "hylra.top_k", "hylra.version", "hylra.layer_count", "hylra.top_k_fraction", "hylra.layer_mode" };
    hylra_overrides out;
    for (uint8_t n = in.take<uint8_t>() % 4; n > 0; --n) {
        llama_model_kv_override o = {};
        const char * key = KEYS[in.take<uint8_t>() % std::size(KEYS)];
        o.tag = llama_model_kv_override_type(in.take<uint8_t>() % 4);
        if (o.tag == LLAMA_KV_OVERRIDE_TYPE_BOOL) {
            o.val_bool = in.take<uint8_t>() & 1;
        } else {
            const uint64_t value = in.take<uint64_t>();
            memcpy(&o.val_i64, &value, sizeof(value));
        }
        out[key] = o;
    }
    return out;
}

void run_gguf(bytes in, const llama_hparams & hparams) {
    gguf_init_params params = { /*no_alloc =*/ true, /*ctx =*/ nullptr };
    if (gguf_context * metadata = gguf_init_from_buffer(in.data, in.size, params)) {
        check_result(hylra_read_policy(metadata, {}, hparams), hparams, 0);
        gguf_free(metadata);
    }
}

void set_array(gguf_context * metadata, const char * key, bytes & in) {
    const gguf_type type = gguf_type(in.take<uint8_t>() % GGUF_TYPE_COUNT);
    std::vector<uint64_t> values(in.take<uint8_t>()); // eight bytes for each value: room for every type
    for (uint64_t & value : values) {
        value = in.size > 0 ? in.take<uint8_t>() : 0;
        value |= value << 32;
        value = value >= 0xf8 && value <= 0xff ? ~uint64_t(0) : value;
    }
    if (type != GGUF_TYPE_STRING && type != GGUF_TYPE_ARRAY && !values.empty()) {
        gguf_set_arr_data(metadata, key, type, values.data(), values.size());
    }
}

// One array in the form that counts, so that most inputs come past its type: U32 or I32, one byte per value, 255 = -1.
void set_plain_array(gguf_context * metadata, const char * key, bool is_signed, bytes & in) {
    std::vector<int32_t> values(in.take<uint8_t>());
    for (int32_t & value : values) {
        value = int8_t(in.take<uint8_t>());
    }
    if (!values.empty()) {
        gguf_set_arr_data(metadata, key, is_signed ? GGUF_TYPE_INT32 : GGUF_TYPE_UINT32, values.data(), values.size());
    }
}

void set_key(gguf_context * metadata, bytes & in) {
    static const char * const KEYS[] = { "hylra.version", "hylra.enabled", "hylra.layer_count", "hylra.head_kv_count", "hylra.layer_mode",
        "hylra.layer_source", "hylra.head_map", "hylra.lists", "hylra.top_k", "hylra.layer_top_k", "hylra.top_k_fraction", "hylra.block_size",
        "hylra.sink_tokens", "hylra.recent_tokens", "hylra.min_context", "hylra.prefill", "hylra.theta", "hylra.measured.kld", "hylra.pad",
        "hylra.colour", "hylra.\n\xff", "hylra.", "general.name", "hylra.sparse_select" };
    const uint8_t number = in.take<uint8_t>();
    const char * key = KEYS[number % std::size(KEYS)];
    switch (in.take<uint8_t>() % 10) {
        case 0: gguf_set_val_u32 (metadata, key, in.take<uint8_t>()); break;
        case 1: gguf_set_val_u32 (metadata, key, in.take<uint32_t>()); break;
        case 2: gguf_set_val_f32 (metadata, key, in.take<float>()); break;
        case 3: gguf_set_val_bool(metadata, key, in.take<uint8_t>() & 1); break;
        case 4: gguf_set_val_str (metadata, key, "text"); break;
        case 5: gguf_set_val_i64 (metadata, key, in.take<int64_t>()); break;
        case 6: gguf_set_val_u8  (metadata, key, in.take<uint8_t>()); break;
        case 7: set_array(metadata, key, in); break;
        default: set_plain_array(metadata, key, strcmp(key, "hylra.layer_source") == 0 || strcmp(key, "hylra.head_map") == 0, in); break;
    }
}

// A policy that fits: every layer that may select does.
void set_valid(gguf_context * metadata, const llama_hparams & hparams) {
    std::vector<uint32_t> mode(hparams.n_layer());
    std::vector<int32_t> source(mode.size(), -1);
    uint32_t n_head_kv = 0;
    for (uint32_t il = 0; il < mode.size(); ++il) {
        mode[il]   = hparams.is_swa(il) || hparams.is_recr(il) ? HYLRA_FULL : HYLRA_SELECT;
        source[il] = mode[il] == HYLRA_SELECT ? int32_t(il) : -1;
        n_head_kv  = std::max(n_head_kv, hparams.n_head_kv(il));
    }
    for (auto [key, value] : { std::pair<const char *, uint32_t>{ "version", 1 }, { "layer_count", mode.size() }, { "head_kv_count", n_head_kv }, { "lists", 1 },
            { "top_k", 255 }, { "block_size", 1 }, { "sink_tokens", 4 }, { "recent_tokens", 64 }, { "min_context", 1024 } }) {
        gguf_set_val_u32(metadata, (std::string("hylra.") + key).c_str(), value);
    }
    gguf_set_arr_data(metadata, "hylra.layer_mode", GGUF_TYPE_UINT32, mode.data(), mode.size());
    gguf_set_arr_data(metadata, "hylra.layer_source", GGUF_TYPE_INT32, source.data(), source.size());
}

void run_keys(bytes in, const llama_hparams & hparams) {
    gguf_context * metadata = gguf_init_empty();
    const hylra_overrides overrides = take_overrides(in);
    if (in.take<uint8_t>() & 1) {
        set_valid(metadata, hparams);
    }
    while (in.size > 0) {
        set_key(metadata, in);
    }
    check_result(hylra_read_policy(metadata, overrides, hparams), hparams, 1);
    gguf_free(metadata);
}

template<typename T> const T * take_array(bytes & in, std::vector<T> & out, size_t n) {
    out.resize(n);
    for (T & value : out) {
        value = T(int8_t(in.take<uint8_t>()));
    }
    return out.data(); // exactly as long as the contract says: one value too far is an overflow
}

void run_struct(bytes in, const llama_hparams & hparams) {
    hylra_policy p = {};
    const uint8_t plain = in.take<uint8_t>(); // bit set: the value that fits, so that checks behind it are reached
    p.version       = plain & 1 ? HYLRA_POLICY_VERSION : in.take<uint32_t>();
    p.layer_count   = plain & 2 ? hparams.n_layer() : in.take<uint32_t>();
    p.head_kv_count = plain & 4 ? hparams.n_head_kv(hparams.n_layer() - 1) : in.take<uint32_t>();
    p.lists         = plain & 8 ? 1 : in.take<uint32_t>();
    p.top_k         = plain & 16 ? 2048 : in.take<uint32_t>();
    p.block_size    = plain & 32 ? 1 : in.take<uint8_t>();
    p.enabled       = in.take<uint8_t>();
    p.sink_tokens   = plain & 64 ? in.take<uint8_t>() : in.take<uint32_t>();
    p.recent_tokens = plain & 64 ? in.take<uint8_t>() : in.take<uint32_t>();
    p.min_context   = in.take<uint16_t>();
    p.prefill       = plain & 128 ? 0 : in.take<uint8_t>();
    const uint8_t arrays = in.take<uint8_t>();
    p.top_k_fraction = arrays & 1 ? in.take<float>() : 0.0f;
    // arrays are as long as the struct says, if that is at all possible
    const size_t n = std::min<uint64_t>(p.layer_count, 512), n_map = std::min<uint64_t>(uint64_t(n)*p.head_kv_count, 4096);
    std::vector<uint32_t> mode, top_k, sparse;
    std::vector<int32_t> source, head_map;
    p.layer_mode   = arrays & 2 ? nullptr : take_array(in, mode, n);
    p.layer_source = arrays & 4 ? nullptr : take_array(in, source, n);
    p.layer_top_k  = arrays & 8 ? take_array(in, top_k, n) : nullptr;
    p.head_map     = arrays & 16 ? take_array(in, head_map, n_map) : nullptr;
    p.sparse_select = arrays & 32 ? take_array(in, sparse, n) : nullptr;
    check_result(hylra_copy_policy(p, hparams), hparams, 2);
}

} // namespace

extern "C" int LLVMFuzzerInitialize(int *, char ***) {
    ggml_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    bytes in = { data, size };
    const uint8_t kind = in.take<uint8_t>();
    const llama_hparams & hparams = hparams_of(in.take<uint8_t>());
    switch (kind % 3) {
        case 0: run_gguf(in, hparams); break;
        case 1: run_keys(in, hparams); break;
        case 2: run_struct(in, hparams); break;
    }
    return 0;
}
