"""Drift along a reuse chain on tiny models, against an independent count, and what is refused."""

from __future__ import annotations

import argparse
import json

import numpy as np
import pytest

from support import random_tokens, write_tiny_model

from hylra_gguf import drift, profile, samples
from hylra_gguf.errors import HylraError, PolicyError, ProfileError
from hylra_gguf.forward import Forward
from hylra_gguf.policy import Policy
from hylra_gguf.profile import Options

OPTIONS = Options(contexts=[1024], samples=3, n_threads=1, progress=False)
TEXTS = [("one", "a")]


def policy_of(modes=(1, 2, 2, 2), sources=(0, 0, 0, 0), **settings) -> Policy:
    return Policy(**{**dict(layer_mode=modes, layer_source=sources, head_kv_count=2, top_k=300), **settings})


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    monkeypatch.setattr(Forward, "tokenize", lambda self, text: random_tokens(1024, seed=ord(text[0])))
    return str(write_tiny_model(tmp_path / "tiny.gguf"))


@pytest.mark.parametrize("settings", [
    {}, {"block_size": 16}, {"lists": 2}, {"lists": 2, "head_map": (0, 1, 1, 0, 0, 0, 1, 1)}, {"top_k_fraction": 0.4}])
def test_the_first_reuse_layer_keeps_what_was_planned_and_later_ones_drift(tiny, settings):
    rows = drift.measure_drift(tiny, policy_of(**settings), TEXTS, OPTIONS)
    assert [(row["layer"], row["source"], row["tokens"]) for row in rows] == [(1, 0, 24), (2, 0, 24), (3, 0, 24)]
    assert rows[0]["in_chain"] == pytest.approx(rows[0]["planned"], abs=2e-3)  # its input is the same; the kernel is not
    for row in rows:
        assert 0.1 < row["in_chain_low"] <= row["in_chain"] < 1
        assert row["drift"] == pytest.approx(row["in_chain"] - row["planned"], abs=2e-4)
        assert row["drift_low"] <= row["drift_high"]
    assert any(row["drift_high"] - row["drift_low"] > 1e-3 for row in rows[1:])


@pytest.mark.parametrize("layer_top_k", [(600, 300, 0, 0), (300, 600, 0, 0), None])
def test_a_reuse_layer_is_planned_at_the_budget_of_its_source(tiny, layer_top_k):
    rows = drift.measure_drift(tiny, policy_of((1, 1, 2, 2), (0, 1, 1, 0), top_k=600, layer_top_k=layer_top_k), TEXTS, OPTIONS)
    assert rows[0]["in_chain"] == pytest.approx(rows[0]["planned"], abs=2e-3)


def test_a_layer_that_is_its_own_source_has_a_row_too(tiny):
    rows = drift.measure_drift(tiny, policy_of((1, 2, 2, 2), (0, 1, 0, 0)), TEXTS, OPTIONS)
    assert [(row["layer"], row["source"]) for row in rows] == [(1, 1), (2, 0), (3, 0)]
    assert rows[0]["in_chain"] == pytest.approx(rows[0]["planned"], abs=2e-3) and rows[0]["planned"] > max(row["planned"] for row in rows[1:])


def test_planned_recall_is_that_of_a_profile_of_the_same_rows(tiny, monkeypatch):
    """Two code paths: rows of a decode and of a prefill"""
    rows = drift.measure_drift(tiny, policy_of(), TEXTS, OPTIONS)
    starts = {min(sample.position, 1024 - drift.STEP_TOKENS) for sample in samples.plan_samples(1, [1024], 3, 300)}
    same = [samples.Sample(0, start + i, i % 2 == 1) for start in sorted(starts) for i in range(drift.STEP_TOKENS)]
    monkeypatch.setattr(profile, "plan_samples", lambda *_: same)
    found = profile.profile_model(tiny, TEXTS, Options(**{**vars(OPTIONS), "top_k": [300]}))
    for row in rows:
        assert row["planned"] == pytest.approx(found.matrix("recall", 300)[0, row["layer"]], abs=1e-3)


def test_the_command_prints_rows(tiny, tmp_path, capsys):
    policy = tmp_path / "policy.json"
    policy_of().save(str(policy))
    (tmp_path / "a.txt").write_text("a")
    args = dict(model=tiny, file=[str(tmp_path / "a.txt")], ctx_size=[1024], samples=2, threads=1, no_progress=True, policy=str(policy))
    profile.cmd_profile(argparse.Namespace(**args, output="json"))
    out, err = capsys.readouterr()
    assert [row["layer"] for row in json.loads(out)] == [1, 2, 3] and "3 reuse layers: recall planned 0." in err
    profile.cmd_profile(argparse.Namespace(**args, output=None))
    assert capsys.readouterr().out.startswith("| layer | source | tokens | planned | in_chain |")
    profile.cmd_profile(argparse.Namespace(**args, output="csv"))
    assert [line.split(",")[0] for line in capsys.readouterr().out.splitlines()] == ["layer", "1", "2", "3"]
    with pytest.raises(ProfileError, match="-o p.json: with --policy rows go to stdout; expected one of md csv json"):
        profile.cmd_profile(argparse.Namespace(**args, output="p.json"))
    with pytest.raises(ProfileError, match="--top-k has no effect beside --policy"):
        profile.cmd_profile(argparse.Namespace(**args, output="md", top_k=[300]))


@pytest.mark.parametrize("policy, options, error, words", [
    (policy_of((0,) * 4, (-1,) * 4), {}, ProfileError, "the policy has no reuse layer"),
    (policy_of((1, 2, 2), (0, 0, 0)), {}, PolicyError, "layer"),
    (policy_of(top_k=1000), {}, ProfileError, "context 1024 is too short for top_k 1000"),
    (policy_of(top_k_fraction=0.9), {}, ProfileError, "context 1024 is too short for top_k 922"),
    (policy_of(), {"contexts": [2048]}, ProfileError, "one: 1024 tokens, shorter than the context of 2048"),
    (policy_of(), {"samples": 0}, ProfileError, "--samples 0"),
])
def test_what_is_refused(tiny, policy, options, error, words):
    with pytest.raises(error, match=words) as caught:
        drift.measure_drift(tiny, policy, TEXTS, Options(**{**vars(OPTIONS), **options}))
    assert "\n" not in str(caught.value)


def test_a_memory_that_cannot_go_back_is_one_line(tiny, monkeypatch):
    import llama_cpp

    monkeypatch.setattr(llama_cpp, "llama_memory_seq_rm", lambda *_: False)
    with pytest.raises(HylraError, match="cannot be rewound to"):
        drift.measure_drift(tiny, policy_of(), TEXTS, OPTIONS)


def test_the_dense_choice_is_sorted_out_by_block(tiny):
    scores = np.linspace(0, 1, 400)
    cells = drift.chosen(scores, drift.Budget([60], 4, 20), 16)
    assert set(range(4)) | set(range(380, 400)) <= set(cells) and len(cells) <= 60
