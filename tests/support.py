"""Builds tiny random llama models and drives a context through the low-level API, as the engine tests need it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np

from hylra_gguf.policy import Policy

VOCAB = 96
THREADS = int(os.environ.get("HYLRA_TEST_THREADS", "1"))  # tools/sanitize.py asks for more


N_EMBD, N_FF = 64, 96  # of the tiny model


def instruction_sets() -> list[str]:
    """Those of the CPU kernels that this build and processor have, the scalar twins first"""
    from hylra_gguf import engine

    score, cell = engine.ffi.new("float[1]", [0.5]), engine.ffi.new("int32_t[1]")
    return [isa for isa in ("ref", "base", "avx2", "avx512", "avx512vnni") if engine.lib.hylra_test_choose(isa.encode(), score, 1, 1, 1, cell) >= 0]


def write_tiny_model(path: Path, n_layer=4, n_head=4, n_head_kv=2, n_embd_head=64, seed=0, context=8192, arch="llama",
                     norms=("attn_norm", "ffn_norm"), sliding_window=0, tied=False) -> Path:
    """A GGUF of llama-like tensors without tokenizer, F32 weights of random value; attention sharp enough to be selective."""
    w = gguf.GGUFWriter(path, arch)
    add_metadata(w, n_layer, n_head, n_head_kv, n_embd_head, context)
    if sliding_window:
        w.add_sliding_window(sliding_window)
    rng = np.random.default_rng(seed)
    for name, shape, scale in tiny_tensors(n_layer, n_head * n_embd_head, n_head_kv * n_embd_head, norms, tied):
        values = np.ones(shape) if scale is None else rng.standard_normal(shape) * scale / np.sqrt(shape[-1])
        w.add_tensor(name + ".weight", values.astype(np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def add_metadata(w: gguf.GGUFWriter, n_layer: int, n_head: int, n_head_kv: int, n_embd_head: int, context: int) -> None:
    w.add_name("tiny")
    w.add_context_length(context)
    w.add_embedding_length(N_EMBD)
    w.add_block_count(n_layer)
    w.add_feed_forward_length(N_FF)
    w.add_head_count(n_head)
    w.add_head_count_kv(n_head_kv)
    w.add_key_length(n_embd_head)
    w.add_value_length(n_embd_head)
    w.add_rope_dimension_count(n_embd_head)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_layer_norm_eps(1e-5)
    w.add_logit_scale(1.0)
    w.add_vocab_size(VOCAB)
    w.add_tokenizer_model("no_vocab")


def tiny_tensors(n_layer: int, n_q: int, n_kv: int, norms, tied: bool):
    """(name, shape, scale of its random values; None: ones); n_q and n_kv are widths over all heads"""
    yield "token_embd", (VOCAB, N_EMBD), 8.0
    if not tied:
        yield "output", (VOCAB, N_EMBD), 2.0
    yield "output_norm", (N_EMBD,), None
    for i in range(n_layer):
        yield from ((f"blk.{i}.{norm}", (N_EMBD,), None) for norm in norms)
        for name, rows, cols, scale in (("attn_q", n_q, N_EMBD, 2.0), ("attn_k", n_kv, N_EMBD, 2.0), ("attn_v", n_kv, N_EMBD, 1.0),
                                        ("attn_output", N_EMBD, n_q, 1.0), ("ffn_gate", N_FF, N_EMBD, 1.0), ("ffn_up", N_FF, N_EMBD, 1.0),
                                        ("ffn_down", N_EMBD, N_FF, 1.0)):
            yield f"blk.{i}.{name}", (rows, cols), scale


def policy(pattern: str, **fields) -> Policy:
    """F full, S select, R reuse of the last S."""
    source, sources = -1, []
    for il, mode in enumerate(pattern):
        source = il if mode == "S" else source
        sources.append(-1 if mode == "F" else source)
    defaults = dict(head_kv_count=2, top_k=64, sink_tokens=4, recent_tokens=16, min_context=256)
    return Policy(layer_mode=tuple("FSR".index(m) for m in pattern), layer_source=tuple(sources), **{**defaults, **fields})


def full_like(p: Policy) -> Policy:
    return policy("F" * p.layer_count, head_kv_count=p.head_kv_count, min_context=p.min_context)


def random_tokens(n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB, n).tolist()


_log_callbacks = []  # llama.cpp keeps the pointer for good: a callback that is collected with its session crashes the next log line


def silence(api) -> None:
    if not _log_callbacks:
        _log_callbacks.append(api.llama_log_callback(lambda level, text, data: None))
        api.llama_log_set(_log_callbacks[0], None)


def run_on_stock(script: str, *args) -> None:
    """A Python script with these arguments in a process of its own, on the unpatched build of the same llama.cpp."""
    stock = os.environ.get("HYLRA_STOCK_LIB")
    assert stock and Path(stock, "libllama.so").exists(), "set HYLRA_STOCK_LIB to the stock/ folder of a build with -DHYLRA_BUILD_STOCK=ON"
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "LLAMA_CPP_LIB_PATH": stock, "PYTHONPATH": path}
    subprocess.run([sys.executable, "-c", script, *map(str, args)], env=env, check=True)


class Session:
    """One model and context on the library that `llama_cpp` has loaded; logits come back as float32 [n_vocab]."""

    def __init__(self, path, n_ctx=1024, n_seq_max=1, unified=True, flash_attn=True, type_k=1, type_v=1, n_threads=THREADS, n_ubatch=512,
                 n_batch=None, overrides=None, eval_callback=None, n_gpu_layers=0, kv_on_gpu=True, split=True):
        import llama_cpp as api

        self.api = api
        api.llama_backend_init()
        silence(api)
        self._alive = []
        params = api.llama_model_default_params()
        params.n_gpu_layers = n_gpu_layers
        if not split:
            params.split_mode = 0  # all layers on the first GPU
        if overrides:
            params.kv_overrides = self._overrides(overrides)
        self.model = api.llama_model_load_from_file(str(path).encode(), params)
        assert self.model, f"{path} does not load"
        c = api.llama_context_default_params()
        c.n_ctx, c.n_batch, c.n_ubatch, c.n_seq_max, c.kv_unified = n_ctx, n_batch or n_ctx, n_ubatch, n_seq_max, unified
        c.n_threads = c.n_threads_batch = n_threads
        c.type_k, c.type_v = type_k, type_v
        c.flash_attn_type = 1 if flash_attn else 0
        c.offload_kqv = c.op_offload = n_gpu_layers > 0 and kv_on_gpu
        if eval_callback:
            callback = api.ggml_backend_sched_eval_callback(eval_callback)
            self._alive.append(callback)
            c.cb_eval = callback
        self.ctx = api.llama_init_from_model(self.model, c)
        assert self.ctx, "no context"
        self.n_vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.model))
        self.memory = api.llama_get_memory(self.ctx)

    def _overrides(self, values: dict):
        array = (self.api.llama_model_kv_override * (len(values) + 1))()
        for slot, (key, value) in zip(array, values.items()):
            slot.key = key.encode()
            if isinstance(value, bool):
                slot.tag, slot.value.val_bool = self.api.LLAMA_KV_OVERRIDE_TYPE_BOOL, value
            else:
                slot.tag, slot.value.val_i64 = self.api.LLAMA_KV_OVERRIDE_TYPE_INT, value
        self._alive.append(array)
        return array

    def decode(self, entries) -> np.ndarray:
        """entries: (token, position, sequence); returns the logits of every one, [len(entries), n_vocab]."""
        batch = self.api.llama_batch_init(len(entries), 0, 1)
        batch.n_tokens = len(entries)
        for i, (token, pos, seq) in enumerate(entries):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, pos, 1, seq, 1
        code = self.api.llama_decode(self.ctx, batch)
        assert code == 0, f"llama_decode: {code}"
        rows = [np.ctypeslib.as_array(self.api.llama_get_logits_ith(self.ctx, i), (self.n_vocab,)).copy() for i in range(len(entries))]
        self.api.llama_batch_free(batch)
        return np.stack(rows)

    def prefill(self, tokens, seq=0, start=0) -> np.ndarray:
        entries, n_batch = [(t, start + i, seq) for i, t in enumerate(tokens)], self.api.llama_n_batch(self.ctx)
        return np.concatenate([self.decode(entries[i : i + n_batch]) for i in range(0, len(entries), n_batch)])

    def fill(self, n_cells: int, n_read: int) -> None:
        """Sequence 0 with copies of a few tokens that are really read; the last sequence of the context carries them."""
        from hylra_gguf.fill import fill_with_copies  # binds the engine, which scripts on stock llama.cpp do without

        self.n_seq, self.is_recurrent = self.api.llama_n_seq_max(self.ctx) - 1, False  # what fill_with_copies asks a context for
        assert fill_with_copies(self, random_tokens(n_read), n_cells)

    def steps(self, tokens, start, seq=0) -> np.ndarray:
        """One token at a time; [len(tokens), n_vocab]."""
        return np.concatenate([self.decode([(t, start + i, seq)]) for i, t in enumerate(tokens)])

    def rewind(self, n_past: int, seq=-1) -> None:
        self.remove(seq, n_past)

    def remove(self, seq: int, begin=-1, end=-1) -> None:
        assert self.api.llama_memory_seq_rm(self.memory, seq, begin, end)

    def close(self) -> None:
        self.api.llama_free(self.ctx)
        self.api.llama_model_free(self.model)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()
