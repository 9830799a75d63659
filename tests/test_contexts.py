"""What else a context lives through: min_context crossed both ways, LoRA, embeddings, grammar, two models, other batches and threads,
files of stock llama.cpp and back, graphs whose buffers must be planned anew, ten thousand steps.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import gguf
import numpy as np
import pytest
from architectures import ARCHITECTURES, SIZES, write_architecture
from reference import Trace
from support import Session, full_like, policy, random_tokens, run_on_stock
from test_life_cycle import Arm
from test_llama import PROMPT, make, spans

from hylra_gguf import engine

engine.activate()
N_PAST = 500
COVERING = policy("SRFRS", top_k=8192)
REAL = policy("SRFRS", sink_tokens=0, recent_tokens=0)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_architecture(tmp_path_factory.mktemp("contexts") / "m.gguf", ARCHITECTURES["llama"])


def close(got, want):
    np.testing.assert_allclose(got, want, atol=2e-3, rtol=1e-3)


# ---- min_context


def around_min_context(path, p):
    """(logits, whether each step ran sparse) of steps that cross 512 cells upwards, fall below it and cross it again"""
    with Session(path, n_ctx=2048) as s:
        engine.set_policy(s.ctx, p)
        rows, sparse = [], []
        for start in (505, 400, 505):
            s.rewind(0)
            s.prefill(random_tokens(start))
            for i in range(14):
                before = engine.status(s.ctx)["sparse_steps"]
                rows.append(s.decode([(i, start + i, 0)])[0])
                sparse.append(engine.status(s.ctx)["sparse_steps"] > before)
        return np.stack(rows), sparse


def test_min_context_is_crossed_in_both_directions(model):
    p = policy("SRFRS", min_context=512)
    got, sparse = around_min_context(model, p)
    stock, _ = around_min_context(model, None)
    crossing = [False] * 7 + [True] * 7  # the step that writes cell 512 finds 512 cached tokens
    assert sparse == crossing + [False] * 14 + crossing
    dense = ~np.array(sparse)
    np.testing.assert_array_equal(got[dense], stock[dense])
    assert np.abs(got[~dense] - stock[~dense]).max() > 0.01
    covering, full = (around_min_context(model, q)[0] for q in (policy("SRFRS", min_context=512, top_k=8192), full_like(p)))
    close(covering, full)


# ---- adapters, embeddings, grammar


def write_lora(path: Path, seed=3) -> Path:
    """Rank 4 on q and on v of every layer."""
    rng = np.random.default_rng(seed)
    w = gguf.GGUFWriter(path, "llama")
    w.add_type("adapter")
    w.add_string("adapter.type", "lora")
    w.add_float32("adapter.lora.alpha", 4.0)
    for il in range(len(ARCHITECTURES["llama"].layers)):
        for name, rows in (("attn_q", SIZES["Q"]), ("attn_v", SIZES["K"])):
            w.add_tensor(f"blk.{il}.{name}.weight.lora_a", rng.standard_normal((4, SIZES["E"]), np.float32) / 12)
            w.add_tensor(f"blk.{il}.{name}.weight.lora_b", rng.standard_normal((rows, 4), np.float32) / 2)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def with_lora(path, lora, p, trace=None):
    """Logits of steps before, with and after an adapter"""
    with Arm(path, p, trace) as a:
        adapter = a.api.llama_adapter_lora_init(a.model, str(lora).encode())
        assert adapter
        a.prefill(random_tokens(N_PAST))
        for i, on in enumerate((False, False, True, True, True, False, False)):
            adapters, scales = (a.api.llama_adapter_lora_p_ctypes * 1)(adapter), (ctypes.c_float * 1)(1.0)
            assert a.api.llama_set_adapters_lora(a.ctx, adapters, int(on), scales) == 0
            a.step((i, N_PAST + i, 0))
        assert engine.status(a.ctx)["sparse_steps"] == 7
        return np.concatenate(a.logits)


def test_lora_comes_and_goes(model, tmp_path):
    lora = write_lora(tmp_path / "lora.gguf")
    got, want = with_lora(model, lora, COVERING), with_lora(model, lora, full_like(COVERING))
    close(got, want)
    np.testing.assert_array_equal(got.argmax(-1), want.argmax(-1))
    with_lora(model, lora, REAL, Trace())  # every step against NumPy
    with Arm(model, COVERING) as a:
        a.prefill(random_tokens(N_PAST))
        for i in range(3):
            a.step((i, N_PAST + i, 0))
    close(got[:2], np.concatenate(a.logits)[:2])
    assert np.abs(got[2] - a.logits[2][0]).max() > 0.1, "the adapter must change something"


def embedding(path, p, trace=None):
    """float32 [width] of the last token of a decode-sized batch"""
    with Arm(path, p, trace) as a:
        a.prefill(random_tokens(N_PAST))
        a.api.llama_set_embeddings(a.ctx, True)
        a.step((1, N_PAST, 0), (2, N_PAST + 1, 0))
        assert engine.status(a.ctx)["sparse_steps"] == int(p is not None)
        return np.ctypeslib.as_array(a.api.llama_get_embeddings_ith(a.ctx, 1), (SIZES["E"],)).copy()


def test_embeddings(model):
    close(embedding(model, COVERING), embedding(model, full_like(COVERING)))
    assert np.abs(embedding(model, REAL, Trace()) - embedding(model, None)).max() > 1e-3  # its step against NumPy


def test_grammar_gives_the_same_tokens_as_full(smollm2):
    from llama_cpp import LlamaGrammar

    rule = 'root ::= " in " [0-9]{4} ", " ("rain" | "snow") " fell on the " [a-z]+ "."'
    llama, texts = make(smollm2, hylra=spans()), []
    for p in (spans(top_k=8192), full_like(spans())):
        llama.set_hylra(p)
        out = llama(PROMPT, max_tokens=16, temperature=0, grammar=LlamaGrammar.from_string(rule, verbose=False))
        assert llama.hylra["on"] and llama.hylra["sparse_steps"] > 8
        texts.append(out["choices"][0]["text"])
    assert texts[0] == texts[1] and texts[0].startswith(" in ") and texts[0][4:8].isdigit()


# ---- several models, threads


def test_two_models_with_different_policies_do_not_touch_each_other(model, tmp_path):
    other = write_architecture(tmp_path / "other.gguf", ARCHITECTURES["gemma2"], seed=5)
    cases = [(model, REAL), (other, policy("FSFRFR", top_k=100)), (model, policy("FSRRR", top_k=32))]

    def turns(sessions):
        for (_, p), s in zip(cases, sessions):
            engine.set_policy(s.ctx, p)
        for s in sessions:
            s.prefill(random_tokens(N_PAST))
        return [[s.decode([(i, N_PAST + i, 0)]) for s in sessions] for i in range(5)]

    alone = []
    for case in cases:
        with Session(case[0]) as s:
            engine.set_policy(s.ctx, case[1])
            s.prefill(random_tokens(N_PAST))
            alone.append(s.steps(range(5), N_PAST))
    sessions = [Session(path) for path, _ in cases]
    together = np.array(turns(sessions)).squeeze(2).swapaxes(0, 1)
    for s in sessions:
        s.close()
    np.testing.assert_array_equal(together, alone)


def test_threads_changed_between_calls_change_nothing(model):
    rows = {}
    for name, threads in (("one", (1, 1, 1, 1)), ("changing", (1, 2, 1, 2))):
        with Session(model) as s:
            engine.set_policy(s.ctx, REAL)
            s.prefill(random_tokens(N_PAST))
            rows[name] = []
            for i, n in enumerate(threads):
                s.api.llama_set_n_threads(s.ctx, n, n)
                rows[name].append(s.decode([(i, N_PAST + i, 0)]))
    np.testing.assert_array_equal(rows["changing"], rows["one"])


# ---- files of stock llama.cpp

SAVE, LOAD = "save", "load"
STATE_SCRIPT = """
import ctypes, sys, numpy as np
action, model, state, out = sys.argv[1:]
from support import Session, random_tokens
s = Session(model)
if action == "save":
    s.prefill(random_tokens(500))
    marks = (s.api.llama_token * 500)()
    assert s.api.llama_state_save_file(s.ctx, state.encode(), marks, 500)
    assert s.api.llama_state_seq_save_file(s.ctx, (state + ".seq").encode(), 0, marks, 500)
