// The few matrix instructions that the kernels use, from sm_75 on. Fragments in the terms of PTX: g = lane/4, t = lane%4.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

// c += a*b of 16x16 and 16x8 halves. a: (g, 2t) (g+8, 2t) (g, 2t+8) (g+8, 2t+8); b: (2t, g) (2t+8, g); c: (g, 2t) (g, 2t+1) (g+8, 2t) (g+8, 2t+1)
static __device__ __forceinline__ void hylra_mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#elif __CUDA_ARCH__ >= 750
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(b0));
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a2), "r"(a3), "r"(b1));
#else
    __trap(); // hylra_cuda_supports refuses such a device
#endif
}

// Transposes the 8x8 halves of which each lane holds (g, 2t) and (g, 2t+1).
static __device__ __forceinline__ uint32_t hylra_transpose(uint32_t x) {
#if __CUDA_ARCH__ >= 750
    uint32_t y;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
#else
    __trap();
    return x;
#endif
}

static __device__ __forceinline__ uint32_t hylra_bits(half2 x) { return *reinterpret_cast<uint32_t *>(&x); }
static __device__ __forceinline__ half2 hylra_half2(uint32_t x) { return *reinterpret_cast<half2 *>(&x); }
