// Times one attention layer of the engine's CPU kernels beside the read bandwidth of this machine, in the same run, and prints JSON: an
// array with a row per number of cells. All of them are measured in turn, so that what differs between rows is the cells, not the hour.
// One sequence, one token; it measures kernels and nothing else (llama.cpp's graph and weights are `hylra-gguf bench`).
//
//   bench-kernels [--heads 32] [--kv-heads 8] [--head-size 128] [--n-kv 32768,...] [--top-k 1024] [--lists 8] [--type f16|q8_0|bf16|f32|q4_0]
//                 [--threads 2] [--repetitions 9] [--isa avx512vnni|avx512|avx2|base|ref] [--cache cold|hot] [--only full|select|scores|reuse|rows|read]
//                 [--run 1]
//
// --cache hot: nothing is read between the arms, so that a few cells stay in the processor's cache and only arithmetic is left.
// rows: the rows that reuse attends to are read and nothing else, which says how much of its time is the memory's.
// --only: the arms of that name alone, so that a counter around the process sees nothing else; read is what comes before each.
// --run: lists are drawn in runs of so many cells behind each other, anywhere. Without --only reuse or rows, select has chosen other lists before.
#include "bench_team.h"
#include "hylra-attn.h"
#include "hylra-cpu.h"
#include "hylra-memory.h"

#include "ggml.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <new>
#include <random>
#include <string>
#include <vector>

namespace {

struct options {
    int heads = 32, kv_heads = 8, head_size = 128, n_kv = 0, top_k = 1024, lists = 8, threads = 2, repetitions = 9, run = 1;
    std::vector<int> lengths{32768}; // n_kv of the layers that are measured
    ggml_type type = GGML_TYPE_F16;
    std::string isa, cache = "cold", only;
};

// ---- the problem: a cache laid out as llama.cpp's, one row per cell with all KV heads behind each other

// at whole lines, as ggml allocates: new[] starts 16 bytes behind one, and an F16 row lies in five lines instead of four
constexpr std::align_val_t LINE{64};
struct free_lines { void operator()(uint8_t * p) const { operator delete[](p, LINE); } };
typedef std::unique_ptr<uint8_t[], free_lines> lines;

struct cache {
    lines k, v;
    size_t head_bytes, row_bytes;
};

lines random_rows(const options & o, size_t head_bytes, unsigned seed) {
    constexpr int N_SAMPLE = 2048;
    const size_t n_row = size_t(o.n_kv)*o.kv_heads, size_bytes = n_row*head_bytes;
    std::vector<float> values(size_t(o.head_size)*N_SAMPLE);
    std::vector<uint8_t> samples(head_bytes*N_SAMPLE);
    lines rows(new (LINE) uint8_t[size_bytes]);
    hylra_advise_huge_pages(rows.get(), size_bytes);
    std::mt19937 rng(seed);
    std::normal_distribution<float> normal;
    for (float & x : values) { x = normal(rng); }
    ggml_quantize_chunk(o.type, values.data(), samples.data(), 0, N_SAMPLE, o.head_size, nullptr);
    if (o.type == GGML_TYPE_F32) { memcpy(samples.data(), values.data(), samples.size()); }
    for (size_t i = 0; i < n_row; ++i) { // drawn from a few, as a normal deviate costs more than all that is measured; neighbours are unlike
        memcpy(&rows[i*head_bytes], &samples[rng() % N_SAMPLE*head_bytes], head_bytes);
    }
    return rows;
}

cache make_cache(const options & o) {
    const size_t head_bytes = ggml_row_size(o.type, o.head_size);
    return { random_rows(o, head_bytes, 1), random_rows(o, head_bytes, 2), head_bytes, head_bytes*o.kv_heads };
}

hylra_attn make_attn(const options & o, const cache & c, const float * q, const void * mask) {
    hylra_attn a = {};
    a.type_k = a.type_v = o.type;
    a.n_embd_k = a.n_embd_v = o.head_size;
    a.n_head = o.heads;
    a.n_head_kv = o.kv_heads;
    a.n_kv = o.n_kv;
    a.n_tokens = a.n_stream = 1;
    a.scale = 1.0f/std::sqrt(float(o.head_size));
    a.q = q;
    a.k = c.k.get();
    a.v = c.v.get();
    a.mask = mask;
    const uint64_t q_row = sizeof(float)*o.head_size, all = c.row_bytes*o.n_kv, mask_row = sizeof(ggml_fp16_t)*o.n_kv;
    const uint64_t q_nb[4] = { sizeof(float), q_row*o.heads, q_row, q_row*o.heads }, kv_nb[4] = { 1, c.row_bytes, c.head_bytes, all };
    const uint64_t mask_nb[4] = { sizeof(ggml_fp16_t), mask_row, mask_row, mask_row };
    memcpy(a.q_nb, q_nb, sizeof(q_nb));
    memcpy(a.k_nb, kv_nb, sizeof(kv_nb));
    memcpy(a.v_nb, kv_nb, sizeof(kv_nb));
    memcpy(a.mask_nb, mask_nb, sizeof(mask_nb));
    return a;
}

// ---- what is timed: the loops of the nodes in hylra-cpu.cpp

constexpr int POOL_CELLS = 4096;

struct bench {
    const options & o;
    const hylra_kernels & kernels;
    hylra_job dense, with_weights, scoring, sparse;
    std::vector<float> dense_scratch, weights_scratch, sparse_scratch, scores, out;
    std::vector<int32_t> cells, head_list;

