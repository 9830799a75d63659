"""Intervals of `eval` against what is known about them, verdicts against made-up and recorded rows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from hylra_gguf import eval_stats, eval_verdict
from hylra_gguf.eval_stats import LOST, OK, OPEN

ACCURACY = Path(__file__).parents[1] / "docs" / "accuracy"


def test_the_interval_of_a_mean_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    found = [eval_stats.mean_interval(rng.normal(3, 2, 8)) for _ in range(2000)]
    assert np.mean([low <= 3 <= high for _, low, high in found]) == pytest.approx(0.95, abs=0.02)
    assert eval_stats.mean_interval(np.ones(1))[1:] == (-np.inf, np.inf)


@pytest.mark.parametrize("rate", [0.0, 0.01, 0.05])
def test_the_paired_interval_covers_rare_losses_too(rate):
    rng = np.random.default_rng(1)
    found = [eval_stats.paired_interval(rng.random(200) < rate) for _ in range(1000)]
    assert np.mean([low <= rate <= high for _, low, high in found]) >= 0.94


@pytest.mark.parametrize("n, worse, better, verdict", [
    (200, 0, 0, OPEN), (400, 0, 0, OK), (400, 3, 0, OPEN), (200, 60, 0, LOST), (400, 3, 3, OPEN), (2000, 4, 4, OK),
])
def test_less_than_a_point_is_said_where_the_interval_allows_it(n, worse, better, verdict):
    dense = [1.0] * worse + [0.0] * (n - worse)
    scores = [0.0] * worse + [1.0] * better + [0.0] * (n - worse - better)
    row = eval_stats.task_row(scores, dense)
    assert (row["score_verdict"], row["n_worse"], row["n_better"]) == (verdict, worse, better)
    assert row["score_loss"] == pytest.approx(100 * (worse - better) / n, abs=1e-3)


def test_a_text_row_is_what_numpy_says():
    rng = np.random.default_rng(2)
    nll_dense = [rng.random(64) for _ in range(6)]
    nll = [one + 0.05 + 0.01 * rng.standard_normal(64) for one in nll_dense]
    kld, change = [0.01 * rng.random(64) for _ in range(6)], [0.1 * rng.standard_normal(64) for _ in range(6)]
    same = [rng.random(64) < 0.9 for _ in range(6)]
    row = eval_stats.text_row(nll, nll_dense, kld, same, change)
    flat = {name: np.concatenate(part) for name, part in (("nll", nll), ("dense", nll_dense), ("kld", kld), ("dp", change), ("same", same))}
    assert row["ppl"] == pytest.approx(np.exp(flat["nll"].mean()), abs=1e-4)
    assert row["ppl_ratio"] == pytest.approx(np.exp(flat["nll"].mean() - flat["dense"].mean()), abs=1e-5)
    assert row["ppl_ratio_low"] < row["ppl_ratio"] < row["ppl_ratio_high"] and row["ppl_verdict"] == LOST
    assert row["mean_kld"] == pytest.approx(flat["kld"].mean(), abs=1e-6)
    assert row["rms_dp"] == pytest.approx(100 * np.sqrt((flat["dp"] ** 2).mean()), abs=1e-3)
    assert row["same_top_p"] == pytest.approx(100 * flat["same"].mean(), abs=1e-3)


def test_few_documents_are_cut_into_stretches():
    one = np.repeat([0.0, 1.0], 64)
    assert eval_stats.clustered_interval([one, one]) == eval_stats.mean_interval(np.array([0, 0, 1, 1, 0, 0, 1, 1.0]))
    assert eval_stats.clustered_interval([one] * 5)[1:] == (0.5, 0.5)


def test_free_text():
    row = eval_stats.long_row([10, 64, 30], [10, 64, 20], [10, 5, 0], 64)
    assert row["length_ratio"] == round(40 / 30, 4) and row["length_ratio_low"] < 1 < row["length_ratio_high"]
    assert {key: row[key] for key in ("n_long", "same_tokens", "n_both_ended", "n_ended", "n_ended_dense")} == {
        "n_long": 3, "same_tokens": 5.0, "n_both_ended": 2, "n_ended": 2, "n_ended_dense": 2}
    assert eval_stats.long_row([64], [64], [64], 64)["length_ratio"] is None


def test_the_interval_of_a_length_ratio_covers_the_true_one():
    """Lengths 20 % above dense with noise: the true ratio lies in 95 % of the intervals, give or take what 400 trials allow."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        dense = rng.integers(20, 200, 60).astype(float)
        found = eval_stats.ratio_of_sums(dense * 1.2 * rng.lognormal(-0.045, 0.3, 60), dense)
        hits += found["length_ratio_low"] <= 1.2 <= found["length_ratio_high"]
    assert 0.91 < hits / 400 < 0.985


