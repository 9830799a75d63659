// How far translated addresses reach: nanoseconds per load where each load waits for the one before, of lines that lie at some distance. Prints JSON: a
// row per distance and number of lines.
//
//   page-reach [REPETITIONS]
//
// The memory is advised to be of huge pages, as a KV cache under a policy is. Where they are huge for the processor too, as many lines as the
// caches hold take the same time at 64 bytes' distance and at 4096; where a hypervisor maps small ones, the latter take longer as soon as they are more
// than the processor keeps translations (1024 to 3072, by model), though the operating system counts the pages as huge.
#include "hylra-memory.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <new>
#include <random>
#include <vector>

namespace {

constexpr size_t LINE = 64, PAGE = 4096, HUGE_PAGE = size_t(2) << 20, SIZE_BYTES = size_t(64) << 20;
constexpr int    N_LOADS = 200000;

struct alignas(LINE) line { line * next; };

// n lines, one in each step of so many bytes, in a ring of random order
line * ring(char * memory, size_t step_bytes, int n, std::mt19937 & rng) {
    std::vector<line *> lines(n);
    for (int i = 0; i < n; ++i) { // not all at the start of their step: those would share few sets of the cache
        const size_t place = step_bytes > LINE ? rng()%(step_bytes/LINE)*LINE : 0;
        lines[i] = reinterpret_cast<line *>(memory + i*step_bytes + place);
    }
    std::shuffle(lines.begin(), lines.end(), rng);
    for (int i = 0; i < n; ++i) { lines[i]->next = lines[(i + 1)%n]; }
    return lines[0];
}

line * follow(line * at, int n_loads) {
    for (int i = 0; i < n_loads; ++i) { at = const_cast<line * volatile &>(at->next); }
    return at;
}

double ns_per_load(char * memory, size_t step_bytes, int n, std::mt19937 & rng) {
    line * at = follow(ring(memory, step_bytes, n, rng), 4*n);
    const auto start = std::chrono::steady_clock::now();
    follow(at, N_LOADS);
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count()*1e9/N_LOADS;
}

} // namespace

int main(int argc, char ** argv) {
    const int repetitions = argc > 1 ? atoi(argv[1]) : 21;
    if (repetitions < 1 || argc > 2) {
        fprintf(stderr, "page-reach: expected a number of repetitions above 0, or nothing\n");
        return 2;
    }
    std::mt19937 rng(1);
    const std::unique_ptr<char, void (*)(char *)> memory(new (std::align_val_t(HUGE_PAGE)) char[SIZE_BYTES],
        [](char * p) { operator delete[](p, std::align_val_t(HUGE_PAGE)); });
    hylra_advise_huge_pages(memory.get(), SIZE_BYTES);
    std::fill_n(memory.get(), SIZE_BYTES, 1);
    const char * comma = "[";
    for (size_t step_bytes : { LINE, PAGE }) {
        for (int n : { 512, 1024, 2048, 4096, 8192, 16384 }) {
            std::vector<double> ns(repetitions);
            for (double & one : ns) { one = ns_per_load(memory.get(), step_bytes, n, rng); }
            std::sort(ns.begin(), ns.end());
            printf("%s{\"step_bytes\": %zu, \"lines\": %d, \"ns\": %.1f}", comma, step_bytes, n, ns[repetitions/2]);
            comma = ",\n ";
        }
    }
    printf("]\n");
}