    bench(const options & o, const hylra_kernels & kernels, const hylra_attn & a) : o(o), kernels(kernels),
        scores(size_t(o.n_kv)*o.lists), out(size_t(o.heads)*o.head_size), cells(size_t(o.top_k)*o.lists), head_list(o.kv_heads) {
        for (int head = 0; head < o.kv_heads; ++head) { head_list[head] = o.lists == 1 ? 0 : head; }
        for (int list = 0; list < o.lists; ++list) { draw_cells(&cells[size_t(list)*o.top_k], list); } // until `choose` has run
        dense       = place(a, dense_scratch, false);
        with_weights = place(a, weights_scratch, true);
        scoring = with_weights; // as a sparse select layer does it
        scoring.scores_only = true;
        hylra_attn listed = a;
        listed.cells   = cells.data();
        listed.n_cells = o.top_k;
        listed.lists   = o.lists;
        sparse = place(listed, sparse_scratch, false);
    }

    // top_k of all cells, any run of them as likely, ascending: at regular distances memory is faster
    void draw_cells(int32_t * list, unsigned seed) const {
        std::mt19937 rng(seed);
        for (int begin = 0, n = 0; n < o.top_k; begin += o.run) {
            if (int(rng() % ((o.n_kv - begin)/o.run)) >= (o.top_k - n)/o.run) { continue; }
            for (int i = 0; i < o.run; ++i) { list[n++] = begin + i; }
        }
    }

    hylra_job place(const hylra_attn & a, std::vector<float> & scratch, bool weights) {
        hylra_job job = hylra_job_of(a, head_list.data());
        scratch.resize(hylra_attend_floats(a, a.cells ? a.n_cells : a.n_kv, weights) + 16);
        hylra_place(job, (float *) ((uintptr_t(scratch.data()) + 63)/64*64), weights);
        return job;
    }

    void attend(hylra_job job, int ith, int nth) const {
        hylra_share_heads(job, nth);
        const int n_task = hylra_n_task(job);
        for (int task = n_task*ith/nth; task < n_task*(ith + 1)/nth; ++task) { kernels.attend(job, task); }
    }

    void reduce(const hylra_job & job, int ith, int nth) {
        for (int head = ith; head < o.heads; head += nth) { kernels.reduce(job, 0, 0, head, &out[size_t(head)*o.head_size]); }
    }

    void pool(int ith, int nth) {
        const int n_part = (o.n_kv + POOL_CELLS - 1)/POOL_CELLS;
        for (int task = ith; task < n_part*o.lists; task += nth) {
            const int begin = task%n_part*POOL_CELLS, list = task/n_part;
            kernels.pool(with_weights, 0, 0, list, o.lists, begin, std::min(begin + POOL_CELLS, o.n_kv), &scores[size_t(list)*o.n_kv]);
        }
    }

    // one byte of each line of the listed rows of K and V
    void read_rows(const cache & c, int ith, int nth) const {
        const volatile uint8_t * sides[] = { c.k.get(), c.v.get() };
        for (int head = 0; head < o.kv_heads; ++head) {
            const int32_t * list = &cells[size_t(head_list[head])*o.top_k];
            for (int i = o.top_k*ith/nth; i < o.top_k*(ith + 1)/nth; ++i) {
                for (const volatile uint8_t * side : sides) {
                    const volatile uint8_t * row = side + list[i]*c.row_bytes + head*c.head_bytes;
                    for (size_t byte = 0; byte < c.head_bytes; byte += 64) { (void) row[byte]; }
                    (void) row[c.head_bytes - 1];
                }
            }
        }
    }

