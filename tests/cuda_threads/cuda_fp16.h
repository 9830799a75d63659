// Halves as the compiler of this machine has them.
#pragma once

#include "cuda_runtime.h"

struct half { _Float16 value; };
struct half2 { half x, y; };
typedef half __half;

inline float __half2float(half x) { return float(x.value); }
inline half __float2half_rn(float x) { return { _Float16(x) }; }
inline half __ushort_as_half(uint16_t x) { return bits_as<half>(x); }
inline half2 __floats2half2_rn(float x, float y) { return { __float2half_rn(x), __float2half_rn(y) }; }
inline half2 __half2half2(half x) { return { x, x }; }
inline float2 __half22float2(half2 x) { return { __half2float(x.x), __half2float(x.y) }; }
inline half2 __hmul2(half2 a, half2 b) { return { { _Float16(a.x.value*b.x.value) }, { _Float16(a.y.value*b.y.value) } }; }
inline half2 __hsub2(half2 a, half2 b) { return { { _Float16(a.x.value - b.x.value) }, { _Float16(a.y.value - b.y.value) } }; }
