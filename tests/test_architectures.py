"""Every architecture of architectures.py: covering selections equal full, real ones equal NumPy, layers left dense are named,
the profile finds the same layers; the whole chain of commands on MLA; policies as large as DeepSeek-R1's and QwQ-32B's.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
from architectures import ARCHITECTURES, LARGE, TRAINED, WHOLE_R1, write_architecture
from reference import Trace, attention, cells_allowed, check_selection, probabilities
from support import Session, full_like, policy, random_tokens, run_on_stock, silence

from hylra_gguf import Llama, cost, engine
from hylra_gguf.cli import main
from hylra_gguf.drift import measure_drift
from hylra_gguf.errors import HylraError, PolicyError
from hylra_gguf.gguf_header import write_policy
from hylra_gguf.plan import plan_policy
from hylra_gguf.profile import Options, profile_model
from hylra_gguf.session import ALL_SEQUENCES, Context, Model

engine.activate()
ALL = {**ARCHITECTURES, **LARGE, **TRAINED, **WHOLE_R1}
N_PAST, N_STEPS = 500, 4
NAMES = [*ARCHITECTURES, *LARGE]
WHY = {"w": "sliding-window attention", "r": "no attention over the KV cache"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Written once per architecture."""
    folder, written = tmp_path_factory.mktemp("architectures"), {}

    def path(name):
        if name not in written:
            written[name] = write_architecture(folder / f"{list(ALL).index(name)}.gguf", ALL[name], with_tokenizer=True)
        return written[name]

    return path


def pattern_of(name: str) -> str:
    """Attention layers take turns: select, reuse, full, reuse; the others must be full."""
    turns = iter("SRFR" * len(ALL[name].layers))
    return "".join(next(turns) if kind == "a" else "F" for kind in ALL[name].layers)


def policy_of(name: str, **fields):
    return policy(pattern_of(name), head_kv_count=ALL[name].head_kv_count, **fields)


def text_of(n_tokens: int) -> str:
    """The tokenizer makes a token of five bytes."""
    return bytes(np.random.default_rng(1).integers(97, 123, 5 * n_tokens, np.uint8)).decode()


def decode(path, p, trace=None, **context):
    """(logits of a few steps, status); a context of its own, since a recurrent state cannot be rewound."""
    with Session(path, eval_callback=trace and trace.callback, **context) as s:
        s.prefill(random_tokens(N_PAST))
        engine.set_policy(s.ctx, p)
        return s.steps(random_tokens(N_STEPS, 9), N_PAST), engine.status(s.ctx)


STOCK_SCRIPT = """
import sys, numpy as np
from support import Session, random_tokens
out, *paths = sys.argv[1:]
rows = []
for path in paths:
    with Session(path) as s:
        rows.append(np.concatenate([s.prefill(random_tokens(300))[-1:], s.steps(random_tokens(3, 9), 300)]))
np.save(out, rows)
"""


@pytest.fixture(scope="module")
def of_stock(model, tmp_path_factory):
    """Per architecture the logits of an unpatched build: the last of a prompt, then three steps."""
    out = tmp_path_factory.mktemp("stock") / "logits.npy"
    run_on_stock(STOCK_SCRIPT, out, *map(model, ARCHITECTURES))
    return dict(zip(ARCHITECTURES, np.load(out)))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_without_a_policy_the_logits_are_those_of_stock(model, of_stock, name):
    with Session(model(name)) as s:
        got = np.concatenate([s.prefill(random_tokens(300))[-1:], s.steps(random_tokens(3, 9), 300)])
    np.testing.assert_array_equal(got, of_stock[name])


@pytest.mark.parametrize("name", NAMES)
def test_a_selection_that_covers_everything_equals_full(model, name):
    p = policy_of(name, top_k=4096)
    (got, status), (want, _), (stock, _) = decode(model(name), p), decode(model(name), full_like(p)), decode(model(name), None)
    assert status["sparse_steps"] == N_STEPS
    scale = want.std()
    np.testing.assert_allclose(got, want, atol=2e-4 * scale, rtol=1e-4)
    np.testing.assert_allclose(want, stock, atol=0.05 * scale)  # stock accumulates V in F16
    assert np.abs(want - stock).max() > 0, "the full arm must be our own kernel"


