// Times one attention layer of the CUDA kernels, as replayed CUDA graphs, beside the copy bandwidth of the card and, if built with
// ggml's CUDA backend (-DHYLRA_BENCH_STOCK), llama.cpp's own flash attention. Prints one JSON array.
//
//   bench-cuda [--heads 32] [--kv-heads 8] [--head-size 128] [--n-kv 8192,65536] [--streams 1] [--top-k 2048] [--type f16] [--repetitions 30]
//              [--mla 1]       heads of 576/512 whose V lies in K (DeepSeek); one KV head
//              [--lists 1]     lists of cells, one per KV head if not said
//              [--cluster 0]   choose and reuse as on cards before Hopper: with one block per row, in two launches
//
// A graph runs so many layers with caches of their own that the second-level cache cannot hold them and that its own start does not count.
// Times are microseconds per layer, medians.
#include "cuda_tools.cuh"

#include "hylra-meters.h"

#include <cuda_fp16.h>

#ifdef HYLRA_BENCH_STOCK
#    include "ggml-alloc.h"
#    include "ggml-backend.h"
#    include "ggml-cuda.h"
#endif

#include <algorithm>
#include <chrono>
#include <cmath>
#include <functional>
#include <string>

namespace {

struct options {
    int heads = 32, kv_heads = 8, head_size = 128, streams = 1, top_k = 2048, repetitions = 30;
    std::vector<int> n_kv = { 8192, 32768, 65536, 131072 };
    ggml_type type = GGML_TYPE_F16;
    int lists = 0; // that a select layer pools into; 0: one per KV head
    bool mla = false, cluster = true;

