// Rows of the KQ mask that are kept up to date as cells of a KV cache come and go, so that a step need not read every cell anew.
// A member of llama_kv_cells: its two helpers that every change of a cell's sequences goes through report here.
#pragma once

#include <cstdint>
#include <vector>

class hylra_mask_rows {
public:
    static constexpr uint16_t SEEN = 0, HIDDEN = 0xFC00; // F16 0 and -inf

    void enter(int32_t seq, uint32_t cell) { if (has(seq)) { rows[seq][cell] = SEEN; } }
    void leave(int32_t seq, uint32_t cell) { if (has(seq)) { rows[seq][cell] = HIDDEN; } }
    void clear() { rows.clear(); n_row = 0; }

    // F16 [n_cell] whether a cell holds the sequence; the first call for a sequence asks holds(cell) of every cell.
    // nullptr: too many sequences have a row.
    template <typename T>
    const uint16_t * row(int32_t seq, uint32_t n_cell, T && holds) {
        if (!has(seq)) {
            if (n_row == MAX_ROWS) {
                return nullptr;
            }
            rows.resize(rows.size() > size_t(seq) ? rows.size() : size_t(seq) + 1);
            for (uint32_t cell = 0; cell < n_cell; ++cell) {
                rows[seq].push_back(holds(cell) ? SEEN : HIDDEN);
            }
            n_row += 1;
        }
        return rows[seq].data();
    }

private:
    static constexpr int MAX_ROWS = 64; // bounds the memory: two bytes per cell and row

    bool has(int32_t seq) const { return size_t(seq) < rows.size() && !rows[seq].empty(); }

    std::vector<std::vector<uint16_t>> rows; // [sequence][cell]; empty: never asked for
    int n_row = 0;
};
