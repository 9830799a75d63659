"""The engine on a CUDA device: against the CPU engine with the same policy, against stock, with the cache in host memory, as CUDA graphs.

Needs a library built with -DGGML_CUDA=ON and a GPU, so continuous integration skips all of it; tools/gpu.sh runs it. What can be checked
without a GPU is in test_choose.py (radix selection), test_cuda_plan.py (launch arithmetic, compilation) and test_apply.py (hooks).
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize
from support import Session, full_like, policy, random_tokens, silence, write_tiny_model

from hylra_gguf import engine
from hylra_gguf.bench import gpu_names
from hylra_gguf.session import Model
from hylra_gguf.texts import calibration_text

api = engine.activate()
api.llama_backend_init()
silence(api)


def gpu_count() -> int:
    return len(gpu_names())


def has_gpu() -> bool:
    return gpu_count() > 0 and bool(api.llama_supports_gpu_offload())


pytestmark = pytest.mark.skipif(not has_gpu(), reason="no CUDA device, or a library without CUDA")

N_PAST, N_STEPS, ON_GPU = 700, 12, dict(n_gpu_layers=99)
KINDS = {
    "f16, head 64, group 2": ({}, {}),
    "head 128, group 5": (dict(n_head=10, n_head_kv=2, n_embd_head=128), {}),
    "head 80, group 4": (dict(n_head=4, n_head_kv=1, n_embd_head=80), {}),
    "head 256, group 16": (dict(n_head=16, n_head_kv=1, n_embd_head=256), {}),
    "bf16": ({}, dict(type_k=30, type_v=30)),
    "q8_0": ({}, dict(type_k=8, type_v=8)),
    "q4_0": ({}, dict(type_k=2, type_v=2)),
    "f32": ({}, dict(type_k=0, type_v=0)),
}


def divergence(got: np.ndarray, want: np.ndarray) -> float:
    """Mean KL divergence of the predictions, nats"""
    def log_softmax(x):
        x = x.astype(np.float64) - x.max(-1, keepdims=True)
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    log_p, log_q = log_softmax(want), log_softmax(got)
    return float((np.exp(log_p) * (log_p - log_q)).sum(-1).mean())


def run(model, p, n_past=N_PAST, **session):
    """(logits of N_STEPS steps under a policy, status of the engine)"""
    with Session(model, **session) as s:
        s.prefill(random_tokens(n_past))
        engine.set_policy(s.ctx, p)
        return s.steps(random_tokens(N_STEPS, 9), n_past), engine.status(s.ctx)


def assert_close(gpu, cpu, dense, apart=0.0):
    """Matrix products differ too (TF32 on a GPU), and this model is sharp: what counts is the error beside what the policy itself changes
    and, for quantised caches, beside how far apart dense predictions of the two backends are."""
    assert divergence(gpu, cpu) < max(1e-4, divergence(cpu, dense) / 20, 2 * apart)


@pytest.fixture(autouse=True)
def caches_of_any_length(monkeypatch):
    """The tiny model's are too short to gain on a GPU."""
    monkeypatch.setenv("HYLRA_DEVICE_MIN_CONTEXT", "0")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