    int head_size_v() const { return mla ? 512 : head_size; }
};

// A select layer, the same without V (sparse_select), a reuse layer
enum mode { SELECT, SCORING, REUSE };

constexpr size_t CACHED_BYTES = 512u << 20; // many times the second-level cache
constexpr int    MANY_LAYERS  = 16;         // its start is charged to them: of 4 layers a reuse layer took 9.2 us (QwQ-32B at 61440 cells), of 24 8.6

int count_layers(size_t cache_bytes) {
    size_t free_bytes, all_bytes;
    CHECK(cudaMemGetInfo(&free_bytes, &all_bytes));
    const int fitting = int(free_bytes/4/cache_bytes); // llama.cpp's own come on top
    return std::max({ 2, int(CACHED_BYTES/cache_bytes), std::min(MANY_LAYERS, fitting) });
}

double median(std::vector<double> samples) {
    std::sort(samples.begin(), samples.end());
    return samples[samples.size()/2];
}

// Microseconds of one replay of what `enqueue` captures
double replayed_us(const std::function<void(cudaStream_t)> & enqueue, int repetitions) {
    cudaStream_t stream;
    cudaGraph_t graph;
    cudaGraphExec_t replay;
    cudaEvent_t start, stop;
    CHECK(cudaStreamCreate(&stream));
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    enqueue(stream);
    CHECK(cudaGetLastError());
    CHECK(cudaStreamEndCapture(stream, &graph));
    CHECK(cudaGraphInstantiate(&replay, graph, 0));
    CHECK(cudaEventCreate(&start));
    CHECK(cudaEventCreate(&stop));
    std::vector<double> samples;
    for (int i = -3; i < repetitions; ++i) {
        float ms = 0.0f;
        CHECK(cudaEventRecord(start, stream));
        CHECK(cudaGraphLaunch(replay, stream));
        CHECK(cudaEventRecord(stop, stream));
        CHECK(cudaEventSynchronize(stop));
        CHECK(cudaEventElapsedTime(&ms, start, stop));
        if (i >= 0) { samples.push_back(1000.0*ms); }
    }
    cudaGraphExecDestroy(replay);
    cudaGraphDestroy(graph);
    cudaStreamDestroy(stream);
    return median(samples);
}

__global__ void copy_kernel(const uint4 * from, uint4 * to, size_t n) {
    for (size_t i = size_t(blockIdx.x)*blockDim.x + threadIdx.x; i < n; i += size_t(gridDim.x)*blockDim.x) {
        to[i] = from[i];
    }
}

// Bytes read and written per second by a large copy; a kernel, since cudaMemcpyAsync in a graph reached two thirds of it
double copy_bandwidth(int repetitions) {
    const size_t bytes = size_t(2) << 30;
    device_buffer from(bytes), to(bytes);
    const double us = replayed_us([&](cudaStream_t stream) { copy_kernel<<<8192, 512, 0, stream>>>((const uint4 *) from.data, (uint4 *) to.data, bytes/16); }, repetitions);
    return 2.0*bytes/us*1e6;
}

// Values that never repeat, nearly normal, as halves or blocks of Q8_0: repeated rows would score alike, which no text does.
__global__ void fill_kernel(uint16_t * out, size_t n, bool q8_0, unsigned seed) {
    for (size_t i = size_t(blockIdx.x)*blockDim.x + threadIdx.x; i < n; i += size_t(gridDim.x)*blockDim.x) {
        unsigned long long x = (i + 1)*0x9E3779B97F4A7C15ull ^ (seed*0xBF58476D1CE4E5B9ull);
        x = (x ^ x >> 30)*0xBF58476D1CE4E5B9ull;
        x = (x ^ x >> 27)*0x94D049BB133111EBull;
        const int sums[2] = { int(x & 63) + int(x >> 6 & 63) + int(x >> 12 & 63) + int(x >> 18 & 63) - 126, int(x >> 24 & 63) + int(x >> 30 & 63) + int(x >> 36 & 63) + int(x >> 42 & 63) - 126 };
        const bool is_scale = q8_0 && i%17 == 0; // a block: half d, int8 q[32]
        out[i] = is_scale ? __half_as_ushort(__float2half_rn(1.0f/37.0f)) : q8_0 ? uint16_t((sums[0] & 255) | (sums[1] & 255) << 8)
                                                                         : __half_as_ushort(__float2half_rn((sums[0] + float(x >> 48)/65536.0f)/37.0f));
    }
}

// Rows of the type, repeated to fill the buffer
void fill_rows(const device_buffer & buffer, const std::vector<uint8_t> & rows) {
    for (size_t at = 0; at < buffer.bytes; at += rows.size()) {
        CHECK(cudaMemcpy((char *) buffer.data + at, rows.data(), std::min(rows.size(), buffer.bytes - at), cudaMemcpyHostToDevice));
    }
}

// Random values, or rows of a type that are repeated
void fill_cache(const device_buffer & buffer, ggml_type type, const std::vector<uint8_t> & rows, unsigned seed) {
    if (type == GGML_TYPE_F16 || type == GGML_TYPE_Q8_0) {
        fill_kernel<<<4096, 256>>>((uint16_t *) buffer.data, buffer.bytes/2, type == GGML_TYPE_Q8_0, seed);
        CHECK(cudaDeviceSynchronize());
    } else {
        fill_rows(buffer, rows);
    }
}

struct layers {
    options o;
    int n_kv, n_layer, lists;
    std::vector<device_buffer> k, v;
    device_buffer q, mask, cells, out, scores, forced, meters;
    std::vector<int32_t> head_list;

    layers(const options & o, int n_kv) : o(o), n_kv(n_kv), n_layer(count_layers(cache_bytes())), lists(o.lists ? o.lists : o.kv_heads),
        q(random_q()), mask(std::vector<uint16_t>(size_t(n_kv)*o.streams, 0)), cells(random_cells()), out(size_t(o.head_size_v())*o.heads*o.streams*4),
        scores(size_t(n_kv)*lists*o.streams*4), forced(std::vector<int32_t>(size_t(o.streams)*68, -1)), meters(std::vector<uint64_t>(size_t(lists)*o.streams*2)) {
        std::mt19937 rng(7);
        const std::vector<uint8_t> rows = as_type(random_floats(rng, size_t(o.head_size)*16384, 1.0f), o.head_size, o.type);
        for (int i = 0; i < n_layer; ++i) {
            k.emplace_back(k_bytes());
            v.emplace_back(cache_bytes() - k_bytes());
            fill_cache(k.back(), o.type, rows, 2*i);
            fill_cache(v.back(), o.type, rows, 2*i + 1);
        }
        for (int head = 0; head < o.kv_heads; ++head) { head_list.push_back(head*lists/o.kv_heads); }
    }

