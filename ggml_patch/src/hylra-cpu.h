// HyLRA graph nodes: what a node carries, and the functions that GGML_OP_CUSTOM calls on the CPU backend. They also name the node:
// the CUDA backend runs its own kernels for them (hylra-cuda.cu).
#pragma once

#include "hylra-attn.h"
#include "hylra-meters.h"

#include "ggml.h"

#include <vector>

struct ggml_backend_device;

// Parameters of the nodes of one layer, their userdata; owned by the graph input, so they live as long as the graph.
struct hylra_op {
    int32_t layer;
    float   scale, max_bias, softcap;
    bool    weights;                // attend writes softmax weights: a select layer
    bool    scores_only;            // and nothing else: what it outputs comes from a second attend, to the cells it chose
    int32_t block_size;
    int32_t lists;                  // that a select layer pools into
    ggml_backend_device * device;   // where the cache lies and the node must run; nullptr: host memory
    std::vector<int32_t> head_list; // [n_head_kv] list that each KV head takes (reuse)
    hylra_meter * meters;           // [rows] (select), in the memory of `device`
};

// A node's function and parameters; both nullptr if it is none of ours.
struct hylra_node_ref {
    ggml_custom_op_t run;
    const hylra_op * op;
};
hylra_node_ref hylra_node_of(const ggml_tensor * node);

hylra_attn hylra_attn_of(const ggml_tensor * q, const ggml_tensor * k, const ggml_tensor * v, const ggml_tensor * mask, const ggml_tensor * sinks);
hylra_job  hylra_job_of(const hylra_attn & attn, const int32_t * head_list);
hylra_attn hylra_attn_of_node(const hylra_op & op, const ggml_tensor * attend, const ggml_tensor * sinks);
hylra_job  hylra_job_of_node(const hylra_op & op, const ggml_tensor * attend, const ggml_tensor * sinks);

// Where a job has fewer chunks than there are threads (a list of 1024 cells has eight), tasks share the KV heads of a chunk. No more of them than threads need,
// since each starts with rows that nobody has fetched. Results are the same.
void hylra_share_heads(hylra_job & job, int n_threads);

// Size of an attend node's result when `n_listed` cells (a list, or all n_kv) are attended to. The chunking depends on
// shapes alone, so results do not depend on the number of threads.
size_t hylra_attend_floats(const hylra_attn & attn, int n_listed, bool weights);
void   hylra_place(hylra_job & job, float * scratch, bool weights);
void   hylra_force(float * scores, const int32_t * forced, int n_forced, int begin, int end);

const char * hylra_default_isa();

void hylra_node_attend(ggml_tensor * dst, int ith, int nth, void * userdata);
void hylra_node_reduce(ggml_tensor * dst, int ith, int nth, void * userdata);
void hylra_node_pool  (ggml_tensor * dst, int ith, int nth, void * userdata);
void hylra_node_choose(ggml_tensor * dst, int ith, int nth, void * userdata);
