// Products with Q8_0 rows where few vectors fit the registers (AVX2, base): each scale is used once per block, K's for its values and V's for its weights, so
// that one or two vectors of values are in registers at a time. Included by hylra-tile.h for its dot_tile and accumulate_tile. On an Intel Xeon a layer takes
// 5 to 20 % less time with AVX2 from a hot cache, 3 to 11 % from a cold one; without AVX2 8 % less.
#pragma once

#include "hylra-rows.h"

namespace {

constexpr int Q8_0_VALUES = 32, Q8_0_BYTES = 34; // { F16 scale; int8 qs[32] } (ggml-common.h block_q8_0)

inline vf q8_0_values(const char * block, int first) { return load_i8((const int8_t *) block + sizeof(ggml_fp16_t) + first); }

// acc[h][c] += q[h] . row[c] for HEADS queries and CELLS rows, block by block
template<int HEADS, int CELLS>
inline void dot_blocks(const float * const * q, const char * const * row, int n_step, vf (*acc)[CELLS]) {
    constexpr int STEPS = Q8_0_VALUES/LANES;
    for (int i = 0, byte = 0; i < n_step; i += STEPS, byte += Q8_0_BYTES) {
        vf scale[CELLS];
        for (int c = 0; c < CELLS; ++c) {
            scale[c] = splat(f16_to_f32(row[c] + byte));
        }
        for (int j = 0; j < STEPS; ++j) {
            vf values[CELLS];
            for (int c = 0; c < CELLS; ++c) {
                values[c] = q8_0_values(row[c] + byte, j*LANES)*scale[c];
            }
            for (int h = 0; h < HEADS; ++h) {
                const vf qv = in_register(load(q[h] + (i + j)*LANES));
                for (int c = 0; c < CELLS; ++c) {
                    acc[h][c] += qv*values[c];
                }
            }
        }
    }
}

// w[h][cell] = p[h][cell] times the scale of the cell's block at `byte`. row(cell): where a row starts
template<int HEADS, int TILE, class ROW>
inline void scale_weights(const float (*p)[TILE], const ROW & row, int byte, float (*w)[TILE]) {
    alignas(32) ggml_fp16_t scale[TILE];
    for (int cell = 0; cell < TILE; ++cell) {
        memcpy(&scale[cell], row(cell) + byte, sizeof(scale[cell]));
    }
    for (int cell = 0; cell < TILE; cell += LANES) {
        const vf scales = load_f16(scale + cell);
        for (int h = 0; h < HEADS; ++h) {
            store(w[h] + cell, load(p[h] + cell)*scales);
        }
    }
}

// acc[h][step*LANES ...] += sum over cells of w[h][cell] times values of the cell's block at `byte`, STEPS vectors of dimensions
template<int HEADS, int STEPS, int TILE, class ROW>
inline void accumulate_values(const float (*w)[TILE], const ROW & row, int n_cells, int byte, int step, float * const * acc) {
    vf sum[HEADS][STEPS];
    for (int h = 0; h < HEADS; ++h) {
        for (int i = 0; i < STEPS; ++i) {
            sum[h][i] = load(acc[h] + (step + i)*LANES);
        }
    }
    for (int cell = 0; cell < n_cells; ++cell) {
        vf values[STEPS];
        for (int i = 0; i < STEPS; ++i) {
            values[i] = q8_0_values(row(cell) + byte, (step + i)*LANES % Q8_0_VALUES);
        }
        for (int h = 0; h < HEADS; ++h) {
            for (int i = 0; i < STEPS; ++i) {
                sum[h][i] += splat(w[h][cell])*values[i];
            }
        }
    }
    for (int h = 0; h < HEADS; ++h) {
        for (int i = 0; i < STEPS; ++i) {
            store(acc[h] + (step + i)*LANES, sum[h][i]);
        }
    }
}

} // namespace
