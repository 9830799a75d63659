// Reads the KQ mask of llama.cpp: F16, one row per token; -inf hides a cell, other values are minus the ALiBi distance.
#pragma once

#include "hylra-attn.h"
#include "ggml.h"

constexpr ggml_fp16_t HYLRA_MASK_HIDDEN = 0xFC00; // -inf

inline const ggml_fp16_t * hylra_mask_row(const hylra_attn & a, int stream, int token) {
    return a.mask ? (const ggml_fp16_t *) ((const char *) a.mask + token*a.mask_nb[1] + stream*a.mask_nb[3]) : nullptr;
}

inline float hylra_mask_at(const hylra_attn & a, int stream, int token, int cell) {
    const ggml_fp16_t * row = hylra_mask_row(a, stream, token);
    return row ? ggml_fp16_to_fp32(row[cell]) : 0.0f;
}