else:
    marks, count = (s.api.llama_token * 1024)(), ctypes.c_size_t()
    assert s.api.llama_state_load_file(s.ctx, state.encode(), marks, 1024, ctypes.byref(count))
rows = s.steps(random_tokens(4, 9), 500)
np.save(out, rows)
"""


def run_stock(action, model, state, out):
    """Logits that an unpatched library gives for the four steps after saving or loading"""
    run_on_stock(STATE_SCRIPT, action, model, state, out)
    return np.load(out)


def load(s, state, seq_file=False):
    marks, count = (s.api.llama_token * 1024)(), ctypes.c_size_t()
    if seq_file:
        assert s.api.llama_state_seq_load_file(s.ctx, f"{state}.seq".encode(), 0, marks, 1024, ctypes.byref(count)) > 0
    else:
        assert s.api.llama_state_load_file(s.ctx, str(state).encode(), marks, 1024, ctypes.byref(count))
    assert count.value == 500


@pytest.mark.parametrize("seq_file", [False, True], ids=["whole state", "one sequence"])
def test_a_state_that_stock_wrote_is_decoded_sparse(model, tmp_path, seq_file):
    stock = run_stock(SAVE, model, tmp_path / "state", tmp_path / "stock.npy")
    logits = {}
    for name, p in (("dense", None), ("covering", COVERING), ("full", full_like(COVERING)), ("real", REAL)):
        with Arm(model, p, Trace() if name == "real" else None, n_ctx=1024) as a:
            load(a, tmp_path / "state", seq_file)
            if p is None:
                logits[name] = a.steps(random_tokens(4, 9), 500)
                continue
            for i, token in enumerate(random_tokens(4, 9)):
                a.step((token, 500 + i, 0))
            logits[name] = np.concatenate(a.logits)
    np.testing.assert_array_equal(logits["dense"], stock)
    close(logits["covering"], logits["full"])
    np.testing.assert_array_equal(logits["covering"].argmax(-1), logits["full"].argmax(-1))


def test_stock_reads_a_state_that_sparse_decoding_left(model, tmp_path):
    with Session(model) as s:
        engine.set_policy(s.ctx, REAL)
        s.prefill(random_tokens(495))
        s.steps(random_tokens(5, 4), 495)
        assert engine.status(s.ctx)["sparse_steps"] == 5
        assert s.api.llama_state_save_file(s.ctx, str(tmp_path / "state").encode(), (s.api.llama_token * 500)(), 500)
        engine.set_policy(s.ctx, None)
        want = s.steps(random_tokens(4, 9), 500)
    np.testing.assert_array_equal(run_stock(LOAD, model, tmp_path / "state", tmp_path / "stock.npy"), want)