@pytest.mark.parametrize("type_kv", [8, 30], ids=["q8_0", "bf16"])
@pytest.mark.parametrize("name", ["gemma2", "gpt-oss", "mpt (ALiBi, six heads)", "deepseek2 (MLA)"])
def test_other_caches_than_f16(model, name, type_kv):
    """llama.cpp rotates q, K and V for a quantised cache."""
    types, trace = dict(type_k=type_kv, type_v=type_kv), Trace()
    (got, _), (want, _) = (decode(model(name), p, **types) for p in (policy_of(name, top_k=4096), full_like(policy_of(name))))
    np.testing.assert_allclose(got, want, atol=2e-4 * want.std(), rtol=1e-4)
    decode(model(name), policy_of(name), trace, **types)
    check_layers(name, trace)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_layers_left_dense_are_named(model, name):
    layers = ALL[name].layers
    _, status = decode(model(name), policy_of(name))
    assert status["on"] and status["left_to_stock"] == {il: WHY[kind] for il, kind in enumerate(layers) if kind in WHY}


@pytest.mark.parametrize("name", ["gemma2", "lfm2 (hybrid)", "deepseek2 (MLA)"])
def test_llama_tells_which_layers_were_left_and_why(model, name, tmp_path):
    write_policy(model(name), policy_of(name), tmp_path / "m.gguf")
    llama = Llama(str(tmp_path / "m.gguf"), n_ctx=1024, n_threads=1, n_threads_batch=1, verbose=False)
    assert llama.hylra["left_to_stock"] == {}, "nothing has run so far"
    llama(text_of(N_PAST), max_tokens=3, temperature=0)
    left = {il: WHY[kind] for il, kind in enumerate(ALL[name].layers) if kind in WHY}
    assert llama.hylra["on"] and llama.hylra["sparse_steps"] >= 2 and llama.hylra["left_to_stock"] == left


def shared_kv(x):
    """Layers 24 and 29 have no KV cache of their own; they read that of layer 19."""
    return np.array_equal(x[24]["k"], x[19]["k"]) and np.array_equal(x[29]["v"], x[19]["v"]) and not np.array_equal(x[14]["k"], x[19]["k"])


# what makes the architecture special is there: else the tests below would show nothing
SPECIAL = {
    "gemma2": lambda x: x[1]["softcap"] == 5.0,
    "gpt-oss": lambda x: x[1]["sinks"] is not None and np.abs(x[1]["sinks"]).min() > 0,
    "bloom (ALiBi)": lambda x: x[0]["max_bias"] == 8.0 and x[0]["mask"][0, 0, 0, 0] == -N_PAST - N_STEPS + 1,
    "mpt (ALiBi, six heads)": lambda x: x[0]["max_bias"] == 8.0 and x[0]["q"].shape[1] == 6,
    "falcon": lambda x: x[0]["k"].shape[1] == 1,
    "gemma3n": shared_kv,
    "deepseek2 (MLA)": lambda x: x[0]["k"].shape[1::2] == (1, 576) and np.array_equal(x[0]["v"], x[0]["k"][..., :512]),
}


@pytest.mark.parametrize("name", SPECIAL)
def test_what_makes_it_special_is_there(model, name):
    trace = Trace()
    decode(model(name), policy_of(name), trace)
    assert SPECIAL[name](trace.inputs)


@pytest.mark.parametrize("name", NAMES)
def test_a_real_selection_equals_numpy(model, name):
    trace = Trace()
    decode(model(name), policy_of(name), trace)
    check_layers(name, trace)


@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE_R1)
def test_deepseek_r1_with_all_its_layers_and_heads(model, name):
    """1.2 GB of weights. Its cache is filled with copies: a prompt of 400 tokens would take minutes."""
    trace, logits, last = Trace(), {}, 400
    with Session(model(name), n_ctx=512, n_seq_max=2, n_threads=2, eval_callback=trace.callback) as s:
        s.fill(last, 16)
        for arm, p in (("covering", policy_of(name, top_k=4096)), ("full", full_like(policy_of(name))), ("stock", None), ("real", policy_of(name))):
            engine.set_policy(s.ctx, p)
            s.rewind(last)
            trace.forget()
            logits[arm] = s.decode([(5, last, 0)])
            assert engine.status(s.ctx)["sparse_steps"] == int(p is not None)
    check_layers(name, trace, last)
    scale = logits["full"].std()
    np.testing.assert_allclose(logits["covering"], logits["full"], atol=2e-4 * scale, rtol=1e-4)
    # stock accumulates V in F16; through 61 layers that grows to a single logit 0.08 apart without AVX-512, 0.03 in the mean square
    assert 0 < np.sqrt(((logits["full"] - logits["stock"])**2).mean()) < 0.06 * scale
    model(name).unlink()
    assert trace.inputs[60]["q"].shape[1] == 128 and trace.inputs[60]["k"].shape[1::2] == (1, 576)


