// Scalar twins of the kernels: the plainest code that states what each one computes, in double precision.
// Slow on purpose; used by tests and by nothing else.
#include "hylra-attn.h"
#include "hylra-mask.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

static void read_row(hylra_to_float_t to_float, const void * base, const uint64_t * nb, int cell, int head_kv, int stream, int n, float * out) {
    const char * row = (const char *) base + cell*nb[1] + head_kv*nb[2] + stream*nb[3];
    if (to_float) {
        to_float(row, out, n);
    } else {
        memcpy(out, row, n*sizeof(float));
    }
}

// softmax argument of one query head and cell, as in llama.cpp: cap(scale * q.k) + slope * mask
static double logit(const hylra_job & job, int stream, int token, int head, int cell, const float * k_row) {
    const hylra_attn & a = job.attn;
    const float bias = hylra_mask_at(a, stream, token, cell);
    if (bias == -INFINITY) {
        return -INFINITY;
    }
    const float * q = (const float *) ((const char *) a.q + token*a.q_nb[1] + head*a.q_nb[2] + stream*a.q_nb[3]);
    double dot = 0.0;
    for (int d = 0; d < a.n_embd_k; ++d) {
        dot += double(q[d])*k_row[d];
    }
    double s = dot*a.scale;
    if (a.softcap != 0.0f) {
        s = a.softcap*tanh(s/a.softcap);
    }
    return s + double(hylra_slope(a, head))*bias;
}

// One peak for all tiles of the chunk.
static void write_weights(const hylra_job & job, int stream, int token, int head, const std::vector<int32_t> & cells,
                          const std::vector<double> & s, double peak) {
    for (size_t i = 0; i < cells.size(); ++i) {
        const int tile = cells[i]/HYLRA_TILE_CELLS;
        hylra_weights(job, stream, token, head, tile)[cells[i]%HYLRA_TILE_CELLS] = s[i] == -INFINITY ? 0.0f : float(exp(s[i] - peak));
        hylra_peaks(job, stream, token, head)[tile] = float(peak);
    }
}

static void attend_head(const hylra_job & job, int chunk, int stream, int token, int head, const std::vector<int32_t> & cells) {
    const hylra_attn & a = job.attn;
    const int head_kv = head/(a.n_head/a.n_head_kv);
    std::vector<float>  row(std::max(a.n_embd_k, a.n_embd_v));
    std::vector<double> s(cells.size()), acc(a.n_embd_v, 0.0);
    double max = -INFINITY, sum = 0.0;
    for (size_t i = 0; i < cells.size(); ++i) {
        read_row(job.k_to_float, a.k, a.k_nb, cells[i], head_kv, stream, a.n_embd_k, row.data());
        s[i] = logit(job, stream, token, head, cells[i], row.data());
        max  = std::max(max, s[i]);
    }
    if (job.weights) {
        write_weights(job, stream, token, head, cells, s, max);
    }
    for (size_t i = 0; i < cells.size(); ++i) {
        if (s[i] == -INFINITY) {
            continue;
        }
        const double p = exp(s[i] - max);
        sum += p;
        if (job.scores_only) {
            continue;
        }
        read_row(job.v_to_float, a.v, a.v_nb, cells[i], head_kv, stream, a.n_embd_v, row.data());
        for (int d = 0; d < a.n_embd_v; ++d) {
            acc[d] += p*row[d];
        }
    }
    float * out = hylra_partial(job, chunk, stream, token, head);
    std::copy(acc.begin(), acc.end(), out);
    out[hylra_padded(a.n_embd_v) + 0] = float(max);
    out[hylra_padded(a.n_embd_v) + 1] = float(sum);
}

static std::vector<int32_t> chunk_cells(const hylra_job & job, int chunk, int stream, int token, int head_kv) {
    const hylra_attn & a = job.attn;
    std::vector<int32_t> cells;
    const int begin = chunk*job.chunk_cells;
    const int end   = std::min(begin + job.chunk_cells, job.cells ? job.attn.n_cells : a.n_kv);
    for (int i = begin; i < end; ++i) {
        if (!job.cells) {
            cells.push_back(i);
            continue;
        }
        const size_t list = (size_t(stream)*a.n_tokens + token)*job.attn.lists + job.head_list[head_kv];
        const int32_t cell = job.cells[list*job.attn.n_cells + i];
        if (cell >= 0) {
            cells.push_back(cell);
        }
    }
    return cells;
}

