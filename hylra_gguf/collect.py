"""Gathers per sample what `measure` says of each layer and pair of layers, and turns it into the arrays of a profile.

Memory: samples * budgets * (block sizes * layers^2 + layers^2 * KV heads^2) numbers, and for the rows of the ubatch at hand
top_k cells for each layer and list; nothing that grows with cells * tokens. A layer that does not see the whole past is left out.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from . import measure
from .measure import AttentionRows, Budget, Ranking
from .profile_data import HIGH_QUANTILE, LOW_QUANTILE, array_shapes

NAMES = ("recall", "overlap")


@dataclass
class SampledRow:
    sample: int  # index among all samples
    token: int  # index in the ubatch
    position: int


@dataclass(frozen=True)
class Row:
    """One sampled row of one layer."""

    layer: int
    sample: int
    p: np.ndarray  # [n_head, n_cells]
    sink_share: np.ndarray  # [n_head]
    dense: np.ndarray  # [n_head, n_embd_v]
    v: measure.Rows  # [n_cells or more, n_head_kv, n_embd_v]


@dataclass
class Lists:
    """Selections of one sample for one kind of list, as far as the layers have come."""

    cells: np.ndarray  # [n_layer, n_lists, free] int32
    counts: np.ndarray  # [n_layer, n_lists, n_top_k]
    layers: list[int] = field(default_factory=list)

    def add(self, layer: int, rankings: list[Ranking]) -> None:
        self.cells[layer], self.counts[layer] = [r.cells for r in rankings], [r.counts for r in rankings]
        self.layers.append(layer)


class Collector:
    """Takes the layers of a ubatch in order."""

    def __init__(self, layer_count: int, head_kv_count: int, samples: int, budget: Budget, block_sizes: list[int]) -> None:
        self.layer_count, self.head_kv_count, self.samples = layer_count, head_kv_count, samples
        self.budget, self.block_sizes = budget, block_sizes
        n, heads, n_k, n_b = layer_count, head_kv_count, len(budget.top_k), len(block_sizes)
        self.state = {  # every array begins with [samples]
            "seen": np.zeros((samples, n), bool),
            "importance": np.full((samples, n), np.nan, np.float32),
            "sparsity_layer": np.zeros((samples, n), np.float32),
            "sparsity_each_head": np.zeros((samples, n, heads), np.float32),
            "sensitivity_layer": np.zeros((samples, n_k, n), np.float32),
            "sensitivity_head": np.zeros((samples, n_k, n), np.float32),
            "sensitivity_each_head": np.zeros((samples, n_k, n, heads), np.float32),
        }
        for name in NAMES:
            self.state[name] = np.zeros((samples, n_k, n_b, n, n), np.float32)
            self.state[f"{name}_head"] = np.zeros((samples, n_k, n, n, heads, heads), np.float16)
        self.lists: dict[tuple[int, int], Lists] = {}  # (sample, block size; 0: lists per KV head) of this ubatch

    def begin_ubatch(self) -> None:
        self.lists.clear()

    # -- one layer

    def wants(self, layer: int, sampled: list[SampledRow], rows: AttentionRows) -> bool:
        """Not a sliding window, and not a second node of a layer."""
        if not 0 <= layer < self.layer_count or rows.k.shape[1] != self.head_kv_count:
            return False
        visible = rows.visible()
        whole = all(visible[r, :s.position + 1].all() and visible[r].sum() == s.position + 1 for r, s in enumerate(sampled))
        return whole and not self.state["seen"][[s.sample for s in sampled], layer].any()

    def add_layer(self, layer: int, sampled: list[SampledRow], rows: AttentionRows) -> bool:
        """rows holds the sampled tokens in the same order; False if the layer cannot take part."""
        if not self.wants(layer, sampled, rows):
            return False
        p, sink_share = measure.probabilities(rows)
        dense = measure.dense_output(p, rows.v)
        for r, s in enumerate(sampled):
            self.add_row(Row(layer, s.sample, p[r, :, :s.position + 1], sink_share[r], dense[r], rows.v))
        return True

    def add_row(self, row: Row) -> None:
        one, each = measure.pool(row.p, 1), measure.pool(row.p, self.head_kv_count)
        self.state["sparsity_layer"][row.sample, row.layer] = measure.sparsity(one)[0]
        self.state["sparsity_each_head"][row.sample, row.layer] = measure.sparsity(each)
        for b, block_size in enumerate(self.block_sizes):
            ranking = measure.rank(one[0], self.budget, block_size)
            self.compare(row, b, block_size, one[0], ranking)
            if block_size == 1:
                self.cut(row, "sensitivity_layer", [ranking])
        rankings = [measure.rank_cells(scores, self.budget) for scores in each]
        self.compare_heads(row, each, rankings)
        self.cut(row, "sensitivity_head", rankings)
        self.state["seen"][row.sample, row.layer] = True

    def cut(self, row: Row, name: str, rankings: list[Ranking]) -> None:
        """Sensitivity for every top_k, of the layer and, with a list per KV head, of each head."""
        groups = measure.nested_cells(rankings, self.budget.forced(row.p.shape[1]))
        each_head = (self.head_kv_count, -1, row.dense.shape[-1])
        for i, out in enumerate(measure.sparse_outputs(row.p, row.sink_share, row.v, groups)):
            self.state[name][row.sample, i, row.layer] = measure.rnmse(row.dense, out)
            if name == "sensitivity_head":
                by_head = measure.rnmse(row.dense.reshape(each_head), out.reshape(each_head), axis=(1, 2))
                self.state["sensitivity_each_head"][row.sample, i, row.layer] = by_head

    def lists_of(self, sample: int, block_size: int, n_lists: int) -> Lists:
        if (sample, block_size) not in self.lists:
            shape, free = (self.layer_count, n_lists), int(self.budget.free[-1])
            self.lists[sample, block_size] = Lists(np.zeros((*shape, free), np.int32), np.zeros((*shape, len(self.budget.top_k)), int))
        return self.lists[sample, block_size]

    def compare(self, row: Row, b: int, block_size: int, scores: np.ndarray, ranking: Ranking) -> None:
        """Recall and overlap on the lists of each earlier layer and on its own."""
        lists = self.lists_of(row.sample, block_size, 1)
        lists.add(row.layer, [ranking])
        i = lists.layers
        found = measure.shared(scores / scores.sum(), ranking, lists.cells[i, 0], lists.counts[i, 0], self.budget)
        for name, values in zip(NAMES, found):
            self.state[name][row.sample, :, b, i, row.layer] = values

    def compare_heads(self, row: Row, pooled: np.ndarray, rankings: list[Ranking]) -> None:
        """The same of each KV head on each head's list of the earlier layers."""
        lists = self.lists_of(row.sample, 0, self.head_kv_count)
        lists.add(row.layer, rankings)
        i, n_k = lists.layers, len(self.budget.top_k)
        cells, counts = lists.cells[i].reshape(-1, lists.cells.shape[-1]), lists.counts[i].reshape(-1, n_k)
        for head, (scores, ranking) in enumerate(zip(pooled, rankings)):
            found = measure.shared(scores / scores.sum(), ranking, cells, counts, self.budget)
            for name, values in zip(NAMES, found):
                by_layer = values.reshape(len(i), self.head_kv_count, n_k).transpose(0, 2, 1)
                self.state[f"{name}_head"][row.sample, :, i, row.layer, :, head] = by_layer

    # -- the result

    def eligible(self) -> np.ndarray:
        return self.state["seen"].all(0)

    def arrays(self, heldout: np.ndarray) -> dict[str, np.ndarray]:
        """Those of profile_data.array_shapes; heldout [samples] bool"""
        return Summary(self, heldout).arrays()


