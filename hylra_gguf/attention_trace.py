"""Reads the tensors of one attention node out of the engine's trace; refuses KV cache types and layouts it cannot read."""

from __future__ import annotations

import math

import numpy as np

from .errors import ProfileError
from .measure import AttentionRows

KV_TYPES = {0: "F32", 1: "F16", 2: "Q4_0", 8: "Q8_0", 30: "BF16"}  # enum ggml_type


class CacheRows:
    """[n_cells, n_head_kv, n_embd] of a K or V cache view that becomes float32 where it is indexed, never as a whole."""

    def __init__(self, raw: np.ndarray, kind, n_embd: int) -> None:
        self.raw, self.kind, self.shape = raw, kind, (*raw.shape[:2], n_embd)

    def __getitem__(self, index) -> np.ndarray:
        from gguf.quants import dequantize

        raw = np.ascontiguousarray(self.raw[index])
        return dequantize(raw, self.kind).reshape(*raw.shape[:-1], self.shape[-1])


def rows_from_trace(trace, tokens: list[int], n_cells: int, buffer) -> AttentionRows:
    """The rows of some tokens of the ubatch and a view of the first n_cells cells of a `struct hylra_attn`.

    buffer(pointer, size_bytes) gives the host memory behind a pointer; the view holds until the callback returns.
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


def given_cells(trace, start: int, buffer) -> list[list[np.ndarray]]:
    """Per token and list the cells that an attention node was given, ascending, without what stands for none and what lies behind the token's own;
    the first token has `start` cached ones before it."""
    shape = (trace.n_tokens, trace.lists, trace.n_cells)
    given = np.frombuffer(buffer(trace.cells, 4 * math.prod(shape)), np.int32).reshape(shape)
    return [[row[(row >= 0) & (row <= start + t)] for row in lists] for t, lists in enumerate(given)]


def strided(buffer, pointer, dtype, shape: tuple[int, ...], strides_bytes: list[int]) -> np.ndarray:
    size_bytes = sum((n - 1) * stride for n, stride in zip(shape, strides_bytes)) + np.dtype(dtype).itemsize
    return np.ndarray(shape, dtype, buffer=buffer(pointer, size_bytes), strides=tuple(strides_bytes))


def mask_rows(buffer, trace, tokens: list[int], n_cells: int) -> np.ndarray | None:
    """[n_rows, n_cells]"""
    if not trace.mask:
        return None
    strides_bytes = [trace.mask_nb[1], trace.mask_nb[0]]
    return strided(buffer, trace.mask, np.float16, (trace.n_tokens, n_cells), strides_bytes)[tokens].astype(np.float32)


def cache_rows(buffer, trace, pointer, nb, ggml_type: int, n_embd: int, n_cells: int) -> CacheRows:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if ggml_type not in KV_TYPES:
        names = " ".join(sorted(KV_TYPES.values()))
        raise ProfileError(f"layer {trace.layer}: KV cache type {ggml_type} is not supported; use one of {names} (-ctk)")
    kind = GGMLQuantizationType[KV_TYPES[ggml_type]]
    block, block_bytes = GGML_QUANT_SIZES[kind]
    shape = (n_cells, trace.n_head_kv, n_embd // block * block_bytes)
    raw = strided(buffer, pointer, np.uint8, shape, [nb[1], nb[2], 1])
    return CacheRows(raw, kind, n_embd)
