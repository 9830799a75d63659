"""A model and a context driven through llama.cpp's own API, for measurements that `Llama` is too high for; text models only.

Runs on the CPU unless layers are given to a GPU. Errors are one line.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Container

import numpy as np

from . import engine
from .attention_trace import KV_TYPES
from .errors import HylraError, ModelFileError

N_UBATCH = 512  # prompt batch
N_CTX_UNIT = 256  # llama.cpp rounds the context of a sequence up to it, and says so
ALL_SEQUENCES = -1
RECURRENT_ONLY = 1  # LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY
DECODE_TOKENS = 8  # the largest batch of one sequence that still runs sparse (TOKENS_PER_SEQUENCE in llama-hylra.cpp)


class Model:
    """An open GGUF model. Raises ModelFileError if the file is missing or llama.cpp cannot load it."""

    def __init__(self, path: str, n_gpu_layers: int = 0):
        if not Path(path).is_file():
            raise ModelFileError(f"{path}: no such file; name a GGUF model")
        self.api = engine.activate()
        from llama_cpp._logger import set_verbose

        set_verbose(False)
        self.path, self.n_gpu_layers = path, n_gpu_layers
        self.api.llama_backend_init()
        params = self.api.llama_model_default_params()
        params.n_gpu_layers = n_gpu_layers
        self.handle = self.api.llama_model_load_from_file(os.fsencode(path), params)
        if not self.handle:
            raise ModelFileError(f"{path}: llama.cpp cannot load this model; check that the GGUF file is whole")
        self.vocab = self.api.llama_model_get_vocab(self.handle)
        self.n_vocab = self.api.llama_vocab_n_tokens(self.vocab)
        self.has_tokenizer = self.api.llama_vocab_type(self.vocab) != self.api.LLAMA_VOCAB_TYPE_NONE

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_) -> None:
        self.api.llama_model_free(self.handle)

    def tokenize(self, text: str, start: bool = True, special: bool = False) -> list[int]:
        """start: with the tokens that the model wants at the start of a text; special: names of control tokens become these tokens.

        Raises ModelFileError for a model without tokenizer.
        """
        if not self.has_tokenizer:
            raise ModelFileError(f"{self.path}: this model has no tokenizer; name one that has")
        data = text.encode("utf-8", "replace")
        room = (self.api.llama_token * (len(data) + 8))()
        n = self.api.llama_tokenize(self.vocab, data, len(data), room, len(room), start, special)
        return list(room[:max(n, 0)])

    def detokenize(self, tokens: list[int]) -> str:
        room = ctypes.create_string_buffer(64 * len(tokens) + 64)
        n = self.api.llama_detokenize(self.vocab, (self.api.llama_token * len(tokens))(*tokens), len(tokens), room, len(room), False, False)
        return room.raw[:max(n, 0)].decode("utf-8", "replace")


class Context:
    """A context of n_seq sequences, each with a cache of n_ctx tokens of its own.

    scratch: one sequence more that shares the cache of a single one, so that cells can be copied within it (fill.py).
    kv_on_gpu: with layers on a GPU, put their cache there too, not into host memory.
    on_node: llama.cpp's ggml_backend_sched_eval_callback in Python, called with every node of the graph.
    """

    def __init__(self, model: Model, n_ctx: int, *, n_seq: int = 1, n_threads: int = 1, type_k: int = 1, type_v: int = 1,
                 flash_attn: bool = True, scratch: bool = False, kv_on_gpu: bool = True, on_node=None):
        self.model, self.api, self.n_seq, self.scratch = model, model.api, n_seq, scratch
        self.is_recurrent = self.api.llama_model_is_recurrent(model.handle) or self.api.llama_model_is_hybrid(model.handle)
        self.kept: dict[tuple[int, int], ctypes.Array] = {}  # (sequence, tokens in it) -> state of its recurrent layers
        n_ctx = -(-n_ctx // N_CTX_UNIT) * N_CTX_UNIT
        params = self.api.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = n_ctx * n_seq, N_UBATCH, N_UBATCH, n_seq + scratch
        params.kv_unified = scratch
        params.n_threads = params.n_threads_batch = n_threads
        params.type_k, params.type_v = type_k, type_v
        params.flash_attn_type = int(flash_attn)
        params.op_offload = model.n_gpu_layers > 0
        params.offload_kqv = params.op_offload and kv_on_gpu
        self.callback = self.api.ggml_backend_sched_eval_callback(on_node) if on_node else None  # must outlive the context
        if on_node:
            params.cb_eval = self.callback
        params.swa_full = True  # a sliding-window cache must survive a rewind
        self.ctx = self.api.llama_init_from_model(model.handle, params)
        if not self.ctx:
            raise HylraError(f"{model.path}: llama.cpp cannot open a context of {n_ctx * n_seq} tokens with "
                             f"KV {KV_TYPES[type_k].lower()}/{KV_TYPES[type_v].lower()}, flash attention {'on' if flash_attn else 'off'}; use a shorter one")
        self.memory = self.api.llama_get_memory(self.ctx)
        self.batch = self.api.llama_batch_init(N_UBATCH, 0, 1)

    def __enter__(self) -> Context:
        return self

    def __exit__(self, *_) -> None:
        self.api.llama_batch_free(self.batch)
        self.api.llama_free(self.ctx)

    def decode(self, tokens: list[int], first_pos: int, seq: int = 0, outputs: Container[int] | None = None) -> None:
        """One llama_decode of at most N_UBATCH tokens; outputs: those whose logits are wanted, else the last."""
        wanted = (len(tokens) - 1,) if outputs is None else outputs
        self._decode([(token, first_pos + i, seq, i in wanted) for i, token in enumerate(tokens)])

    def step(self, token: int, pos: int) -> None:
        """The next token of every sequence, in one llama_decode; waits for it."""
        self._decode([(token, pos, seq, True) for seq in range(self.n_seq)])
        self.api.llama_synchronize(self.ctx)

    def _decode(self, entries: list[tuple[int, int, int, bool]]) -> None:
        """entries: (token, position, sequence, whether its logits are wanted)"""
        batch = self.batch
        batch.n_tokens = len(entries)
        for i, (token, pos, seq, logits) in enumerate(entries):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, pos, 1, logits
            batch.seq_id[i][0] = seq
        code = self.api.llama_decode(self.ctx, batch)
        if code != 0:
            raise HylraError(f"{self.model.path}: llama.cpp stopped with code {code} at token {entries[0][1]}")

    def prefill(self, tokens: list[int], first_pos: int = 0, seq: int = 0, progress=None) -> None:
        for start in range(0, len(tokens), N_UBATCH):
            part = tokens[start : start + N_UBATCH]
            self.decode(part, first_pos + start, seq)
            if progress:
                progress(len(part))

    def keep(self, n_tokens: int, seq: int = 0) -> None:
        """A later rewind to these n_tokens, which the sequence has now, will work for recurrent layers too: their state has no past."""
        if not self.is_recurrent:
            return
        size_bytes = self.api.llama_state_seq_get_size_ext(self.ctx, seq, RECURRENT_ONLY)
        state = (ctypes.c_uint8 * size_bytes)()
        self.api.llama_state_seq_get_data_ext(self.ctx, state, size_bytes, seq, RECURRENT_ONLY)
        self.kept[seq, n_tokens] = state

    def copy_first(self, seq: int) -> None:
        """What sequence 0 holds, into an empty one."""
        self.api.llama_memory_seq_cp(self.memory, 0, seq, -1, -1)
        self.kept.update({(seq, n_tokens): state for (kept_seq, n_tokens), state in list(self.kept.items()) if kept_seq == 0})

    def rewind(self, n_tokens: int, seq: int = 0) -> None:
        """Forgets what follows the first n_tokens of a sequence, or of all with seq = ALL_SEQUENCES.

        Raises HylraError for recurrent layers whose state at that place was not kept.
        """
        for one in range(self.n_seq + self.scratch) if seq == ALL_SEQUENCES else (seq,):
            if not self._remove(n_tokens, one) and not (self._restore(n_tokens, one) and self._remove(n_tokens, one)):
                raise HylraError(f"{self.model.path}: the recurrent layers of this model cannot be rewound to {n_tokens} tokens; "
                                 "it cannot be measured this way")
            self.kept = {at: state for at, state in self.kept.items() if at[0] != one or at[1] <= n_tokens}

    def _remove(self, n_tokens: int, seq: int) -> bool:
        return self.api.llama_memory_seq_rm(self.memory, seq, n_tokens, -1)

    def _restore(self, n_tokens: int, seq: int) -> bool:
        state = self.kept.get((seq, n_tokens))
        return state is not None and self.api.llama_state_seq_set_data_ext(self.ctx, state, len(state), seq, RECURRENT_ONLY) > 0

    def logits(self, n_rows: int) -> np.ndarray:
        """[n_rows, n_vocab] F32 of the last batch; a view that the next decode overwrites."""
        pointer = self.api.llama_get_logits(self.ctx)
        return np.ctypeslib.as_array(pointer, shape=(n_rows, self.model.n_vocab))
