"""Numerics of one attention node against plain loops, the choice of cells against the engine's own, and reading the trace."""

from __future__ import annotations

import ctypes
import math
from types import SimpleNamespace

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st

from hylra_gguf import attention_trace, engine, measure
from hylra_gguf.errors import ProfileError
from hylra_gguf.measure import AttentionRows, Budget


def random_rows(n_rows=2, n_head=6, n_head_kv=2, n_kv=40, n_embd_k=8, n_embd_v=5, seed=0, **extra) -> AttentionRows:
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal(shape).astype(np.float32) for shape in
               [(n_rows, n_head, n_embd_k), (n_kv, n_head_kv, n_embd_k), (n_kv, n_head_kv, n_embd_v)])
    return AttentionRows(q=q, k=k, v=v, **{"scale": 0.5, **extra})


def causal_mask(positions, n_kv, alibi=False, window=None) -> np.ndarray:
    cell, row = np.arange(n_kv)[None], np.array(positions)[:, None]
    hidden = (cell > row) | (cell <= row - (window or n_kv + 1))
    return np.where(hidden, -np.inf, -np.abs(row - cell) if alibi else 0).astype(np.float32)


def plain_attention(rows, r, h, slope, cells=None):
    """float64 loops over one row and head: (probability of each cell, output)"""
    g = h // (rows.q.shape[1] // rows.k.shape[1])
    weights = {}
    for j in range(len(rows.k)) if cells is None else cells:
        s = rows.scale * float(np.dot(rows.q[r, h].astype(float), rows.k[j, g].astype(float)))
        s = rows.softcap * math.tanh(s / rows.softcap) if rows.softcap else s
        weights[j] = math.exp(s + (slope * float(rows.mask[r, j]) if rows.mask is not None else 0))
    total = sum(weights.values()) + (math.exp(rows.sinks[h]) if rows.sinks is not None else 0)
    p = {j: w / total for j, w in weights.items()}
    return p, sum(p[j] * rows.v[j, g].astype(float) for j in p)


CASES = {
    "plain": {},
    "causal": {"mask": causal_mask([30, 39], 40)},
    "softcap": {"softcap": 2.0},
    "alibi, heads no power of two": {"mask": causal_mask([30, 39], 40, alibi=True), "max_bias": 8.0},
    "sinks": {"sinks": np.linspace(-1, 3, 6).astype(np.float32)},
    "all": {"mask": causal_mask([20, 39], 40, alibi=True), "max_bias": 4.0, "softcap": 3.0, "sinks": np.ones(6, np.float32)},
}
SLOPES_OF_6_HEADS = {0.0: [1] * 6, 8.0: [1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 2, 1 / 8],
                     4.0: [1 / 2, 1 / 4, 1 / 8, 1 / 16, 2 ** -0.5, 2 ** -1.5]}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("chunk_cells", [7, 4096])
