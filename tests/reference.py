"""Traces what the engine's nodes read and wrote, and states in float64 NumPy what they should have written (DESIGN §5)."""

from __future__ import annotations

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from hylra_gguf import engine


class Trace:
    """Collects, per layer of the last batch, what our nodes read and wrote."""

    def __init__(self):
        engine.activate()
        self.raw = engine.ffi.new("struct hylra_attn *")
        self.forget()

    def forget(self):
        self.inputs, self.outputs, self.choices = {}, {}, {}

    def callback(self, node, ask, data):
        kind = engine.lib.hylra_trace_node(engine.ffi.cast("struct ggml_tensor *", node), self.raw)
        if not ask and kind:
            self.take(kind, self.raw)
        return bool(kind) if ask else True

    def take(self, kind, a):
        if kind == engine.TRACE_ATTEND:
            self.inputs[a.layer] = dict(
                q=tensor(a.q, np.float32, (a.n_stream, a.n_head, a.n_tokens, a.n_embd_k), a.q_nb),
                k=cache(a.k, a.type_k, (a.n_stream, a.n_head_kv, a.n_kv, a.n_embd_k), a.k_nb),
                v=cache(a.v, a.type_v, (a.n_stream, a.n_head_kv, a.n_kv, a.n_embd_v), a.v_nb),
                mask=tensor(a.mask, np.float16, (a.n_stream, 1, a.n_tokens, a.n_kv), a.mask_nb),
                cells=flat(a.cells, np.int32, (a.n_stream, a.n_tokens, a.lists, a.n_cells)) if a.cells else None,
                scale=a.scale, softcap=a.softcap, max_bias=a.max_bias,
            )
        elif kind == engine.TRACE_REDUCE:
            self.inputs[a.layer]["sinks"] = flat(a.sinks, np.float32, (a.n_head,)) if a.sinks else None
            self.outputs[a.layer] = flat(a.dst, np.float32, (a.n_stream, a.n_tokens, a.n_head, a.n_embd_v))
        elif kind == engine.TRACE_CHOOSE:
            self.choices[a.layer] = flat(a.cells, np.int32, (a.n_stream, a.n_tokens, a.lists, a.n_cells))


def bytes_at(pointer, n_bytes):
    return np.frombuffer(engine.ffi.buffer(engine.ffi.cast("char *", pointer), n_bytes), np.uint8)


def tensor(pointer, dtype, shape, nb):
    """A copy of shape [stream, head, row, column]; nb in ggml order."""
    strides = [nb[3], nb[2], nb[1], np.dtype(dtype).itemsize]
    raw = bytes_at(pointer, sum((n - 1) * s for n, s in zip(shape, strides)) + strides[-1])
    return np.lib.stride_tricks.as_strided(raw.view(dtype), shape, strides).astype(dtype)


def cache(pointer, ggml_type, shape, nb):
    """float32 [stream, KV head, cell, column] of a K or V view of any type"""
    kind = GGMLQuantizationType(ggml_type)
    block, block_bytes = GGML_QUANT_SIZES[kind]
    raw = tensor(pointer, np.uint8, (*shape[:3], shape[3] // block * block_bytes), nb)
    return dequantize(raw, kind).reshape(shape)


def flat(pointer, dtype, shape):
    return bytes_at(pointer, int(np.prod(shape)) * np.dtype(dtype).itemsize).view(dtype).reshape(shape).copy()


def alibi_slopes(n_head, max_bias):
    """[head]; ALiBi as llama.cpp defines it, also for head counts that are no power of two."""
    if not max_bias:
        return np.ones(n_head)
    power = 2 ** int(np.log2(n_head))
    first = [2 ** (-max_bias / power * (h + 1)) for h in range(min(power, n_head))]
    return np.array(first + [2 ** (-max_bias / 2 / power * (2 * h + 1)) for h in range(n_head - power)])


def logits(x):
    """float64 [stream, token, head, cell] of one traced layer, with softcap, ALiBi and mask"""
    n_stream, n_head, n_tokens, n_embd = x["q"].shape
    q = x["q"].astype(np.float64).reshape(n_stream, x["k"].shape[1], -1, n_embd)  # the heads of a group one behind the other
    s = (q @ x["k"].astype(np.float64).swapaxes(2, 3)).reshape(n_stream, n_head, n_tokens, -1).swapaxes(1, 2) * x["scale"]
    if x["softcap"]:
        s = x["softcap"] * np.tanh(s / x["softcap"])
    slopes = alibi_slopes(s.shape[2], x["max_bias"])[:, None]
    return s + slopes * x["mask"].astype(np.float64).transpose(0, 2, 1, 3)


def probabilities(x, allowed=None):
    """float64 softmax [stream, token, head, cell], over the cells that `allowed` [.., KV head, cell] names; a sink takes its share."""
    s = logits(x)
    if allowed is not None:
        s = np.where(np.repeat(allowed, s.shape[2] // allowed.shape[2], axis=2), s, -np.inf)
    sinks = np.full(s.shape[2], -np.inf) if x["sinks"] is None else x["sinks"].astype(np.float64)
    top = np.maximum(s.max(-1), sinks)[..., None]
    e = np.exp(s - top)
    return e / (e.sum(-1, keepdims=True) + np.exp(sinks[:, None] - top))


def attention(x, p):
    """float64 [stream, token, head, column]"""
    n_stream, n_tokens, n_head, n_kv = p.shape
    grouped = p.swapaxes(1, 2).reshape(n_stream, x["v"].shape[1], -1, n_kv)
    return (grouped @ x["v"].astype(np.float64)).reshape(n_stream, n_head, n_tokens, -1).swapaxes(1, 2)


def check_selection(x, cells, lists, top_k, forced):
    """The cells are the forced ones and the best of the rest by pooled probability, ascending; ties within rounding allowed.

    cells [stream, token, list, k]; forced[stream][token]: cells
    """
    p = probabilities(x)
    pooled = p.reshape(*p.shape[:2], lists, -1, p.shape[-1]).mean(3)
    for s, t, i in np.ndindex(*cells.shape[:3]):
        got = cells[s, t, i][cells[s, t, i] >= 0]
        visible = np.flatnonzero(np.isfinite(x["mask"][s, 0, t]))
        assert (np.diff(got) > 0).all() and len(got) == min(top_k, len(visible)) and set(got) <= set(visible)
        assert set(forced[s][t]) <= set(got)
        rest = np.setdiff1d(visible, got)
        free = np.setdiff1d(got, forced[s][t])
        if len(rest) and len(free):
            assert pooled[s, t, i][free].min() >= pooled[s, t, i][rest].max() * (1 - 1e-4)


def cells_allowed(x, heads):
    """bool [stream, token, KV head, cell]; heads: the list that each KV head takes"""
    allowed = np.zeros((*x["cells"].shape[:2], len(heads), x["k"].shape[2]), bool)
    for s, t, h in np.ndindex(*allowed.shape[:3]):
        listed = x["cells"][s, t, heads[h]]
        allowed[s, t, h, listed[listed >= 0]] = True
    return allowed
