// The threads of bench-kernels, which wait by spinning as ggml's pool does, and the read bandwidth that they reach. Included by bench_kernels.cpp only.
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

namespace {

class team {
public:
    explicit team(int n) : n(n) {
        for (int i = 1; i < n; ++i) {
            threads.emplace_back([this, i] { serve(i); });
        }
    }

    ~team() {
        work = nullptr;
        round.fetch_add(1);
        for (auto & t : threads) { t.join(); }
    }

    // Seconds of fn(ith, nth) on all threads.
    double run(const std::function<void(int, int)> & fn) {
        work = &fn;
        done.store(0);
        const auto start = std::chrono::steady_clock::now();
        round.fetch_add(1);
        fn(0, n);
        while (done.load() != n - 1) {}
        return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    }

private:
    void serve(int i) {
        for (int seen = 0; ; ++seen) {
            while (round.load() == seen) {}
            if (!work) { return; }
            (*work)(i, n);
            done.fetch_add(1);
        }
    }

    const int n;
    const std::function<void(int, int)> * work = nullptr;
    std::atomic<int> round{0}, done{0};
    std::vector<std::thread> threads;
};

// Bytes per second that all threads read together, from a buffer that no cache holds.
double read_bytes_per_s(team & t, const std::vector<uint64_t> & buffer) {
    std::atomic<uint64_t> sink{0};
    const double s = t.run([&](int ith, int nth) {
        const size_t part = buffer.size()/nth, begin = part*ith;
        uint64_t sum[8] = {};
        for (size_t i = begin; i + 8 <= begin + part; i += 8) {
            for (int j = 0; j < 8; ++j) { sum[j] += buffer[i + j]; }
        }
        for (uint64_t x : sum) { sink += x; }
    });
    return double(buffer.size()*sizeof(uint64_t))/s;
}

} // namespace