def check_layers(name, trace, last=N_PAST + N_STEPS - 1):
    """What every layer of the last step selected and gave out."""
    forced = [[[*range(4), *range(last - 15, last + 1)]]]
    source = None
    served = [il for il, kind in enumerate(ALL[name].layers) if kind == "a"]
    assert sorted(trace.outputs) == served
    for il in served:
        x, mode = trace.inputs[il], pattern_of(name)[il]
        if mode == "S":
            source = trace.choices[il]
            check_selection(x, source, 1, 64, forced)
        allowed = cells_allowed(x, [0] * x["k"].shape[1]) if mode == "R" else None
        if mode == "R":
            np.testing.assert_array_equal(x["cells"], source)
        want = attention(x, probabilities(x, allowed))
        np.testing.assert_allclose(trace.outputs[il], want, atol=2e-5 * max(1, np.abs(want).max()), rtol=1e-4, err_msg=f"layer {il}")


@pytest.mark.parametrize("name", TRAINED)
def test_a_model_that_is_sparse_by_training_stays_stock_and_says_so(model, name):
    p = policy("SRRR", head_kv_count=1)
    (got, status), (want, _) = decode(model(name), p), decode(model(name), None)
    np.testing.assert_array_equal(got, want)
    assert not status["on"] and status["sparse_steps"] == 0
    why = "a kind of KV cache that the engine does not serve"
    assert status["reason"] == f"no layer can be served: {why}" and status["left_to_stock"] == dict.fromkeys(range(4), why)


REFUSED = {"gemma2": (0, "layer 0 has sliding-window attention, it must be full"), "lfm2 (hybrid)": (2, "layer 2 has no attention, it must be full"),
           "qwen3next (hybrid)": (4, "layer 4 has no attention, it must be full")}


@pytest.mark.parametrize("name", REFUSED)
def test_a_policy_that_wants_such_a_layer_is_refused(model, name):
    layer, words = REFUSED[name]
    p = policy_of(name)
    mode, source = (tuple(value if il == layer else old for il, old in enumerate(values))
                    for value, values in ((1, p.layer_mode), (layer, p.layer_source)))
    with Session(model(name)) as s:
        with pytest.raises(PolicyError, match=words):
            engine.set_policy(s.ctx, replace(p, layer_mode=mode, layer_source=source))
        assert not engine.status(s.ctx)["on"] and words in engine.status(s.ctx)["reason"]


# ---- the profiler and the commands

@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_profile_finds_these_layers_and_its_plan_runs(model, name):
    silence(engine.activate())
    found = profile_model(str(model(name)), [("random", text_of(1024))], Options(contexts=[1024], top_k=[64], sink_tokens=4, recent_tokens=16,
                                                                                 samples=4, n_threads=1, progress=False))
    able = {il for il, kind in enumerate(ALL[name].layers) if kind == "a"}
    assert set(np.flatnonzero(found.eligible)) == able and found.head_kv_count == ALL[name].head_kv_count
    p = plan_policy(found, "explicit", layers=[min(able)], max_sensitivity=9.0, min_context=256)
    assert p.layer_mode.count(2) == len(able) - 1
    _, status = decode(model(name), p)
    assert status["on"] and status["sparse_steps"] == N_STEPS


def test_drift_tells_layers_that_share_a_kv_cache_apart(model):
    p = policy_of("gemma3n", top_k=100)
    rows = measure_drift(str(model("gemma3n")), p, [("random", text_of(1024))], Options(contexts=[1024], samples=2, n_threads=1, progress=False))
    assert [row["layer"] for row in rows] == [9, 19, 29] and [row["source"] for row in rows] == [4, 4, 24]
    assert all(0.1 < row["planned"] < 0.999 and row["tokens"] == 16 for row in rows)


HYBRIDS = [name for name, a in ARCHITECTURES.items() if "r" in a.layers or a.arch == "falcon-h1"]


