// The few instructions that the kernels use beyond CUDA C++: products of matrices from sm_75 on, hints to caches from sm_80 on. Fragments in the terms of PTX: g = lane/4, t = lane%4.
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

// Four 8x8 matrices of halves from shared memory: lane i gives row i%8 of matrix i/8, and gets (g, 2t) and (g, 2t+1) of each, or of each transposed
template <bool TRANSPOSED = false> static __device__ __forceinline__ void hylra_ldmatrix(uint32_t (&x)[4], const uint4 * row) {
#if __CUDA_ARCH__ >= 750
    const uint32_t at = uint32_t(__cvta_generic_to_shared(row));
    if constexpr (TRANSPOSED) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(at) : "memory");
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(at) : "memory");
    }
#else
    __trap();
#endif
}

// ---- shared memory: what a launch asked for, and copies to it that are waited for later

static __device__ __forceinline__ uint4 * hylra_dynamic_shared() {
    extern __shared__ uint4 memory[];
    return memory;
}

// n_byte of 16, an even number, and zeros behind them; before Ampere at once
static __device__ __forceinline__ void hylra_copy_async(uint4 * to, const uint4 * from, int n_byte) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(uint32_t(__cvta_generic_to_shared(to))), "l"(from), "r"(n_byte) : "memory");
#else
    for (int i = 0; i < 8; ++i) {
        ((uint16_t *) to)[i] = 2*i < n_byte ? ((const uint16_t *) from)[i] : 0;
    }
#endif
}

static __device__ __forceinline__ void hylra_copy_commit() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits for all but the last N groups that this thread has committed; the block still has to meet.
template <int N> static __device__ __forceinline__ void hylra_copy_wait() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" :: "n"(N) : "memory");
#endif
}

// 2^x, 0 where that has no normal float: one instruction, exp2f takes four
static __device__ __forceinline__ float hylra_exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

static __device__ __forceinline__ uint32_t hylra_bits(half2 x) { return *reinterpret_cast<uint32_t *>(&x); }
static __device__ __forceinline__ half2 hylra_half2(uint32_t x) { return *reinterpret_cast<half2 *>(&x); }

// ---- what stays in the second-level cache

// Of rows that nobody reads again in this step: they pass by the first-level cache and are the first to leave the second one, so that what a
// select layer keeps for pooling stays there instead of being written to memory and read back. Zeros if the row is not present.
static __device__ __forceinline__ uint4 hylra_load_once(const uint4 * p, bool present) {
    uint4 x;
#if __CUDA_ARCH__ >= 800
    uint64_t evict_first;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(evict_first)); // the compiler takes it out of the loop
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %5, 0; mov.u32 %0, 0; mov.u32 %1, 0; mov.u32 %2, 0; mov.u32 %3, 0;\n"
                 "@p ld.global.nc.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %6; }"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(p), "r"(int(present)), "l"(evict_first));
#else
    x = present ? *p : make_uint4(0, 0, 0, 0);
#endif
    return x;
}

// Has that cache fetch a line
static __device__ __forceinline__ void hylra_prefetch(const void * line) {
    asm volatile("prefetch.global.L2 [%0];" :: "l"(line));
}

// Writes what pooling reads soon: lines that the second-level cache keeps longest. Of QwQ-32B at 61440 cells 15 MB went to memory without such hints, and
// attend took 71 us; it takes 66 with them, as without any store. With several sequences the lines do not fit, and nothing is gained.
template <typename T> static __device__ __forceinline__ void hylra_store_kept(T * to, T x) {
#if __CUDA_ARCH__ >= 800
    uint64_t evict_last;
    asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(evict_last));
    if constexpr (sizeof(T) == 4) {
        asm volatile("st.global.L2::cache_hint.u32 [%0], %1, %2;" :: "l"(to), "r"(x), "l"(evict_last) : "memory");
    } else {
        asm volatile("st.global.L2::cache_hint.v2.f32 [%0], {%1, %2}, %3;" :: "l"(to), "f"(x.x), "f"(x.y), "l"(evict_last) : "memory");
    }
#else
    *to = x;
#endif
}
