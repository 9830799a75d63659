// The policy as the engine holds it: read from GGUF metadata or taken from the C interface, checked as a whole.
#pragma once

#include "hylra.h"

#include "llama.h"

#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

struct gguf_context;
struct llama_hparams;

typedef std::unordered_map<std::string, llama_model_kv_override> hylra_overrides; // as llama_model_loader has them

struct llama_hylra_policy {
    uint32_t version        = HYLRA_POLICY_VERSION;
    bool     enabled        = true;
    uint32_t layer_count    = 0;
    uint32_t head_kv_count  = 0;
    std::vector<uint32_t> layer_mode;   // [layer_count] hylra_mode
    std::vector<int32_t>  layer_source; // [layer_count]
    std::vector<int32_t>  head_map;     // [layer_count * head_kv_count] or empty
    std::vector<uint32_t> sparse_select; // [layer_count] or empty
    uint32_t lists          = 1;
    uint32_t top_k          = 0;
    std::vector<uint32_t> layer_top_k;  // [layer_count] or empty
    float    top_k_fraction = 0.0f;
    uint32_t block_size     = 1;
    uint32_t sink_tokens    = 0;
    uint32_t recent_tokens  = 0;
    uint32_t min_context    = 0;
    uint32_t prefill        = 0;

    std::string problem; // why it was refused, one line; empty: valid

    uint32_t top_k_at(uint32_t il, uint32_t n_kv) const; // cells that select layer il emits when the cache view holds n_kv
    // whether select layer il reads V of its selection only: where that is fewer rows than K and V of all cells
    bool selects_sparsely(uint32_t il, uint32_t n_kv) const;
    uint32_t count(uint32_t mode) const;
};

typedef std::shared_ptr<const llama_hylra_policy> llama_hylra_policy_ptr;

// nullptr if the file has no hylra.* keys. Never throws: quantize tools load models whose layers were renumbered.
llama_hylra_policy_ptr hylra_read_policy(const gguf_context * metadata, const hylra_overrides & overrides, const llama_hparams & hparams);

llama_hylra_policy_ptr hylra_copy_policy(const hylra_policy & policy, const llama_hparams & hparams);