    size_t row_bytes() const { return ggml_row_size(o.type, o.head_size); }
    size_t k_bytes() const { return row_bytes()*o.kv_heads*n_kv*o.streams; }
    size_t cache_bytes() const { return o.mla ? k_bytes() : 2*k_bytes(); }
    size_t listed_bytes() const { return cache_bytes()/n_kv*std::min(o.top_k, n_kv); }

    std::vector<float> random_q() const {
        std::mt19937 rng(1);
        return random_floats(rng, size_t(o.head_size)*o.heads*o.streams, 1.0f);
    }

    // Ascending lists of distinct cells, one per KV head and stream
    std::vector<int32_t> random_cells() const {
        std::mt19937 rng(2);
        std::vector<int32_t> all;
        for (int row = 0; row < lists*o.streams; ++row) {
            std::vector<int32_t> cells(n_kv);
            for (int i = 0; i < n_kv; ++i) { cells[i] = i; }
            std::shuffle(cells.begin(), cells.end(), rng);
            cells.resize(std::min(o.top_k, n_kv));
            std::sort(cells.begin(), cells.end());
            all.insert(all.end(), cells.begin(), cells.end());
        }
        return all;
    }

    hylra_cuda_job job(int layer, mode m, void * scratch) const {
        hylra_attn a = {};
        a.type_k = a.type_v = o.type;
        a.n_embd_k = o.head_size, a.n_embd_v = o.head_size_v();
        a.n_head = o.heads, a.n_head_kv = o.kv_heads, a.n_kv = n_kv, a.n_tokens = 1, a.n_stream = o.streams;
        a.scale = 1.0f/sqrtf(float(o.head_size));
        a.q = q.data, a.k = k[layer].data, a.v = o.mla ? a.k : v[layer].data, a.mask = mask.data;
        const uint64_t token = 4ull*o.head_size, row = row_bytes();
        const uint64_t q_nb[4] = { 4, token, token, token*o.heads }, kv_nb[4] = { 2, row*o.kv_heads, row, row*o.kv_heads*n_kv };
        const uint64_t mask_nb[4] = { 2, 2ull*n_kv, 2ull*n_kv, 2ull*n_kv };
        memcpy(a.q_nb, q_nb, sizeof(q_nb));
        memcpy(a.k_nb, kv_nb, sizeof(kv_nb));
        memcpy(a.v_nb, kv_nb, sizeof(kv_nb));
        memcpy(a.mask_nb, mask_nb, sizeof(mask_nb));
        if (m == REUSE) {
            a.cells = cells.data, a.n_cells = std::min(o.top_k, n_kv), a.lists = lists;
        }
        return hylra_cuda_job_of(a, head_list.data(), m == REUSE ? 0 : lists, m == SCORING, scratch);
    }

    bool in_cluster() const { return o.cluster && hylra_cuda_cluster_fits(n_kv, 1); }

    void choose(const hylra_cuda_job & job, cudaStream_t stream) const {
        const int n_row = lists*o.streams, n = std::min(o.top_k, n_kv);
        const int32_t * bins = (const int32_t *) (job.scratch + job.layout.bins);
        if (in_cluster()) {
            return hylra_cuda_choose_in_cluster((const float *) scores.data, bins, n_kv, n_row, n, (int32_t *) cells.data, (hylra_meter *) meters.data, stream);
        }
        hylra_cuda_choose((const float *) scores.data, bins, n_kv, n_row, n, 1, (int32_t *) cells.data, (hylra_meter *) meters.data, stream);
    }