def test_attention_equals_plain_loops(case, chunk_cells, monkeypatch):
    monkeypatch.setattr(measure, "CHUNK_CELLS", chunk_cells)
    rows = random_rows(**CASES[case])
    p, sink_share = measure.probabilities(rows)
    cells = np.stack([np.arange(0, 20, 2), np.arange(1, 20, 2)])  # one list per KV head, visible in every case
    dense = measure.dense_output(p, rows.v)
    for r in range(2):
        half, sparse = measure.sparse_outputs(p[r], sink_share[r], rows.v, [cells[:, :4], cells[:, 4:]])
        shared, = measure.sparse_outputs(p[r], sink_share[r], rows.v, [cells[:1]])
        for h, slope in enumerate(SLOPES_OF_6_HEADS[rows.max_bias]):
            plain_p, plain_out = plain_attention(rows, r, h, slope)
            np.testing.assert_allclose(p[r, h], [plain_p[j] for j in range(40)], atol=1e-6)
            np.testing.assert_allclose(dense[r, h], plain_out, atol=2e-6)
            np.testing.assert_allclose(sparse[h], plain_attention(rows, r, h, slope, cells[h // 3])[1], atol=2e-6)
            np.testing.assert_allclose(half[h], plain_attention(rows, r, h, slope, cells[h // 3, :4])[1], atol=2e-6)
            np.testing.assert_allclose(shared[h], plain_attention(rows, r, h, slope, cells[0])[1], atol=2e-6)
        np.testing.assert_allclose(p[r].sum(-1) + sink_share[r], 1, atol=1e-6)


# -- selection --------------------------------------------------------------------------------------------------------

FORCED = 2.0  # HYLRA_SCORE_FORCED of hylra-attn.h, added to a forced cell's score


def engine_choice(scores, top_k, block_size, sink, recent):
    """The cells that the engine's scalar twin chooses"""
    marked = scores.astype(np.float32)
    marked[:sink] += FORCED
    marked[len(marked) - recent:] += FORCED
    out = engine.ffi.new("int32_t[]", top_k)
    n = engine.lib.hylra_test_choose(b"ref", engine.ffi.from_buffer("float[]", marked), len(marked), top_k, block_size, out)
    return sorted(out[0:n])


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10 ** 6), st.integers(100, 400), st.sampled_from([1, 16, 32, 64, 128]), st.integers(0, 9), st.integers(0, 40))
def test_ranking_chooses_the_cells_of_the_engine(seed, n_cells, block_size, sink, recent):
    scores = np.random.default_rng(seed).random(n_cells).astype(np.float32) ** 4
    engine.activate()
    budget = Budget(sorted({sink + recent + extra for extra in (0, 7, 16, 33)}), sink, recent)
    ranking = measure.rank(scores, budget, block_size)
    for top_k, count in zip(budget.top_k, ranking.counts):
        cells = [*budget.forced(n_cells), *ranking.cells[:count]]
        assert sorted(cells) == engine_choice(scores, top_k, block_size, sink, recent)


@pytest.mark.parametrize("block_size", [1, 16])
def test_shared_counts_mass_and_cells(block_size):
    rng, budget = np.random.default_rng(3), Budget([20, 45, 70], 2, 5)
    scores = rng.random((4, 200)) ** 3
    ranks = [measure.rank(row, budget, block_size) for row in scores]
    recall, overlap = measure.shared(scores[0] / scores[0].sum(), ranks[0], np.stack([r.cells for r in ranks]),
                                     np.stack([r.counts for r in ranks]), budget)
    for i, k in enumerate(budget.top_k):
        sets = [set(budget.forced(200)) | set(r.cells[:r.counts[i]]) for r in ranks]
        for m, cells in enumerate(sets):
            assert recall[m, i] == pytest.approx(scores[0, sorted(cells)].sum() / scores[0].sum(), abs=1e-6)
            assert overlap[m, i] == pytest.approx(len(cells & sets[0]) / k)


def test_nested_cells_grow_to_each_budget():
    budget = Budget([8, 20], 2, 3)
    rankings = [measure.rank_cells(row, budget) for row in np.random.default_rng(4).random((2, 60))]
    first, more = measure.nested_cells(rankings, budget.forced(60))
    for row, ranking in enumerate(rankings):
        assert set(first[row]) == {0, 1, 57, 58, 59} | set(ranking.cells[:3])
        assert set(more[row]) == set(ranking.cells[3:15])


def test_pool_is_the_mean_over_heads_or_groups():
    p = np.arange(24.0).reshape(6, 4)
    np.testing.assert_array_equal(measure.pool(p, 1), [p.mean(0)])
    np.testing.assert_array_equal(measure.pool(p, 2), [p[:3].mean(0), p[3:].mean(0)])


def test_sparsity_is_the_smallest_share_of_cells_with_nine_tenths_of_the_mass():
    one_cell, even = np.array([0.95, 0.05, 0, 0, 0, 0, 0, 0, 0, 0]), np.full(10, 0.1)
    np.testing.assert_allclose(measure.sparsity(np.stack([one_cell, even * 7])), [0.1, 0.9])


def test_rnmse():
    assert measure.rnmse(np.array([3.0, 4.0]), np.array([3.0, 3.0])) == pytest.approx(0.2)
    assert measure.rnmse(np.zeros(2), np.zeros(2)) == 0
    np.testing.assert_allclose(measure.rnmse(np.array([[3.0, 4.0], [1, 0]]), np.array([[3.0, 3.0], [0, 0]]), (1,)), [0.2, 1])


# -- the trace --------------------------------------------------------------------------------------------------------


def host_buffer(pointer, size_bytes):
    return (ctypes.c_char * size_bytes).from_address(pointer)


def fake_trace(q, k_bytes, v_bytes, types, mask, sinks=None, layer=3):
    """The struct as the engine fills it: arrays are numpy order, [n_head, n_tokens, d] and [n_kv, n_head_kv, bytes]."""
    n_head, n_tokens, n_embd_k = q.shape
    n_kv, n_head_kv, _ = k_bytes.shape
    mask16 = mask.astype(np.float16)
    keep = (q, k_bytes, v_bytes, mask16, sinks)
    return SimpleNamespace(
        keep=keep, layer=layer, type_k=types[0], type_v=types[1], n_embd_k=n_embd_k, n_embd_v=64, n_head=n_head,
        n_head_kv=n_head_kv, n_kv=n_kv, n_tokens=n_tokens, n_stream=1, scale=0.125, max_bias=0.0, softcap=0.0,
        q=q.ctypes.data, k=k_bytes.ctypes.data, v=v_bytes.ctypes.data, mask=mask16.ctypes.data,
        sinks=sinks.ctypes.data if sinks is not None else 0,
        q_nb=[4, q.strides[1], q.strides[0], 0], k_nb=[0, k_bytes.strides[0], k_bytes.strides[1], 0],
        v_nb=[0, v_bytes.strides[0], v_bytes.strides[1], 0], mask_nb=[2, mask16.strides[0], 0, 0])


def cache_view(values, kind):
    """A layer's rows inside a wider cache, so that strides are not those of a packed array: (view, values read back)"""
    raw = quantize(values, kind).view(np.uint8)
    wide = np.zeros((*raw.shape[:2], raw.shape[2] * 2), np.uint8)
    wide[..., :raw.shape[2]] = raw
    return wide[..., :raw.shape[2]], dequantize(raw, kind).reshape(values.shape)


@pytest.mark.parametrize("name", attention_trace.KV_TYPES.values())
def test_rows_from_trace(name):
    rng = np.random.default_rng(2)
    kind = GGMLQuantizationType[name]
    q = rng.standard_normal((4, 10, 64)).astype(np.float32)
    (k, k_read), (v, v_read) = (cache_view(rng.standard_normal((48, 2, 64)).astype(np.float32), kind) for _ in "kv")
    mask, sinks = causal_mask(range(20, 30), 48), np.arange(4, dtype=np.float32)
    trace = fake_trace(q, k, v, (int(kind), int(kind)), mask, sinks)
    rows = attention_trace.rows_from_trace(trace, [2, 9], 30, host_buffer)
    np.testing.assert_array_equal(rows.q, q[:, [2, 9]].transpose(1, 0, 2))
    np.testing.assert_array_equal(rows.k[:], k_read[:30])
    np.testing.assert_array_equal(rows.k[np.array([[3, 9], [29, 1]]), [[0], [1]]], [k_read[[3, 9], 0], k_read[[29, 1], 1]])
    np.testing.assert_array_equal(rows.v[5:20], v_read[5:20])
    np.testing.assert_array_equal(rows.mask, mask[[2, 9], :30])
    np.testing.assert_array_equal(rows.sinks, sinks)
    assert rows.scale == 0.125


@pytest.mark.parametrize("change, words", [({"type_k": 6}, "KV cache type 6"), ({"n_stream": 2}, "2 streams")])
def test_a_trace_that_cannot_be_read(change, words):
    zeros = np.zeros((48, 2, 128), np.uint8)
    trace = fake_trace(np.zeros((4, 10, 64), np.float32), zeros, zeros, (1, 1), causal_mask(range(10), 48))
    vars(trace).update(change)
    with pytest.raises(ProfileError, match=words):
        attention_trace.rows_from_trace(trace, [0], 48, host_buffer)
