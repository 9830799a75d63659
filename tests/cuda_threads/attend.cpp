// Attention on random F16 rows by the CUDA kernels, beside plain double precision: `attend BLOCK.so... < cases`. A case: kernel, head size, query heads,
// KV heads, cells, tokens, streams, listed cells, lists, sinks, share of visible cells. The kernels: `plain`; `nan`, the same for queries that are no numbers, whose weights
// count as nothing; `q8_0`, plain on rounded rows; of hylra-cuda-mla.cuh, with K of 576 values,
// `mla16`, `mla32` and `mla64` by columns per block, whose V is the first 512 of them, and `apart`, as mla32 with V rows of its own. Prints for each the
// kernel and the largest errors, relative to the largest value: output of select, its scores, scores without V, output of reuse in two launches and, plain, in one.
#include "hylra-attn.h"
#include "hylra-cuda-plan.h"

#include <dlfcn.h>
#include <pthread.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <algorithm>
#include <random>
#include <string>
#include <vector>

#include "hylra-cuda.cuh"

enum { ATTEND, REDUCE, POOL, REUSE, MLA_32, MLA_64, MLA_16 };
struct work { int kind, grid[3], n_forced; hylra_cuda_job job; float * out; const int32_t * forced; float * scores; };

// ---- blocks

static std::vector<void *> blocks; // the copies of the library
template <typename F> static F function(int block, const char * name) { return (F) dlsym(blocks[block], name); }

struct task { const work * w; int block, at[3], thread; };
static void * start(void * p) {
    const task & t = *(const task *) p;
    function<void (*)(const work &, int, int, int, int)>(t.block, "run")(*t.w, t.at[0], t.at[1], t.at[2], t.thread);
    return nullptr;
}

// `side` neighbouring blocks run together, one such group after another
static void launch(work w, int x, int y, int z, int side) {
    w.grid[0] = x, w.grid[1] = y, w.grid[2] = z;
    const int n_thread = function<int (*)(int)>(0, "threads")(w.kind);
    pthread_barrier_t cluster;
    pthread_barrier_init(&cluster, nullptr, n_thread*side);
    std::vector<const char *> bases;
    for (int i = 0; i < side; ++i) { bases.push_back(function<const char * (*)()>(i, "base")()); }
    for (int i = 0; i < side; ++i) { function<void (*)(int, pthread_barrier_t *, const char * const *, int)>(i, "begin")(w.kind, &cluster, bases.data(), side); }
    pthread_attr_t small;
    pthread_attr_init(&small);
    pthread_attr_setstacksize(&small, 128 << 10);
    for (int first = 0; first < x*y*z; first += side) {
        std::vector<task> tasks;
        for (int i = 0; i < side; ++i) {
            const int at = first + i;
            for (int thread = 0; thread < n_thread; ++thread) { tasks.push_back({ &w, i, { at%x, at/x%y, at/x/y }, thread }); }
        }
        std::vector<pthread_t> threads(tasks.size());
        for (size_t i = 0; i < tasks.size(); ++i) {
            if (pthread_create(&threads[i], &small, start, &tasks[i]) != 0) { fprintf(stderr, "no more threads\n"); exit(3); }
        }
        for (pthread_t thread : threads) { pthread_join(thread, nullptr); }
    }
}

// ---- problems

struct problem {
    int kernel, size, size_v, heads, heads_kv, n_kv, tokens, streams, n_listed, lists, sinks;
    float visible;
    bool v_in_k, quantised, no_number;
    std::vector<float> q, sink_values;
    std::vector<_Float16> k, v, mask;
    std::vector<uint8_t> k_blocks, v_blocks; // of Q8_0, whose values k and v then are
    std::vector<int32_t> cells, forced, head_list;

    int rows() const { return heads*tokens*streams; }

    // Blocks of 32 values: half d; int8 q[32]
    static void round(std::vector<_Float16> & x, std::vector<uint8_t> & blocks) {
        blocks.resize(x.size()/32*34);
        for (size_t block = 0; block < x.size()/32; ++block) {
            float top = 0.0f;
            for (int i = 0; i < 32; ++i) { top = std::max(top, std::fabs(float(x[block*32 + i]))); }
            const _Float16 d = _Float16(top/127.0f);
            memcpy(&blocks[block*34], &d, 2);
            for (int i = 0; i < 32; ++i) {
                const int8_t value = int8_t(std::max(-127.0f, std::min(127.0f, std::round(float(x[block*32 + i])/float(d)))));
                blocks[block*34 + 2 + i] = uint8_t(value);
                x[block*32 + i] = _Float16(float(value)*float(d));
            }
        }
    }