    // Per layer; parts: how many of attend, pool with reduce, choose, or of attend and reduce (reuse)
    double run_us(mode m, int parts) const {
        device_buffer scratch(job(0, m, nullptr).layout.size);
        const double us = replayed_us([&](cudaStream_t stream) {
            for (int i = 0; i < n_layer; ++i) {
                const hylra_cuda_job one = job(i, m, scratch.data);
                if (m == REUSE && parts > 1 && o.cluster && hylra_cuda_reuse(one, (float *) out.data, stream)) { continue; }
                hylra_cuda_attend(one, stream);
                if (m == REUSE && parts > 1) { hylra_cuda_reduce(one, (float *) out.data, stream); }
                if (m != REUSE && parts > 1) { hylra_cuda_pool(one, (float *) out.data, (const int32_t *) forced.data, 68, (float *) scores.data, stream); }
                if (parts > 2) { choose(one, stream); }
            }
        }, o.repetitions);
        return us/n_layer;
    }
};

#ifdef HYLRA_BENCH_STOCK
// llama.cpp's node on caches of the same size; the backend captures its graph by itself after two runs.
double stock_us(const options & o, int n_kv, int n_layer) {
    ggml_backend_t backend = ggml_backend_cuda_init(0);
    ggml_context * ctx = ggml_init({ ggml_tensor_overhead()*(5*size_t(n_layer) + 8) + ggml_graph_overhead(), nullptr, true });
    ggml_tensor * q = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, o.head_size, 1, o.heads, o.streams);
    ggml_tensor * mask = ggml_new_tensor_4d(ctx, GGML_TYPE_F16, n_kv, 1, 1, o.streams);
    ggml_cgraph * graph = ggml_new_graph(ctx);
    std::vector<ggml_tensor *> caches;
    for (int i = 0; i < n_layer; ++i) {
        ggml_tensor * kv[2];
        for (ggml_tensor *& t : kv) {
            const bool in_k = o.mla && &t == &kv[1];
            ggml_tensor * cache = in_k ? caches.back() : ggml_new_tensor_4d(ctx, o.type, o.head_size, o.kv_heads, n_kv, o.streams);
            if (!in_k) { caches.push_back(cache); }
            t = in_k ? ggml_view_4d(ctx, kv[0], o.head_size_v(), n_kv, o.kv_heads, o.streams, kv[0]->nb[1], kv[0]->nb[2], kv[0]->nb[3], 0) : ggml_permute(ctx, cache, 0, 2, 1, 3);
        }
        ggml_tensor * out = ggml_flash_attn_ext(ctx, q, kv[0], kv[1], mask, 1.0f/sqrtf(float(o.head_size)), 0.0f, 0.0f);
        ggml_prec_set_acc(out, GGML_PREC_F32);
        ggml_build_forward_expand(graph, out);
    }
    ggml_backend_buffer_t buffer = ggml_backend_alloc_ctx_tensors(ctx, backend);
    std::mt19937 rng(7);
    const std::vector<uint8_t> rows = as_type(random_floats(rng, size_t(o.head_size)*16384, 1.0f), o.head_size, o.type);
    for (ggml_tensor * cache : caches) {
        for (size_t at = 0; at < ggml_nbytes(cache); at += rows.size()) {
            ggml_backend_tensor_set(cache, rows.data(), at, std::min(rows.size(), ggml_nbytes(cache) - at));
        }
    }
    const std::vector<float> q_values = random_floats(rng, ggml_nelements(q), 1.0f);
    const std::vector<uint16_t> seen(ggml_nelements(mask), 0);
    ggml_backend_tensor_set(q, q_values.data(), 0, ggml_nbytes(q));
    ggml_backend_tensor_set(mask, seen.data(), 0, ggml_nbytes(mask));
    std::vector<double> samples;
    for (int i = -5; i < o.repetitions; ++i) {
        const auto start = std::chrono::steady_clock::now();
        ggml_backend_graph_compute(backend, graph); // waits
        const double us = std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start).count();
        if (i >= 0) { samples.push_back(us); }
    }
    ggml_backend_buffer_free(buffer);
    ggml_free(ctx);
    ggml_backend_free(backend);
    return median(samples)/n_layer;
}
#endif

