// Chooses cells of one row after another: `cluster BLOCK.so...` reads n_kv, top_k and n_kv scores per row from stdin as text, writes the list and
// its mass, beside what the serial code chooses.
#include "hylra-attn.h"
#include "hylra-meters.h"
#include "hylra-radix.h"

#include <dlfcn.h>
#include <pthread.h>

#include <cstdio>
#include <vector>

typedef void (*run_t)(int, int, const float *, const int32_t *, int, int, int32_t *, hylra_meter *);

struct task { run_t run; int rank, thread, n_kv, top_k; const float * scores; const int32_t * bins; int32_t * cells; hylra_meter * meter; };

static void * start(void * p) {
    const task & t = *(const task *) p;
    t.run(t.rank, t.thread, t.scores, t.bins, t.n_kv, t.top_k, t.cells, t.meter);
    return nullptr;
}

int main(int argc, char ** argv) {
    std::vector<void *> blocks;
    std::vector<const char *> bases;
    for (int i = 1; i < argc; ++i) {
        blocks.push_back(dlopen(argv[i], RTLD_NOW | RTLD_LOCAL));
        if (!blocks.back()) { fprintf(stderr, "%s\n", dlerror()); return 2; }
        bases.push_back(((const char * (*)()) dlsym(blocks.back(), "base"))());
    }
    const int n_thread = ((int (*)()) dlsym(blocks[0], "threads"))();
    pthread_barrier_t cluster;
    pthread_barrier_init(&cluster, nullptr, n_thread*int(blocks.size()));
    for (void * block : blocks) { ((void (*)(pthread_barrier_t *, const char * const *)) dlsym(block, "begin"))(&cluster, bases.data()); }
    pthread_attr_t small;
    pthread_attr_init(&small);
    pthread_attr_setstacksize(&small, 128 << 10);
    int n_kv, top_k;
    while (scanf("%d %d", &n_kv, &top_k) == 2) {
        alignas(16) static float scores[1 << 18];
        alignas(16) static int32_t bins[HYLRA_CUDA_BINS];
        std::fill(bins, bins + HYLRA_CUDA_BINS, 0);
        for (int i = 0; i < n_kv; ++i) {
            if (scanf("%a", &scores[i]) != 1) { return 2; }
            if (scores[i] >= 0.0f) { bins[hylra_radix_digit(hylra_radix_key(scores[i], 0), 0)] += 1; } // as pool does
        }
        std::vector<int32_t> cells(top_k, -7), expected(top_k);
        hylra_meter meter = {};
        std::vector<task> tasks;
        for (size_t rank = 0; rank < blocks.size(); ++rank) {
            for (int thread = 0; thread < n_thread; ++thread) {
                tasks.push_back({ (run_t) dlsym(blocks[rank], "run"), int(rank), thread, n_kv, top_k, scores, bins, cells.data(), &meter });
            }
        }
        std::vector<pthread_t> threads(tasks.size());
        for (size_t i = 0; i < tasks.size(); ++i) {
            if (pthread_create(&threads[i], &small, start, &tasks[i]) != 0) { fprintf(stderr, "no more threads\n"); return 3; }
        }
        for (pthread_t thread : threads) { pthread_join(thread, nullptr); }
        double mass = 0.0;
        const int n = hylra_choose_radix(scores, n_kv, top_k, 1, expected.data());
        for (int i = 0; i < n; ++i) { mass += scores[expected[i]] >= HYLRA_SCORE_FORCED ? scores[expected[i]] - HYLRA_SCORE_FORCED : scores[expected[i]]; }
        printf("%s %d %.9g %.9g %d\n", cells == expected ? "same" : "other", n, meter.mass, mass, int(meter.n));
        fflush(stdout);
    }
    return 0;
}