    void fill(std::mt19937 & rng) {
        std::normal_distribution<float> normal;
        const auto random = [&](auto & to, size_t n, float scale) { to.resize(n); for (auto & x : to) { x = scale*normal(rng); } };
        random(q, size_t(size)*rows(), 2.0f), random(k, size_t(size)*heads_kv*n_kv*streams, 1.0f), random(v, size_t(size_v)*heads_kv*n_kv*streams, 1.0f);
        if (no_number) { std::fill(q.begin(), q.end(), NAN); }
        if (quantised) { round(k, k_blocks), round(v, v_blocks); }
        random(sink_values, sinks ? heads : 0, 1.0f);
        mask.resize(size_t(n_kv)*tokens*streams);
        for (_Float16 & x : mask) { x = _Float16(rng()%1000 < visible*1000 ? 0.0f : -INFINITY); }
        for (int row = 0; row < lists*tokens*streams; ++row) { // ascending visible cells, then -1
            std::vector<int32_t> list;
            for (int cell = 0; cell < n_kv; ++cell) {
                if (mask[size_t(row/lists)*n_kv + cell] == 0 && rng()%3 && int(list.size()) < n_listed) { list.push_back(cell); }
            }
            list.resize(n_listed, -1);
            cells.insert(cells.end(), list.begin(), list.end());
        }
        forced.assign(size_t(tokens)*streams*2, -1);
        for (int head = 0; head < heads_kv; ++head) { head_list.push_back(lists == 1 ? 0 : (head + 1)%heads_kv); }
    }

    hylra_cuda_job job(bool listed, bool scores_only, std::vector<char> & scratch) const {
        hylra_cuda_job j = {};
        hylra_attn & a = j.attn;
        a.type_k = a.type_v = quantised ? 8 : 1;
        a.n_embd_k = size, a.n_embd_v = size_v, a.n_head = heads, a.n_head_kv = heads_kv, a.n_kv = n_kv, a.n_tokens = tokens, a.n_stream = streams;
        a.scale = 1.0f/sqrtf(float(size)), a.q = q.data(), a.k = quantised ? (const void *) k_blocks.data() : k.data(), a.v = quantised ? (const void *) v_blocks.data() : v_in_k ? k.data() : v.data(), a.mask = mask.data(), a.sinks = sinks ? sink_values.data() : nullptr;
        const uint64_t of_q = 4ull*size, row = quantised ? size/32*34ull : 2ull*size, row_v = v_in_k || quantised ? row : 2ull*size_v, of_mask = 2ull*n_kv;
        const uint64_t q_nb[4] = { 4, of_q*heads, of_q, of_q*heads*tokens }, k_nb[4] = { 2, row*heads_kv, row, row*heads_kv*n_kv };
        const uint64_t v_nb[4] = { 2, row_v*heads_kv, row_v, row_v*heads_kv*n_kv };
        const uint64_t mask_nb[4] = { 2, of_mask, of_mask*tokens, of_mask*tokens };
        memcpy(a.q_nb, q_nb, sizeof(q_nb)), memcpy(a.k_nb, k_nb, sizeof(k_nb)), memcpy(a.v_nb, v_nb, sizeof(v_nb)), memcpy(a.mask_nb, mask_nb, sizeof(mask_nb));
        if (listed) { a.cells = cells.data(), a.n_cells = n_listed, a.lists = lists; }
        j.plan = hylra_cuda_plan_of(a, listed ? n_listed : n_kv, listed, scores_only);
        j.select_lists = listed ? 0 : lists;
        j.layout = hylra_cuda_layout_of(a, j.plan, j.select_lists);
        scratch.assign(j.layout.size, char(0xFF));
        j.scratch = scratch.data();
        for (int head = 0; head < heads_kv; ++head) { j.head_list[head] = int16_t(head_list[head]); }
        return j;
    }

    // Output and, if wanted, scores by their definition
    std::vector<float> reference(bool listed, std::vector<float> * scores) const {
        std::vector<float> out(size_t(size_v)*rows());
        if (scores) { scores->assign(size_t(n_kv)*lists*tokens*streams, 0.0f); }
        for (int row = 0; row < rows(); ++row) {
            const int head = row%heads, column = row/heads, stream = column/tokens, head_kv = head/(heads/heads_kv);
            std::vector<double> weight(n_kv, 0.0);
            std::vector<char> wanted(n_kv, !listed);
            for (int i = 0; listed && i < n_listed; ++i) {
                const int cell = cells[(size_t(column)*lists + head_list[head_kv])*n_listed + i];
                if (cell >= 0) { wanted[cell] = 1; }
            }
            const auto row_of = [&](const std::vector<_Float16> & x, int n, int cell) { return &x[((size_t(stream)*n_kv + cell)*heads_kv + head_kv)*n]; };
            const auto v_of = [&](int cell) { return v_in_k ? row_of(k, size, cell) : row_of(v, size_v, cell); };
            double top = sinks ? sink_values[head] : -INFINITY, sum = 0.0;
            for (int cell = 0; cell < n_kv; ++cell) {
                weight[cell] = -INFINITY;
                if (!wanted[cell] || mask[size_t(column)*n_kv + cell] != 0) { continue; }
                double dot = 0.0;
                for (int d = 0; d < size; ++d) { dot += double(q[size_t(row)*size + d])*double(float(row_of(k, size, cell)[d])); }
                weight[cell] = dot/sqrt(double(size));
                top = std::max(top, weight[cell]);
            }
            for (double & w : weight) { w = w == -INFINITY ? 0.0 : exp(w - top); sum += w; }
            sum += sinks ? exp(sink_values[head] - top) : 0.0;
            for (int cell = 0; cell < n_kv && sum > 0.0; ++cell) {
                for (int d = 0; d < size_v; ++d) { out[size_t(row)*size_v + d] += float(weight[cell]/sum*double(float(v_of(cell)[d]))); }
                if (scores) { (*scores)[(size_t(column)*lists + head_kv/(heads_kv/lists))*n_kv + cell] += float(weight[cell]/sum*lists/heads); }
            }
        }
        if (scores) {
            for (size_t i = 0; i < scores->size(); ++i) {
                if (mask[i/n_kv/lists*n_kv + i%n_kv] != 0) { (*scores)[i] = HYLRA_SCORE_HIDDEN; }
            }
        }
        return out;
    }
};

