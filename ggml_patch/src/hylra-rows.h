// Readers of KV rows: step i of a row is its values [i*LANES, (i + 1)*LANES) as F32, converted in registers; a reader gives
// STEPS of them at a time, which for quantised types is a block with its scale. A head size that
// is no multiple of LANES, or a type without a reader here, goes through a padded F32 copy. Included by hylra-kernels.cpp only.
#pragma once

#include "hylra-simd.h"

namespace {

#if defined(__AVX512F__)
inline vf load_f16 (const ggml_fp16_t * p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) p)); }
inline vf load_bf16(const uint16_t * p) {
    return (vf) _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *) p)), 16);
}
inline vf load_i8  (const int8_t * p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *) p))); }
inline vf load_nibbles(const uint8_t * p, int shift) {
    const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *) p));
    return _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(bytes, shift), _mm512_set1_epi32(15)));
}
#elif defined(__AVX2__)
inline vf load_f16 (const ggml_fp16_t * p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) p)); }
inline vf load_bf16(const uint16_t * p) {
    return (vf) _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *) p)), 16);
}
inline vf load_i8  (const int8_t * p) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *) p))); }
inline vf load_nibbles(const uint8_t * p, int shift) {
    const __m256i bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *) p));
    return _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(bytes, shift), _mm256_set1_epi32(15)));
}
#else
typedef uint16_t vh __attribute__((vector_size(LANES*sizeof(uint16_t))));

// The exponent is moved by a multiplication, which makes subnormal numbers right too; infinity and NaN keep the largest one.
// ggml_fp16_to_fp32_row for four values is a call with a loop, and a layer took three times as long.
inline vf load_f16(const ggml_fp16_t * p) {
    vh h;
    memcpy(&h, p, sizeof(h));
    const vi bits = __builtin_convertvector(h, vi), size = bits & 0x7fff;
    const vi value = (vi) ((vf) (size << 13)*0x1p112f);
    return (vf) ((size >= 0x7c00 ? (size << 13) | 0x7f800000 : value) | (bits & 0x8000) << 16);
}
inline vf load_bf16(const uint16_t * p) {
    vi v;
    for (int i = 0; i < LANES; ++i) {
        v[i] = int32_t(uint32_t(p[i]) << 16);
    }
    return (vf) v;
}
inline vf load_i8(const int8_t * p) {
    vf v;
    for (int i = 0; i < LANES; ++i) {
        v[i] = p[i];
    }
    return v;
}
inline vf load_nibbles(const uint8_t * p, int shift) {
    vf v;
    for (int i = 0; i < LANES; ++i) {
        v[i] = (p[i] >> shift) & 15;
    }
    return v;
}
#endif

inline float f16_to_f32(const char * p) {
    ggml_fp16_t h;
    memcpy(&h, p, sizeof(h));
#if defined(__F16C__)
    return _cvtsh_ss(h);
#else
    return ggml_fp16_to_fp32(h);
#endif
}

struct reader_f32 {
    static constexpr int STEPS = 1;
    static void read(const char * row, int i, vf * out) { out[0] = load((const float *) row + i*LANES); }
};

struct reader_f16 {
    static constexpr int STEPS = 1;
    static void read(const char * row, int i, vf * out) { out[0] = load_f16((const ggml_fp16_t *) row + i*LANES); }
};

struct reader_bf16 {
    static constexpr int STEPS = 1;
    static void read(const char * row, int i, vf * out) { out[0] = load_bf16((const uint16_t *) row + i*LANES); }
};

// blocks of 32 values, { F16 scale; int8 qs[32] } (ggml-common.h block_q8_0)
struct reader_q8_0 {
    static constexpr int STEPS = 32/LANES;
    static void read(const char * row, int i, vf * out) {
        const char * block = row + i/STEPS*34;
        const vf scale = splat(f16_to_f32(block));
        for (int j = 0; j < STEPS; ++j) {
            out[j] = load_i8((const int8_t *) block + 2 + j*LANES)*scale;
        }
    }
};

// blocks of 32 values, { F16 scale; uint8 qs[16] }, the low nibbles first, offset 8 (ggml-common.h block_q4_0)
struct reader_q4_0 {
    static constexpr int STEPS = 32/LANES;
    static void read(const char * row, int i, vf * out) {
        const char * block = row + i/STEPS*18;
        const vf scale = splat(f16_to_f32(block));
        for (int j = 0; j < STEPS; ++j) {
            out[j] = (load_nibbles((const uint8_t *) block + 2 + j*LANES%16, j*LANES/16*4) - 8.0f)*scale;
        }
    }
};

} // namespace
