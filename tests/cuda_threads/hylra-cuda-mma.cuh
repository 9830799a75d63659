// Takes the place of ggml_patch/src/hylra-cuda-mma.cuh: the same instructions, by exchange between the threads of a warp.
#pragma once

#include "cuda_fp16.h"

inline uint32_t hylra_bits(half2 x) { return bits_as<uint32_t>(x); }
inline half2 hylra_half2(uint32_t x) { return bits_as<half2>(x); }

inline float half_of(uint32_t word, int i) { return __half2float(__ushort_as_half(uint16_t(word >> 16*(i%2)))); }

// A half of what lane `lane` gave as its word `word`
inline float given(int lane, int word, int i) { return half_of(of_block.fragments[threadIdx.x/32][lane][word], i); }

inline void hylra_mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    const int g = threadIdx.x%32/4, t = threadIdx.x%4;
    const uint32_t mine[6] = { a0, a1, a2, a3, b0, b1 };
    memcpy(of_block.fragments[threadIdx.x/32][threadIdx.x%32], mine, sizeof(mine));
    __syncwarp();
    for (int i = 0; i < 4; ++i) { // row g + 8*(i/2), column 2*t + i%2
        for (int k = 0; k < 16; ++k) {
            c[i] += given(g*4 + k%8/2, i/2 + k/8*2, k)*given((2*t + i%2)*4 + k%8/2, 4 + k/8, k);
        }
    }
    __syncwarp();
}

inline uint32_t hylra_transpose(uint32_t x) {
    const int g = threadIdx.x%32/4, t = threadIdx.x%4;
    of_block.fragments[threadIdx.x/32][threadIdx.x%32][0] = x;
    __syncwarp();
    const uint32_t out = hylra_bits(__floats2half2_rn(given(2*t*4 + g/2, 0, g), given((2*t + 1)*4 + g/2, 0, g)));
    __syncwarp();
    return out;
}

// Word i of the four matrices whose rows the lanes name
template <bool TRANSPOSED = false> void hylra_ldmatrix(uint32_t (&x)[4], const uint4 * row) {
    const int g = threadIdx.x%32/4, t = threadIdx.x%4;
    const void ** rows = of_block.rows[threadIdx.x/32];
    rows[threadIdx.x%32] = row;
    __syncwarp();
    for (int i = 0; i < 4; ++i) {
        const auto at = [&](int r, int c) { return ((const half *) rows[8*i + r])[c]; };
        const half2 both = TRANSPOSED ? half2{ at(2*t, g), at(2*t + 1, g) } : half2{ at(g, 2*t), at(g, 2*t + 1) };
        x[i] = hylra_bits(both);
    }
    __syncwarp();
}

inline float hylra_exp2(float x) { return exp2f(x); }

inline uint4 * hylra_dynamic_shared() {
    static uint4 memory[(227 << 10)/16];
    return memory;
}
inline void hylra_copy_async(uint4 * to, const uint4 * from, int n_byte) {
    *to = make_uint4(0, 0, 0, 0);
    memcpy(to, from, n_byte);
}
inline void hylra_copy_commit() {}
template <int N> void hylra_copy_wait() {}

inline uint4 hylra_load_once(const uint4 * p, bool present) { return present ? *p : make_uint4(0, 0, 0, 0); }
inline void hylra_prefetch(const void *) {}
template <typename T> void hylra_store_kept(T * to, T x) { *to = x; }
