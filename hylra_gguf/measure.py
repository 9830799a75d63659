"""What one attention layer looks at, for sampled query rows: probabilities, the cells in order of use, and what leaving cells out costs.

Plain numpy in float32 from the traced inputs. The engine's own attention output is never the reference: with F16 V it may be
accumulated in FP16, which is off by whole percents at 32K cells. Cells must be positions, as they are in one appended sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

MASS_SHARE = 0.9  # of sparsity
CHUNK_CELLS = 4096  # cache rows held as float32 at a time


class Rows(Protocol):
    """A numpy array, or cache rows that become float32 when indexed"""

    shape: tuple[int, ...]

    def __getitem__(self, index) -> np.ndarray: ...


@dataclass(frozen=True)
class AttentionRows:
    """Some query rows of one layer and the cells they may see."""

    q: np.ndarray  # [n_rows, n_head, n_embd_k] float32
    k: Rows  # [n_kv, n_head_kv, n_embd_k]
    v: Rows  # [n_kv, n_head_kv, n_embd_v]
    mask: np.ndarray | None = None  # [n_rows, n_kv]: -inf hides a cell; otherwise 0, or with ALiBi minus the distance
    sinks: np.ndarray | None = None  # [n_head] logits that join the denominator only
    scale: float = 1.0
    max_bias: float = 0.0
    softcap: float = 0.0

    def visible(self) -> np.ndarray:
        """[n_rows, n_kv] bool"""
        if self.mask is None:
            return np.ones((len(self.q), self.k.shape[0]), bool)
        return self.mask != -np.inf


def chunks(n_cells: int) -> list[slice]:
    return [slice(start, min(start + CHUNK_CELLS, n_cells)) for start in range(0, n_cells, CHUNK_CELLS)]


# -- products ---------------------------------------------------------------------------------------------------------


def step_below_threads(m: int, n: int) -> int:
    """Length of the third dimension that keeps a product on one thread in OpenBLAS (m * n * k up to 2^18, 9216 for vectors).

    Its threads would fight the engine's, which spin while the callback runs: 270 ms instead of 1 ms for p @ v on two busy cores.
    """
    return max(1, ((1 << 18) if min(m, n) > 1 else 9216) // (m * n))


def sum_product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a [..., m, k] @ b [..., k, n] for long k, in float32"""
    step = step_below_threads(a.shape[-2], b.shape[-1])
    pieces = (np.matmul(a[..., i:i + step].astype(np.float32, copy=False), b[..., i:i + step, :]) for i in range(0, a.shape[-1], step))
    return sum(pieces, np.float32(0))


def wide_product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a [..., m, k] @ b [..., k, n] for long n, in float32"""
    step = step_below_threads(a.shape[-2], a.shape[-1])
    return np.concatenate([np.matmul(a, b[..., i:i + step]) for i in range(0, b.shape[-1], step)], axis=-1)


# -- probabilities ----------------------------------------------------------------------------------------------------


def alibi_slopes(n_head: int, max_bias: float) -> np.ndarray:
    """[n_head]; the two geometric series of llama.cpp, the second for heads beyond the last power of two."""
    if max_bias <= 0:
        return np.ones(n_head, np.float32)
    n_head_log2 = 1 << (n_head.bit_length() - 1)
    first, second = 2.0 ** (-max_bias / n_head_log2), 2.0 ** (-max_bias / 2 / n_head_log2)
    slopes = [first ** (h + 1) if h < n_head_log2 else second ** (2 * (h - n_head_log2) + 1) for h in range(n_head)]
    return np.array(slopes, np.float32)


def logits(rows: AttentionRows) -> np.ndarray:
    """[n_rows, n_head, n_kv], hidden cells -inf"""
    n_rows, n_head, n_embd_k = rows.q.shape
    n_kv, n_head_kv, _ = rows.k.shape
    q = rows.q.reshape(n_rows, n_head_kv, n_head // n_head_kv, n_embd_k).transpose(1, 0, 2, 3).reshape(n_head_kv, -1, n_embd_k)
    parts = [wide_product(q, rows.k[chunk].transpose(1, 2, 0)) for chunk in chunks(n_kv)]
    s = np.concatenate(parts, axis=-1) * np.float32(rows.scale)  # [n_head_kv, n_rows * group, n_kv]
    s = s.reshape(n_head_kv, n_rows, -1, n_kv).transpose(1, 0, 2, 3).reshape(n_rows, n_head, n_kv)
    if rows.softcap:
        s = np.float32(rows.softcap) * np.tanh(s / np.float32(rows.softcap))
    if rows.mask is not None:
        s = s + alibi_slopes(n_head, rows.max_bias)[None, :, None] * rows.mask[:, None, :]
    return s


def probabilities(rows: AttentionRows) -> tuple[np.ndarray, np.ndarray]:
    """p [n_rows, n_head, n_kv] over the cells, and the share that an attention sink takes, [n_rows, n_head]."""
    s = logits(rows)
    sinks = np.full(s.shape[1], -np.inf, np.float32) if rows.sinks is None else rows.sinks
    top = np.maximum(s.max(-1), sinks)
    p = np.exp(s - top[..., None])
    sink_share = np.exp(sinks - top)
    total = p.sum(-1) + sink_share
    p /= total[..., None]
    return p, sink_share / total


# -- selection --------------------------------------------------------------------------------------------------------


def pool(p: np.ndarray, n_lists: int) -> np.ndarray:
    """[n_head, n_kv] -> [n_lists, n_kv]: mean over all heads (1 list) or over each KV head's group (n_head_kv lists)."""
    return p.reshape(n_lists, -1, p.shape[-1]).mean(1)


