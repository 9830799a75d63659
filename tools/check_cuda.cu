// CUDA kernels against the scalar twins, over a matrix of types, shapes, masks and lists; random inputs, poisoned outputs.
// One line per case; exit code 1 if one is off.
//
//   check-cuda [all|small] [SEED|random] [TYPE]      small: the part that compute-sanitizer has time for; TYPE: cases of that KV type alone, e.g. f16
#include "cuda_tools.cuh"

#include "hylra-attn.h"
#include "hylra-cpu.h"
#include "hylra-radix.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>

namespace {

struct shape {
    const char * name;
    ggml_type type;
    int embd_k, embd_v, group, heads_kv, n_kv, tokens, streams;
    float softcap, max_bias;
    bool  sinks, shared_list, v_in_k; // v_in_k: V is the head of each K row (MLA)
    int   top_k, block_size;
    float visible;
    float q_scale = 2.0f; // 0: all scores are equal; NaN: no score is a number, as where a model overflows
};

shape base(const char * name) { return { name, GGML_TYPE_F16, 128, 128, 4, 2, 1536, 1, 1, 0, 0, false, false, false, 200, 1, 0.8f }; }

template <typename F> shape with(const char * name, F change) {
    shape s = base(name);
    change(s);
    return s;
}

std::vector<shape> shapes() {
    std::vector<shape> all;
    const ggml_type types[] = { GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_F32, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 };
    for (ggml_type type : types) {
        for (int size : { 64, 128, 256 }) {
            for (int group : { 1, 5, 16 }) {
                all.push_back(with("type, head size, group", [&](shape & s) { s.type = type; s.embd_k = s.embd_v = size; s.group = group; }));
            }
        }
        all.push_back(with("four tokens", [&](shape & s) { s.type = type; s.tokens = 4; }));
        all.push_back(with("MLA", [&](shape & s) { s.type = type; s.embd_k = 576; s.embd_v = 512; s.group = 128; s.heads_kv = 1; s.n_kv = 512; s.v_in_k = true; }));
    }
    const auto mla = [](shape & s) { s.embd_k = 576; s.embd_v = 512; s.heads_kv = 1; s.n_kv = 512; s.v_in_k = true; };
    all.push_back(with("MLA, 20 heads, sinks", [&](shape & s) { mla(s); s.group = 20; s.sinks = true; }));
    all.push_back(with("MLA, tokens, streams", [&](shape & s) { mla(s); s.group = 12; s.tokens = 3; s.streams = 2; s.n_kv = 700; }));
    all.push_back(with("MLA, V apart", [&](shape & s) { mla(s); s.group = 64; s.v_in_k = false; }));
    all.push_back(with("MLA, softcap, q8_0", [&](shape & s) { mla(s); s.group = 40; s.softcap = 20; s.type = GGML_TYPE_Q8_0; s.tokens = 2; }));
    all.push_back(with("MLA, few visible cells", [&](shape & s) { mla(s); s.group = 16; s.visible = 0.01f; s.n_kv = 9000; }));
    all.push_back(with("MLA, long", [&](shape & s) { mla(s); s.group = 128; s.visible = 1.0f; s.n_kv = 4100; s.top_k = 2048; }));
    for (int group : { 2, 3, 6, 7, 8, 9, 12 }) {
        all.push_back(with("group", [&](shape & s) { s.group = group; }));
    }
    for (int tokens : { 2, 3, 8, 16, 32, 64 }) {
        all.push_back(with("tokens", [&](shape & s) { s.tokens = tokens; s.group = 5; s.n_kv = 700; }));
    }
    all.push_back(with("head size 80", [](shape & s) { s.embd_k = s.embd_v = 80; }));
    all.push_back(with("head size 96", [](shape & s) { s.embd_k = s.embd_v = 96; s.group = 3; }));
    all.push_back(with("head size 192/128", [](shape & s) { s.embd_k = 192; }));
    all.push_back(with("head size 96, q8_0", [](shape & s) { s.embd_k = s.embd_v = 96; s.type = GGML_TYPE_Q8_0; }));
    all.push_back(with("softcap", [](shape & s) { s.softcap = 30; }));
    all.push_back(with("ALiBi, 12 heads", [](shape & s) { s.max_bias = 8; s.group = 6; }));
    all.push_back(with("sinks", [](shape & s) { s.sinks = true; }));
    all.push_back(with("sinks, softcap, tokens", [](shape & s) { s.sinks = true; s.softcap = 20; s.tokens = 5; s.group = 7; }));
    all.push_back(with("three streams", [](shape & s) { s.streams = 3; s.tokens = 2; }));
    all.push_back(with("eight streams", [](shape & s) { s.streams = 8; s.n_kv = 600; }));
    all.push_back(with("one list for all heads", [](shape & s) { s.shared_list = true; s.heads_kv = 4; s.tokens = 3; }));
    all.push_back(with("few visible cells", [](shape & s) { s.visible = 0.02f; s.tokens = 2; }));
    all.push_back(with("no visible cell", [](shape & s) { s.visible = 0.0f; }));
    all.push_back(with("all visible, long", [](shape & s) { s.visible = 1.0f; s.n_kv = 20000; s.top_k = 2048; s.heads_kv = 1; }));
    all.push_back(with("equal scores", [](shape & s) { s.q_scale = 0.0f; s.n_kv = 9000; s.top_k = 1000; }));
    all.push_back(with("scores that are close", [](shape & s) { s.q_scale = 1e-3f; s.n_kv = 9000; s.top_k = 1000; }));
    all.push_back(with("NaN scores", [](shape & s) { s.q_scale = NAN; s.n_kv = 3000; }));
    all.push_back(with("short", [](shape & s) { s.n_kv = 8; s.top_k = 5; }));
    all.push_back(with("top_k of all", [](shape & s) { s.top_k = s.n_kv; }));
    for (int block : { 16, 64, 128 }) {
        all.push_back(with("blocks", [&](shape & s) { s.block_size = block; s.n_kv = 5000; s.top_k = 1000; }));
    }
    return all;
}

// A problem in host memory and on the device
struct problem {
    shape s;
    std::vector<float> q, sinks;
    std::vector<uint8_t> k, v;
    std::vector<ggml_fp16_t> mask;
    std::vector<int32_t> forced, head_list;
    hylra_attn host = {};

