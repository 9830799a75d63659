"""The engine inside llama.cpp: exactness, selection against a NumPy statement, sequences and streams, switches, status."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from reference import Trace, attention, cells_allowed, check_selection, probabilities
from support import Session, full_like, policy, random_tokens, run_on_stock, write_tiny_model

from hylra_gguf import engine
from hylra_gguf.errors import PolicyError
from hylra_gguf.gguf_header import write_policy
from hylra_gguf.policy import Policy

engine.activate()
N_PAST, N_STEPS = 700, 6


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


def step_logits(session, p, tokens=None, start=N_PAST):
    """Logits of a few decode steps under policy p, leaving the cache as it was."""
    engine.set_policy(session.ctx, p)
    logits = session.steps(tokens or random_tokens(N_STEPS, 9), start)
    session.rewind(start)
    return logits


# ---- 1. nothing changes without a policy in force

STOCK_SCRIPT = """
import sys, numpy as np
from support import Session, random_tokens
s = Session(sys.argv[1], n_ctx=1024, type_k=int(sys.argv[3]), type_v=int(sys.argv[3]), flash_attn=sys.argv[4] == "1")
vocab = min(s.n_vocab, 96)
rows = [s.prefill(random_tokens(700))[-1:], s.steps(random_tokens(6, 9), 700)]
np.save(sys.argv[2], np.concatenate(rows))
"""


def logits_of_stock(model: Path, out: Path, type_kv: int, flash_attn: bool) -> np.ndarray:
    """From the unpatched build of the same source, in its own process."""
    run_on_stock(STOCK_SCRIPT, model, out, type_kv, int(flash_attn))
    return np.load(out)


SWITCHES = {
    "no policy": lambda s: None,
    "policy taken away": lambda s: (engine.set_policy(s.ctx, policy("FSRR")), engine.set_policy(s.ctx, None)),
    "enabled = false": lambda s: engine.set_policy(s.ctx, policy("FSRR", enabled=False)),
    "below min_context": lambda s: engine.set_policy(s.ctx, policy("FSRR", min_context=1024)),
}


@pytest.mark.parametrize("type_kv", [1, 8], ids=["f16", "q8_0"])
@pytest.mark.parametrize("flash_attn", [True, False], ids=["fa", "no fa"])
def test_bit_identical_to_the_unpatched_build(tiny, tmp_path, type_kv, flash_attn):
    if type_kv == 8 and not flash_attn:
        type_kv = 0  # llama.cpp wants flash attention for a quantised V
    want = logits_of_stock(tiny, tmp_path / "stock.npy", type_kv, flash_attn)
    for name, switch in SWITCHES.items():
        with Session(tiny, type_k=type_kv, type_v=type_kv, flash_attn=flash_attn) as s:
            switch(s)
            got = np.concatenate([s.prefill(random_tokens(N_PAST))[-1:], s.steps(random_tokens(6, 9), N_PAST)])
        np.testing.assert_array_equal(got, want, err_msg=name)


def test_the_real_model_is_bit_identical_too(smollm2, tmp_path):
    want = logits_of_stock(smollm2, tmp_path / "stock.npy", 1, True)
    with Session(smollm2) as s:
        got = np.concatenate([s.prefill(random_tokens(N_PAST))[-1:], s.steps(random_tokens(6, 9), N_PAST)])
    np.testing.assert_array_equal(got, want)


# ---- 2. a selection that covers everything equals full attention

SHAPES = {
    "GQA 1, head 64": dict(n_head=2, n_head_kv=2),
    "GQA 3, head 64": dict(n_head=6, n_head_kv=2),
    "GQA 4, head 80": dict(n_head=4, n_head_kv=1, n_embd_head=80),
    "GQA 8, head 128": dict(n_head=8, n_head_kv=1, n_embd_head=128),
}


@pytest.mark.parametrize("pattern", ["SRRR", "FSRS", "SSRR"])
@pytest.mark.parametrize("lists", ["shared", "per head"])
@pytest.mark.parametrize("shape", SHAPES)
def test_top_k_that_covers_everything_equals_full(tmp_path, shape, lists, pattern):
    heads = SHAPES[shape]["n_head_kv"]
    model = write_tiny_model(tmp_path / "m.gguf", **SHAPES[shape])
    p = policy(pattern, head_kv_count=heads, lists=heads if lists == "per head" else 1, top_k=4096)
    with Session(model) as s:
        s.prefill(random_tokens(N_PAST))
        got, want, stock = step_logits(s, p), step_logits(s, full_like(p)), step_logits(s, None)
    np.testing.assert_allclose(got, want, atol=3e-4, rtol=1e-4)
    np.testing.assert_allclose(want, stock, atol=0.15)  # stock accumulates V in F16: close, not equal
    assert np.abs(want - stock).max() > 0, "the full arm must be our own kernel"


@pytest.mark.parametrize("type_kv", [0, 1, 2, 8, 30], ids=["f32", "f16", "q4_0", "q8_0", "bf16"])
@pytest.mark.parametrize("block_size", [1, 32])
def test_every_kv_type_and_blocks(tiny, type_kv, block_size):
    p = policy("SRSR", top_k=4096, block_size=block_size)
    with Session(tiny, type_k=type_kv, type_v=type_kv) as s:
        s.prefill(random_tokens(N_PAST))
        np.testing.assert_allclose(step_logits(s, p), step_logits(s, full_like(p)), atol=3e-4, rtol=1e-4)


def test_smollm2_top_k_that_covers_everything_equals_full(smollm2):
    p = policy("F" + "SRR" * 9 + "SR", head_kv_count=3, top_k=8192)
    with Session(smollm2) as s:
        s.prefill(random_tokens(N_PAST))
        got, want = step_logits(s, p), step_logits(s, full_like(p))
    assert np.abs(got - want).max() < 2e-3 * np.abs(want).max()
    np.testing.assert_array_equal(got.argmax(-1), want.argmax(-1))


# ---- 3. a real selection is the one that DESIGN §5 states


@pytest.mark.parametrize("lists,head_map", [(1, None), (2, None), (2, (0, 1, 0, 1, 1, 0, 1, 1))])
def test_selection_and_reuse_equal_numpy(tiny, lists, head_map):
    p = policy("SRFR", lists=lists, head_map=head_map)
    trace = Trace()
    with Session(tiny, eval_callback=trace.callback) as s:
        s.prefill(random_tokens(N_PAST))
        step_logits(s, p, random_tokens(1, 5))
    forced = [[[*range(4), *range(N_PAST - 15, N_PAST + 1)]]]
    check_selection(trace.inputs[0], trace.choices[0], lists, 64, forced)
    for layer, mode in enumerate("SRFR"):
        x = trace.inputs[layer]
        heads = [0, 0] if lists == 1 else (head_map or (0, 1) * 4)[2 * layer : 2 * layer + 2]
        allowed = cells_allowed(x, heads) if mode == "R" else None
        assert (x["cells"] is None) == (mode != "R")
        if mode == "R":
            np.testing.assert_array_equal(x["cells"], trace.choices[0])
        np.testing.assert_allclose(trace.outputs[layer], attention(x, probabilities(x, allowed)), atol=2e-5, rtol=1e-4)


def test_every_select_layer_emits_its_own_budget(tiny):
    p = policy("SRSR", top_k=64, layer_top_k=(64, 0, 24, 0))
    trace = Trace()
    with Session(tiny, eval_callback=trace.callback) as s:
        s.prefill(random_tokens(N_PAST))
        step_logits(s, p, random_tokens(1, 5))
    forced = [[[*range(4), *range(N_PAST - 15, N_PAST + 1)]]]
    for layer, k in ((0, 64), (2, 24)):
        check_selection(trace.inputs[layer], trace.choices[layer], 1, k, forced)
        np.testing.assert_array_equal(trace.inputs[layer + 1]["cells"], trace.choices[layer])


@pytest.mark.parametrize("lists", [1, 2])
def test_a_layer_that_is_its_own_source_attends_to_its_best_cells(tiny, lists):
    p = Policy(layer_mode=(2,) * 4, layer_source=tuple(range(4)), head_kv_count=2, lists=lists, top_k=64, recent_tokens=16, min_context=256)
    trace = Trace()
    with Session(tiny, eval_callback=trace.callback) as s:
        s.prefill(random_tokens(N_PAST))
        step_logits(s, p, random_tokens(1, 5))
    forced = [[[*range(4), *range(N_PAST - 15, N_PAST + 1)]]]
    for layer in range(4):
        x = trace.inputs[layer]
        check_selection(x, trace.choices[layer], lists, 64, forced)
        np.testing.assert_array_equal(x["cells"], trace.choices[layer])
        allowed = cells_allowed(x, [0, 0] if lists == 1 else [0, 1])
        np.testing.assert_allclose(trace.outputs[layer], attention(x, probabilities(x, allowed)), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("lists,head_map", [(1, None), (2, None), (2, (1, 0) * 4)])
def test_a_sparse_select_layer_attends_to_its_selection_and_hands_it_out(tiny, lists, head_map):
    """Layer 2 selects densely beside it. A head map speaks of reuse layers only."""
    p = policy("SRSR", lists=lists, head_map=head_map, sparse_select=(1, 0, 0, 0))
    trace = Trace()
    with Session(tiny, eval_callback=trace.callback) as s:
        s.prefill(random_tokens(N_PAST))
        step_logits(s, p, random_tokens(1, 5))
    forced = [[[*range(4), *range(N_PAST - 15, N_PAST + 1)]]]
    heads = {layer: [0, 0] if lists == 1 else list((head_map or (0, 1) * 4)[2 * layer:2 * layer + 2]) for layer in (1, 3)}
    heads[0] = [0, 0] if lists == 1 else [0, 1]
    check_selection(trace.inputs[0], trace.choices[0], lists, 64, forced)
    for layer, source in ((0, 0), (1, 0), (2, None), (3, 2)):
        x = trace.inputs[layer]
        assert (x["cells"] is None) == (source is None)
        if source is not None:
            np.testing.assert_array_equal(x["cells"], trace.choices[source])
        allowed = cells_allowed(x, heads[layer]) if source is not None else None
        np.testing.assert_allclose(trace.outputs[layer], attention(x, probabilities(x, allowed)), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("top_k, sparse", [(255, True), (256, False)])
def test_a_select_layer_turns_sparse_where_that_reads_fewer_rows(tiny, top_k, sparse):
    """The cache view holds 512 cells: V of 512, or K and V of the selection."""
    trace = Trace()
    with Session(tiny, n_ctx=512, eval_callback=trace.callback) as s:
        s.prefill(random_tokens(400))
        step_logits(s, policy("SRRR", top_k=top_k, sparse_select=(1, 0, 0, 0)), random_tokens(1, 5), start=400)
    assert trace.inputs[0]["mask"].shape[-1] == 512 and (trace.inputs[0]["cells"] is not None) == sparse


def test_equal_policies_but_for_sparse_select_predict_something_else(tiny):
    with Session(tiny) as s:
        s.prefill(random_tokens(N_PAST))
        dense, sparse = step_logits(s, policy("SRRR")), step_logits(s, policy("SRRR", sparse_select=(1, 0, 0, 0)))
    assert np.abs(dense - sparse).max() > 1e-3


# ---- 4. sequences, streams, cells out of order


@pytest.mark.parametrize("unified", [True, False], ids=["one stream", "streams"])
def test_sequences_of_different_length_select_their_own_cells(tiny, unified):
    p = policy("SRRR", sink_tokens=0, recent_tokens=0)
    trace = Trace()
    with Session(tiny, n_ctx=3072, n_seq_max=3, unified=unified, eval_callback=trace.callback) as s:
        for seq, n in enumerate((600, 400, 500)):
            s.prefill(random_tokens(n, seq), seq)
        s.rewind(300, seq=1)  # a hole, which sequence 0 fills: its cells are out of order then
        s.prefill(random_tokens(90, 7), seq=0, start=600)
        engine.set_policy(s.ctx, p)
        s.decode([(5, 690, 0), (6, 300, 1), (7, 500, 2)])
        assert engine.status(s.ctx)["sparse_steps"] == 1
    rows = [(0, 0), (0, 1), (0, 2)] if unified else [(0, 0), (1, 0), (2, 0)]
    x, cells = trace.inputs[0], trace.choices[0]
    assert cells.shape == ((1, 3, 1, 64) if unified else (3, 1, 1, 64))
    assert [(x["mask"][s, 0, t] == 0).sum() for s, t in rows] == [691, 301, 501]
    check_selection(x, cells, 1, 64, [[[]] * 3] * 3)
    for layer in range(1, 4):
        x = trace.inputs[layer]
        np.testing.assert_array_equal(x["cells"], cells)
        np.testing.assert_allclose(trace.outputs[layer], attention(x, probabilities(x, cells_allowed(x, [0, 0]))), atol=2e-5, rtol=1e-4)


def test_sink_and_recent_cells_follow_positions_not_cells(tiny):
    """Sequence 0 is written behind, then into a hole before, other tokens: positions and cells disagree."""
    p = policy("SRRR", top_k=24, sink_tokens=4, recent_tokens=16)
    trace = Trace()
    with Session(tiny, n_ctx=2048, n_seq_max=2, eval_callback=trace.callback) as s:
        s.prefill(random_tokens(300, 1), seq=1)
        s.prefill(random_tokens(400, 0), seq=0)
        s.rewind(0, seq=1)
        s.prefill(random_tokens(100, 2), seq=0, start=400)
        engine.set_policy(s.ctx, p)
        s.decode([(5, 500, 0)])
    x, cells = trace.inputs[0], trace.choices[0][0, 0, 0]
    k_of_first = set(np.flatnonzero(x["mask"][0, 0, 0] == 0)[-400:][:4])  # positions 0..3 lie behind the hole
    assert k_of_first <= set(cells)
    low = cells[cells < 300]
    assert len(low) >= 16 and set(range(85, 101)) <= set(low)  # positions 485..500 lie in cells 85..100 of the hole


def test_several_tokens_of_one_sequence_equal_single_steps(tiny):
    tokens = random_tokens(5, 4)
    for p in (policy("SRSR"), full_like(policy("SRSR"))):
        with Session(tiny) as s:
            s.prefill(random_tokens(N_PAST))
            single = step_logits(s, p, tokens)
            batch = s.decode([(t, N_PAST + i, 0) for i, t in enumerate(tokens)])
        np.testing.assert_allclose(batch, single, atol=3e-3, rtol=1e-3)


def test_prefill_stays_dense(tiny):
    with Session(tiny) as s:
        want = s.prefill(random_tokens(N_PAST))
    with Session(tiny) as s:
        engine.set_policy(s.ctx, policy("SRRR"))
        got = s.prefill(random_tokens(N_PAST))
        assert engine.status(s.ctx)["sparse_steps"] == 0
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("per_sequence, sparse", [((1,), 1), ((8,), 1), ((9,), 0), ((60,), 0), ((1, 8), 1), ((1, 16), 0), ((8, 8, 8), 1)])
def test_a_step_has_up_to_eight_tokens_per_sequence_that_is_in_it(tiny, per_sequence, sparse):
    """However many sequences there could be: more tokens are a piece of a prompt."""
    with Session(tiny, n_ctx=4096, n_seq_max=8) as s:
        for seq in range(len(per_sequence)):
            s.prefill(random_tokens(N_PAST, seq), seq)
        engine.set_policy(s.ctx, policy("SRRR"))
        s.decode([(i, N_PAST + i, seq) for seq, n in enumerate(per_sequence) for i in range(n)])
        assert engine.status(s.ctx)["sparse_steps"] == sparse


def test_threads_do_not_change_the_result(tiny):
    """Nor whether they share the heads of a chunk, as more threads than chunks do."""
    logits = []
    for n_threads in (1, 2, 3, 12):
        with Session(tiny, n_threads=n_threads) as s:
            s.prefill(random_tokens(N_PAST))
            logits.append(step_logits(s, policy("SRSR")))
    for other in logits[1:]:
        np.testing.assert_array_equal(logits[0], other)


# ---- 5. switches, status, graphs


def test_policies_that_change_between_steps_leave_no_trace(tiny):
    """Equal node counts, other lifetimes: buffers must be planned anew (ggml_gallocr_needs_realloc compares by index)."""
    patterns = ["SRFR", "FSRR", "SRRF", "SFRR"]
    with Session(tiny) as s:
        s.prefill(random_tokens(N_PAST))
        first = {x: step_logits(s, policy(x)) for x in patterns}
        again = {x: step_logits(s, policy(x)) for x in reversed(patterns)}
    for x in patterns:
        with Session(tiny) as s:
            s.prefill(random_tokens(N_PAST))
            fresh = step_logits(s, policy(x))
        np.testing.assert_array_equal(first[x], fresh, err_msg=x)
        np.testing.assert_array_equal(again[x], fresh, err_msg=x)


def test_graphs_are_reused_as_in_stock(tiny):
    reused = {}
    for name, p in (("stock", None), ("hylra", policy("SRSR"))):
        with Session(tiny) as s:
            s.prefill(random_tokens(N_PAST))
            engine.set_policy(s.ctx, p)
            s.steps(random_tokens(200, 3), N_PAST)
            reused[name] = s.api.llama_perf_context(s.ctx).n_reused
    assert reused["stock"] > 150 and reused["hylra"] == reused["stock"]


def test_policy_in_the_file_and_its_switches(tiny, tmp_path, monkeypatch):
    model = tmp_path / "with.gguf"
    write_policy(str(tiny), policy("FSRR"), out=str(model))
    on = lambda **kw: read_status(model, **kw)
    status = on()
    assert status["on"] and status["layers"] == {"full": 1, "select": 1, "reuse": 2} and status["left_to_stock"] == {}
    assert status["steps"] == status["sparse_steps"] == 3
    assert list(status["captured_mass"]) == [1] and 0.05 < status["captured_mass"][1] <= 1.0001
    assert on(overrides={"hylra.enabled": False})["reason"] == "switched off by hylra.enabled = false"
    assert on(overrides={"hylra.min_context": 1024}) | {"steps": 0} == status | {"steps": 0, "sparse_steps": 0, "captured_mass": {}, "min_context": 1024}
    assert "flash attention is off" in on(flash_attn=False)["reason"]
    monkeypatch.setenv("HYLRA", "0")
    assert on()["reason"] == "switched off by the environment variable HYLRA=0"


def read_status(model, **kw):
    with Session(model, **kw) as s:
        s.prefill(random_tokens(N_PAST))
        s.steps(random_tokens(3), N_PAST)
        return engine.status(s.ctx)


@pytest.mark.parametrize("n_cached,sparse", [(500, 0), (511, 0), (512, 1), (600, 1)])
def test_min_context_counts_cached_tokens(tiny, n_cached, sparse):
    with Session(tiny) as s:
        s.prefill(random_tokens(n_cached))
        engine.set_policy(s.ctx, policy("FSRR", min_context=512))
        s.steps([1], n_cached)
        assert engine.status(s.ctx)["sparse_steps"] == sparse


def test_no_policy_is_told(tiny):
    assert read_status(tiny)["reason"] == "the model file has no policy"


def test_layers_that_cannot_be_served_are_told(tmp_path):
    """A head larger than any kernel's (HYLRA_MAX_EMBD) is left to llama.cpp, and the status says so."""
    model = write_tiny_model(tmp_path / "wide.gguf", n_head=1, n_head_kv=1, n_embd_head=704)
    with Session(model) as s:
        s.prefill(random_tokens(N_PAST))
        want = step_logits(s, None)
        np.testing.assert_array_equal(step_logits(s, policy("FSRR", head_kv_count=1)), want)
        status = engine.status(s.ctx)
    assert not status["on"] and "no layer can be served" in status["reason"] and set(status["left_to_stock"]) == {0, 1, 2, 3}


def test_every_layer_state_has_words_of_its_own():
    states = [name for name in dir(engine.lib) if name.startswith("HYLRA_LAYER_")]
    texts = {engine.ffi.string(engine.lib.hylra_layer_text(getattr(engine.lib, name))) for name in states}
    assert len(texts) == len(states) > 10 and b"unknown" not in texts
    assert engine.ffi.string(engine.lib.hylra_layer_text(len(states))) == b"unknown"


MISFITS = {
    "another layer count": (lambda: policy("FSRRR"), "layer_count is 5, the model has 4 layers"),
    "another head count": (lambda: policy("FSRR", head_kv_count=3), "head_kv_count is 3, the model has 2 KV heads"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_a_policy_that_does_not_fit_runs_dense_and_says_why(tiny, case, tmp_path):
    make, line = MISFITS[case]
    with Session(tiny) as s:
        s.prefill(random_tokens(N_PAST))
        want = step_logits(s, None)
        with pytest.raises(PolicyError, match=re.escape(line)):
            engine.set_policy(s.ctx, make())
        np.testing.assert_array_equal(s.steps(random_tokens(N_STEPS, 9), N_PAST), want)
        assert line in engine.status(s.ctx)["reason"] and not engine.status(s.ctx)["on"]
