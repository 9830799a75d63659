// The HyLRA nodes on the CUDA backend: which of them it takes, and from a node to the launches of hylra-cuda.cuh.
// Launches depend on shapes and addresses alone, as CUDA graphs need.
#include "hylra-cuda.cuh"

#include "hylra-cpu.h"
#include "hylra-cuda.h"

#include "ggml.h"

void hylra_cuda_attend_f16 (const hylra_cuda_job & job, cudaStream_t stream);
void hylra_cuda_attend_bf16(const hylra_cuda_job & job, cudaStream_t stream);
void hylra_cuda_attend_f32 (const hylra_cuda_job & job, cudaStream_t stream);
void hylra_cuda_attend_q8_0(const hylra_cuda_job & job, cudaStream_t stream);
void hylra_cuda_attend_q4_0(const hylra_cuda_job & job, cudaStream_t stream);

void hylra_cuda_attend(const hylra_cuda_job & job, cudaStream_t stream) {
    switch (job.attn.type_k) {
        case GGML_TYPE_F16:  return hylra_cuda_attend_f16 (job, stream);
        case GGML_TYPE_BF16: return hylra_cuda_attend_bf16(job, stream);
        case GGML_TYPE_F32:  return hylra_cuda_attend_f32 (job, stream);
        case GGML_TYPE_Q8_0: return hylra_cuda_attend_q8_0(job, stream);
        case GGML_TYPE_Q4_0: return hylra_cuda_attend_q4_0(job, stream);
        default: GGML_ABORT("hylra: no CUDA kernel for this KV type"); // hylra_cuda_fits lets none through
    }
}

bool hylra_cuda_reuse_f16 (const hylra_cuda_job & job, float * out, cudaStream_t stream);
bool hylra_cuda_reuse_bf16(const hylra_cuda_job & job, float * out, cudaStream_t stream);
bool hylra_cuda_reuse_f32 (const hylra_cuda_job & job, float * out, cudaStream_t stream);
bool hylra_cuda_reuse_q8_0(const hylra_cuda_job & job, float * out, cudaStream_t stream);
bool hylra_cuda_reuse_q4_0(const hylra_cuda_job & job, float * out, cudaStream_t stream);

bool hylra_cuda_reuse(const hylra_cuda_job & job, float * out, cudaStream_t stream) {
    switch (job.attn.type_k) {
        case GGML_TYPE_F16:  return hylra_cuda_reuse_f16 (job, out, stream);
        case GGML_TYPE_BF16: return hylra_cuda_reuse_bf16(job, out, stream);
        case GGML_TYPE_F32:  return hylra_cuda_reuse_f32 (job, out, stream);
        case GGML_TYPE_Q8_0: return hylra_cuda_reuse_q8_0(job, out, stream);
        case GGML_TYPE_Q4_0: return hylra_cuda_reuse_q4_0(job, out, stream);
        default: return false;
    }
}

hylra_cuda_job hylra_cuda_job_of(const hylra_attn & attn, const int32_t * head_list, int select_lists, bool scores_only, void * scratch) {
    hylra_cuda_job job = {};
    job.attn         = attn;
    job.plan         = hylra_cuda_plan_of(attn, attn.cells ? attn.n_cells : attn.n_kv, attn.cells != nullptr, scores_only);
    job.layout       = hylra_cuda_layout_of(attn, job.plan, select_lists);
    job.scratch      = (char *) scratch;
    job.select_lists = select_lists;
    for (int head = 0; head < attn.n_head_kv && head_list; ++head) {
        job.head_list[head] = int16_t(head_list[head]);
    }
    return job;
}

// ---- nodes: sources as in hylra-cpu.cpp; pool has reduce's node as a further source, whose work is done in pool's launch

static hylra_cuda_job job_of_node(const hylra_op & op, const ggml_tensor * attend, const ggml_tensor * sinks) {
    const hylra_attn attn = hylra_attn_of_node(op, attend, sinks);
    return hylra_cuda_job_of(attn, op.head_list.data(), op.weights ? op.lists : 0, op.scores_only, attend->data);
}