void print_row(const options & o, int n_kv, double copy_bytes_per_s, bool first) {
    double stock = 0.0;
    const layers all(o, n_kv);
    const double attend = all.run_us(SELECT, 1), pooled = all.run_us(SELECT, 2), select = all.run_us(SELECT, 3);
    const double scoring = all.run_us(SCORING, 1), scored = all.run_us(SCORING, 3);
    const double gather = all.run_us(REUSE, 1), reuse = all.run_us(REUSE, 2);
#ifdef HYLRA_BENCH_STOCK
    stock = stock_us(o, n_kv, all.n_layer);
#endif
    cudaDeviceProp device;
    CHECK(cudaGetDeviceProperties(&device, 0));
    const char * commit = getenv("HYLRA_COMMIT");
    printf("%s{\"build_commit\": \"%s\", \"gpu\": \"%s\", \"type\": \"%s\", \"heads\": %d, \"kv_heads\": %d, \"head_size\": %d, \"streams\": %d, \"n_kv\": %d, \"n_layer\": %d, \"top_k\": %d, "
           "\"copy_gb_per_s\": %.0f, \"stock_us\": %.2f, \"select_us\": %.2f, \"select_attend_us\": %.2f, \"select_pool_us\": %.2f, "
           "\"select_choose_us\": %.2f, \"cluster\": %s, \"reuse_us\": %.2f, \"reuse_attend_us\": %.2f, \"sparse_select_us\": %.2f, \"sparse_select_scoring_us\": %.2f, "
           "\"select_share_of_copy\": %.3f, \"scoring_share_of_copy\": %.3f, \"reuse_share_of_copy\": %.3f}",
           first ? "[" : ",\n ", commit ? commit : "unknown", device.name, ggml_type_name(o.type), o.heads, o.kv_heads, o.head_size, o.streams, n_kv, all.n_layer, o.top_k, copy_bytes_per_s/1e9,
           stock, select, attend, pooled - attend, select - pooled, all.in_cluster() ? "true" : "false", reuse, gather,
           scored + reuse, scoring, all.cache_bytes()/attend*1e6/copy_bytes_per_s, all.k_bytes()/scoring*1e6/copy_bytes_per_s, all.listed_bytes()/reuse*1e6/copy_bytes_per_s);
    fflush(stdout);
}

std::vector<int> integers(const char * text) {
    std::vector<int> out;
    for (const char * at = text; *at; at += *at == ',') {
        char * end;
        out.push_back(int(strtol(at, &end, 10)));
        if (end == at) { fprintf(stderr, "%s: expected integers and commas\n", text); exit(2); }
        at = end;
    }
    return out;
}

ggml_type type_of(const std::string & name) {
    for (int i = 0; i < GGML_TYPE_COUNT; ++i) {
        const char * known = ggml_type_name(ggml_type(i));
        if (known && name == known) { return ggml_type(i); }
    }
    fprintf(stderr, "%s: no such type\n", name.c_str());
    exit(2);
}

options parse(int argc, char ** argv) {
    options o;
    for (int i = 1; i + 1 < argc; i += 2) {
        const std::string name = argv[i];
        const char * value = argv[i + 1];
        if      (name == "--heads")       { o.heads       = atoi(value); }
        else if (name == "--kv-heads")    { o.kv_heads    = atoi(value); }
        else if (name == "--head-size")   { o.head_size   = atoi(value); }
        else if (name == "--streams")     { o.streams     = atoi(value); }
        else if (name == "--top-k")       { o.top_k       = atoi(value); }
        else if (name == "--repetitions") { o.repetitions = atoi(value); }
        else if (name == "--mla")         { o.mla         = atoi(value); }
        else if (name == "--lists")       { o.lists       = atoi(value); }
        else if (name == "--cluster")     { o.cluster     = atoi(value); }
        else if (name == "--n-kv")        { o.n_kv        = integers(value); }
        else if (name == "--type")        { o.type        = type_of(value); }
        else { fprintf(stderr, "%s: unknown option\n", argv[i]); exit(2); }
    }
    if (o.mla) { o.head_size = 576, o.kv_heads = 1; }
    return o;
}

} // namespace

int main(int argc, char ** argv) {
    const options o = parse(argc, argv);
    const double bandwidth = copy_bandwidth(o.repetitions);
    for (size_t i = 0; i < o.n_kv.size(); ++i) {
        print_row(o, o.n_kv[i], bandwidth, i == 0);
    }
    printf("]\n");
    return 0;
}