    problem(const shape & s, std::mt19937 & rng) : s(s) {
        const int heads = s.group*s.heads_kv;
        q = random_floats(rng, size_t(s.embd_k)*s.tokens*heads*s.streams, s.q_scale);
        k = as_type(random_floats(rng, size_t(s.embd_k)*s.heads_kv*s.n_kv*s.streams, 1.0f), s.embd_k, s.type);
        v = as_type(random_floats(rng, size_t(s.embd_v)*s.heads_kv*s.n_kv*s.streams, 1.0f), s.embd_v, s.type);
        sinks = random_floats(rng, s.sinks ? heads : 0, 1.0f);
        std::uniform_real_distribution<float> uniform(0.0f, 1.0f);
        for (int row = 0; row < s.tokens*s.streams; ++row) {
            for (int cell = 0; cell < s.n_kv; ++cell) {
                // the first 200 cells hidden from all: tiles that are skipped
                const bool seen = (cell >= std::min(200, s.n_kv/4) || s.visible == 1.0f) && uniform(rng) < s.visible;
                mask.push_back(ggml_fp32_to_fp16(!seen ? -INFINITY : s.max_bias > 0 ? -float(s.n_kv - cell) : 0.0f));
            }
            for (int i = 0; i < 12; ++i) {
                forced.push_back(i == 3 ? -1 : int(rng()%s.n_kv));
            }
            forced.push_back(forced.back()); // twice
        }
        for (int head = 0; head < s.heads_kv; ++head) {
            head_list.push_back(s.shared_list ? 0 : (head + 1)%s.heads_kv);
        }
        fill(host);
    }

    int lists() const { return s.shared_list ? 1 : s.heads_kv; }
    int n_forced() const { return 13; }