// Lists in one launch: at reduce's node, whose data is the output; attend's then does nothing.
static bool in_one_launch(const hylra_cuda_job & job, float * out, cudaStream_t stream) { return job.attn.cells && hylra_cuda_reuse(job, out, stream); }

static void compute_attend(const hylra_op & op, ggml_tensor * node, cudaStream_t stream) {
    const hylra_cuda_job job = job_of_node(op, node, nullptr);
    if (!in_one_launch(job, nullptr, stream)) {
        hylra_cuda_attend(job, stream);
    }
}

// A select layer's is left to pool, which follows at once: llama_hylra_attn expands both before anything that reads this node, and both run here alone
// (hylra_cuda_supports).
static void compute_reduce(const hylra_op & op, ggml_tensor * node, cudaStream_t stream) {
    if (op.weights) {
        return;
    }
    const hylra_cuda_job job = job_of_node(op, node->src[0], node->src[1]);
    if (!in_one_launch(job, (float *) node->data, stream)) {
        hylra_cuda_reduce(job, (float *) node->data, stream);
    }
}

static void compute_pool(const hylra_op & op, ggml_tensor * node, cudaStream_t stream) {
    const ggml_tensor * forced = node->src[2], * reduced = node->src[3];
    hylra_cuda_pool(job_of_node(op, node->src[0], node->src[1]), reduced ? (float *) reduced->data : nullptr, (const int32_t *) forced->data, int(forced->ne[0]),
                    (float *) node->data, stream);
}

static void compute_choose(const hylra_op & op, ggml_tensor * node, cudaStream_t stream) {
    const ggml_tensor * pooled = node->src[0];
    const hylra_cuda_job job = job_of_node(op, node->src[1], nullptr);
    const int n_kv = int(pooled->ne[0]), top_k = int(node->ne[0]), n_row = int(node->ne[1]*node->ne[2]*node->ne[3]);
    const float * scores = (const float *) pooled->data;
    const int32_t * bins = (const int32_t *) (job.scratch + job.layout.bins);
    int32_t * cells = (int32_t *) node->data;
    if (hylra_cuda_cluster_fits(n_kv, op.block_size)) {
        hylra_cuda_choose_in_cluster(scores, bins, n_kv, n_row, top_k, cells, op.meters, stream);
    } else {
        hylra_cuda_choose(scores, bins, n_kv, n_row, top_k, op.block_size, cells, op.meters, stream);
    }
}

void hylra_cuda_compute(ggml_tensor * node, cudaStream_t stream) {
    const hylra_node_ref ref = hylra_node_of(node);
    const hylra_op & op = *ref.op;
    if (ref.run == hylra_node_attend) {
        compute_attend(op, node, stream);
    } else if (ref.run == hylra_node_reduce) {
        compute_reduce(op, node, stream);
    } else if (ref.run == hylra_node_pool) {
        compute_pool(op, node, stream);
    } else {
        compute_choose(op, node, stream);
    }
}

static int attribute(cudaDeviceAttr name, int device) {
    int value = 0;
    return cudaDeviceGetAttribute(&value, name, device) == cudaSuccess ? value : 0;
}

static bool has_shared_memory(const ggml_tensor * node, int device) {
    return hylra_cuda_choose_bytes(int(node->src[0]->ne[0])) <= size_t(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
}

bool hylra_cuda_supports(ggml_backend_dev_t dev, int device, const ggml_tensor * node) {
    const hylra_node_ref ref = hylra_node_of(node);
    if (!ref.op || ref.op->device != dev) {
        return false; // not ours, or its cache lies elsewhere
    }
    return attribute(cudaDevAttrComputeCapabilityMajor, device)*10 + attribute(cudaDevAttrComputeCapabilityMinor, device) >= 75 &&
           (ref.run != hylra_node_choose || has_shared_memory(node, device));
}
