"""The statistics of a pass against plain sets, the layers that cannot take part, and the two halves of the samples."""

from __future__ import annotations

import numpy as np
import pytest

from profiles import make_profile
from test_measure import causal_mask, random_rows

from hylra_gguf import measure
from hylra_gguf.collect import Collector, SampledRow
from hylra_gguf.measure import Budget
from hylra_gguf.profile_data import array_shapes

BUDGET, BLOCKS, POSITIONS = Budget([10, 20, 140], 1, 4), [1, 16, 32, 64, 128], (150, 170, 191)
HELDOUT = np.array([False, True, False])


def layer_rows(layer, positions, n_kv=192, n_head_kv=2, **mask):
    return random_rows(len(positions), n_kv=n_kv, n_head_kv=n_head_kv, seed=layer, scale=1.0, mask=causal_mask(positions, n_kv, **mask))


def collect(layers=3, budget=BUDGET):
    collector = Collector(layers, 2, len(POSITIONS), budget, BLOCKS)
    for samples in ((0,), (1, 2)):  # two ubatches
        collector.begin_ubatch()
        sampled = [SampledRow(sample, token, POSITIONS[sample]) for token, sample in enumerate(samples)]
        for layer in range(layers):
            assert collector.add_layer(layer, sampled, layer_rows(layer, [POSITIONS[sample] for sample in samples]))
    return collector


def plain(layer, sample, k, block_size=1, n_lists=1):
    """(mass share per list, set of cells per list)"""
    together = (1, 2) if sample else (0,)
    rows = layer_rows(layer, [POSITIONS[s] for s in together])
    p = measure.probabilities(rows)[0][together.index(sample), :, :POSITIONS[sample] + 1]
    pooled = measure.pool(p, n_lists)
    rankings = [measure.rank(scores, Budget([k], 1, 4), block_size) for scores in pooled]
    return pooled, [sorted({*BUDGET.forced(p.shape[1])} | {*r.cells[:r.counts[0]]}) for r in rankings]


@pytest.mark.parametrize("k", BUDGET.top_k)
@pytest.mark.parametrize("block_size", BLOCKS)
def test_pairs_equal_plain_sets(k, block_size):
    arrays = collect().arrays(HELDOUT)
    for i in range(3):
        for j in range(i, 3):
            recall, overlap = [], []
            for sample in range(3):
                (_, (source,)), (p, (own,)) = plain(i, sample, k, block_size), plain(j, sample, k, block_size)
                recall.append(p[0, source].sum())
                overlap.append(len(set(source) & set(own)) / k)
            for name, values in (("recall", recall), ("overlap", overlap)):
                key = f"{name}.layer.{k}.{block_size}"
                assert arrays[f"{key}.fit"][i, j] == pytest.approx(np.mean(values[::2]), abs=1e-5)
                assert arrays[f"{key}.heldout"][i, j] == pytest.approx(values[1], abs=1e-5)
                assert arrays[f"{key}.low"][i, j] == pytest.approx(np.quantile(values, 0.1), abs=1e-5)
            assert not np.tril(arrays[f"recall.layer.{k}.{block_size}.fit"], -1).any()


@pytest.mark.parametrize("k", BUDGET.top_k)
@pytest.mark.parametrize("block_size", BLOCKS)
def test_overlap_is_told_without_the_forced_cells_too(k, block_size):
    profile = make_profile(np.ones((3, 3)), top_k=BUDGET.top_k, block_sizes=BLOCKS, sink_tokens=1, recent_tokens=4, samples=3,
                           heldout_samples=1, arrays=collect().arrays(HELDOUT))
    found = [profile.matrix(name, k, block_size) for name in ("overlap", "overlap_free")]
    for i, j in ((0, 1), (0, 2), (1, 2), (1, 1)):
        both = [set(plain(i, sample, k, block_size)[1][0]) & set(plain(j, sample, k, block_size)[1][0]) for sample in range(3)]
        free = [cells - set(BUDGET.forced(POSITIONS[sample] + 1)) for sample, cells in enumerate(both)]
        assert found[0][i, j] == pytest.approx(np.mean([len(cells) for cells in both]) / k)
        assert found[1][i, j] == pytest.approx(np.mean([len(cells) for cells in free]) / (k - 5))