@pytest.mark.parametrize("sparse_select", [None, (1, 0, 1, 0)], ids=["dense select", "sparse select"])
@pytest.mark.parametrize("lists", ["shared", "per head"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_gpu_predicts_what_the_cpu_predicts(tmp_path, kind, lists, sparse_select):
    shape, cache = KINDS[kind]
    model, heads = write_tiny_model(tmp_path / "m.gguf", **shape), shape.get("n_head_kv", 2)
    p = policy("SRSR", head_kv_count=heads, lists=heads if lists == "per head" else 1, top_k=128, sparse_select=sparse_select)
    gpu, on_gpu = run(model, p, **cache, **ON_GPU)
    cpu, on_cpu = run(model, p, **cache)
    assert on_gpu["sparse_steps"] == on_cpu["sparse_steps"] == N_STEPS and on_gpu["left_to_stock"] == {}
    dense = run(model, full_like(p), **cache)[0]
    assert_close(gpu, cpu, dense, divergence(run(model, None, **cache, **ON_GPU)[0], dense))
    assert on_gpu["captured_mass"] == pytest.approx(on_cpu["captured_mass"], rel=1e-2)


def test_top_k_that_covers_everything_equals_full(tiny):
    with Session(tiny, **ON_GPU) as s:
        s.prefill(random_tokens(N_PAST))
        logits = {}
        for name, p in (("all", policy("SRSR", top_k=4096)), ("full", full_like(policy("SRSR"))), ("stock", None)):
            engine.set_policy(s.ctx, p)
            logits[name] = s.steps(random_tokens(N_STEPS, 9), N_PAST)
            s.rewind(N_PAST)
            assert engine.status(s.ctx)["on"] == (p is not None)
    np.testing.assert_array_equal(logits["full"], logits["stock"])  # on a GPU a full layer is llama.cpp's own
    assert divergence(logits["all"], logits["stock"]) < 1e-5


@pytest.mark.parametrize("unified", [True, False], ids=["one cell space", "streams"])
def test_sequences_and_several_tokens_of_each(tiny, unified):
    p, tokens, logits = policy("SRSR", lists=2), random_tokens(80, 3), []
    for place, p in ((ON_GPU, p), ({}, p), ({}, full_like(p))):
        with Session(tiny, n_ctx=3072, n_seq_max=3, unified=unified, **place) as s:
            for seq in range(3):
                s.prefill(random_tokens(400 + 100*seq, seq), seq)
            engine.set_policy(s.ctx, p)
            logits.append(np.concatenate([s.decode([(tokens[3*i + seq], 400 + 100*seq + 3*step + i, seq) for seq in range(3) for i in range(3)])
                                          for step in range(4)]))
            assert engine.status(s.ctx)["sparse_steps"] == 4
    assert_close(*logits)


def test_whole_blocks(tiny):
    p = policy("SRSR", block_size=16, top_k=160)
    assert_close(run(tiny, p, **ON_GPU)[0], run(tiny, p)[0], run(tiny, full_like(p))[0])


def test_a_cache_in_host_memory_is_served_by_the_cpu_next_to_it(tiny):
    p = policy("SRSR")
    got, status = run(tiny, p, kv_on_gpu=False, **ON_GPU)
    want, on_cpu = run(tiny, p)
    assert status["sparse_steps"] == N_STEPS and status["left_to_stock"] == {}
    assert_close(got, want, run(tiny, full_like(p))[0])
    assert status["captured_mass"] == pytest.approx(on_cpu["captured_mass"], rel=1e-3)


def test_layers_on_both_sides_share_a_selection(tiny):
    p = policy("SRRR")
    got, status = run(tiny, p, n_gpu_layers=3)  # the first layers stay on the CPU, their list crosses
    assert status["left_to_stock"] == {}
    assert_close(got, run(tiny, p)[0], run(tiny, full_like(p))[0])


@pytest.mark.skipif(gpu_count() < 2, reason="fewer than two GPUs")
@pytest.mark.parametrize("sparse_select", [None, (0, 1, 0, 0, 0, 0, 0, 0)], ids=["dense select", "sparse select"])
def test_layers_split_over_two_gpus_share_a_selection(tmp_path, sparse_select):
    """Layer 1 selects on the first GPU for the reuse layers of both."""
    model, p = write_tiny_model(tmp_path / "m.gguf", n_layer=8), policy("FSRRRRRR", lists=2, top_k=128, sparse_select=sparse_select)
    (two, on_two), (one, _) = (run(model, p, split=split, **ON_GPU) for split in (True, False))
    assert on_two["sparse_steps"] == N_STEPS and on_two["left_to_stock"] == {} and on_two["captured_mass"]
    assert divergence(two, one) < 1e-6 < divergence(one, run(model, None, **ON_GPU)[0])


def test_a_cache_too_short_for_a_gpu_runs_stock(tiny, monkeypatch):
    p, stock = policy("SRSR"), run(tiny, None, **ON_GPU)[0]
    for least, sparse_steps in (("", 0), ("1024", 0), ("768", N_STEPS)):
        monkeypatch.setenv("HYLRA_DEVICE_MIN_CONTEXT", least)
        logits, status = run(tiny, p, **ON_GPU)
        assert status["on"] and status["sparse_steps"] == sparse_steps and status["left_to_stock"] == {}
        assert status["device_min_context"] == int(least or 65536)  # 2^24 values, 256 in a cell
        assert (logits == stock).all() == (sparse_steps == 0)


def test_a_new_policy_is_not_served_by_an_old_graph(tiny):
    one, other = policy("SRRR", lists=2, head_map=[0, 1]*4), policy("SRRR", lists=2, head_map=[0, 1] + [1, 0]*3)
    fresh = [run(tiny, p, **ON_GPU)[0] for p in (one, other)]
    with Session(tiny, **ON_GPU) as s:
        s.prefill(random_tokens(N_PAST))
        for p, want in zip((one, other, one), (*fresh, fresh[0])):
            engine.set_policy(s.ctx, p)
            np.testing.assert_array_equal(s.steps(random_tokens(N_STEPS, 9), N_PAST), want)
            s.rewind(N_PAST)


def test_steps_are_replayed_as_cuda_graphs(tiny, capfd):
    lines = []
    callback = api.llama_log_callback(lambda level, text, data: lines.append(text.decode(errors="replace")))
    api.llama_log_set(callback, ctypes.c_void_p())
    try:
        with Session(tiny, **ON_GPU) as s:
            api.llama_log_set(callback, ctypes.c_void_p())
            s.prefill(random_tokens(N_PAST))
            engine.set_policy(s.ctx, policy("SRSR"))
            lines.clear()
            s.steps(random_tokens(40, 9), N_PAST)
    finally:
        silence(api)
        test_steps_are_replayed_as_cuda_graphs.alive = callback  # llama.cpp may keep the pointer
    captured = sum("graph warmup complete" in line for line in lines)
    reset = sum("graph warmup reset" in line for line in lines)
    print(f"CUDA graphs: {captured} captured, {reset} given up in 40 steps")
    assert captured >= 1 and reset == 0


def text_tokens(model: str, count: int) -> list[int]:
    with Model(model) as opened:
        return opened.tokenize(calibration_text(8 * count)[0])[:count]


def cache_after(model: str, tokens: list[int], **session):
    """What a context holds that has read the tokens: bytes that any other can load"""
    with Session(model, n_ctx=len(tokens) + 256, n_batch=512, **session) as s:
        s.prefill(tokens)
        size_bytes = api.llama_state_seq_get_size(s.ctx, 0)
        state = (ctypes.c_uint8 * size_bytes)()
        assert api.llama_state_seq_get_data(s.ctx, state, size_bytes, 0) == size_bytes
        return state


def greedy(s: Session, first: int, depth: int, n: int = 32) -> list[int]:
    tokens = [first]
    for i in range(n):
        tokens.append(int(s.decode([(tokens[-1], depth + i, 0)])[0].argmax()))
    s.rewind(depth)
    return tokens


def policy_for(s: Session, top_k: int):
    """Of a model of ten layers or more: two select layers"""
    layers, heads = api.llama_model_n_layer(s.model), api.llama_model_n_head_kv(s.model)
    return policy("F" + "S" + "R"*6 + "S" + "R"*(layers - 9), head_kv_count=heads, top_k=top_k, min_context=1024)


def on_one_cache(model: str, depth: int):
    """Per place, GPU and CPU: (logits under a policy, dense logits, captured mass, greedy tokens), all from the cache that the GPU has filled.

    On quantised weights the caches that two backends fill differ by more than what is asked for here.
    """
    tokens = text_tokens(model, depth + N_STEPS)
    state, found = cache_after(model, tokens[:depth], **ON_GPU), []
    for place in (ON_GPU, {}):
        with Session(model, n_ctx=depth + 256, n_threads=8, **place) as s:
            p = policy_for(s, top_k=512)
            assert api.llama_state_seq_set_data(s.ctx, state, len(state), 0)
            logits = []
            for one in (p, full_like(p)):
                engine.set_policy(s.ctx, one)
                logits.append(s.steps(tokens[depth:], depth))
                s.rewind(depth)
            engine.set_policy(s.ctx, p)
            text = greedy(s, tokens[depth], depth)
            found.append((*logits, engine.status(s.ctx)["captured_mass"], text))
    return found


def f32_copy(model: str, path: Path) -> Path:
    """The same weights, no longer quantised: backends then differ by rounding in F32 alone."""
    reader = gguf.GGUFReader(model)
    writer = gguf.GGUFWriter(path, "llama")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            kind, item = field.types[0], field.types[-1]
            writer.add_key_value(name, field.contents(), kind, item if kind == gguf.GGUFValueType.ARRAY else None)
    for t in reader.tensors:
        writer.add_tensor(t.name, dequantize(t.data, t.tensor_type).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def real_models(needle_model, tmp_path_factory):
    model = str(needle_model)
    return {"as it is": model, "F32": str(f32_copy(model, tmp_path_factory.mktemp("f32") / "f32.gguf"))}


@pytest.mark.parametrize("depth", [1500, 6000])
@pytest.mark.parametrize("weights", ["as it is", "F32"])
def test_a_real_model(real_models, weights, depth):
    """Quantised: no further apart than dense steps of the two backends, whose products round activations differently. F32: equal."""
    (gpu, gpu_dense, gpu_mass, gpu_text), (cpu, cpu_dense, cpu_mass, cpu_text) = on_one_cache(real_models[weights], depth)
    sparse, dense, loss = divergence(gpu, cpu), divergence(gpu_dense, cpu_dense), divergence(cpu, cpu_dense)
    print(f"KL divergence of CUDA from CPU, weights {weights}, {depth} tokens: {sparse:.1e} under a policy, {dense:.1e} dense; the policy itself: {loss:.1e}")
    assert gpu_mass == pytest.approx(cpu_mass, rel=1e-2)
    assert sparse < (1.5*dense + 1e-4 if weights == "as it is" else 1e-4)
    assert weights == "as it is" or gpu_text == cpu_text


def test_a_real_model_whose_lists_hold_every_cell_equals_full(real_models):
    """Full layers are llama.cpp's on a GPU, so two kernels are compared; with weights of F32, as quantised activations make much of their last bits."""
    depth = 1500
    tokens = text_tokens(real_models["F32"], depth + N_STEPS)
    with Session(real_models["F32"], n_ctx=depth + 256, n_batch=512, n_threads=8, **ON_GPU) as s:
        s.prefill(tokens[:depth])
        logits = []
        for p in (policy_for(s, top_k=4096), full_like(policy_for(s, top_k=4096)), policy_for(s, top_k=512)):
            engine.set_policy(s.ctx, p)
            logits.append(s.steps(tokens[depth:], depth))
            s.rewind(depth)
        assert engine.status(s.ctx)["sparse_steps"] == N_STEPS
    every, few = divergence(logits[0], logits[1]), divergence(logits[2], logits[1])
    print(f"KL divergence from full, weights F32, {depth} tokens: {every:.1e} with lists of every cell, {few:.1e} with 512")
    assert every < 1e-5 < few