static double error(const std::vector<float> & found, const std::vector<float> & expected) {
    double gap = 0.0, top = 1e-9;
    for (size_t i = 0; i < expected.size(); ++i) {
        const double one = std::fabs(double(found[i]) - expected[i]);
        gap = one <= gap ? gap : one; // a NaN stays
        top = std::max(top, expected[i] == HYLRA_SCORE_HIDDEN ? 0.0 : std::fabs(double(expected[i])));
    }
    return gap/top;
}

static void attend(const hylra_cuda_job & job, int kernel) {
    const hylra_attn & a = job.attn;
    const int columns = kernel == MLA_16 ? 16 : kernel == MLA_32 ? 32 : kernel == MLA_64 ? 64 : job.plan.block_columns;
    launch({ kernel, {}, 0, job, nullptr, nullptr, nullptr }, job.plan.n_group*8/columns*job.plan.n_chunk, a.n_head_kv, a.n_stream*(a.cells ? a.n_tokens : 1), 1);
}

static void run(const problem & p, double (&errors)[5]) {
    std::vector<char> scratch;
    std::vector<float> expected_scores, out(size_t(p.size_v)*p.rows(), NAN), scores;
    const std::vector<float> expected = p.reference(false, &expected_scores), listed = p.reference(true, nullptr);
    for (bool scores_only : { false, true }) {
        const hylra_cuda_job job = p.job(false, scores_only, scratch);
        scores.assign(expected_scores.size(), NAN);
        attend(job, p.kernel);
        const int n_part = hylra_ceil_div(p.n_kv, 512), n_reduced = scores_only ? 0 : hylra_ceil_div(p.rows(), n_part*p.lists);
        launch({ POOL, {}, 2, job, out.data(), p.forced.data(), scores.data() }, n_part, p.lists, p.tokens*p.streams + n_reduced, 1);
        errors[1 + scores_only] = error(scores, expected_scores);
    }
    errors[0] = error(out, expected);
    const hylra_cuda_job job = p.job(true, false, scratch);
    out.assign(out.size(), NAN);
    attend(job, p.kernel);
    launch({ REDUCE, {}, 0, job, out.data(), nullptr, nullptr }, p.rows(), 1, 1, 1);
    errors[3] = error(out, listed);
    if (p.kernel != ATTEND) { return; }
    out.assign(out.size(), NAN);
    launch({ REUSE, {}, 0, job, out.data(), nullptr, nullptr }, int(blocks.size())*job.plan.n_block_column, p.heads_kv, p.tokens*p.streams, int(blocks.size()));
    errors[4] = error(out, listed);
}

int main(int argc, char ** argv) {
    for (int i = 1; i < argc; ++i) {
        blocks.push_back(dlopen(argv[i], RTLD_NOW | RTLD_LOCAL));
        if (!blocks.back()) { fprintf(stderr, "%s\n", dlerror()); return 2; }
    }
    std::mt19937 rng(11);
    char kernel[64];
    problem p;
    while (scanf("%63s %d %d %d %d %d %d %d %d %d %f", kernel, &p.size, &p.heads, &p.heads_kv, &p.n_kv, &p.tokens, &p.streams, &p.n_listed, &p.lists, &p.sinks, &p.visible) == 11) {
        const std::string name = kernel;
        p.quantised = name == "q8_0", p.no_number = name == "nan";
        p.kernel = name == "plain" || p.quantised || p.no_number ? ATTEND : name == "mla16" ? MLA_16 : name == "mla64" ? MLA_64 : MLA_32;
        p.v_in_k = p.kernel != ATTEND && name != "apart";
        p.size_v = p.kernel == ATTEND ? p.size : 512;
        double errors[5];
        p.fill(rng);
        run(p, errors);
        printf("%s", kernel);
        for (int i = 0; i < (p.kernel == ATTEND ? 5 : 4); ++i) { printf(" %.3g", errors[i]); }
        printf("\n");
        fflush(stdout);
        p = problem();
    }
    return 0;
}