class Summary:
    """Means of both halves and quantiles over the samples of a Collector."""

    def __init__(self, collector: Collector, heldout: np.ndarray) -> None:
        self.of, self.heldout, self.found = collector, np.asarray(heldout, bool), {}
        self.layers = collector.eligible().astype(float)
        self.pairs = np.triu(np.outer(self.layers, self.layers))

    def put(self, key: str, samples: np.ndarray, mask: np.ndarray | float, means_only: bool = False) -> None:
        """samples [samples, ...]; mask has the first dimensions of one sample"""
        mask = np.reshape(mask, np.shape(mask) + (1,) * (samples.ndim - 1 - np.ndim(mask)))
        for half, chosen in (("fit", ~self.heldout), ("heldout", self.heldout)):
            mean = samples[chosen].mean(0, dtype=np.float64) if chosen.any() else np.zeros(samples.shape[1:])
            self.found[f"{key}.{half}"] = mean * mask
        if not means_only:
            for name, q in (("low", LOW_QUANTILE), ("high", HIGH_QUANTILE)):
                self.found[f"{key}.{name}"] = np.quantile(samples, q, axis=0) * mask

    def arrays(self) -> dict[str, np.ndarray]:
        of, state = self.of, self.of.state
        for i, k in enumerate(of.budget.top_k):
            for b, block_size in enumerate(of.block_sizes):
                for name in NAMES:
                    self.put(f"{name}.layer.{k}.{block_size}", state[name][:, i, b], self.pairs)
            self.put_heads(i, k)
            for lists in ("layer", "head"):
                self.put(f"sensitivity.{lists}.{k}", state[f"sensitivity_{lists}"][:, i], self.layers)
            self.put(f"sensitivity.each_head.{k}", state["sensitivity_each_head"][:, i], self.layers, means_only=True)
        self.put("sparsity.layer", state["sparsity_layer"], self.layers)
        self.put("sparsity.head", state["sparsity_each_head"].mean(-1), self.layers)
        self.put("sparsity.each_head", state["sparsity_each_head"], self.layers, means_only=True)
        self.put("importance", state["importance"], 1.0)
        return {key: self.found[key] for key in array_shapes(of.layer_count, of.head_kv_count, of.budget.top_k, of.block_sizes)}

    def put_heads(self, i: int, k: int) -> None:
        """Of pairs of heads all means, and of the layer its mean over heads under the map that the fit half prefers."""
        recall = self.of.state["recall_head"][:, i]
        chosen = recall[~self.heldout].mean(0, dtype=np.float64).argmax(2)  # [n_layer, n_layer, head]
        for name in NAMES:
            values = self.of.state[f"{name}_head"][:, i]
            mapped = np.take_along_axis(values, chosen[None, :, :, None], axis=3)[:, :, :, 0].mean(-1, dtype=np.float32)
            self.put(f"{name}.head.{k}", mapped, self.pairs)
        self.put(f"recall.head.{k}", recall, self.pairs, means_only=True)
