// What the inserted lines in llama.cpp call: load the policy, keep its state per context, build the attention nodes.
// With no policy every call returns at once and the graph is llama.cpp's own.
#pragma once

#include "hylra-policy.h"

#include <cstdint>
#include <memory>
#include <vector>

struct ggml_backend_buffer;
struct ggml_tensor;
class  llama_kv_cells;
struct llama_hylra_context;
struct llama_model;
struct llama_model_loader;
struct llama_ubatch;
struct llm_graph_context;

// llama_model_base::load_hparams, after the architecture's own hyperparameters
llama_hylra_policy_ptr llama_hylra_load(const llama_model_loader & ml, const llama_hparams & hparams);

// constructor of llama_context: the state that cparams.hylra points to
std::shared_ptr<llama_hylra_context> llama_hylra_init(const llama_model & model);

// constructor of llama_kv_cache, before a buffer of the cache is first written
void llama_hylra_cache_allocated(const llama_model & model, ggml_backend_buffer * buffer);

// flash-attention branch of llm_graph_context::build_attn_mha; nullptr: not ours, build the stock node
//   q [n_embd_k, n_tokens, n_head, n_stream], k [n_embd_k, n_kv, n_head_kv, n_stream], v [n_embd_v, n_kv, n_head_kv, n_stream]
//   returns F32 [n_embd_v, n_head, n_tokens, n_stream], the layout of ggml_flash_attn_ext
ggml_tensor * llama_hylra_attn(const llm_graph_context & graph, ggml_tensor * q, ggml_tensor * k, ggml_tensor * v,
                               ggml_tensor * kq_mask, ggml_tensor * sinks, int64_t n_kv_max, float kq_scale, int il);

// For the mask of a graph that holds our nodes: llama_hylra_kq_mask may fill it.
void llama_hylra_want_kept_mask(ggml_tensor * mask);

// llama_kv_cache::set_input_kq_mask, for causal attention without sliding window and ALiBi; false: not ours, fill it the stock way
bool llama_hylra_kq_mask(ggml_tensor * mask, const llama_ubatch & ubatch, std::vector<llama_kv_cells> & v_cells,
                         const std::vector<uint32_t> & seq_to_stream);