    void choose(int ith, int nth) {
        for (int list = ith; list < o.lists; list += nth) {
            kernels.choose(&scores[size_t(list)*o.n_kv], o.n_kv, o.top_k, 1, &cells[size_t(list)*o.top_k]);
        }
    }
};

double median(std::vector<double> x) {
    std::sort(x.begin(), x.end());
    return x[x.size()/2];
}

// ---- command line

// one number, or several between commas
std::vector<int> numbers_of(const char * text, const char * flag, bool several) {
    std::vector<int> found;
    for (const char * at = text; ; ++at) {
        char * end = nullptr;
        const long n = strtol(at, &end, 10);
        if (end == at || (*end && (*end != ',' || !several)) || n < 1 || n > 1 << 24) {
            fprintf(stderr, "bench-kernels: %s %s: expected %s above 0\n", flag, text, several ? "whole numbers" : "a whole number");
            exit(2);
        }
        found.push_back(int(n));
        at = end;
        if (!*at) { return found; }
    }
}

ggml_type type_of(const std::string & name) {
    for (ggml_type type : { GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_F32, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 }) {
        if (name == ggml_type_name(type)) { return type; }
    }
    fprintf(stderr, "bench-kernels: --type %s: expected f16, bf16, f32, q8_0 or q4_0\n", name.c_str());
    exit(2);
}

options parse(int argc, char ** argv) {
    options o;
    const std::map<std::string, int *> numbers = { { "--heads", &o.heads }, { "--kv-heads", &o.kv_heads }, { "--head-size", &o.head_size },
        { "--top-k", &o.top_k }, { "--lists", &o.lists }, { "--threads", &o.threads }, { "--repetitions", &o.repetitions },
        { "--run", &o.run } };
    const std::map<std::string, std::string *> words = { { "--isa", &o.isa }, { "--cache", &o.cache }, { "--only", &o.only } };
    for (int i = 1; i < argc; ++i) {
        const std::string flag = argv[i];
        const bool known = numbers.count(flag) || words.count(flag) || flag == "--type" || flag == "--n-kv";
        if (!known || i + 1 == argc) {
            fprintf(stderr, "bench-kernels: %s: %s; see the head of tools/bench_kernels.cpp\n", argv[i], known ? "value missing" : "unknown flag");
            exit(2);
        }
        const char * value = argv[++i];
        if (flag == "--type")       { o.type = type_of(value); }
        else if (flag == "--n-kv")  { o.lengths = numbers_of(value, "--n-kv", true); }
        else if (words.count(flag)) { *words.at(flag) = value; }
        else                        { *numbers.at(flag) = numbers_of(value, flag.c_str(), false)[0]; }
    }
    const auto one_of = [](const std::string & word, std::initializer_list<const char *> words, const char * flag) {
        if (std::find(words.begin(), words.end(), word) != words.end()) { return; }
        fprintf(stderr, "bench-kernels: %s %s: see the head of tools/bench_kernels.cpp\n", flag, word.c_str());
        exit(2);
    };
    one_of(o.cache, { "cold", "hot" }, "--cache");
    one_of(o.only, { "", "full", "select", "scores", "reuse", "rows", "read" }, "--only");
    const int shortest = *std::min_element(o.lengths.begin(), o.lengths.end());
    if (o.heads % o.kv_heads || (o.lists != 1 && o.lists != o.kv_heads) || o.top_k > shortest || o.top_k % o.run || o.head_size % ggml_blck_size(o.type)) {
        fprintf(stderr, "bench-kernels: heads must be a multiple of kv-heads, lists 1 or kv-heads, top-k whole runs and at most n-kv, head-size whole blocks\n");
        exit(2);
    }
    return o;
}

// ---- one layer

struct arm {
    const char * name;
    double bytes; // that it has to read from memory; 0: it reads what the arm before has written
    std::function<void(int, int)> run;
    std::vector<double> seconds;
};

std::vector<float> random_query(const options & o) {
    std::vector<float> q(size_t(o.heads)*o.head_size);
    std::mt19937 rng(3);
    std::normal_distribution<float> normal;
    for (float & x : q) { x = normal(rng); }
    return q;
}

struct layer {
    const options o;
    const cache c;
    const std::vector<float> q;
    const std::vector<ggml_fp16_t> mask;
    bench b;
    std::vector<arm> arms;

