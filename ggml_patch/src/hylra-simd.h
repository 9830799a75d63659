// Vectors of F32 in the width of the instruction set that this translation unit is compiled for (GCC/Clang vector
// extensions), and readers that turn KV rows of any type into padded F32 rows. Included by hylra-kernels.cpp only.
#pragma once

#include "hylra-attn.h"
#include "ggml.h"

#include <cmath>
#include <cstring>
#include <utility>

#if defined(__AVX512F__) || defined(__AVX2__)
#    if defined(__GNUC__) && !defined(__clang__)
#        pragma GCC diagnostic ignored "-Wmaybe-uninitialized" // GCC 12 warns inside its own _mm512_undefined_ps
#    endif
#    include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float   vf __attribute__((vector_size(LANES*sizeof(float))));
typedef int32_t vi __attribute__((vector_size(LANES*sizeof(int32_t))));

inline vf splat(float x) { return vf{} + x; }
inline vf load(const float * p) { vf v; memcpy(&v, p, sizeof(v)); return v; }
inline void store(float * p, vf v) { memcpy(p, &v, sizeof(v)); }
inline vf vmax(vf a, vf b) { return a > b ? a : b; }

inline float hmax(vf v) {
    float m = v[0];
    for (int i = 1; i < LANES; ++i) {
        m = v[i] > m ? v[i] : m;
    }
    return m;
}

inline float hsum(vf v) {
    float s = v[0];
    for (int i = 1; i < LANES; ++i) {
        s += v[i];
    }
    return s;
}

// exp(x) for x <= 0 (or small positive); 0 below the smallest normal result. Cody-Waite reduction, degree-6 polynomial:
// largest relative error 2e-7 over [-87, 0].
inline vf vexp(vf x) {
    const vf shift = splat(12582912.0f); // 1.5 * 2^23: adding it rounds to an integer held in the low mantissa bits
    const vf z = x*1.44269504f + shift;
    const vf n = z - shift;
    const vf r = x - n*0.693359375f - n*-2.12194440e-4f;
    vf p = splat(1.0f/720.0f);
    p = p*r + 1.0f/120.0f;
    p = p*r + 1.0f/24.0f;
    p = p*r + 1.0f/6.0f;
    p = p*r + 0.5f;
    p = p*r + 1.0f;
    p = p*r + 1.0f;
    const vi bits = (vi) p + (((vi) z - (vi) shift) << 23);
    return x < -87.0f ? vf{} : (vf) bits;
}

// Index of lane j when two vectors are folded in groups of g lanes: the low groups of x, then those of y (see hsum_lanes).
constexpr int fold_index(int j, int g, int offset) {
    return j/(2*g)*(2*g) + j%g + offset + (j%(2*g) < g ? 0 : LANES);
}

template<int G, int... J>
inline vf fold(vf x, vf y, std::integer_sequence<int, J...>) {
#if defined(__clang__)
    return __builtin_shufflevector(x, y, fold_index(J, G, 0)...) + __builtin_shufflevector(x, y, fold_index(J, G, G)...);
#else // __builtin_shufflevector came with GCC 12
    return __builtin_shuffle(x, y, vi{fold_index(J, G, 0)...}) + __builtin_shuffle(x, y, vi{fold_index(J, G, G)...});
#endif
}

// Lane i of the result is the sum of the lanes of a[i]: LANES horizontal sums for log2(LANES) folds each.
template<int G = 1>
inline vf hsum_lanes(vf * a) {
    if constexpr (G == LANES) {
        return a[0];
    } else {
        for (int i = 0; i < LANES/(2*G); ++i) {
            a[i] = fold<G>(a[2*i], a[2*i + 1], std::make_integer_sequence<int, LANES>{});
        }
        return hsum_lanes<2*G>(a);
    }
}

// ---- one step of LANES values, by source type

#if defined(__AVX512F__)
inline vf load_f16 (const ggml_fp16_t * p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) p)); }
inline vf load_bf16(const uint16_t * p) {
    return (vf) _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *) p)), 16);
}
inline vf load_i8  (const int8_t * p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *) p))); }
#elif defined(__AVX2__)
inline vf load_f16 (const ggml_fp16_t * p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) p)); }
inline vf load_bf16(const uint16_t * p) {
    return (vf) _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *) p)), 16);
}
inline vf load_i8  (const int8_t * p) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *) p))); }
#else
inline vf load_f16(const ggml_fp16_t * p) {
    float f[LANES];
    ggml_fp16_to_fp32_row(p, f, LANES);
    return load(f);
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
#endif

// ---- rows: read n values and store F32; the caller clears the padding behind them

inline void row_f32(const void * row, float * out, int n) { memcpy(out, row, n*sizeof(float)); }

inline void row_f16(const void * row, float * out, int n) {
    const ggml_fp16_t * p = (const ggml_fp16_t *) row;
    int i = 0;
    for (; i + LANES <= n; i += LANES) {
        store(out + i, load_f16(p + i));
    }
    for (; i < n; ++i) {
        out[i] = ggml_fp16_to_fp32(p[i]);
    }
}

inline void row_bf16(const void * row, float * out, int n) {
    const uint16_t * p = (const uint16_t *) row;
    int i = 0;
    for (; i + LANES <= n; i += LANES) {
        store(out + i, load_bf16(p + i));
    }
    for (; i < n; ++i) {
        out[i] = ggml_bf16_to_fp32(ggml_bf16_t{p[i]});
    }
}

// Q8_0: blocks of 32 values, { F16 scale; int8 qs[32] } (ggml-common.h block_q8_0)
inline void row_q8_0(const void * row, float * out, int n) {
    const char * p = (const char *) row;
    for (int i = 0; i < n; i += 32, p += 34) {
        ggml_fp16_t d;
        memcpy(&d, p, sizeof(d));
        const vf scale = splat(ggml_fp16_to_fp32(d));
        for (int j = 0; j < 32; j += LANES) {
            store(out + i + j, load_i8((const int8_t *) p + 2 + j)*scale);
        }
    }
}

// Q4_0: blocks of 32 values, { F16 scale; uint8 qs[16] }, low nibbles first, offset 8 (ggml-common.h block_q4_0)
inline void row_q4_0(const void * row, float * out, int n) {
    const char * p = (const char *) row;
    for (int i = 0; i < n; i += 32, p += 18) {
        ggml_fp16_t d;
        memcpy(&d, p, sizeof(d));
        const vf scale = splat(ggml_fp16_to_fp32(d));
        int8_t q[32];
        for (int j = 0; j < 16; ++j) {
            q[j]      = int8_t((uint8_t(p[2 + j]) & 15) - 8);
            q[j + 16] = int8_t((uint8_t(p[2 + j]) >> 4) - 8);
        }
        for (int j = 0; j < 32; j += LANES) {
            store(out + i + j, load_i8(q + j)*scale);
        }
    }
}

} // namespace
