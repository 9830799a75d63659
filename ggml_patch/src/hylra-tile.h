// One tile of cells: dot products with the query heads of a group, and the weighted sum of its V rows. A row is converted to
// F32 in registers and used for up to MAX_HEADS query heads at once; with VNNI a K of 8 or 4 bits stays in bytes. Included by
// hylra-kernels.cpp only.
#pragma once

#include "hylra-attn.h"
#include "hylra-blocks.h"
#include "hylra-rows.h"
#if defined(__AVX512VNNI__)
#    include "hylra-vnni-sum.h"
#endif

#include <algorithm>
#include <new>
#include <type_traits>

namespace {

constexpr int TILE      = HYLRA_TILE_CELLS;
constexpr int MAX_HEADS = 4; // query heads per pass: 16 sums and their inputs fit 32 registers

// One tile of up to TILE cells of one stream.
struct block {
    const int32_t * list; // the cells, or nullptr: first, first + 1, ...
    int first;
    int n;

    int cell(int i) const { return list ? list[i] : first + i; }
};

// The rows of a tile in one cache, for one KV head: row i starts at base + offset[i]. Rows behind the end repeat the last
// one, since their logits are hidden afterwards. While a tile is computed, the rows that come after it are fetched: without
// that one thread read a cold cache at 9 GB/s here, with it at 16.
struct tile_rows {
    const char * base;
    const size_t * offset;
    const char * next_base;
    const size_t * next_offset;
    int row_bytes;

    const char * at(int i) const { return base + offset[i]; }

    // Every line that the row touches: 36 bytes of Q4_0 lie in two as often as not, and steps of 64 from its first byte miss the second
    // (head size 64, 32K cells: 0.28 -> 0.20 ms). Always inline: GCC drops a call of a function that does nothing but fetch.
    __attribute__((always_inline)) void fetch_next(int i) const {
        const char * row = next_base + next_offset[i];
        for (const char * line = (const char *) (uintptr_t(row)/64*64); line < row + row_bytes; line += 64) {
            __builtin_prefetch(line, 0, 2);
        }
    }

    __attribute__((always_inline)) void fetch_next_all() const {
        for (int i = 0; i < TILE; ++i) {
            fetch_next(i);
        }
    }

    // A line of each: scattered rows lie in pages of their own, and a fetch that waits for the translation of its address holds up
    // the arithmetic behind it, unless translations wait together. Q8_0, 128K cells: 0.43 -> 0.32 ms, at 8K and with F16 the same.
    __attribute__((always_inline)) void translate_next_all() const {
        for (int i = 0; i < TILE && row_bytes > 0; ++i) {
            __builtin_prefetch(next_base + next_offset[i], 0, 2);
        }
    }
};

// Fetches the rows of the next tile in n_step steps: a processor has few places for what is on its way, and all loads wait behind a fetch that finds
// none, so that a burst adds its time to the arithmetic's instead of hiding in it (F16, head size 128, 32K cells: a dense layer 6.2 -> 5.6 ms; AVX2 2.0 -> 1.7).
struct steady_fetch {
    const tile_rows & rows;
    const int step; // rows, in 1/256
    int due = 0, row = 0;

    steady_fetch(const tile_rows & rows, int n_step) : rows(rows), step((TILE*256 + n_step - 1)/n_step) {}

