"""Runs a model on the CPU over tokens and shows the nodes of its graph to a visitor; refuses what llama.cpp cannot load or compute."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any, Protocol

from .attention_trace import KV_TYPES
from .errors import ModelFileError, ProfileError

N_UBATCH = 512
GGML_TYPES = {name.lower(): number for number, name in KV_TYPES.items()}


class Visitor(Protocol):
    """kind is an enum hylra_trace; the trace is filled if it is not 0, and the node's data is there in `take` only."""

    def wants(self, node: int, kind: int, trace: Any) -> bool: ...

    def take(self, node: int, kind: int, trace: Any) -> None: ...


class Forward:
    """A model and one context for a single sequence."""

    def __init__(self, model_path: str) -> None:
        from . import engine

        if not Path(model_path).is_file():
            raise ModelFileError(f"{model_path}: no such file; name a GGUF model")
        llama_cpp = engine.activate()
        from llama_cpp._logger import set_verbose

        set_verbose(False)
        self.api, self.engine, self.path = llama_cpp, engine, model_path
        self.ctx, self.visitor, self.failure = None, None, None
        self.trace = engine.ffi.new("struct hylra_attn *")
        self.api.llama_backend_init()
        params = self.api.llama_model_default_params()
        params.n_gpu_layers = 0  # the callback reads the tensors where they are
        self.model = self.api.llama_model_load_from_file(os.fsencode(model_path), params)
        if not self.model:
            raise ModelFileError(f"{model_path}: llama.cpp cannot load this model; check that the GGUF file is whole")
        self.vocab = self.api.llama_model_get_vocab(self.model)

    def __enter__(self) -> Forward:
        return self

    def __exit__(self, *_) -> None:
        if self.ctx:
            self.api.llama_free(self.ctx)
        self.api.llama_model_free(self.model)

    def open_context(self, n_ctx: int, type_kv: str, n_threads: int) -> None:
        self.callback = self.api.ggml_backend_sched_eval_callback(self.on_node)  # must outlive the context
        params = self.api.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = n_ctx, N_UBATCH, N_UBATCH, 1
        params.n_threads = params.n_threads_batch = n_threads
        params.type_k = params.type_v = GGML_TYPES[type_kv]
        params.flash_attn_type = self.api.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.offload_kqv = params.op_offload = False
        params.cb_eval = self.callback
        self.ctx = self.api.llama_init_from_model(self.model, params)
        if not self.ctx:
            raise ProfileError(f"{self.path}: llama.cpp cannot open a context of {n_ctx} tokens with KV {type_kv}; "
                               "lower -c or take another -ctk")
        self.memory = self.api.llama_get_memory(self.ctx)

    def meta(self, key: str) -> str:
        value = ctypes.create_string_buffer(256)
        found = self.api.llama_model_meta_val_str(self.model, key.encode(), value, len(value))
        return value.value.decode("utf-8", "replace") if found >= 0 else ""

    def tokenize(self, text: str) -> list[int]:
        data = text.encode("utf-8", "replace")
        tokens = (self.api.llama_token * (len(data) + 8))()
        n_tokens = self.api.llama_tokenize(self.vocab, data, len(data), tokens, len(tokens), True, False)
        return tokens[:max(n_tokens, 0)]

    def clear(self) -> None:
        self.api.llama_memory_clear(self.memory, True)

    def forget_from(self, position: int) -> None:
        self.api.llama_memory_seq_rm(self.memory, 0, position, -1)

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
        batch = self.api.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, start + i, 1, 0
            batch.logits[i] = i in outputs
        try:
            code = self.api.llama_decode(self.ctx, batch)
        finally:
            self.api.llama_batch_free(batch)
        if self.failure:
            raise self.failure
        if code:
            raise ProfileError(f"{self.path}: llama.cpp stopped with code {code} at token {start}; lower -c")

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


def ubatches(n_tokens: int) -> list[range]:
    """Prefill batches; a short rest is left out, since decode-sized batches may take another path in the engine."""
    spans = [range(start, min(start + N_UBATCH, n_tokens)) for start in range(0, n_tokens, N_UBATCH)]
    return [span for span in spans if len(span) >= 64]


def cpu_count() -> int:
    """The processors this process may use, which in a container are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