@pytest.mark.parametrize("points, expected", [
    ([(1, 1), (2, 2), (3, 2), (2, 1)], [True, True, False, False]), ([(1, 1), (1, 1)], [True, True]), ([(1, 2), (1, 1)], [True, False]),
])
def test_pareto(points, expected):
    assert eval_stats.pareto(points) == expected


def row(**fields) -> dict:
    return {"n_depth": 8192, "arm": "hylra", "score_loss": 0.0, "score_loss_low": -0.5, "ppl_ratio": 1.0, "ppl_ratio_low": 0.999,
            "captured_mass": [0.98, 0.7], "theta": 0.97, "top_k": 2048, "block_size": 1, "policy": "FSR", "sources": [-1, 1, 1],
            "sparse_steps": 9, "verdict": OK, "n_documents": 8, "n_questions": 200, "min_context": 4096, **fields}


@pytest.mark.parametrize("fields, words, command", [
    ({}, "ok, within 1 point", "hylra-gguf bench m.gguf -d 8192"),
    ({"verdict": OPEN}, "too wide", "hylra-gguf eval m.gguf -d 8192 --docs 16 --questions 400"),
    ({"sparse_steps": 0}, "never sparse", "hylra-gguf eval m.gguf -d 8192"),
    ({"score_loss": 2.0, "ppl_ratio": 1.02}, "ok, within", "hylra-gguf bench m.gguf -d 8192"),  # chance explains both
    ({"score_loss": 2.0, "score_loss_low": 0.5, "captured_mass": [0.8, 0.2]}, "k too small (select layers hold 0.8", "hylra-gguf embed-policy m.gguf --top-k 4096"),
    ({"ppl_ratio": 1.05, "ppl_ratio_low": 1.02, "theta": 0.8}, "theta too low", "hylra-gguf embed-policy m.gguf --theta 0.9"),
    ({"ppl_ratio": 1.05, "ppl_ratio_low": 1.02, "theta": 0.8, "captured_mass": [0.8, 0.2]}, "theta too low", "hylra-gguf embed-policy m.gguf --theta 0.9"),
    ({"ppl_ratio": 1.05, "ppl_ratio_low": 1.02, "theta": None}, "not planned for a recall", "hylra-gguf embed-policy m.gguf"),
    ({"ppl_ratio": 1.05, "ppl_ratio_low": 1.02}, "the profile does not match this text", "hylra-gguf embed-policy m.gguf -f TEXT --minutes 10"),
])
def test_the_verdict_names_the_failure_and_what_to_do(fields, words, command):
    dense = row(arm="dense", score_loss=9.0, policy="FFF", sources=[-1, -1, -1])
    found = eval_verdict.verdict([dense, row(**fields)], "m.gguf")  # dense layers reuse nothing and judge nothing
    assert words in found["verdict"] and found["next"] == command


# Losses in docs/accuracy with what was seen to mend them: another theta, another way to find sources; or text that the plan was not made from.
@pytest.mark.parametrize("result, arm, words", [
    ("sister9-1", "hylra:for8192", "theta too low (0.92)"),  # theta 0.97 lost nothing (sister9-2), 4096 cells lost 5.6 points (sister9-3)
    ("sister9-3", "hylra:for8192-k4096", "theta too low (0.92)"),
    ("sister10-32k", "hylra:for8192", "theta too low (0.93)"),
    ("theta-8k", "hylra:theta0.50", "theta too low (0.5)"),
    ("theta-8k", "hylra:theta0.85", "theta too low (0.85)"),
    ("strategies-8k", "hylra:tidal-2-13", "not planned for a recall"),
    ("strategies-32k", "hylra:random4", "not planned for a recall"),
    ("strategies-32k", "hylra:own", "k too small"),  # perplexity x 1.016, and nothing is reused
    ("sister8-1", "hylra:own", "k too small"),
    ("text-plan-8k", "hylra:dense7", "the profile does not match this text"),
])
def test_the_verdict_of_recorded_losses(result, arm, words):
    rows = json.loads((ACCURACY / f"{result}.json").read_text())["rows"]
    rows.sort(key=lambda one: one["arm"] != arm)  # the verdict is of the first policy
    assert words in eval_verdict.verdict(rows, "m.gguf")["verdict"]


@pytest.mark.parametrize("loss, words", [(3.0, "lose as much"), (0.0, "the profile does not match this text")])
def test_an_arm_without_reuse_tells_k_from_sources(loss, words):
    own = row(arm="own", policy="RRR", sources=[0, 1, 2], theta=None, score_loss=loss, score_loss_low=loss - 1)
    found = eval_verdict.verdict([row(score_loss=3.0, score_loss_low=1.0, captured_mass=[0.8, 0.2]), own], "m.gguf")
    assert words in found["verdict"] and ("--top-k 4096" in found["next"]) == (loss > 0)


def test_without_a_policy_there_is_nothing_to_judge():
    assert eval_verdict.verdict([row(arm="dense")], "m.gguf")["next"] == "hylra-gguf embed-policy m.gguf"
