// Rows of quantised blocks pass through shared memory. Blocks of 34 or 18 bytes are aligned to two, and a lane that loads its octets two bytes at a time takes
// five instructions for each, every one of which looks up eight rows. Here a warp copies whole rows, its next tile's while it computes one: 172 -> 69 us for
// dense attention of Llama-3.1-8B's shape to 65536 cells of Q8_0, 132 -> 60 of Q4_0 (H200). Other types are loaded from where they are.
#pragma once

#include "hylra-cuda-rows.cuh"

// Room for the rows of one side (K or V) of a tile. Rows begin an odd number of 16 bytes apart, so eight of them in different banks, and with the bytes that
// lie before them in their first 16: a row keeps its alignment.
template <int TYPE, int EMBD> struct hylra_stage_shape {
    static constexpr bool USED       = TYPE == GGML_TYPE_Q8_0 || TYPE == GGML_TYPE_Q4_0;
    static constexpr int  ROW_BYTES  = EMBD/32*(TYPE == GGML_TYPE_Q8_0 ? 34 : 18);
    static constexpr int  PITCH      = ((ROW_BYTES + 15)/16 | 1)*16;
    static constexpr int  TILE_BYTES = USED ? HYLRA_CUDA_TILE*PITCH : 16;
    static constexpr int  STAGES     = EMBD <= 128 ? 2 : 1; // static shared memory ends at 48 KiB
    static constexpr int  UNIT       = (ROW_BYTES & -ROW_BYTES) < 16 ? ROW_BYTES & -ROW_BYTES : 16; // rows begin at its multiples (hylra_cuda_fits)
    static_assert(!USED || ROW_BYTES + 16 - UNIT <= PITCH, "a row and what lies before it");
};

// One side of the rows that a warp reads: K or V of a KV head
template <int TYPE, int EMBD> struct hylra_side {
    using shape = hylra_stage_shape<TYPE, EMBD>;
    const uint8_t * base;
    uint64_t nb; // from cell to cell
    int n_octet, row_bytes;
    uint8_t * room; // [STAGES][TILE_BYTES] of shared memory

    __device__ __forceinline__ hylra_side(const void * data, const uint64_t (&nb)[4], int n_embd, int head_kv, int stream, uint8_t * room) :
        base((const uint8_t *) data + head_kv*nb[2] + stream*nb[3]), nb(nb[1]), n_octet(n_embd/8), row_bytes(n_embd/32*(TYPE == GGML_TYPE_Q8_0 ? 34 : 18)), room(room) {}

    static __device__ __forceinline__ int before(const uint8_t * row) { return int(uint64_t(row)%16); }

    // Starts to copy the rows of the cells that there are: cell[i] of the lanes of g is the tile's row g + 8*i.
    __device__ __forceinline__ void copy(int slot, const int (&cell)[2]) const {
        constexpr int CHUNKS = shape::PITCH/16, N = HYLRA_CUDA_TILE*CHUNKS;
        const int lane = threadIdx.x%32;
        uint8_t * to = room + slot*shape::TILE_BYTES;
#pragma unroll
        for (int first = 0; first < N; first += 32) {
            const int i = first + lane, row = i/CHUNKS, chunk = i%CHUNKS;
            const int low = __shfl_sync(0xFFFFFFFFu, cell[0], row%8*4), high = __shfl_sync(0xFFFFFFFFu, cell[1], row%8*4), of_row = row < 8 ? low : high;
            const uint8_t * from = base + of_row*nb;
            const int n_byte = before(from) + row_bytes - chunk*16;
            if (row < HYLRA_CUDA_TILE && of_row >= 0 && n_byte > 0) {
                hylra_copy_async((uint4 *) (to + row*shape::PITCH) + chunk, (const uint4 *) (from - before(from)) + chunk, n_byte < 16 ? n_byte : 16);
            }
        }
    }

    // Of row `row` of the tile in `slot`; zeros if it has no cell
    __device__ __forceinline__ uint4 octet(int slot, int row, int cell, int octet) const {
        const uint8_t * at = base + cell*nb;
        const bool present = cell >= 0 && octet < n_octet;
        if constexpr (shape::USED) {
            return hylra_octet_of_blocks<TYPE>(room + slot*shape::TILE_BYTES + row*shape::PITCH + before(at), octet, present);
        } else {
            return hylra_octet<TYPE, true>(at, octet, present);
        }
    }
};

// K and, with two SIDES, V of a KV head, as the warps of a block read them
template <int TYPE, int EMBD, int SIDES, int N_STAGE> struct hylra_sides {
    static constexpr bool STAGED = hylra_stage_shape<TYPE, EMBD>::USED;
    static constexpr int  STAGES = N_STAGE, SIDE_BYTES = STAGES*hylra_stage_shape<TYPE, EMBD>::TILE_BYTES, WARP_BYTES = SIDES*SIDE_BYTES;
    hylra_side<TYPE, EMBD> k, v;

    // room: [WARP_BYTES] of each warp
    __device__ __forceinline__ hylra_sides(const hylra_attn & a, int head_kv, int stream, uint8_t * room) :
        k(a.k, a.k_nb, a.n_embd_k, head_kv, stream, room + int(threadIdx.x)/32*WARP_BYTES),
        v(a.v, a.v_nb, a.n_embd_v, head_kv, stream, room + int(threadIdx.x)/32*WARP_BYTES + WARP_BYTES - SIDE_BYTES) {}

    __device__ __forceinline__ void copy(int slot, const int (&cell)[2]) const {
        k.copy(slot, cell);
        if constexpr (SIDES > 1) {
            v.copy(slot, cell);
        }
        hylra_copy_commit();
    }
};

// Shared bytes that hold the rows of tiles and, at the end, outputs of warps
HYLRA_HD constexpr int hylra_room_bytes(int stage_bytes, int merge_bytes) { return stage_bytes > merge_bytes ? stage_bytes : merge_bytes; }
