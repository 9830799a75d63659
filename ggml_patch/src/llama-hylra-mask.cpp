// Fills the KQ mask of a sparse decode step from kept rows; the result is llama.cpp's own, bit for bit.
//
// llama.cpp asks every cell at every step whether it holds the token's sequence: 0.5M cells of 36 bytes take a millisecond on one thread,
// while the GPU waits. A kept row (hylra-mask-rows.h) is copied instead, and the cells of later positions, which lie at the end of
// the sequence's ordered positions, are hidden.
#include "llama-hylra.h"

#include "llama-batch.h"
#include "llama-kv-cells.h"

#include <cstring>

// In op_params of the mask, a leaf that no operation reads them of
constexpr int     WANTED_PARAM = 0, KEPT_PARAM = 1;
constexpr int32_t WANTED = 0x68796c72;

void llama_hylra_want_kept_mask(ggml_tensor * mask) {
    if (mask->op == GGML_OP_NONE) {
        mask->op_params[WANTED_PARAM] = WANTED;
    }
}

// Later positions, and with 2D positions (M-RoPE) those of the same position that lie further on in the picture.
static void hide_later(uint16_t * row, int64_t n_kv, const llama_kv_cells & cells, const llama_ubatch & ubatch, uint32_t i) {
    const llama_pos pos = ubatch.pos[i];
    const bool      flat = !ubatch.is_pos_2d();
    const llama_pos x = flat ? 0 : ubatch.pos[i + ubatch.n_tokens*2], y = flat ? 0 : ubatch.pos[i + ubatch.n_tokens];
    const auto & by_pos = cells.seq_pos_get(ubatch.seq_id[i][0]);
    for (auto it = by_pos.lower_bound({ pos, 0 }); it != by_pos.end(); ++it) {
        const bool later = it->first > pos || (!flat && cells.ext_get(it->second).is_2d_gt(x, y));
        if (later && it->second < n_kv) {
            row[it->second] = hylra_mask_rows::HIDDEN;
        }
    }
}

bool llama_hylra_kq_mask(ggml_tensor * mask, const llama_ubatch & ubatch, std::vector<llama_kv_cells> & v_cells,
                         const std::vector<uint32_t> & seq_to_stream) {
    if (mask->op_params[WANTED_PARAM] != WANTED || mask->type != GGML_TYPE_F16) {
        return false;
    }
    const int64_t n_kv = mask->ne[0];
    mask->op_params[KEPT_PARAM] = 0;
    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        const llama_seq_id seq = ubatch.seq_id[i][0];
        llama_kv_cells & cells = v_cells.at(seq_to_stream[seq]);
        const uint16_t * kept = cells.hylra_rows.row(seq, cells.size(), [&](uint32_t cell) { return cells.seq_has(cell, seq); });
        if (!kept) {
            return false;
        }
        uint16_t * row = (uint16_t *) mask->data + n_kv*i;
        memcpy(row, kept, n_kv*sizeof(*row));
        hide_later(row, n_kv, cells, ubatch, i);
    }
    mask->op_params[KEPT_PARAM] = 1;
    return true;
}