    __attribute__((always_inline)) void operator()() {
        for (due += step; row < TILE && row < due/256; ++row) {
            rows.fetch_next(row);
        }
    }
};

// How often it is called: at every step costs narrow vectors more than it gains
constexpr int FETCH_STEPS = 64/LANES; // vectors of K's rows between calls
constexpr int FETCH_CELLS = 4;        // V's rows

void find_rows(const block & b, size_t row_bytes, size_t * offset) {
    if (b.n == TILE) { // by vectors
        for (int i = 0; i < TILE; ++i) {
            offset[i] = size_t(b.cell(i))*row_bytes;
        }
        return;
    }
    for (int i = 0; i < TILE; ++i) {
        offset[i] = b.n == 0 ? 0 : b.cell(std::min(i, b.n - 1))*row_bytes;
    }
}

// Q8_0 where a block's vectors and their sums do not fit the registers (hylra-blocks.h)
template<class READER> constexpr bool BY_BLOCKS = LANES < 16 && std::is_same<READER, reader_q8_0>::value;

// acc[h][c] += q[h] . row[c], vector by vector
template<class READER, int HEADS, int CELLS>
__attribute__((always_inline)) inline void dot_rows(const float * const * q, const char * const * row, int n_step, vf (*acc)[CELLS], steady_fetch & fetch) {
    if constexpr (BY_BLOCKS<READER>) {
        fetch();
        return dot_blocks<HEADS, CELLS>(q, row, n_step, acc);
    }
    for (int i = 0; i < n_step; i += READER::STEPS) {
        if (i % FETCH_STEPS == 0) {
            fetch();
        }
        vf kv[CELLS][READER::STEPS];
        for (int c = 0; c < CELLS; ++c) {
            READER::read(row[c], i, kv[c]);
        }
        for (int j = 0; j < READER::STEPS; ++j) {
            for (int h = 0; h < HEADS; ++h) {
                const vf qv = in_register(load(q[h] + (i + j)*LANES));
                for (int c = 0; c < CELLS; ++c) {
                    acc[h][c] += qv*kv[c][j];
                }
            }
        }
    }
}

// s[h][cell] = q[h] . k[cell] for HEADS query heads. CELLS cells at a time: their sums stay in registers, then are folded so
// that LANES cells share one horizontal reduction.
template<class READER, int HEADS>
void dot_tile(const float * const * q, const tile_rows & k, int n_step, float (*s)[TILE]) {
    constexpr int CELLS = LANES >= 16 ? 4 : 2;
    steady_fetch fetch(k, TILE/CELLS*(BY_BLOCKS<READER> ? 1 : (n_step + FETCH_STEPS - 1)/FETCH_STEPS));
    for (int cell = 0; cell < TILE; cell += LANES) {
        vf part[HEADS][LANES/CELLS];
        for (int p = 0; p < LANES/CELLS; ++p) {
            const char * row[CELLS];
            for (int c = 0; c < CELLS; ++c) {
                row[c] = k.at(cell + p*CELLS + c);
            }
            vf acc[HEADS][CELLS] = {};
            dot_rows<READER, HEADS, CELLS>(q, row, n_step, acc, fetch);
            for (int h = 0; h < HEADS; ++h) {
                part[h][p] = fold_all<1, CELLS>(acc[h]);
            }
        }
        for (int h = 0; h < HEADS; ++h) {
            store(s[h] + cell, fold_all<CELLS, LANES/CELLS>(part[h]));
        }
    }
}

#if defined(__AVX512VNNI__)
// the same for K in bytes; q: as pack_bytes makes them
template<class BYTES_OF, int HEADS>
void dot_tile_bytes(const float * const * q, const tile_rows & k, int n_step, float (*s)[TILE]) {
    const char * row[TILE];
    for (int i = 0; i < TILE; ++i) {
        row[i] = k.at(i);
    }
    static_assert(TILE == BYTES_ROWS, "");
    const int n_block = n_step*LANES/BLOCK;
    steady_fetch fetch(k, n_block*HEADS);
    dot_bytes<BYTES_OF, HEADS>(q, row, n_block, s, fetch);
}

template<class BYTES_OF>
void pack_bytes(const float * q, int n, float * out) { pack_query(q, n, BYTES_OF::ZERO, out); }
#endif

// acc[h][d0..] += sum over cells of p[h][cell]*v[cell][d0..] for STEPS vectors of dimensions, whose sums stay in registers
template<class READER, int HEADS, int STEPS>
void accumulate_strip(const float (*p)[TILE], const tile_rows & v, int n_cells, int step, float * const * acc, steady_fetch & fetch) {
    vf sum[HEADS][STEPS];
    for (int h = 0; h < HEADS; ++h) {
        for (int i = 0; i < STEPS; ++i) {
            sum[h][i] = load(acc[h] + (step + i)*LANES);
        }
    }
    for (int cell = 0; cell < n_cells; ++cell) {
        const char * row = v.at(cell);
        if (cell % FETCH_CELLS == 0) {
            fetch();
        }
        vf w[HEADS];
        for (int h = 0; h < HEADS; ++h) {
            w[h] = splat(p[h][cell]);
        }
        for (int i = 0; i < STEPS; i += READER::STEPS) {
            vf vv[READER::STEPS];
            READER::read(row, step + i, vv);
            for (int j = 0; j < READER::STEPS; ++j) {
                for (int h = 0; h < HEADS; ++h) {
                    sum[h][i + j] += w[h]*vv[j];
                }
            }
        }
    }
    for (int h = 0; h < HEADS; ++h) {
        for (int i = 0; i < STEPS; ++i) {
            store(acc[h] + (step + i)*LANES, sum[h][i]);
        }
    }
}

// strips as long as STEPS, then shorter ones for what is left of the row: a head of 64 is half of what fits the registers of AVX-512
template<class READER, int HEADS, int STEPS>
void accumulate_strips(const float (*p)[TILE], const tile_rows & v, int n_cells, int n_step, int step, float * const * acc, steady_fetch & fetch) {
    for (; step + STEPS <= n_step; step += STEPS) {
        accumulate_strip<READER, HEADS, STEPS>(p, v, n_cells, step, acc, fetch);
    }
    if constexpr (STEPS/2 >= READER::STEPS) {
        accumulate_strips<READER, HEADS, STEPS/2>(p, v, n_cells, n_step, step, acc, fetch);
    }
}

// the same for BY_BLOCKS: weights are multiplied with a block's scales first
template<int HEADS>
void accumulate_blocks(const float (*p)[TILE], const tile_rows & v, int n_cells, int n_step, float * const * acc) {
    constexpr int STEPS = 2;
    alignas(64) float w[HEADS][TILE];
    steady_fetch fetch(v, n_step/STEPS);
    const auto row = [&](int cell) { return v.at(cell); };
    for (int step = 0; step < n_step; step += STEPS) {
        const int byte = step*LANES/Q8_0_VALUES*Q8_0_BYTES;
        if (step*LANES % Q8_0_VALUES == 0) {
            scale_weights<HEADS>(p, row, byte, w);
        }
        fetch();
        accumulate_values<HEADS, STEPS>(w, row, n_cells, byte, step, acc);
    }
}

template<class READER, int HEADS>
void accumulate_tile(const float (*p)[TILE], const tile_rows & v, int n_cells, int n_step, float * const * acc) {
    if constexpr (BY_BLOCKS<READER>) {
        return accumulate_blocks<HEADS>(p, v, n_cells, n_step, acc);
    }
    constexpr int FIT  = LANES >= 16 && HEADS <= 3 ? 8 : LANES >= 16 || HEADS <= 2 ? 4 : 2; // vectors of sums that fit the registers
    constexpr int LONG = FIT > READER::STEPS ? FIT : READER::STEPS;
    steady_fetch fetch(v, (n_cells + FETCH_CELLS - 1)/FETCH_CELLS*(n_step/LONG + __builtin_popcount(n_step%LONG)));
    accumulate_strips<READER, HEADS, LONG>(p, v, n_cells, n_step, 0, acc, fetch);
}

#if defined(__AVX512VNNI__)
// the same for V in bytes. Weights are bytes without a sign; ggml writes no negative scale, and a block that has one is summed in F32.
template<int HEADS>
void accumulate_tile_bytes(const float (*p)[TILE], const tile_rows & v, int n_cells, int n_step, float * const * acc) {
    static_assert(TILE == SUM_ROWS, "");
    constexpr int STEPS = BLOCK/LANES, BYTES = bytes_q8_0::BYTES;
    const char * row[TILE];
    for (int i = 0; i < TILE; ++i) {
        row[i] = v.at(i);
    }
    const int n_block = n_step/STEPS;
    const tile_weights<HEADS> weights(p);
    alignas(64) int32_t digit[SUM_BLOCKS][HEADS][TILE/4][4];
    float largest[SUM_BLOCKS];
    for (int block = 0; block < n_block; ++block) { // all before the first sum, which would have to wait for its own
        const block_scales scales = read_scales(row, block*BYTES, weights.counts);
        largest[block] = scales.largest;
        write_weights(weights, scales, digit[block]);
    }
    steady_fetch fetch(v, n_block*(TILE/4));
    for (int block = 0; block < n_block; ++block) {
        if (std::signbit(largest[block])) {
            accumulate_strip<reader_q8_0, HEADS, STEPS>(p, v, n_cells, block*STEPS, acc, fetch);
            continue;
        }
        float unit[HEADS];
        for (int h = 0; h < HEADS; ++h) {
            unit[h] = weights.unit[h]*largest[block];
        }
        sum_bytes<HEADS>(digit[block], row, block*BYTES + 2, unit, block*BLOCK, acc, fetch);
    }
}
#endif

typedef void (*dot_t)(const float * const * q, const tile_rows & k, int n_step, float (*s)[TILE]);
typedef void (*accumulate_t)(const float (*p)[TILE], const tile_rows & v, int n_cells, int n_step, float * const * acc);

typedef void (*pack_t)(const float * q, int n, float * out); // [n] -> [n]

// The kernels of one KV type, by number of query heads.
struct type_kernels {
    pack_t       pack; // what `dot` wants a query to go through first; nullptr: F32 as it is
    dot_t        dot[MAX_HEADS];
    accumulate_t accumulate[MAX_HEADS];
};

template<class READER>
constexpr type_kernels kernels_of = { nullptr,
    { dot_tile<READER, 1>, dot_tile<READER, 2>, dot_tile<READER, 3>, dot_tile<READER, 4> },
    { accumulate_tile<READER, 1>, accumulate_tile<READER, 2>, accumulate_tile<READER, 3>, accumulate_tile<READER, 4> },
};

#if defined(__AVX512VNNI__)
constexpr type_kernels kernels_of_q8_0 = { pack_bytes<bytes_q8_0>,
    { dot_tile_bytes<bytes_q8_0, 1>, dot_tile_bytes<bytes_q8_0, 2>, dot_tile_bytes<bytes_q8_0, 3>, dot_tile_bytes<bytes_q8_0, 4> },
    { accumulate_tile_bytes<1>, accumulate_tile_bytes<2>, accumulate_tile_bytes<3>, accumulate_tile_bytes<4> },
};
constexpr type_kernels kernels_of_q4_0 = { pack_bytes<bytes_q4_0>,
    { dot_tile_bytes<bytes_q4_0, 1>, dot_tile_bytes<bytes_q4_0, 2>, dot_tile_bytes<bytes_q4_0, 3>, dot_tile_bytes<bytes_q4_0, 4> },
    { accumulate_tile<reader_q4_0, 1>, accumulate_tile<reader_q4_0, 2>, accumulate_tile<reader_q4_0, 3>, accumulate_tile<reader_q4_0, 4> },
};
#endif

// nullptr: rows of this type or size go through a padded F32 copy
const type_kernels * direct_kernels(int type, int n_embd) {
    if (n_embd % LANES != 0) {
        return nullptr;
    }
    switch (type) {
        case GGML_TYPE_F32:  return &kernels_of<reader_f32>;
        case GGML_TYPE_F16:  return &kernels_of<reader_f16>;
        case GGML_TYPE_BF16: return &kernels_of<reader_bf16>;
#if defined(__AVX512VNNI__)
        case GGML_TYPE_Q8_0: return &kernels_of_q8_0;
        case GGML_TYPE_Q4_0: return &kernels_of_q4_0;
#else
        case GGML_TYPE_Q8_0: return &kernels_of<reader_q8_0>;
        case GGML_TYPE_Q4_0: return &kernels_of<reader_q4_0>;
#endif
    }
    return nullptr;
}

// Room that a thread keeps, so that a token allocates nothing. Not a std::vector: the linker keeps one copy of its functions for
// all instruction sets.
struct thread_room {
    float * data = nullptr;
    size_t size = 0;

