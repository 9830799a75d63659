// What the two CUDA tools share: checked calls, device buffers, random KV rows of any type.
#pragma once

#include "hylra-cuda.cuh"

#include "ggml.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#define CHECK(call) check_call(call, #call, __LINE__)

inline void check_call(cudaError_t code, const char * what, int line) {
    if (code != cudaSuccess) {
        fprintf(stderr, "line %d: %s: %s\n", line, what, cudaGetErrorString(code));
        exit(2);
    }
}

struct device_buffer {
    void * data = nullptr;
    size_t bytes;

    // Filled with bits that are a NaN as float and as half: what a kernel leaves unwritten shows.
    explicit device_buffer(size_t bytes) : bytes(bytes) {
        CHECK(cudaMalloc(&data, bytes ? bytes : 1));
        poison();
    }
    template <typename T> explicit device_buffer(const std::vector<T> & host) : device_buffer(host.size()*sizeof(T)) {
        CHECK(cudaMemcpy(data, host.data(), bytes, cudaMemcpyHostToDevice));
    }
    device_buffer(device_buffer && other) : data(other.data), bytes(other.bytes) { other.data = nullptr; }
    device_buffer(const device_buffer &) = delete;
    ~device_buffer() { cudaFree(data); }

    void poison() { CHECK(cudaMemset(data, 0xFF, bytes)); }

    template <typename T> std::vector<T> read() const {
        std::vector<T> host(bytes/sizeof(T));
        CHECK(cudaMemcpy(host.data(), data, bytes, cudaMemcpyDeviceToHost));
        return host;
    }
};

inline std::vector<float> random_floats(std::mt19937 & rng, size_t n, float scale) {
    std::normal_distribution<float> normal;
    std::vector<float> out(n);
    for (float & x : out) { x = scale*normal(rng); }
    return out;
}

// rows of `n` values in a ggml type
inline std::vector<uint8_t> as_type(const std::vector<float> & values, int64_t n, ggml_type type) {
    const size_t row_bytes = ggml_row_size(type, n);
    std::vector<uint8_t> out(values.size()/n*row_bytes);
    if (type == GGML_TYPE_F32) {
        memcpy(out.data(), values.data(), out.size());
    } else {
        ggml_quantize_chunk(type, values.data(), out.data(), 0, int64_t(values.size()/n), n, nullptr);
    }
    return out;
}