@dataclass(frozen=True)
class Budget:
    """Which cells are always kept and how many in all; the choice is that of ggml_patch/src/hylra-choose.cpp."""

    top_k: list[int]  # ascending, each below the cells that a row sees
    sink_tokens: int
    recent_tokens: int

    @property
    def free(self) -> np.ndarray:
        """[n_top_k] cells beside the forced ones"""
        return np.array(self.top_k) - self.sink_tokens - self.recent_tokens

    def forced(self, n_cells: int) -> np.ndarray:
        return np.concatenate([np.arange(self.sink_tokens), np.arange(n_cells - self.recent_tokens, n_cells)])


@dataclass(frozen=True)
class Ranking:
    """The choice of one list for every top_k at once: each takes the forced cells and a prefix of the same order."""

    cells: np.ndarray  # [largest free budget] int32, best first; beyond the last count any cell
    counts: np.ndarray  # [n_top_k] cells that each budget takes


def rank_cells(scores: np.ndarray, budget: Budget) -> Ranking:
    """scores [n_cells]"""
    end, most = len(scores) - budget.recent_tokens, int(budget.free[-1])
    free = scores[budget.sink_tokens:end]
    best = np.argpartition(free, len(free) - most)[len(free) - most:] if most else np.zeros(0, int)
    order = best[np.argsort(-free[best], kind="stable")]
    return Ranking((order + budget.sink_tokens).astype(np.int32), budget.free)