    ~thread_room() { operator delete(data, std::align_val_t(64)); }

    // [n], what it held is lost
    float * of(size_t n) {
        if (n > size) {
            operator delete(data, std::align_val_t(64));
            data = nullptr;
            data = (float *) operator new(n*sizeof(float), std::align_val_t(64));
            size = n;
        }
        return data;
    }
};

// One of the two caches as a task reads it.
struct cache_side {
    const char * data;        // of the stream
    size_t cell_bytes, head_bytes;
    int    type, n_embd, n_step;
    const type_kernels * kernels;
    bool   direct;
    hylra_to_float_t to_float;
    float * copy;             // [padded(n_embd), TILE] if not direct
    size_t offset[2][TILE];   // of the cells of this tile and the next
    size_t copy_offset[TILE];
    int    now = 0;

    cache_side(const void * data, const uint64_t * nb, int stream, int type, int n_embd, hylra_to_float_t to_float, float * copy) :
        data((const char *) data + stream*nb[3]), cell_bytes(nb[1]), head_bytes(nb[2]), type(type), n_embd(n_embd),
        n_step((n_embd + LANES - 1)/LANES), kernels(direct_kernels(type, n_embd)), direct(kernels != nullptr), to_float(to_float), copy(copy) {
        if (!direct) {
            kernels = &kernels_of<reader_f32>;
        }
    }

    // Before the first tile with what it holds, then at each tile with the one that follows it.
    void advance(const block & next) {
        now ^= 1;
        find_rows(next, cell_bytes, offset[now ^ 1]);
    }

    // next_head: the KV head that is read in the next tile
    tile_rows rows(const block & b, int head_kv, int next_head) {
        const char * head = data + head_kv*head_bytes;
        return direct ? tile_rows{ head, offset[now], data + next_head*head_bytes, offset[now ^ 1], int(head_bytes) } : converted(b, head);
    }

    // stride of the copy: whole vectors, so that kernels need no tail
    tile_rows converted(const block & b, const char * head) {
        for (int i = 0; i < TILE; ++i) {
            float * row = copy + i*hylra_padded(n_embd);
            copy_offset[i] = i*hylra_padded(n_embd)*sizeof(float);
            memset(row, 0, sizeof(float)*hylra_padded(n_embd));
            const char * source = head + offset[now][i];
            if (i < b.n && to_float) {
                to_float(source, row, n_embd);
            } else if (i < b.n) {
                memcpy(row, source, sizeof(float)*n_embd);
            }
        }
        return { (const char *) copy, copy_offset, (const char *) copy, copy_offset, 0 };
    }
};

} // namespace