static void attend_ref(const hylra_job & job, int task) {
    const hylra_attn & a = job.attn;
    const int group = a.n_head/a.n_head_kv;
    const hylra_task at = hylra_task_of(job, task);
    const int t1 = job.cells ? at.token + 1 : a.n_tokens;
    for (int token = at.token; token < t1; ++token) {
        for (int head = at.head_kv_begin*group; head < at.head_kv_end*group; ++head) {
            attend_head(job, at.chunk, at.stream, token, head, chunk_cells(job, at.chunk, at.stream, token, head/group));
        }
    }
}

static void reduce_ref(const hylra_job & job, int stream, int token, int head, float * out) {
    const hylra_attn & a = job.attn;
    const hylra_norm norm = hylra_normaliser(job, stream, token, head);
    for (int d = 0; d < a.n_embd_v; ++d) {
        double sum = 0.0;
        for (int chunk = 0; chunk < job.n_chunk; ++chunk) {
            const float * p   = hylra_partial(job, chunk, stream, token, head);
            const float   max = p[hylra_padded(a.n_embd_v)];
            if (max != -INFINITY) {
                sum += p[d]*exp(double(max) - norm.max);
            }
        }
        out[d] = float(sum*norm.inv_sum);
    }
}

static void pool_ref(const hylra_job & job, int stream, int token, int list, int lists, int cell_begin, int cell_end, float * scores) {
    const hylra_attn & a = job.attn;
    const int n_head = a.n_head/lists;
    for (int cell = cell_begin; cell < cell_end; ++cell) {
        double sum = 0.0;
        for (int head = list*n_head; head < (list + 1)*n_head; ++head) {
            const hylra_norm norm = hylra_normaliser(job, stream, token, head);
            const double peak = hylra_peaks(job, stream, token, head)[cell/HYLRA_TILE_CELLS];
            const double mass = hylra_weights(job, stream, token, head, cell/HYLRA_TILE_CELLS)[cell%HYLRA_TILE_CELLS]*exp(peak - norm.max)*norm.inv_sum;
            sum += mass > 0.0 ? mass : 0.0; // what is no number, of a model that overflows, counts as nothing
        }
        scores[cell] = hylra_mask_at(a, stream, token, cell) == -INFINITY ? HYLRA_SCORE_HIDDEN : float(sum/n_head);
    }
}

// Whole blocks in descending order of their mass, until one does not fit; forced cells are single.
static void choose_blocks(const float * scores, int n_kv, int top_k, int block_size, std::vector<int32_t> & cells) {
    const int n_block = (n_kv + block_size - 1)/block_size;
    std::vector<double>  mass(n_block, 0.0);
    std::vector<int32_t> order(n_block);
    for (int cell = 0; cell < n_kv; ++cell) {
        const float s = scores[cell];
        mass[cell/block_size] += s >= 0.0f && s < HYLRA_SCORE_FORCED ? double(s) : 0.0;
        if (s >= HYLRA_SCORE_FORCED) {
            cells.push_back(cell);
        }
    }
    for (int b = 0; b < n_block; ++b) {
        order[b] = b;
    }
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return mass[a] > mass[b]; });
    for (int b : order) {
        std::vector<int32_t> block;
        for (int cell = b*block_size; cell < std::min((b + 1)*block_size, n_kv); ++cell) {
            if (scores[cell] >= 0.0f && scores[cell] < HYLRA_SCORE_FORCED) {
                block.push_back(cell);
            }
        }
        if (cells.size() + block.size() > size_t(top_k)) {
            break;
        }
        cells.insert(cells.end(), block.begin(), block.end());
    }
}

static int choose_ref(const float * scores, int n_kv, int top_k, int block_size, int32_t * out) {
    std::vector<int32_t> cells;
    if (block_size > 1) {
        choose_blocks(scores, n_kv, top_k, block_size, cells);
    } else {
        for (int cell = 0; cell < n_kv; ++cell) {
            if (scores[cell] >= 0.0f) {
                cells.push_back(cell);
            }
        }
        std::stable_sort(cells.begin(), cells.end(), [&](int a, int b) { return scores[a] > scores[b]; });
        cells.resize(std::min(cells.size(), size_t(top_k)));
    }
    std::sort(cells.begin(), cells.end());
    std::copy(cells.begin(), cells.end(), out);
    std::fill(out + cells.size(), out + top_k, -1);
    return int(cells.size());
}

const hylra_kernels hylra_kernels_ref = { "ref", attend_ref, reduce_ref, pool_ref, choose_ref };
