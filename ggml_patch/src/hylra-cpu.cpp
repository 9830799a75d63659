// The HyLRA nodes on the CPU: each is a GGML_OP_CUSTOM whose function cuts the work into tasks and calls the kernels.
// A graph barrier stands between nodes, so one node may read all that the one before it wrote.
#include "hylra-cpu.h"

#include "ggml.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>

constexpr int POOL_CELLS = 4096; // cells per pooling task

// Cells of a chunk when n cells are attended to: at most HYLRA_MAX_CHUNKS chunks, for threads to share and yet few enough partial results;
// at least 4 tiles each, since the first rows of a chunk come from memory with nothing to compute meanwhile.
static int chunk_cells(int n) {
    const int tiles = (hylra_n_tile(n) + HYLRA_MAX_CHUNKS - 1)/HYLRA_MAX_CHUNKS;
    return std::max(4, tiles)*HYLRA_TILE_CELLS;
}

static int chunk_count(int n) { return (n + chunk_cells(n) - 1)/chunk_cells(n); }

float hylra_slope(const hylra_attn & attn, int head) {
    if (attn.max_bias <= 0.0f) {
        return 1.0f;
    }
    const int n_log2 = 1 << int(floor(log2(attn.n_head)));
    const float m0 = powf(2.0f, -attn.max_bias/n_log2);
    const float m1 = powf(2.0f, -attn.max_bias/2.0f/n_log2);
    return head < n_log2 ? powf(m0, head + 1) : powf(m1, 2*(head - n_log2) + 1);
}

hylra_norm hylra_normaliser(const hylra_job & job, int stream, int token, int head) {
    const int n_v = hylra_padded(job.attn.n_embd_v);
    const float * sinks = (const float *) job.attn.sinks;
    float max = sinks ? sinks[head] : -INFINITY;
    for (int chunk = 0; chunk < job.n_chunk; ++chunk) {
        max = std::max(max, hylra_partial(job, chunk, stream, token, head)[n_v]);
    }
    double sum = sinks ? exp(double(sinks[head]) - max) : 0.0;
    for (int chunk = 0; chunk < job.n_chunk; ++chunk) {
        const float * p = hylra_partial(job, chunk, stream, token, head) + n_v;
        sum += p[0] == -INFINITY ? 0.0 : double(p[1])*exp(double(p[0]) - max);
    }
    // a row without visible cells gives zeros, as in llama.cpp
    return { max == -INFINITY ? 0.0f : max, sum > 0.0 ? float(1.0/sum) : 0.0f };
}

// ---- kernels of the instruction set

#if defined(HYLRA_X86)
extern const hylra_kernels hylra_kernels_avx2;
extern const hylra_kernels hylra_kernels_avx512;
extern const hylra_kernels hylra_kernels_avx512vnni;
#endif
extern const hylra_kernels hylra_kernels_base;

static const hylra_kernels * runnable(const hylra_kernels & kernels) {
#if defined(HYLRA_X86)
    if (&kernels == &hylra_kernels_avx512vnni) {
        return __builtin_cpu_supports("avx512vnni") && runnable(hylra_kernels_avx512) ? &kernels : nullptr;
    }
    if (&kernels == &hylra_kernels_avx512) {
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") ? &kernels : nullptr;
    }
    if (&kernels == &hylra_kernels_avx2) {
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") ? &kernels : nullptr;
    }
#endif
    return &kernels;
}

static const hylra_kernels * const ALL_KERNELS[] = { // fastest first; the scalar twins are never chosen by default
#if defined(HYLRA_X86)
    &hylra_kernels_avx512vnni, &hylra_kernels_avx512, &hylra_kernels_avx2,
#endif
    &hylra_kernels_base, &hylra_kernels_ref,
};

const hylra_kernels * hylra_get_kernels(const char * isa) {
    for (const hylra_kernels * kernels : ALL_KERNELS) {
        if ((!isa || strcmp(isa, kernels->isa) == 0) && runnable(*kernels)) {
            return kernels;
        }
    }
    return nullptr;
}

static const hylra_kernels & default_kernels() {
    static const hylra_kernels * const kernels = [] {
        const char * wanted = getenv("HYLRA_ISA");
        const hylra_kernels * found = wanted && *wanted ? hylra_get_kernels(wanted) : nullptr;
        return found ? found : hylra_get_kernels(nullptr);
    }();
    return *kernels;
}

const char * hylra_default_isa() { return default_kernels().isa; }

// ---- nodes

static void copy_strides(uint64_t * out, const ggml_tensor * t) {
    for (int i = 0; i < 4; ++i) {
        out[i] = t->nb[i];
    }
}

