"""Finds where a graph adds the attention output to the residual stream, and says how far that turns it: 1 - cos(x, x + attn).

By structure, not by names, which differ between architectures: the sum of something that was made from the attention output and of
something that the query was made from. A graph without such a sum (parallel attention and feed-forward, for one) gives nothing.
"""

from __future__ import annotations

import ctypes

import numpy as np

GGML_TYPE_F32, GGML_OP_NONE, GGML_OP_ADD, GGML_OP_GET_ROWS = 0, 0, 2, 40  # ggml.h of the pinned llama.cpp
MAX_STEPS = 32  # from x to the query, and from the attention to the sum: norms, projections, rope, views; far below a layer


class Tensor(ctypes.Structure):
    """struct ggml_tensor of the pinned llama.cpp, as far as it is read here"""

    _fields_ = [
        ("type", ctypes.c_int), ("buffer", ctypes.c_void_p), ("ne", ctypes.c_int64 * 4), ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int), ("op_params", ctypes.c_int32 * 16), ("flags", ctypes.c_int32), ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p), ("view_offs", ctypes.c_size_t), ("data", ctypes.c_void_p), ("name", ctypes.c_char * 64),
    ]

    def sources(self) -> list[int]:
        return [address for address in self.src if address]


def ancestors(node: int) -> set[int]:
    """Up to MAX_STEPS results that `node` was computed from, the nearest first; no weights."""
    found, queue = set(), [node]
    while queue and len(found) < MAX_STEPS:
        address = queue.pop(0)
        if address not in found and Tensor.from_address(address).op != GGML_OP_NONE:
            found.add(address)
            queue += Tensor.from_address(address).sources()
    return found


def rows_of(tensor: Tensor, tokens: list[int]) -> np.ndarray | None:
    """[len(tokens), n_embd] of a float32 matrix of all tokens of the ubatch, or of just these (the last layer drops the others)."""
    n_embd, n_rows = tensor.ne[0], tensor.ne[1]
    if tensor.type != GGML_TYPE_F32 or tensor.nb[0] != 4 or tensor.ne[2] * tensor.ne[3] != 1:
        return None
    if n_rows != len(tokens) and n_rows <= max(tokens):
        return None
    wanted = range(n_rows) if n_rows == len(tokens) else tokens
    rows = [(ctypes.c_float * n_embd).from_address(tensor.data + row * tensor.nb[1]) for row in wanted]
    return np.array(rows, np.float64)


class ResidualStream:
    """Follows the nodes after one attention node; the rows of each are copied, since a sum may be written over what it adds."""

    def __init__(self) -> None:
        self.stop()

    def start(self, attention_node: int, tokens: list[int]) -> None:
        self.inputs, self.tokens = ancestors(Tensor.from_address(attention_node).src[0]), tokens
        self.made, self.rows = {attention_node}, {}

    def stop(self) -> None:
        self.inputs, self.tokens, self.made, self.rows = set(), [], set(), {}

    def wants(self, node: int) -> bool:
        if not self.made.intersection(Tensor.from_address(node).sources()):
            return False
        self.made.add(node)
        if len(self.made) > MAX_STEPS:
            self.stop()
        return bool(self.made)

    def take(self, node: int) -> np.ndarray | None:
        """1 - cos(x, x + attn) [len(tokens)] if this node is the sum; then the search ends."""
        tensor = Tensor.from_address(node)
        rows = rows_of(tensor, self.tokens)
        attended = self.added(tensor)
        if attended is None or rows is None or attended not in self.rows:
            self.rows[node] = rows
            return None
        output = self.rows[attended]
        self.stop()
        return None if output is None or output.shape != rows.shape else turn(rows - output, rows)

    def added(self, tensor: Tensor) -> int | None:
        """Of a sum with the residual stream the other part"""
        sources = tensor.sources()
        if tensor.op != GGML_OP_ADD or len(sources) != 2:
            return None
        for stream, other in (sources, sources[::-1]):
            if other in self.made and self.is_stream(stream):
                return other
        return None

    def is_stream(self, address: int) -> bool:
        tensor = Tensor.from_address(address)
        return address in self.inputs or (tensor.op == GGML_OP_GET_ROWS and tensor.src[0] in self.inputs)


def turn(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """1 - cosine of each row"""
    lengths = np.linalg.norm(before, axis=-1) * np.linalg.norm(after, axis=-1)
    return 1 - (before * after).sum(-1) / np.maximum(lengths, 1e-30)