    void fill(hylra_attn & a) const {
        a.layer = 0;
        a.type_k = a.type_v = s.type;
        a.n_embd_k = s.embd_k, a.n_embd_v = s.embd_v, a.n_head = s.group*s.heads_kv, a.n_head_kv = s.heads_kv;
        a.n_kv = s.n_kv, a.n_tokens = s.tokens, a.n_stream = s.streams;
        a.scale = 1.0f/sqrtf(float(s.embd_k)), a.max_bias = s.max_bias, a.softcap = s.softcap;
        const uint64_t token = 4*s.embd_k, row_k = ggml_row_size(s.type, s.embd_k), row_v = s.v_in_k ? row_k : ggml_row_size(s.type, s.embd_v);
        const uint64_t q_nb[4] = { 4, token, token*s.tokens, token*s.tokens*a.n_head };
        const uint64_t mask_nb[4] = { 2, 2ull*s.n_kv, 2ull*s.n_kv*s.tokens, 2ull*s.n_kv*s.tokens };
        memcpy(a.q_nb, q_nb, sizeof(q_nb));
        memcpy(a.mask_nb, mask_nb, sizeof(mask_nb));
        for (int i = 0; i < 2; ++i) {
            const uint64_t row = i ? row_v : row_k, nb[4] = { 0, row*s.heads_kv, row, row*s.heads_kv*s.n_kv };
            memcpy(i ? a.v_nb : a.k_nb, nb, sizeof(nb));
        }
        a.q = q.data(), a.k = k.data(), a.v = s.v_in_k ? k.data() : v.data(), a.mask = mask.data();
        a.sinks = s.sinks ? sinks.data() : nullptr;
    }
};

struct on_device {
    device_buffer q, k, v, mask, sinks;
    hylra_attn attn;

