// Readers of KV rows on CUDA: an octet is eight values of a row, in the order in which a type gives them up cheaply.
#pragma once

#include "hylra-cuda-mma.cuh"

#include "ggml.h"

// Which element of the row is value j of an octet. Q4_0 keeps elements i and i + 16 of a block in one byte.
template <int TYPE> static __device__ __forceinline__ int hylra_octet_dim(int octet, int j) {
    if (TYPE == GGML_TYPE_Q4_0) {
        return octet/4*32 + octet%4*4 + (j < 4 ? j : j + 12);
    }
    return octet*8 + j;
}

template <bool ONCE> static __device__ __forceinline__ uint4 hylra_load(const uint4 * p, bool present) {
    if constexpr (ONCE) {
        return hylra_load_once(p, present);
    }
    return present ? *p : make_uint4(0, 0, 0, 0);
}

static __device__ __forceinline__ uint32_t hylra_load_u16x2(const uint8_t * p) { // blocks are aligned to two bytes only
    const uint16_t * x = (const uint16_t *) p;
    return uint32_t(x[0]) | uint32_t(x[1]) << 16;
}

static __device__ __forceinline__ uint32_t hylra_bf16x2_to_half2(uint32_t x) {
    return hylra_bits(__floats2half2_rn(__uint_as_float(x << 16), __uint_as_float(x & 0xFFFF0000u)));
}

// Four bytes, each an integer + 128, to halves times d: 0x6400 + u is the half 1024 + u.
static __device__ __forceinline__ void hylra_bytes_to_halves(uint32_t u, half2 d, uint32_t & lo, uint32_t & hi) {
    const half2 bias = __half2half2(__float2half_rn(1152.0f));
    lo = hylra_bits(__hmul2(__hsub2(hylra_half2(__byte_perm(u, 0x64646464u, 0x4140)), bias), d));
    hi = hylra_bits(__hmul2(__hsub2(hylra_half2(__byte_perm(u, 0x64646464u, 0x4342)), bias), d));
}

// Two nibbles at bits 0 and 16 to halves minus 8, times d.
static __device__ __forceinline__ uint32_t hylra_nibbles_to_halves(uint32_t x, half2 d) {
    const half2 bias = __half2half2(__float2half_rn(1032.0f));
    return hylra_bits(__hmul2(__hsub2(hylra_half2((x & 0x000F000Fu) | 0x64006400u), bias), d));
}

static __device__ __forceinline__ uint32_t hylra_floats_to_halves(uint32_t a, uint32_t b) {
    return hylra_bits(__floats2half2_rn(__uint_as_float(a), __uint_as_float(b)));
}

// An octet of a quantised row as four half2, which can be read even if it is not present: then its scale counts as 0, since nothing else can be other than finite.
template <int TYPE> static __device__ __forceinline__ uint4 hylra_octet_of_blocks(const uint8_t * row, int octet, bool present) {
    constexpr int BLOCK_BYTES = TYPE == GGML_TYPE_Q8_0 ? 34 : 18; // half d; int8 q[32] or uint8 q[16]
    const uint8_t * block = row + octet/4*BLOCK_BYTES;
    const half2 d = __half2half2(present ? *(const half *) block : __ushort_as_half(0));
    uint4 out;
    if constexpr (TYPE == GGML_TYPE_Q8_0) {
        hylra_bytes_to_halves(hylra_load_u16x2(block + 2 + octet%4*8) ^ 0x80808080u, d, out.x, out.y);
        hylra_bytes_to_halves(hylra_load_u16x2(block + 6 + octet%4*8) ^ 0x80808080u, d, out.z, out.w);
    } else {
        const uint32_t x = hylra_load_u16x2(block + 2 + octet%4*4);
        const uint32_t a = __byte_perm(x, 0, 0x4140), b = __byte_perm(x, 0, 0x4342);
        out = make_uint4(hylra_nibbles_to_halves(a, d), hylra_nibbles_to_halves(b, d), hylra_nibbles_to_halves(a >> 4, d), hylra_nibbles_to_halves(b >> 4, d));
    }
    return out;
}

// An octet as four half2, zeros if there is none; values beyond a half's range saturate as they do in llama.cpp's own kernels.
template <int TYPE, bool ONCE> static __device__ __forceinline__ uint4 hylra_octet(const uint8_t * row, int octet, bool present) {
    if constexpr (TYPE == GGML_TYPE_F16) {
        return hylra_load<ONCE>((const uint4 *) row + octet, present);
    } else if constexpr (TYPE == GGML_TYPE_BF16) {
        const uint4 x = hylra_load<ONCE>((const uint4 *) row + octet, present);
        return make_uint4(hylra_bf16x2_to_half2(x.x), hylra_bf16x2_to_half2(x.y), hylra_bf16x2_to_half2(x.z), hylra_bf16x2_to_half2(x.w));
    } else if constexpr (TYPE == GGML_TYPE_F32) {
        const uint4 a = hylra_load<ONCE>((const uint4 *) row + 2*octet, present), b = hylra_load<ONCE>((const uint4 *) row + 2*octet + 1, present);
        return make_uint4(hylra_floats_to_halves(a.x, a.y), hylra_floats_to_halves(a.z, a.w), hylra_floats_to_halves(b.x, b.y), hylra_floats_to_halves(b.z, b.w));
    } else {
        return present ? hylra_octet_of_blocks<TYPE>(row, octet, true) : make_uint4(0, 0, 0, 0);
    }
}
