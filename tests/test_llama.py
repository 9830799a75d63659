"""`Llama` as people use it: drop-in for llama_cpp.Llama, import order, switches, state, streaming, chat. On the real model."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap

import pytest

from hylra_gguf import Llama, Policy, PolicyError
from hylra_gguf.gguf_header import write_policy

N_LAYER = 30


def spans(top_k=256, min_context=256, **fields) -> Policy:
    """Layer 0 full, every fourth layer selects."""
    mode = [0] + [1 if il % 4 == 1 else 2 for il in range(1, N_LAYER)]
    source = [-1] + [il - (il - 1) % 4 for il in range(1, N_LAYER)]
    return Policy(layer_mode=tuple(mode), layer_source=tuple(source), head_kv_count=3, top_k=top_k, sink_tokens=4, recent_tokens=64,
                  min_context=min_context, **fields)


@pytest.fixture(scope="module")
def with_policy(smollm2, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "policy.gguf"
    write_policy(str(smollm2), spans(), out=str(path))
    return str(path)


def make(path, **kw) -> Llama:
    return Llama(str(path), n_ctx=1024, n_threads=1, n_threads_batch=2, verbose=False, **kw)


PROMPT = "The history of the lighthouse begins in the year 1820, when " * 25


def test_policy_of_the_file_is_on_by_itself(with_policy):
    llama = make(with_policy)
    out = llama(PROMPT, max_tokens=8, temperature=0)
    status = llama.hylra
    assert out["usage"]["completion_tokens"] == 8
    assert status["on"] and status["reason"] == "" and status["sparse_steps"] >= 7
    assert sorted(status["captured_mass"]) == list(range(1, N_LAYER, 4))
    assert all(0.5 < mass <= 1.0001 for mass in status["captured_mass"].values())


OFF = {
    "hylra=False": (dict(hylra=False), "switched off at run time"),
    "kv_overrides": (dict(kv_overrides={"hylra.enabled": False}), "switched off by hylra.enabled = false"),
    "flash_attn=False": (dict(flash_attn=False), "flash attention is off"),
}


@pytest.mark.parametrize("case", OFF)
def test_switches(with_policy, case):
    kw, reason = OFF[case]
    llama = make(with_policy, **kw)
    llama(PROMPT, max_tokens=4, temperature=0)
    assert not llama.hylra["on"] and reason in llama.hylra["reason"] and llama.hylra["sparse_steps"] == 0


def test_no_policy_is_stock(smollm2):
    llama = make(smollm2)
    assert not llama.hylra["on"] and llama.hylra["reason"] == "the model file has no policy"


def test_policy_handed_over_as_object_or_path(smollm2, tmp_path):
    spans().save(str(tmp_path / "policy.json"))
    for policy in (spans(), str(tmp_path / "policy.json"), tmp_path / "policy.json"):
        llama = make(smollm2, hylra=policy)
        llama(PROMPT, max_tokens=3, temperature=0)
        assert llama.hylra["on"] and llama.hylra["sparse_steps"] > 0


def test_a_policy_for_another_model_is_refused(smollm2):
    with pytest.raises(PolicyError, match="layer_count is 2, the model has 30 layers"):
        make(smollm2, hylra=Policy(layer_mode=(1, 2), layer_source=(0, 0), head_kv_count=3, top_k=512))


def test_switching_at_run_time(with_policy):
    llama = make(with_policy)
    answers = {}
    for name, policy in (("file", None), ("off", False), ("again", None)):
        llama.set_hylra(policy)
        answers[name] = llama(PROMPT, max_tokens=6, temperature=0)["choices"][0]["text"]
        assert llama.hylra["on"] == (policy is None)
    assert answers["file"] == answers["again"]


def test_streaming_and_chat(with_policy):
    llama = make(with_policy)
    pieces = [part["choices"][0]["text"] for part in llama(PROMPT, max_tokens=6, temperature=0, stream=True)]
    assert "".join(pieces) == make(with_policy)(PROMPT, max_tokens=6, temperature=0)["choices"][0]["text"]
    reply = llama.create_chat_completion([{"role": "user", "content": PROMPT + "Say hello."}], max_tokens=6, temperature=0)
    assert reply["choices"][0]["message"]["content"]
    assert llama.hylra["on"]


def test_state_saved_and_restored_gives_the_same_text(with_policy):
    llama = make(with_policy)
    tokens = llama.tokenize(PROMPT.encode())
    llama.eval(tokens[:-1])
    state = llama.save_state()
    first = next_tokens(llama, tokens[-1], 8)
    llama.reset()
    llama.load_state(state)
    assert next_tokens(llama, tokens[-1], 8) == first


def next_tokens(llama: Llama, last: int, n: int) -> list[int]:
    llama.eval([last])  # a restored state holds the cache, not the logits
    out = []
    for _ in range(n):
        out.append(llama.sample(temp=0.0))
        llama.eval([out[-1]])
    return out


def test_prompt_cache_hit_gives_the_same_text(with_policy):
    llama = make(with_policy)
    first = llama(PROMPT, max_tokens=8, temperature=0)["choices"][0]["text"]
    assert llama(PROMPT, max_tokens=8, temperature=0)["choices"][0]["text"] == first


# ---- imports, each in a process of its own

SCRIPTS = {
    "hylra_gguf first": (
        "import hylra_gguf; from llama_cpp import Llama, llama_cpp; print(hasattr(llama_cpp._lib, 'hylra_version'))",
        0, "True"),
    "stock llama_cpp first": (
        "import llama_cpp; import hylra_gguf",
        1, "llama_cpp was imported before hylra_gguf, so the stock library is in use; import hylra_gguf first"),
    "wrong version": (
        "import importlib.metadata as m; real = m.version; m.version = lambda n: '0.2.0' if n == 'llama-cpp-python' else real(n)\n"
        "from hylra_gguf import Llama",
        1, "llama-cpp-python 0.2.0 is installed, the engine is built for 0.3.36; run: pip install llama-cpp-python==0.3.36"),
}


@pytest.mark.parametrize("case", SCRIPTS)
def test_import_order_and_version(case):
    script, code, line = SCRIPTS[case]
    env = {k: v for k, v in os.environ.items() if k != "LLAMA_CPP_LIB_PATH"}
    if case == "stock llama_cpp first":
        env["LLAMA_CPP_LIB_PATH"] = os.environ["HYLRA_STOCK_LIB"]  # what an installed stock library would be
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], env=env, capture_output=True, text=True)
    assert done.returncode == code
    assert (done.stdout if code == 0 else done.stderr).strip().splitlines()[-1].endswith(line)


# ---- the command line on the real model


def cli(*args, **kw):
    command = shutil.which("hylra-gguf", path=os.path.dirname(sys.executable))
    start = [command] if command else [sys.executable, "-m", "hylra_gguf"]
    return subprocess.run([*start, *map(str, args)], capture_output=True, text=True, **kw)


def test_embed_show_run_bench_strip_on_the_real_model(smollm2, tmp_path):
    model, original = tmp_path / "m.gguf", smollm2.read_bytes()
    shutil.copyfile(smollm2, model)
    embedded = cli("embed-policy", model, "-c", 1024, "--top-k", 256, "--recent", 64, "--min-context", 256, "--no-progress")
    assert embedded.returncode == 0 and "layer map" in embedded.stdout, embedded.stderr
    shown = cli("show", model, "-o", "json")
    assert '"layer_mode"' in shown.stdout and '"top_k": 256' in shown.stdout
    assert cli("verify", model).returncode == 0
    dump = subprocess.run([sys.executable, "-m", "gguf.scripts.gguf_dump", "--no-tensors", str(model)], capture_output=True, text=True)
    assert dump.returncode == 0 and "hylra.layer_mode" in dump.stdout, dump.stderr
    ran = cli("run", model, "-p", PROMPT, "-n", 8)
    assert ran.returncode == 0 and ran.stdout.strip() and "HyLRA on" in ran.stderr and "steps sparse" in ran.stderr
    bench = cli("bench", model, "-d", "0,300", "-n", 4, "-r", 2, "-o", "json", "--no-progress")
    check_bench(bench)
    assert cli("strip", model).returncode == 0 and model.read_bytes() == original


def check_bench(done):
    import json

    rows = json.loads(done.stdout)
    assert [(r["n_depth"], r["arm"]) for r in rows] == [(d, a) for d in (0, 300) for a in ("stock-fa1", "stock-fa0", "full", "hylra")]
    sparse = {(r["n_depth"], r["arm"]): r["hylra_sparse_steps"] for r in rows}
    assert sparse[0, "hylra"] == 0 and sparse[300, "hylra"] == sparse[300, "full"] == 5
    assert all(r["avg_ts"] > 0 and r["n_gen"] == 4 and r["build_commit"] and r["cpu_info"] for r in rows)


def test_stock_llama_loads_a_file_with_policy_and_gives_the_same_logits(smollm2, with_policy, tmp_path):
    import numpy as np
    from pathlib import Path
    from test_engine import logits_of_stock

    before = logits_of_stock(smollm2, tmp_path / "before.npy", 1, True)
    after = logits_of_stock(Path(with_policy), tmp_path / "after.npy", 1, True)
    np.testing.assert_array_equal(before, after)
