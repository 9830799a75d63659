// Vectors of F32 in the width of the instruction set that this translation unit is compiled for (GCC/Clang vector
// extensions). Included by hylra-kernels.cpp only.
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

inline vf splat(float x) { return x - vf{}; } // not 0 + x, which turns -0 into 0 and so is an addition to GCC
inline vf load(const float * p) { vf v; memcpy(&v, p, sizeof(v)); return v; }
inline void store(float * p, vf v) { memcpy(p, &v, sizeof(v)); }

// The same value in a register. GCC gives each product with AVX2 its own load of a vector that several take: ten loads for eight products of two cells and
// four heads, where Zen 3 has two per cycle. With six, dot products of F16 are 2 to 7 % faster even on an Intel Xeon, which has three.
inline vf in_register(vf v) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    asm("" : "+x"(v));
#endif
    return v;
}

inline vf vmax(vf a, vf b) { return a > b ? a : b; }

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

// Folds n vectors, in which every G-th lane belongs together, to one: after fold_all<1, n> lane i % n of the result holds a
// part of the sum of the lanes of a[i]; after a second fold_all<n, LANES/n> over such results lane i is the sum of vector i.
template<int G, int N>
inline vf fold_all(vf * a) {
    if constexpr (N == 1) {
        return a[0];
    } else {
        for (int i = 0; i < N/2; ++i) {
            a[i] = fold<G>(a[2*i], a[2*i + 1], std::make_integer_sequence<int, LANES>{});
        }
        return fold_all<2*G, N/2>(a);
    }
}

// ---- horizontal: halves onto each other, so that the chain is log2(LANES) long

template<int STEP, int... J>
inline vf rotated(vf v, std::integer_sequence<int, J...>) {
#if defined(__clang__)
    return __builtin_shufflevector(v, v, ((J + STEP) % LANES)...);
#else
    return __builtin_shuffle(v, vi{((J + STEP) % LANES)...});
#endif
}

template<int STEP = LANES/2>
inline float hmax(vf v) {
    if constexpr (STEP == 0) {
        return v[0];
    } else {
        return hmax<STEP/2>(vmax(v, rotated<STEP>(v, std::make_integer_sequence<int, LANES>{})));
    }
}

template<int STEP = LANES/2>
inline float hsum(vf v) {
    if constexpr (STEP == 0) {
        return v[0];
    } else {
        return hsum<STEP/2>(v + rotated<STEP>(v, std::make_integer_sequence<int, LANES>{}));
    }
}

} // namespace