// The attention problem of tensors laid out as in build_attn_mha; see struct hylra_attn.
hylra_attn hylra_attn_of(const ggml_tensor * q, const ggml_tensor * k, const ggml_tensor * v, const ggml_tensor * mask, const ggml_tensor * sinks) {
    hylra_attn a = {};
    a.layer     = -1;
    a.type_k    = k->type;
    a.type_v    = v->type;
    a.n_embd_k  = int32_t(k->ne[0]);
    a.n_embd_v  = int32_t(v->ne[0]);
    a.n_head    = int32_t(q->ne[2]);
    a.n_head_kv = int32_t(k->ne[2]);
    a.n_kv      = int32_t(k->ne[1]);
    a.n_tokens  = int32_t(q->ne[1]);
    a.n_stream  = int32_t(q->ne[3]);
    a.q = q->data;
    a.k = k->data;
    a.v = v->data;
    copy_strides(a.q_nb, q);
    copy_strides(a.k_nb, k);
    copy_strides(a.v_nb, v);
    if (mask) {
        a.mask = mask->data;
        copy_strides(a.mask_nb, mask);
    }
    a.sinks = sinks ? sinks->data : nullptr;
    return a;
}

static hylra_to_float_t to_float_of(int type) {
    return type == GGML_TYPE_F32 ? nullptr : (hylra_to_float_t) ggml_get_type_traits(ggml_type(type))->to_float;
}

hylra_job hylra_job_of(const hylra_attn & attn, const int32_t * head_list) {
    hylra_job job = {};
    job.attn       = attn;
    job.k_to_float = to_float_of(attn.type_k);
    job.v_to_float = to_float_of(attn.type_v);
    job.cells      = (const int32_t *) attn.cells;
    job.head_list  = head_list;
    const int n = job.cells ? attn.n_cells : attn.n_kv;
    job.chunk_cells = chunk_cells(n);
    job.n_chunk     = chunk_count(n);
    job.n_part      = 1;
    return job;
}

void hylra_share_heads(hylra_job & job, int n_threads) {
    job.n_part = 1;
    job.n_part = std::min(job.attn.n_head_kv, (n_threads + hylra_n_task(job) - 1)/hylra_n_task(job));
}

size_t hylra_attend_floats(const hylra_attn & a, int n_listed, bool weights) {
    const size_t rows = size_t(a.n_head)*a.n_tokens*a.n_stream;
    return rows*hylra_partial_floats(a.n_embd_v)*chunk_count(n_listed) + (weights ? rows*hylra_n_tile(a.n_kv)*(HYLRA_TILE_CELLS + 1) : 0);
}

void hylra_place(hylra_job & job, float * scratch, bool weights) {
    const hylra_attn & a = job.attn;
    job.partials = scratch;
    job.weights  = weights ? scratch + hylra_attend_floats(a, job.cells ? a.n_cells : a.n_kv, false) : nullptr;
    job.peaks    = weights ? job.weights + size_t(a.n_head)*a.n_tokens*a.n_stream*hylra_n_tile(a.n_kv)*HYLRA_TILE_CELLS : nullptr;
}

// attend: src = q, k, v, mask, then the list of cells of a reuse layer; dst = scratch
hylra_attn hylra_attn_of_node(const hylra_op & op, const ggml_tensor * attend, const ggml_tensor * sinks) {
    const ggml_tensor * idx = attend->src[4];
    hylra_attn a = hylra_attn_of(attend->src[0], attend->src[1], attend->src[2], attend->src[3], sinks);
    a.layer    = op.layer;
    a.scale    = op.scale;
    a.max_bias = op.max_bias;
    a.softcap  = op.softcap;
    a.cells    = idx ? idx->data : nullptr;
    a.n_cells  = idx ? int32_t(idx->ne[0]) : 0;
    a.lists    = idx ? int32_t(idx->ne[1]) : 0;
    return a;
}

hylra_job hylra_job_of_node(const hylra_op & op, const ggml_tensor * attend, const ggml_tensor * sinks) {
    hylra_job job = hylra_job_of(hylra_attn_of_node(op, attend, sinks), op.head_list.data());
    hylra_place(job, (float *) attend->data, op.weights);
    job.scores_only = op.scores_only;
    return job;
}

// The head of ggml_custom_op_params (ggml-impl.h), which is what ggml_custom_4d stores in op_params.
struct custom_params {
    ggml_custom_op_t run;
    int              n_tasks;
    void           * userdata;
};