def rank_blocks(scores: np.ndarray, budget: Budget, block_size: int) -> Ranking:
    """Blocks by their summed score; each budget takes whole ones until the first that does not fit."""
    first, end = budget.sink_tokens, len(scores) - budget.recent_tokens
    blocks = np.arange(first // block_size, -(-end // block_size)) * block_size
    starts, ends = np.maximum(blocks, first), np.minimum(blocks + block_size, end)
    order = np.argsort(-np.add.reduceat(scores[:end], starts), kind="stable")
    sizes = (ends - starts)[order]
    filled = np.concatenate([[0], np.cumsum(sizes)])
    counts = filled[np.searchsorted(filled, budget.free, side="right") - 1]
    taken = int(np.searchsorted(filled, counts[-1]))
    cells = np.repeat(starts[order[:taken]] - filled[:taken], sizes[:taken]) + np.arange(counts[-1])
    padded = np.zeros(int(budget.free[-1]), np.int32)
    padded[:len(cells)] = cells
    return Ranking(padded, counts)


def rank(scores: np.ndarray, budget: Budget, block_size: int) -> Ranking:
    return rank_cells(scores, budget) if block_size == 1 else rank_blocks(scores, budget, block_size)


def shared(share: np.ndarray, own: Ranking, cells: np.ndarray, counts: np.ndarray, budget: Budget) -> tuple[np.ndarray, np.ndarray]:
    """Recall and overlap of a list (its mass share [n_cells], its ranking) on m other lists: cells [m, free], counts [m, n_top_k].

    Both [m, n_top_k], the forced cells included.
    """
    mass = np.cumsum(share[cells], axis=1, dtype=np.float64)
    mass = np.concatenate([np.zeros((len(cells), 1)), mass], axis=1)
    recall = np.take_along_axis(mass, counts, axis=1) + share[budget.forced(len(share))].sum()
    place = np.full(len(share), len(own.cells), np.int32)
    place[own.cells[:own.counts[-1]]] = np.arange(own.counts[-1], dtype=np.int32)
    place, index = place[cells], np.arange(cells.shape[1])
    common = [((place < n) & (index < counts[:, [i]])).sum(1) for i, n in enumerate(own.counts)]
    forced = budget.sink_tokens + budget.recent_tokens
    return recall, (np.stack(common, axis=1) + forced) / np.array(budget.top_k)


def sparsity(pooled: np.ndarray) -> np.ndarray:
    """[n_lists, n_cells] -> [n_lists] smallest share of the cells that holds MASS_SHARE of the mass"""
    mass = np.cumsum(np.sort(pooled, axis=-1)[:, ::-1], axis=-1, dtype=np.float64)
    return ((mass < MASS_SHARE * mass[:, -1:]).sum(-1) + 1) / pooled.shape[-1]


# -- cost of leaving cells out ----------------------------------------------------------------------------------------


def dense_output(p: np.ndarray, v: Rows) -> np.ndarray:
    """p [n_rows, n_head, n_kv], v [n_kv, n_head_kv, n_embd_v] -> [n_rows, n_head, n_embd_v]"""
    n_rows, n_head, n_kv = p.shape
    n_head_kv = v.shape[1]
    grouped = p.reshape(n_rows, n_head_kv, -1, n_kv).transpose(1, 0, 2, 3).reshape(n_head_kv, -1, n_kv)
    out = sum((sum_product(grouped[..., chunk], v[chunk].transpose(1, 0, 2)) for chunk in chunks(n_kv)), np.float32(0))
    return out.reshape(n_head_kv, n_rows, -1, out.shape[-1]).transpose(1, 0, 2, 3).reshape(n_rows, n_head, -1)


def sparse_outputs(p: np.ndarray, sink_share: np.ndarray, v: Rows, cell_groups: list[np.ndarray]) -> list[np.ndarray]:
    """[n_head, n_embd_v] after each group of cells [n_lists, m] is added, with the softmax over the cells so far only.

    p [n_head, n_kv]; a trained sink (sink_share [n_head]) keeps its place in the softmax.
    """
    n_head_kv = v.shape[1]
    grouped = p.reshape(n_head_kv, -1, p.shape[-1])
    heads = np.arange(n_head_kv)[:, None]
    outputs, above, below = [], np.float32(0), sink_share.reshape(n_head_kv, -1)
    for cells in cell_groups:
        lists = np.broadcast_to(cells, (n_head_kv, cells.shape[1]))
        kept = np.take_along_axis(grouped, lists[:, None, :], axis=-1)  # [n_head_kv, group, m]
        above = above + sum_product(kept, v[lists, heads])
        below = below + kept.sum(-1)
        outputs.append((above / np.maximum(below, 1e-30)[..., None]).reshape(len(p), -1))
    return outputs


def nested_cells(rankings: list[Ranking], forced: np.ndarray) -> list[np.ndarray]:
    """What each top_k adds to the one before, [n_lists, m] each; of rankings of cells, whose counts are all the same."""
    cells, counts = np.stack([ranking.cells for ranking in rankings]), rankings[0].counts
    first = np.concatenate([np.tile(forced, (len(cells), 1)), cells[:, :counts[0]]], axis=1)
    return [first] + [cells[:, start:stop] for start, stop in zip(counts[:-1], counts[1:])]


def rnmse(reference: np.ndarray, other: np.ndarray, axis: tuple[int, ...] | None = None) -> np.ndarray:
    """sqrt(sum |reference - other|^2 / sum |reference|^2) over axis (default all)"""
    energy = np.square(reference, dtype=np.float64).sum(axis)
    return np.sqrt(np.square(reference - other, dtype=np.float64).sum(axis) / np.where(energy > 0, energy, np.inf))
