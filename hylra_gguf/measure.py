"""What one attention layer looks at, for sampled query rows: probabilities, top-k cells, and what keeping only those cells costs.

Plain numpy in float32 from the traced inputs. The engine's own attention output is never the reference: with F16 V it may be
accumulated in FP16, which is off by whole percents at 32K cells. Collector gathers the rows of a pass, with memory of
samples * layers^2 numbers and one bit per cell, layer and list of the ubatch at hand.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .errors import ProfileError

STATISTICS = ("sensitivity", "sensitivity_high", "sensitivity_heads", "overlap", "recall", "recall_low", "head_recall", "head_map")
LOW_QUANTILE = 0.1
KV_TYPES = {0: "F32", 1: "F16", 2: "Q4_0", 8: "Q8_0", 30: "BF16"}


@dataclass(frozen=True)
class AttentionRows:
    """Some query rows of one layer and the cells they may see, all float32."""

    q: np.ndarray  # [n_rows, n_head, n_embd_k]
    k: np.ndarray  # [n_kv, n_head_kv, n_embd_k]
    v: np.ndarray  # [n_kv, n_head_kv, n_embd_v]
    mask: np.ndarray | None = None  # [n_rows, n_kv]: -inf hides a cell; otherwise 0, or with ALiBi minus the distance
    sinks: np.ndarray | None = None  # [n_head] logits that join the denominator only
    scale: float = 1.0
    max_bias: float = 0.0
    softcap: float = 0.0

    def visible(self) -> np.ndarray:
        """[n_rows, n_kv] bool"""
        if self.mask is None:
            return np.ones((len(self.q), len(self.k)), bool)
        return self.mask != -np.inf


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
    s = wide_product(q, rows.k.transpose(1, 2, 0)) * np.float32(rows.scale)  # [n_head_kv, n_rows * group, n_kv]
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


def select_cells(pooled: np.ndarray, visible: np.ndarray, top_k: int, sink: int, recent: int) -> np.ndarray:
    """Ascending cells [n_lists, min(top_k, visible)]: first and latest visible cells, then the best of the rest.

    Cells must be positions, as they are in one sequence that was only appended to.
    """
    seen = np.flatnonzero(visible)
    if len(seen) <= top_k:
        return np.tile(seen, (len(pooled), 1))
    score = pooled[:, seen].copy()
    score[:, :sink] = np.inf
    score[:, len(seen) - recent:] = np.inf
    best = np.argpartition(score, len(seen) - top_k, axis=-1)[:, len(seen) - top_k:]
    return seen[np.sort(best, axis=-1)]


def pack_cells(cells: np.ndarray, n_kv: int) -> np.ndarray:
    """Cells [n_lists, k] as bits [n_lists, ceil(n_kv / 8)]: a list of 2048 of 8192 cells takes 1 KiB."""
    member = np.zeros((len(cells), n_kv), bool)
    np.put_along_axis(member, cells, True, axis=-1)
    return np.packbits(member, axis=-1)


def mass_on(bits: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """bits [n, ceil(n_kv / 8)], weights [m, n_kv] -> sum of each weight row over each cell set, [n, m]."""
    member = np.unpackbits(bits, axis=-1, count=weights.shape[-1])
    return sum_product(member, weights.T)


# -- cost of leaving cells out ----------------------------------------------------------------------------------------


def dense_output(p: np.ndarray, v: np.ndarray) -> np.ndarray:
    """p [n_head, n_kv], v [n_kv, n_head_kv, n_embd_v] -> [n_head, n_embd_v]"""
    n_head_kv = v.shape[1]
    grouped = p.reshape(n_head_kv, -1, p.shape[-1])
    return sum_product(grouped, v.transpose(1, 0, 2)).reshape(len(p), -1)


def sparse_output(p: np.ndarray, sink_share: np.ndarray, v: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """As dense_output, with the softmax taken over the cells [n_lists, k] only; a trained sink keeps its place in it."""
    n_head, n_head_kv = len(p), v.shape[1]
    lists = np.broadcast_to(cells, (n_head_kv, cells.shape[1]))
    grouped = p.reshape(n_head_kv, n_head // n_head_kv, -1)
    kept = np.take_along_axis(grouped, lists[:, None, :], axis=-1)  # [n_head_kv, group, k]
    kept_v = v[lists, np.arange(n_head_kv)[:, None]]  # [n_head_kv, k, n_embd_v]
    total = kept.sum(-1) + sink_share.reshape(n_head_kv, -1)
    out = sum_product(kept, kept_v) / np.maximum(total, 1e-30)[..., None]
    return out.reshape(n_head, -1)


def rnmse(reference: np.ndarray, other: np.ndarray) -> float:
    """sqrt(sum |reference - other|^2 / sum |reference|^2)"""
    energy = float(np.square(reference, dtype=np.float64).sum())
    return float(np.sqrt(np.square(reference - other, dtype=np.float64).sum() / energy)) if energy else 0.0


# -- statistics over samples ------------------------------------------------------------------------------------------


@dataclass
class SampledRow:
    sample: int  # index among all samples
    token: int  # index in the ubatch
    position: int


@dataclass
class Collector:
    """Takes the layers of a ubatch in order and keeps numbers per sample; cell sets live only as long as their ubatch."""

    layer_count: int
    head_kv_count: int
    samples: int
    top_k: list[int]
    sink_tokens: int
    recent_tokens: int
    sensitivity: dict = field(default_factory=dict)  # (k, lists) -> [samples, n_layer]
    overlap: dict = field(default_factory=dict)  # k -> [samples, n_layer, n_layer]
    recall: dict = field(default_factory=dict)  # k -> the same
    head_sum: dict = field(default_factory=dict)  # k -> [n_layer, n_layer, source head, head], summed over samples
    seen: np.ndarray | None = None  # [samples, n_layer] measured
    sets: dict = field(default_factory=dict)  # (k, lists, sample) -> {layer: bits [lists, n_cells / 8]}

    def __post_init__(self) -> None:
        n, heads = self.layer_count, self.head_kv_count
        for k in self.top_k:
            for lists in self.list_counts():
                self.sensitivity[k, lists] = np.zeros((self.samples, n), np.float32)
            self.overlap[k] = np.zeros((self.samples, n, n), np.float32)
            self.recall[k] = np.zeros((self.samples, n, n), np.float32)
            self.head_sum[k] = np.zeros((n, n, heads, heads), np.float32)
        self.seen = np.zeros((self.samples, n), bool)

    def list_counts(self) -> list[int]:
        return sorted({1, self.head_kv_count})

    def begin_ubatch(self) -> None:
        self.sets.clear()

    def add_layer(self, layer: int, sampled: list[SampledRow], rows: AttentionRows) -> None:
        """rows holds the sampled tokens in the same order; a layer that does not see the whole past stays unseen."""
        visible = rows.visible()
        whole = all(visible[r, :s.position + 1].all() and visible[r].sum() == s.position + 1 for r, s in enumerate(sampled))
        fresh = 0 <= layer < self.layer_count and not self.seen[[s.sample for s in sampled], layer].any()
        # not fresh: a layer that shares the K cache of an earlier one, whose own number is not in the trace
        if not whole or not fresh or rows.k.shape[1] != self.head_kv_count:
            return
        p, sink_share = probabilities(rows)
        for r, row in enumerate(sampled):
            n_cells = row.position + 1
            self.add_row(layer, row.sample, p[r, :, :n_cells], sink_share[r], rows.v[:n_cells])

    def add_row(self, layer: int, sample: int, p: np.ndarray, sink_share: np.ndarray, v: np.ndarray) -> None:
        """p [n_head, n_cells], sink_share [n_head], v [n_cells, n_head_kv, n_embd_v]"""
        dense = dense_output(p, v)
        for lists in self.list_counts():
            pooled = pool(p, lists)
            for k in self.top_k:
                cells = select_cells(pooled, np.ones(len(v), bool), k, self.sink_tokens, self.recent_tokens)
                sparse = sparse_output(p, sink_share, v, cells)
                self.sensitivity[k, lists][sample, layer] = rnmse(dense, sparse)
                self.compare(layer, sample, k, lists, pooled, pack_cells(cells, len(v)))
        self.seen[sample, layer] = True

    def compare(self, layer: int, sample: int, k: int, lists: int, pooled: np.ndarray, bits: np.ndarray) -> None:
        """Mass of this layer on the cells of each earlier one and its own, per pair of lists."""
        sets = self.sets.setdefault((k, lists, sample), {})
        sets[layer] = bits
        sources = list(sets)
        share = pooled / pooled.sum(-1, keepdims=True)
        own = np.unpackbits(bits, axis=-1, count=share.shape[-1])
        weights = np.concatenate([share, own / np.float32(k)]) if lists == 1 else share
        mass = mass_on(np.concatenate([sets[i] for i in sources]), weights).reshape(len(sources), lists, -1)
        if lists == 1:
            self.recall[k][sample, sources, layer] = mass[:, 0, 0]
            self.overlap[k][sample, sources, layer] = mass[:, 0, 1]
        if lists == self.head_kv_count:
            self.head_sum[k][sources, layer] += mass[:, :, :lists]  # [sources, source head, head]

    def results(self) -> dict:
        """The measured fields of a Profile."""
        eligible = self.seen.all(0)
        pairs = np.outer(eligible, eligible)
        out: dict[str, dict] = {name: {} for name in STATISTICS}
        for k in self.top_k:
            one, heads = self.sensitivity[k, 1], self.sensitivity[k, self.head_kv_count]
            out["sensitivity"][k] = one.mean(0) * eligible
            out["sensitivity_high"][k] = np.quantile(one, 1 - LOW_QUANTILE, axis=0) * eligible
            out["sensitivity_heads"][k] = heads.mean(0) * eligible
            out["overlap"][k] = self.overlap[k].mean(0) * pairs
            out["recall"][k] = self.recall[k].mean(0) * pairs
            out["recall_low"][k] = np.quantile(self.recall[k], LOW_QUANTILE, axis=0) * pairs
            out["head_recall"][k] = self.head_sum[k].max(2) / self.samples * pairs[..., None]
            out["head_map"][k] = self.head_sum[k].argmax(2)
        return {"eligible": eligible.tolist(), **out}


# -- the engine's trace -----------------------------------------------------------------------------------------------


def rows_from_trace(trace, tokens: list[int], n_cells: int, buffer) -> AttentionRows:
    """Copy the rows of some tokens of the ubatch and the first n_cells cells out of a `struct hylra_attn`.

    buffer(pointer, size_bytes) gives the host memory behind a pointer.
    """
    if trace.n_stream != 1:
        raise ProfileError(f"layer {trace.layer}: {trace.n_stream} streams in one pass; profile a single sequence")
    n_cells = min(n_cells, trace.n_kv)
    q = strided(buffer, trace.q, np.float32, (trace.n_tokens, trace.n_head, trace.n_embd_k), [trace.q_nb[i] for i in (1, 2, 0)])
    return AttentionRows(
        q=q[tokens],
        k=cache_rows(buffer, trace, trace.k, trace.k_nb, trace.type_k, trace.n_embd_k, n_cells),
        v=cache_rows(buffer, trace, trace.v, trace.v_nb, trace.type_v, trace.n_embd_v, n_cells),
        mask=mask_rows(buffer, trace, tokens, n_cells),
        sinks=strided(buffer, trace.sinks, np.float32, (trace.n_head,), [4]).copy() if trace.sinks else None,
        scale=trace.scale, max_bias=trace.max_bias, softcap=trace.softcap,
    )


def strided(buffer, pointer, dtype, shape: tuple[int, ...], strides_bytes: list[int]) -> np.ndarray:
    size_bytes = sum((n - 1) * stride for n, stride in zip(shape, strides_bytes)) + np.dtype(dtype).itemsize
    return np.ndarray(shape, dtype, buffer=buffer(pointer, size_bytes), strides=tuple(strides_bytes))


def mask_rows(buffer, trace, tokens: list[int], n_cells: int) -> np.ndarray | None:
    """[n_rows, n_cells]"""
    if not trace.mask:
        return None
    strides_bytes = [trace.mask_nb[1], trace.mask_nb[0]]
    return strided(buffer, trace.mask, np.float16, (trace.n_tokens, n_cells), strides_bytes)[tokens].astype(np.float32)


def cache_rows(buffer, trace, pointer, nb, ggml_type: int, n_embd: int, n_cells: int) -> np.ndarray:
    """[n_cells, n_head_kv, n_embd] of a K or V cache view, as float32"""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    if ggml_type not in KV_TYPES:
        names = " ".join(sorted(KV_TYPES.values()))
        raise ProfileError(f"layer {trace.layer}: KV cache type {ggml_type} is not supported; use one of {names} (-ctk)")
    kind = GGMLQuantizationType[KV_TYPES[ggml_type]]
    block, block_bytes = GGML_QUANT_SIZES[kind]
    shape = (n_cells, trace.n_head_kv, n_embd // block * block_bytes)
    raw = strided(buffer, pointer, np.uint8, shape, [nb[1], nb[2], 1])
    return dequantize(np.ascontiguousarray(raw), kind).reshape(n_cells, trace.n_head_kv, n_embd)