hylra_node_ref hylra_node_of(const ggml_tensor * node) {
    custom_params params;
    memcpy(&params, node->op_params, sizeof(params));
    const bool ours = node->op == GGML_OP_CUSTOM && (params.run == hylra_node_attend || params.run == hylra_node_reduce ||
                                                     params.run == hylra_node_pool   || params.run == hylra_node_choose);
    return ours ? hylra_node_ref{ params.run, (const hylra_op *) params.userdata } : hylra_node_ref{};
}

void hylra_node_attend(ggml_tensor * dst, int ith, int nth, void * userdata) {
    hylra_job job = hylra_job_of_node(*(const hylra_op *) userdata, dst, nullptr);
    hylra_share_heads(job, nth);
    // neighbouring chunks to the same thread: at the end of one the first rows of the next are fetched already
    const int n_task = hylra_n_task(job);
    for (int task = n_task*ith/nth; task < n_task*(ith + 1)/nth; ++task) {
        default_kernels().attend(job, task);
    }
}

// reduce: src = attend, sinks (may be absent); dst = F32 [n_embd_v, n_head, n_tokens, n_stream]
void hylra_node_reduce(ggml_tensor * dst, int ith, int nth, void * userdata) {
    const hylra_job job = hylra_job_of_node(*(const hylra_op *) userdata, dst->src[0], dst->src[1]);
    const hylra_attn & a = job.attn;
    for (int row = ith; row < a.n_head*a.n_tokens*a.n_stream; row += nth) {
        const int head = row%a.n_head, token = row/a.n_head%a.n_tokens, stream = row/a.n_head/a.n_tokens;
        default_kernels().reduce(job, stream, token, head, (float *) dst->data + size_t(row)*a.n_embd_v);
    }
}

// Adds the mark to the sink and recent cells of a row that lie in [begin, end).
void hylra_force(float * scores, const int32_t * forced, int n_forced, int begin, int end) {
    for (int i = 0; i < n_forced; ++i) {
        const int cell = forced[i];
        if (cell >= begin && cell < end && scores[cell] >= 0.0f && scores[cell] < HYLRA_SCORE_FORCED) {
            scores[cell] += HYLRA_SCORE_FORCED;
        }
    }
}

// pool: src = attend, sinks (may be absent), forced I32 [n_forced, n_tokens*n_stream]; dst = F32 [n_kv, lists, n_tokens, n_stream]
void hylra_node_pool(ggml_tensor * dst, int ith, int nth, void * userdata) {
    const hylra_job job = hylra_job_of_node(*(const hylra_op *) userdata, dst->src[0], dst->src[1]);
    const hylra_attn & a = job.attn;
    const ggml_tensor * forced = dst->src[2];
    const int lists = int(dst->ne[1]), n_part = (a.n_kv + POOL_CELLS - 1)/POOL_CELLS;
    for (int task = ith; task < n_part*lists*a.n_tokens*a.n_stream; task += nth) {
        const int row = task/n_part, list = row%lists, column = row/lists; // column: token of the batch
        const int begin = task%n_part*POOL_CELLS, end = std::min(begin + POOL_CELLS, a.n_kv);
        float * scores = (float *) dst->data + size_t(row)*a.n_kv;
        default_kernels().pool(job, column/a.n_tokens, column%a.n_tokens, list, lists, begin, end, scores);
        hylra_force(scores, (const int32_t *) forced->data + size_t(column)*forced->ne[0], int(forced->ne[0]), begin, end);
    }
}

static double selected_mass(const float * scores, const int32_t * cells, int n) {
    double mass = 0.0;
    for (int i = 0; i < n; ++i) {
        const float s = scores[cells[i]];
        mass += s >= HYLRA_SCORE_FORCED ? s - HYLRA_SCORE_FORCED : s;
    }
    return mass;
}

// choose: src = pool; dst = I32 [top_k, lists, n_tokens, n_stream]
void hylra_node_choose(ggml_tensor * dst, int ith, int nth, void * userdata) {
    const hylra_op & op = *(const hylra_op *) userdata;
    const int n_kv = int(dst->src[0]->ne[0]), top_k = int(dst->ne[0]), n_row = int(dst->ne[1]*dst->ne[2]*dst->ne[3]);
    for (int row = ith; row < n_row; row += nth) {
        const float * scores = (const float *) dst->src[0]->data + size_t(row)*n_kv;
        int32_t * cells = (int32_t *) dst->data + size_t(row)*top_k;
        const int n = default_kernels().choose(scores, n_kv, top_k, op.block_size, cells);
        op.meters[row].mass += selected_mass(scores, cells, n); // one thread per row and node: no lock
        op.meters[row].n    += 1;
    }
}