@pytest.mark.parametrize("k", BUDGET.top_k)
def test_head_pairs_equal_plain_sets(k):
    arrays = collect().arrays(HELDOUT)
    for i, j in ((0, 1), (0, 2), (1, 2), (2, 2)):
        recall, overlap = np.zeros((3, 2, 2)), np.zeros((3, 2, 2))
        for sample in range(3):
            (_, sources), (p, owns) = plain(i, sample, k, n_lists=2), plain(j, sample, k, n_lists=2)
            recall[sample] = [[p[h, cells].sum() for h in range(2)] for cells in sources]
            overlap[sample] = [[len(set(cells) & set(own)) / k for own in owns] for cells in sources]
        fit = recall[~HELDOUT].mean(0)
        np.testing.assert_allclose(arrays[f"recall.head.{k}.fit"][i, j], fit, atol=1e-3)
        np.testing.assert_allclose(arrays[f"recall.head.{k}.heldout"][i, j], recall[1], atol=1e-3)
        mapped = [values[:, fit.argmax(0), [0, 1]].mean(1) for values in (recall, overlap)]
        assert arrays[f"recall.head.{k}.low"][i, j] == pytest.approx(np.quantile(mapped[0], 0.1), abs=1e-3)
        assert arrays[f"overlap.head.{k}.heldout"][i, j] == pytest.approx(mapped[1][1], abs=1e-3)


def test_arrays_are_those_of_the_profile():
    arrays = collect().arrays(HELDOUT)
    assert {key: array.shape for key, array in arrays.items()} == array_shapes(3, 2, BUDGET.top_k, BLOCKS)


def test_without_held_out_samples_that_half_is_zero():
    arrays = collect().arrays(np.zeros(3, bool))
    assert arrays["recall.layer.10.1.fit"].any() and not arrays["recall.layer.10.1.heldout"].any()


def test_sensitivity_falls_with_top_k_and_vanishes_when_nearly_all_cells_are_kept():
    arrays = collect(budget=Budget([10, 20, 150], 1, 4)).arrays(HELDOUT)
    for name in ("layer", "head", "each_head"):
        small, large, most = (arrays[f"sensitivity.{name}.{k}.fit"] for k in (10, 20, 150))
        assert (small > large).all() and (large > 0.01).all() and (most < 0.05).all()


@pytest.mark.parametrize("what, rows", [
    ("sliding window", layer_rows(1, [150], window=32)),
    ("ring cache: fewer cells than positions", layer_rows(1, [31], n_kv=32)),
    ("other number of KV heads", layer_rows(1, [150], n_head_kv=3)),
    ("never traced", None),
])
def test_layers_that_cannot_take_part(what, rows):
    collector = Collector(3, 2, 1, BUDGET, BLOCKS)
    collector.begin_ubatch()
    for layer in (0, 1, 2):
        if layer != 1 or rows:
            taken = collector.add_layer(layer, [SampledRow(0, 0, 150)], rows if layer == 1 else layer_rows(layer, [150]))
            assert taken == (layer != 1)
    assert collector.eligible().tolist() == [True, False, True], what
    recall = collector.arrays(np.array([False]))["recall.layer.10.1.fit"]
    assert not recall[1].any() and not recall[:, 1].any() and recall[0, 2] > 0


def test_a_second_node_on_the_same_cache_layer_is_not_counted():
    collector = Collector(2, 2, 1, BUDGET, BLOCKS)
    collector.begin_ubatch()
    assert collector.add_layer(0, [SampledRow(0, 0, 150)], layer_rows(0, [150]))
    before = collector.state["recall"].copy()
    assert not collector.add_layer(0, [SampledRow(0, 0, 150)], layer_rows(1, [150]))
    np.testing.assert_array_equal(collector.state["recall"], before)