@pytest.mark.parametrize("name", HYBRIDS)
def test_a_rewound_hybrid_goes_on_as_if_nothing_had_been_read(model, name):
    tokens, tail = random_tokens(600), random_tokens(8, 9)
    with Model(str(model(name))) as opened, Context(opened, 1024, n_seq=2) as context:
        context.prefill(tokens[:520])
        context.keep(520)
        context.prefill(tokens[520:], 520)
        context.keep(600)
        context.copy_first(1)
        found = {}
        for depth, seq in itertools.product((600, 520), (0, 1, 0, 1)):
            context.rewind(depth, ALL_SEQUENCES)
            context.decode(tail, depth, seq, outputs=range(8))
            found.setdefault(depth, []).append(context.logits(8).copy())
        for logits in found.values():
            for again in logits[1:]:
                np.testing.assert_array_equal(again, logits[0])
        assert np.abs(found[600][0] - found[520][0]).max() > 1e-3
        context.rewind(520)
        with pytest.raises(HylraError, match="recurrent layers of this model cannot be rewound to 500 tokens"):
            context.rewind(500)


@pytest.mark.parametrize("name", ["lfm2 (hybrid)", "qwen3next (hybrid)"])
def test_commands_that_rewind_on_hybrids(model, name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cost, "DEPTHS_TOKENS", (300, 600))
    path, own, plan = str(model(name)), str(tmp_path / "policy.json"), str(tmp_path / "p.npz")
    policy_of(name, top_k=100).save(own)

    def run(line: str) -> str:
        assert main([*line.split(), "-t", "1", "--no-progress"]) in (0, None), capsys.readouterr().err
        return capsys.readouterr().out

    rows = json.loads(run(f"bench {path} --policy {own} -d 300,600 -np 2 -n 2 -r 2 -o json"))
    assert {row["hylra_sparse_steps"] > 0 for row in rows if row["arm"] in ("full", "hylra")} == {True}
    assert [row["n_depth"] for row in rows] == [300] * 4 + [600] * 4 and {row["fill"] for row in rows} == {rows[0]["fill"]} != {"synthetic"}
    rows = json.loads(run(f"profile {path} --policy {own} -c 1024 -o json"))
    assert len(rows) == policy_of(name).layer_mode.count(2) and all(0.05 < row["in_chain"] < 0.999 for row in rows)
    run(f"profile {path} -c 1024 --top-k 300 --samples 4 -o {plan}")
    assert main(f"plan {plan} --sweep theta=0.5:0.9:0.4 --max-sensitivity 9 --model {path} -d 600 -t 1 --format json".split()) in (0, None)
    assert [row["tokens_per_s_600"] > 0 for row in json.loads(capsys.readouterr().out)] == [True] * 2
    (tmp_path / "a.txt").write_text(text_of(1000))
    refined = tmp_path / "refined.json"
    first, text = ALL[name].layers.index("a"), tmp_path / "a.txt"
    line = f"plan {plan} --strategy explicit --layers {first} --max-sensitivity 9 --refine {path} --text {text} -c 600 --minutes 0.2 -t 1"
    assert main([*line.split(), "-o", str(refined)]) in (0, None), capsys.readouterr().err
    assert "refined at 600 tokens" in json.loads(refined.read_text())["tool"] and "held out" in capsys.readouterr().err


def test_every_command_on_mla(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    silence(engine.activate())
    original = model("deepseek2 (MLA)").read_bytes()
    (tmp_path / "m.gguf").write_bytes(original)
    (tmp_path / "question.txt").write_text(text_of(600))
    measured = "-c 1024 --top-k 64 --sink 4 --recent 16 -t 1 --no-progress"

    told = []

    def run(line: str) -> str:
        code, (out, err) = main(line.split()), capsys.readouterr()
        assert code in (0, None), err
        told.append(err)
        return out

    run(f"profile m.gguf {measured} -o m.npz")
    run("plan m.npz --theta 0.01 --max-sensitivity 9 --min-context 256 -o policy.json")
    assert "deepseek2, 4 layers, 1 KV heads" in run("report m.npz")
    run("embed-policy m.gguf --policy policy.json")
    assert json.loads(run("show m.gguf -o json"))["layer_mode"] == [1, 2, 2, 2]
    assert "ok  policy" in run("verify m.gguf")
    assert "| 3 |" in run("profile m.gguf --policy m.gguf -c 1024 -t 1 --no-progress")
    run("run m.gguf -f question.txt -n 4 -t 1")
    assert "HyLRA on" in told[-1] and "3 of 3 steps sparse" in told[-1]
    rows = {row["arm"]: row for row in json.loads(run("bench m.gguf -d 600 -n 2 -r 1 -t 1 --no-progress -o json"))}
    assert rows["hylra"]["hylra_on"] and rows["hylra"]["hylra_sparse_steps"] == rows["full"]["hylra_sparse_steps"] == 3
    run("strip m.gguf")
    assert (tmp_path / "m.gguf").read_bytes() == original