    layer(const options & given, const hylra_kernels & kernels) : o(given), c(make_cache(o)), q(random_query(o)), mask(o.n_kv, ggml_fp16_t(0)),
        b(o, kernels, make_attn(o, c, q.data(), mask.data())) {
        const double dense = 2.0*c.row_bytes*o.n_kv, listed = 2.0*c.head_bytes*o.kv_heads*o.top_k;
        add("full",          dense,   [this](int i, int n) { b.attend(b.dense, i, n); });
        add("full_reduce",   0,       [this](int i, int n) { b.reduce(b.dense, i, n); });
        add("select_attend", dense,   [this](int i, int n) { b.attend(b.with_weights, i, n); });
        add("select_reduce", 0,       [this](int i, int n) { b.reduce(b.with_weights, i, n); });
        add("select_pool",   0,       [this](int i, int n) { b.pool(i, n); });
        add("select_choose", 0,       [this](int i, int n) { b.choose(i, n); });
        add("scores",        dense/2, [this](int i, int n) { b.attend(b.scoring, i, n); });
        add("reuse",         listed,  [this](int i, int n) { b.attend(b.sparse, i, n); });
        add("reuse_reduce",  0,       [this](int i, int n) { b.reduce(b.sparse, i, n); });
        add("rows",          listed,  [this](int i, int n) { b.read_rows(c, i, n); });
    }

    void add(const char * name, double bytes, std::function<void(int, int)> run) {
        if (strncmp(name, o.only.c_str(), o.only.size()) == 0) { arms.push_back({ name, bytes, std::move(run), {} }); }
    }

    void print(double read_bytes_per_s) const {
        printf("{\"isa\": \"%s\", \"type\": \"%s\", \"heads\": %d, \"kv_heads\": %d, \"head_size\": %d, \"n_kv\": %d, \"top_k\": %d, "
               "\"lists\": %d, \"run\": %d, \"threads\": %d, \"repetitions\": %d, \"read_bytes_per_s\": %.4g", b.kernels.isa, ggml_type_name(o.type),
               o.heads, o.kv_heads, o.head_size, o.n_kv, o.top_k, o.lists, o.run, o.threads, o.repetitions, read_bytes_per_s);
        for (const arm & one : arms) {
            const double s = median(one.seconds);
            printf(",\n \"%s_ms\": %.4f", one.name, s*1e3);
            if (one.bytes > 0) {
                printf(", \"%s_bytes\": %.0f, \"%s_of_read\": %.3f", one.name, one.bytes, one.name, one.bytes/s/read_bytes_per_s);
            }
        }
        printf("}");
    }
};

// A layer for each length, which takes its turn at every arm. The first round warms up and is not counted.
class run {
public:
    run(const options & o, const hylra_kernels & kernels) : o(o), t(o.threads), buffer((size_t(256) << 20)/sizeof(uint64_t), 1) {
        for (int n_kv : o.lengths) {
            options one = o;
            one.n_kv = n_kv;
            layers.emplace_back(new layer(one, kernels));
        }
    }

    void all() {
        if (o.cache == "hot") { bandwidth.push_back(read_bytes_per_s(t, buffer)); }
        for (int r = 0; r <= o.repetitions; ++r) {
            if (o.only == "read") { empty_caches(r > 0); }
            for (size_t i = 0, next = 0; i < layers[0]->arms.size(); i = next) {
                for (auto & layer : layers) { next = with_followers(layer->arms, i, r > 0); }
            }
        }
    }

    void print() const {
        for (size_t i = 0; i < layers.size(); ++i) {
            printf(i ? ",\n" : "[");
            layers[i]->print(median(bandwidth));
        }
        printf("]\n");
    }

private:
    // reads as much as no cache holds: no arm finds its data where another has left it
    void empty_caches(bool counts) {
        if (o.cache == "hot") { return; }
        const double read = read_bytes_per_s(t, buffer);
        if (counts) { bandwidth.push_back(read); }
    }

    // arm i and those that read what it has written; the index of the one after them
    size_t with_followers(std::vector<arm> & arms, size_t i, bool counts) {
        empty_caches(counts);
        do {
            const double s = t.run(arms[i].run);
            if (counts) { arms[i].seconds.push_back(s); }
        } while (++i < arms.size() && arms[i].bytes == 0);
        return i;
    }

    const options & o;
    team t;
    std::vector<uint64_t> buffer;
    std::vector<std::unique_ptr<layer>> layers;
    std::vector<double> bandwidth;
};

} // namespace

int main(int argc, char ** argv) {
    const options o = parse(argc, argv);
    const hylra_kernels * kernels = hylra_get_kernels(o.isa.empty() ? nullptr : o.isa.c_str());
    if (!kernels) {
        fprintf(stderr, "bench-kernels: --isa %s: this build or machine does not have it\n", o.isa.c_str());
        return 2;
    }
    ggml_time_init();
    run r(o, *kernels);
    r.all();
    r.print();
}