    explicit on_device(const problem & p) : q(p.q), k(p.k), v(p.v), mask(p.mask), sinks(p.sinks), attn(p.host) {
        attn.q = q.data, attn.k = k.data, attn.v = p.s.v_in_k ? k.data : v.data, attn.mask = mask.data;
        attn.sinks = p.s.sinks ? sinks.data : nullptr;
    }
};

// ---- scalar twins

std::vector<float> reference(const hylra_attn & a, const int32_t * head_list, std::vector<float> * scores, int lists) {
    const hylra_kernels & ref = hylra_kernels_ref;
    hylra_job job = hylra_job_of(a, head_list);
    std::vector<float> scratch(hylra_attend_floats(a, a.cells ? a.n_cells : a.n_kv, scores != nullptr), NAN);
    hylra_place(job, scratch.data(), scores != nullptr);
    for (int task = 0; task < hylra_n_task(job); ++task) { ref.attend(job, task); }
    std::vector<float> out(size_t(a.n_embd_v)*a.n_head*a.n_tokens*a.n_stream);
    for (int row = 0; row < a.n_head*a.n_tokens*a.n_stream; ++row) {
        ref.reduce(job, row/a.n_head/a.n_tokens, row/a.n_head%a.n_tokens, row%a.n_head, out.data() + size_t(row)*a.n_embd_v);
    }
    for (int row = 0; scores && row < lists*a.n_tokens*a.n_stream; ++row) {
        ref.pool(job, row/lists/a.n_tokens, row/lists%a.n_tokens, row%lists, lists, 0, a.n_kv, scores->data() + size_t(row)*a.n_kv);
    }
    return out;
}

double error_of(const std::vector<float> & found, const std::vector<float> & expected) {
    double diff = 0.0, norm = 0.0;
    for (size_t i = 0; i < expected.size(); ++i) {
        diff += std::pow(double(found[i]) - expected[i], 2);
        norm += std::pow(double(expected[i]), 2);
    }
    return norm > 0.0 ? std::sqrt(diff/norm) : std::sqrt(diff);
}

// ---- one case

double worst_of(double a, double b) { return std::isnan(a) || b <= a ? a : b; } // a NaN stays

struct verdict { double dense, scores, reuse, mass; bool lists; double scoring; int paths; }; // paths: ways to the lists that there were

// The list that the serial code chooses from the same scores
bool same_lists(const problem & p, const std::vector<float> & scores, const std::vector<int32_t> & cells, int top_k, double & mass) {
    std::vector<int32_t> expected(top_k);
    bool same = true;
    for (size_t row = 0; row < cells.size()/top_k; ++row) {
        const float * s = scores.data() + row*p.s.n_kv;
        const int n = p.s.block_size > 1 ? hylra_choose_radix(s, p.s.n_kv, top_k, p.s.block_size, expected.data())
                                         : hylra_kernels_ref.choose(s, p.s.n_kv, top_k, 1, expected.data());
        same = same && std::equal(expected.begin(), expected.end(), cells.begin() + row*top_k);
        for (int i = 0; i < n; ++i) {
            mass += s[expected[i]] >= HYLRA_SCORE_FORCED ? s[expected[i]] - HYLRA_SCORE_FORCED : s[expected[i]];
        }
    }
    return same;
}

struct found_select { std::vector<float> out, scores; std::vector<int32_t> cells; std::vector<hylra_meter> meters; };

// Worst error of out and of a score, in parts of the row's largest; whether the lists are those of the scores; by how much the metered mass is off
struct select_errors { double out, scores, mass; bool lists; };

// The ways to the lists
enum select_path { BY_BLOCK, BY_CLUSTER };

// What a path leaves in poisoned buffers; nothing if it is not for these shapes
std::optional<found_select> select_by(select_path path, const problem & p, hylra_cuda_job job) {
    if (path == BY_CLUSTER && !hylra_cuda_cluster_fits(p.s.n_kv, p.s.block_size)) { return {}; }
    const int n_row = p.lists()*p.s.tokens*p.s.streams, top_k = p.s.top_k;
    const std::vector<hylra_meter> no_meters(n_row);
    device_buffer scratch(job.layout.size), out(size_t(p.s.embd_v)*job.attn.n_head*p.s.tokens*p.s.streams*4), forced(p.forced);
    device_buffer scores(size_t(p.s.n_kv)*n_row*4), cells(size_t(top_k)*n_row*4), meters(no_meters);
    int32_t * list = (int32_t *) cells.data;
    hylra_meter * meter = (hylra_meter *) meters.data;
    job.scratch = (char *) scratch.data;
    hylra_cuda_attend(job, 0);
    const int32_t * bins = (const int32_t *) (job.scratch + job.layout.bins);
    hylra_cuda_pool(job, (float *) out.data, (const int32_t *) forced.data, p.n_forced(), (float *) scores.data, 0);
    if (path == BY_CLUSTER) {
        hylra_cuda_choose_in_cluster((const float *) scores.data, bins, p.s.n_kv, n_row, top_k, list, meter, 0);
    } else {
        hylra_cuda_choose((const float *) scores.data, bins, p.s.n_kv, n_row, top_k, p.s.block_size, list, meter, 0);
    }
    CHECK(cudaDeviceSynchronize());
    return found_select{ job.plan.scores_only ? std::vector<float>() : out.read<float>(), scores.read<float>(), cells.read<int32_t>(), meters.read<hylra_meter>() };
}

select_errors errors_of(const problem & p, const found_select & found, const std::vector<float> & expected, const std::vector<float> & expected_scores) {
    select_errors e = {};
    double mass = 0.0, measured = 0.0;
    e.lists = same_lists(p, found.scores, found.cells, p.s.top_k, mass);
    for (const hylra_meter & meter : found.meters) { measured += meter.n == 1 ? meter.mass : NAN; }
    e.mass = std::fabs(measured - mass)/std::max(mass, 1e-9);
    for (size_t i = 0; i < found.scores.size(); ++i) {
        e.scores = worst_of(e.scores, std::fabs(double(found.scores[i]) - expected_scores[i]));
    }
    e.out = found.out.empty() ? 0.0 : error_of(found.out, expected);
    return e;
}

// scores_only: V is out of reach, so that a kernel that reads it faults
verdict run_select(const problem & p, const on_device & d, bool scores_only, std::vector<int32_t> & cells) {
    const int lists = p.lists(), n_row = lists*p.s.tokens*p.s.streams;
    hylra_attn attn = d.attn;
    attn.v = scores_only ? nullptr : attn.v;
    const hylra_cuda_job job = hylra_cuda_job_of(attn, p.head_list.data(), lists, scores_only, nullptr);
    std::vector<float> expected_scores(size_t(p.s.n_kv)*n_row);
    const std::vector<float> expected = reference(p.host, nullptr, &expected_scores, lists);
    for (int row = 0; row < n_row; ++row) {
        hylra_force(expected_scores.data() + size_t(row)*p.s.n_kv, p.forced.data() + size_t(row/lists)*p.n_forced(), p.n_forced(), 0, p.s.n_kv);
    }
    verdict v = { 0.0, 0.0, 0.0, 0.0, true, 0.0, 0 };
    for (select_path path : { BY_BLOCK, BY_CLUSTER }) {
        if (const auto found = select_by(path, p, job)) {
            const select_errors e = errors_of(p, *found, expected, expected_scores);
            v.dense = worst_of(v.dense, e.out), v.scores = worst_of(v.scores, e.scores), v.mass = worst_of(v.mass, e.mass);
            v.lists = v.lists && e.lists;
            v.paths += 1;
            cells = found->cells;
        }
    }
    return v;
}

double run_reuse(const problem & p, on_device & d, const std::vector<int32_t> & cells) {
    device_buffer list(cells);
    hylra_attn host = p.host;
    host.cells = cells.data(), host.n_cells = p.s.top_k, host.lists = p.lists();
    d.attn.cells = list.data, d.attn.n_cells = p.s.top_k, d.attn.lists = p.lists();
    hylra_cuda_job job = hylra_cuda_job_of(d.attn, p.head_list.data(), 0, false, nullptr);
    device_buffer scratch(job.layout.size), out(size_t(p.s.embd_v)*d.attn.n_head*p.s.tokens*p.s.streams*4);
    job.scratch = (char *) scratch.data;
    hylra_cuda_attend(job, 0);
    hylra_cuda_reduce(job, (float *) out.data, 0);
    CHECK(cudaDeviceSynchronize());
    const std::vector<float> expected = reference(host, p.head_list.data(), nullptr, 0);
    const double two_launches = error_of(out.read<float>(), expected);
    out.poison();
    if (!hylra_cuda_reuse(job, (float *) out.data, 0)) {
        return two_launches;
    }
    CHECK(cudaDeviceSynchronize());
    return worst_of(two_launches, error_of(out.read<float>(), expected));
}

bool report(const problem & p, const verdict & v) {
    // halves for q and weights: 1e-3 and less; a NaN never passes but as the output for queries that are NaN
    const bool outputs = std::isnan(p.s.q_scale) || (v.dense < 2e-3 && v.reuse < 2e-3);
    const bool ok = outputs && v.scores < 2e-3 && v.mass < 1e-4 && v.lists && v.scoring < 2e-3;
    printf("%s  %-24s %-5s %3d/%3d heads %3d/%d cells %5d tokens %2d streams %d  dense %.1e scores %.1e reuse %.1e mass %.1e lists %s by %d without V %.1e\n", ok ? "ok " : "BAD",
           p.s.name, ggml_type_name(p.s.type), p.s.embd_k, p.s.embd_v, p.s.group*p.s.heads_kv, p.s.heads_kv, p.s.n_kv, p.s.tokens, p.s.streams,
           v.dense, v.scores, v.reuse, v.mass, v.lists ? "same" : "DIFFER", v.paths, v.scoring);
    return ok;
}

} // namespace

int main(int argc, char ** argv) {
    const bool small = argc > 1 && std::string(argv[1]) == "small";
    const std::string seed = argc > 2 ? argv[2] : "random", type = argc > 3 ? argv[3] : "";
    std::mt19937 rng(seed == "random" ? std::random_device{}() : std::stoul(seed));
    int n = 0, n_bad = 0;
    for (const shape & s : shapes()) {
        if (small && size_t(s.n_kv)*s.group*s.heads_kv*s.tokens*s.streams > 60000) {
            continue;
        }
        if (!type.empty() && type != ggml_type_name(s.type)) {
            continue;
        }
        const problem p(s, rng);
        on_device d(p);
        std::vector<int32_t> cells;
        const verdict scoring = run_select(p, d, true, cells);
        verdict v = run_select(p, d, false, cells);
        v.scoring = scoring.scores;
        v.lists   = v.lists && scoring.lists;
        v.mass    = worst_of(v.mass, scoring.mass);
        v.reuse = run_reuse(p, d, cells);
        n_bad += !report(p, v);
        n += 1;
    }
    printf("%d of %d cases ok\n", n - n_bad, n);
    return n_bad > 0 || n == 0; // no case: no such type
}
