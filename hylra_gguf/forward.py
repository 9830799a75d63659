"""Runs a model on the CPU and shows the nodes of its graph to a visitor; refuses what llama.cpp cannot load or compute."""

from __future__ import annotations

import ctypes
import os
from typing import Any, Protocol

from . import engine
from .attention_trace import KV_TYPES
from .errors import HylraError, ProfileError
from .session import N_UBATCH, Context, Model

GGML_TYPES = {name.lower(): number for number, name in KV_TYPES.items()}


class Visitor(Protocol):
    """kind is an enum hylra_trace; the trace is filled if it is not 0, and the node's data is there in `take` only."""

    def wants(self, node: int, kind: int, trace: Any) -> bool: ...

    def take(self, node: int, kind: int, trace: Any) -> None: ...


class Forward:
    """A model and one context for a single sequence."""

    def __init__(self, model_path: str) -> None:
        self.model, self.path, self.engine = Model(model_path), model_path, engine
        self.api = self.model.api
        self.context, self.visitor, self.failure = None, None, None
        self.trace = engine.ffi.new("struct hylra_attn *")

    def __enter__(self) -> Forward:
        return self

    def __exit__(self, *_) -> None:
        if self.context:
            self.context.__exit__()
        self.model.__exit__()

    def open_context(self, n_ctx: int, type_kv: str, n_threads: int) -> None:
        type_k, type_v = (GGML_TYPES[name] for name in kv_names(type_kv))
        try:
            self.context = Context(self.model, n_ctx, n_threads=n_threads, type_k=type_k, type_v=type_v, on_node=self.on_node)
        except HylraError as error:
            raise ProfileError(f"{error}: lower -c or take another -ctk") from None
        self.ctx, self.memory = self.context.ctx, self.context.memory

    def tokenize(self, text: str) -> list[int]:
        return self.model.tokenize(text)

    def clear(self) -> None:
        self.api.llama_memory_clear(self.memory, True)

    def save_cache(self, path: str, n_tokens: int) -> bool:
        """False if it could not be written"""
        marks = (self.api.llama_token * n_tokens)()  # the file format counts tokens; which they are does not matter here
        return self.api.llama_state_seq_save_file(self.ctx, os.fsencode(path), 0, marks, n_tokens) > 0

    def load_cache(self, path: str, n_tokens: int) -> bool:
        """False if the file is not the cache of n_tokens of a context like this one"""
        if not os.path.exists(path):
            return False
        marks, count = (self.api.llama_token * n_tokens)(), ctypes.c_size_t(0)
        read_bytes = self.api.llama_state_seq_load_file(self.ctx, os.fsencode(path), 0, marks, n_tokens, ctypes.byref(count))
        return read_bytes > 0 and count.value == n_tokens

    def decode(self, tokens: list[int], start: int, outputs: list[int]) -> None:
        """One ubatch at positions start, start + 1, ...; the last layer keeps the tokens `outputs` only."""
        try:
            self.context.decode(tokens, start, outputs=outputs)
        except HylraError as error:
            raise self.failure or ProfileError(f"{error}; lower -c") from None
        if self.failure:
            raise self.failure

    def on_node(self, node: int, ask: bool, _user_data: Any) -> bool:
        """ask: is this node wanted? Otherwise its data is ready. An exception must not cross the C code in between."""
        if self.failure or not self.visitor:
            return False
        try:
            kind = self.engine.lib.hylra_trace_node(self.engine.ffi.cast("void *", node), self.trace)
            if ask:
                return self.visitor.wants(node, kind, self.trace)
            self.visitor.take(node, kind, self.trace)
            return True
        except BaseException as error:
            self.failure = error
            return False


def kv_names(type_kv: str) -> tuple[str, str]:
    """Types of K and V: "q8_0" is both, "q8_0/f16" one each."""
    type_k, _, type_v = type_kv.partition("/")
    return type_k, type_v or type_k


def ubatches(n_tokens: int) -> list[range]:
    """Prefill batches; a short rest is left out, since decode-sized batches may take another path in the engine."""
    spans = [range(start, min(start + N_UBATCH, n_tokens)) for start in range(0, n_tokens, N_UBATCH)]
    return [span for span in spans if len(span) >= 64]


def cpu_count() -> int:
    """The processors this process may use, which in a container are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
