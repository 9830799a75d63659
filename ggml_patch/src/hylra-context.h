// State of HyLRA in one llama_context: the active policy, why it is off, counters.
#pragma once

#include "hylra-cpu.h"
#include "hylra-policy.h"

#include <mutex>
#include <string>

struct llama_model;

// Name of the query of llama.cpp's own attention node while someone traces: a layer without a KV cache of its own cannot be told by it.
constexpr char HYLRA_TRACED_Q[] = "hylra_q-%d";

struct llama_hylra_context {
    const llama_model & model;
    llama_hylra_policy_ptr policy; // active; nullptr: dense
    std::string reason;            // why it is dense; empty while a policy is active
    uint32_t epoch = 0;            // changes with the policy: graphs of another epoch are not reused

    uint64_t n_step = 0;
    uint64_t n_step_sparse = 0;
    uint32_t device_min_context = 0; // cells below which layers on a GPU stay llama.cpp's; 0: none seen there
    bool     stock_only = false; // the policy is on, but the last graph held no layer that the engine can serve
    std::vector<uint32_t> layer_states; // hylra_layer_state [n_layer] of the last sparse graph
    hylra_meters meters;

    explicit llama_hylra_context(const llama_model & model) : model(model) {}

    void set_policy(llama_hylra_policy_ptr next, const std::string & none_reason);
    void reset_counters(); // no batch is being computed
};
