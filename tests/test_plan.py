"""From a profile to a policy: defaults, bounds, budgets and evidence, and every request that must be refused in one line."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from profiles import make_profile

from hylra_gguf import cli, plan, solver
from hylra_gguf.errors import HylraError, PolicyError
from hylra_gguf.policy import REUSE, Policy
from hylra_gguf.profile_data import Profile

GEMMA = [False, False, True, False, True, True, False, True]


def line(n, near=0.95, decay=0.02):
    return [[near - decay * abs(i - j) for j in range(n)] for i in range(n)]


def dense_count(policy) -> int:
    return sum(mode != REUSE for mode in policy.layer_mode)


@pytest.mark.parametrize("near, decay", [(0.999, 0.004), (0.97, 0.02), (0.9, 0.05)])
def test_the_default_theta_is_the_strictest_that_leaves_a_third_dense(near, decay):
    profile = make_profile(line(12, near, decay))
    policy = plan.plan_policy(profile)
    assert dense_count(policy) <= 4
    stricter = plan.plan_policy(profile, theta=min(1.0, policy.theta + 0.005))
    assert policy.theta == pytest.approx(0.995) or dense_count(stricter) > 4


def test_the_default_theta_of_a_model_that_cannot_reuse_is_the_loosest():
    policy = plan.plan_policy(make_profile(np.zeros((6, 6))), select="dense")
    assert (policy.layer_map(), policy.theta) == ("FFFFFF", 0.5)


def test_layers_that_cannot_take_part_do_not_use_up_the_dense_share():
    policy = plan.plan_policy(make_profile(line(8), GEMMA))
    assert policy.layer_map() == "FFSFRRFR"


def test_a_layer_beyond_the_sensitivity_bound_never_reuses():
    profile = make_profile(line(6), sensitivity=[0.9, 0.01, 0.3, 0.01, 0.01, 0.01])
    assert plan.plan_policy(profile, theta=0.5, max_sensitivity=1.0).layer_source == (0,) * 6
    assert plan.plan_policy(profile, "count", count=2).layer_source[2] in (-1, 2)
    assert plan.plan_policy(profile, theta=0.5).layer_source[2] in (-1, 2)
    assert plan.plan_policy(profile, "jump3").layer_source == (0, 0, 0, 3, 3, 3)
    assert plan.plan_policy(profile, "jump3", max_sensitivity=0.2).layer_source == (0, 0, -1, 3, 3, 3)


def test_policy_carries_the_evidence(tmp_path):
    profile = make_profile(line(4), eligible=[False, True, True, True])
    policy = plan.plan_policy(profile, theta=0.9, top_k=512)
    assert policy.summary == "4 layers: full 0; select 1; reuse 2; top_k 512; recall@512 min 0.91 mean 0.92"
    assert (policy.top_k, policy.sink_tokens, policy.recent_tokens, policy.theta) == (512, 4, 256, 0.9)
    assert policy.similarity == "recall" and policy.overlap[1] == pytest.approx(0.93) and len(policy.overlap) == 16
    assert policy.sensitivity == (0.01,) * 4 and "synthetic" in policy.calibration
    policy.save(tmp_path / "policy.json")
    assert Policy.load(tmp_path / "policy.json") == policy


def test_per_head_lists_bring_the_head_map_of_the_profile():
    policy = plan.plan_policy(make_profile(line(4)), theta=0.9, lists="head")
    assert policy.layer_source == (0, 0, 2, 2)
    assert policy.lists == 2 and policy.head_map == (0, 1, 1, 0, 0, 1, 1, 0)


@pytest.mark.parametrize("asked, chosen", [(None, 512), (300, 300), (512, 512)])
def test_top_k_defaults_to_the_largest_profiled_up_to_2048(asked, chosen):
    assert plan.plan_policy(make_profile(line(4)), top_k=asked).top_k == chosen
    assert plan.plan_policy(make_profile(line(4), top_k=(512, 2048, 4096))).top_k == 2048


@pytest.mark.parametrize("options, words", [
    ({"theta": math.nan}, "--theta nan"),
    ({"theta": 0.0}, "--theta 0.0"),
    ({"theta": 1.01}, "--theta 1.01"),
    ({"theta": -1}, "--theta -1"),
    ({"strategy": "jump3", "theta": 0.9}, "--theta has no effect on --strategy jump3"),
    ({"n": 3}, "--n has no effect on --strategy hylra"),
    ({"strategy": "jump3", "layers": [1]}, "take --strategy tidal or explicit"),
    ({"top_k": 259}, "at least the 260 sink and recent"),
    ({"recent": 600}, "--top-k 512: expected at least the 604 sink and recent"),
    ({"block_size": 5}, "block size 5"),
    ({"strategy": "jump3", "weights": "importance"}, "--weights has no effect on --strategy jump3; .* hylra or count or bottleneck"),
    ({"strategy": "count", "count": 2, "budgets": "auto"}, "--budgets has no effect on --strategy count; .* hylra"),
    ({"head_map": "x.npy"}, "--head-map has no effect on --strategy hylra; .* kascade"),
    ({"strategy": "kascade", "anchors": [0], "head_map": "x.npy", "lists": "layer"}, "--head-map has no effect on --lists layer"),
    ({"weights": "size"}, "--weights size: expected importance"),
    ({"statistic": "high"}, "--statistic high: expected mean or low"),
    ({"top_k_fraction": 0.1}, "--top-k 1024: the profile holds 300 512"),
    ({"top_k_fraction": 0.1, "top_k": 512}, "--top-k 512: expected 1024 or more"),
    ({"top_k": 1024}, "the profile holds 300 512"),
    ({"strategy": "best"}, "expected one of hylra"),
    ({"strategy": "every-n"}, "--n"),
    ({"strategy": "every-n", "n": 0}, "--n 0"),
    ({"strategy": "explicit"}, "--layers"),
    ({"strategy": "explicit", "layers": [0, 4]}, "layer 4 .* expected 0 to 3"),
    ({"strategy": "explicit", "layers": [-1]}, "layer -1"),
    ({"strategy": "explicit", "layers": [0, 2]}, "layer 2 cannot select"),
    ({"lists": "3"}, "expected layer or head"),
    ({"similarity": "cosine"}, "expected recall or overlap"),
    ({"max_sensitivity": math.nan}, "--max-sensitivity nan"),
])
def test_refusals_are_one_line(options, words):
    profile = make_profile(line(4), eligible=[True, True, False, True])
    with pytest.raises(HylraError, match=words) as caught:
        plan.plan_policy(profile, **options)
    assert "\n" not in str(caught.value)


def test_cmd_plan_writes_the_policy_and_shows_the_layer_map(tmp_path, capsys):
    make_profile(line(8)).save(tmp_path / "profile.json")
    line_of_flags = f"plan {tmp_path}/profile.json --strategy explicit --layers 1,5 --min-context 512 --recent 128"
    plan.cmd_plan(cli.build_parser().parse_args([*line_of_flags.split(), "-o", str(tmp_path / "policy.json")]))
    policy = Policy.load(tmp_path / "policy.json")
    assert (policy.layer_map(), policy.min_context, policy.recent_tokens, policy.sink_tokens) == ("FSRRRSRR", 512, 128, 4)
    out, err = capsys.readouterr()
    assert out == "" and "FSRRRSRR" in err
    plan.cmd_plan(cli.build_parser().parse_args(line_of_flags.split()))
    assert Policy.from_dict(json.loads(capsys.readouterr().out)) == policy


def test_a_strategy_leaves_its_numbers_in_the_policy():
    profile = make_profile(line(8))
    assert plan.plan_policy(profile, "random", count=3, seed=7).tool.endswith("strategy random --count 3 --seed 7 for 4096 tokens")
    policy = plan.plan_policy(profile, "bottleneck", count=4)
    assert dense_count(policy) == 4 and policy.theta == pytest.approx(0.93) and policy.tool.endswith("strategy bottleneck --count 4 for 4096 tokens")


def test_a_plan_out_of_time_says_so(monkeypatch):
    monkeypatch.setattr(solver, "minimise", lambda *_: (None, False))
    assert "not proven" in plan.plan_policy(make_profile(line(8)), theta=0.9).tool


def test_the_low_quantile_is_what_theta_is_compared_with():
    profile = make_profile(line(8))
    profile.arrays["recall.layer.512.1.low"] *= 0.5
    assert dense_count(plan.plan_policy(profile, theta=0.9)) < 8
    assert dense_count(plan.plan_policy(profile, theta=0.9, statistic="low")) == 8


@pytest.mark.parametrize("similarity, theta, dense", [("recall", 0.9, 3), ("overlap", 0.9, 8), ("overlap", 0.45, 3)])
def test_theta_is_compared_with_the_similarity_that_was_asked_for(similarity, theta, dense):
    policy = plan.plan_policy(make_profile(line(8)), theta=theta, similarity=similarity)  # every overlap is half the recall
    assert (dense_count(policy), policy.similarity) == (dense, similarity)
    assert policy.overlap[1] == pytest.approx(0.93 if similarity == "recall" else 0.465)


@pytest.mark.parametrize("flags, layers, sparse", [
    ({}, "SRFS", (1, 0, 0, 1)),  # layer 2 is sensitive; layer 3 has no source, and its own cells do for it
    ({"select": "sparse"}, "SRFS", (1, 0, 0, 1)),
    ({"select": "dense"}, "SRFF", None),
    ({"max_sensitivity": 0.5}, "SRSS", (1, 0, 1, 1)),
    ({"strategy": "explicit", "layers": [0, 2]}, "SRSR", None),
    ({"strategy": "explicit", "layers": [0, 2], "select": "sparse"}, "SRSR", (1, 0, 0, 0)),
    ({"strategy": "explicit", "layers": [0, 1, 2, 3], "select": "sparse"}, "SSFS", (1, 1, 0, 1)),  # as Quest: each its own cells
    ({"strategy": "explicit", "layers": [0, 1, 2, 3]}, "FFFF", None),
    ({"strategy": "explicit", "sources": [0, 1, -1, 3], "select": "sparse"}, "SSFS", (1, 1, 0, 1)),
    ({"strategy": "explicit", "sources": [-1, -1, -1, -1], "select": "sparse"}, "FFFF", None),
])
def test_dense_layers_attend_to_their_own_selection_unless_they_are_sensitive(flags, layers, sparse):
    similarity = np.zeros((4, 4))
    similarity[0, 1] = 0.9
    policy = plan.plan_policy(make_profile(similarity, sensitivity=[0.01, 0.01, 0.2, 0.01]), **{"strategy": "count", **flags},
                              **({} if "strategy" in flags else {"count": 3}))
    assert (policy.layer_map(), policy.sparse_select) == (layers, sparse)


@pytest.mark.parametrize("bound, calm", [(0.1, [True, True, False, False]), (math.inf, [True, True, True, False]), (-math.inf, [False] * 4)])
def test_a_layer_that_was_not_measured_is_never_calm(bound, calm):
    assert plan.calm_layers([0.0, 0.1, 0.2, math.nan], bound).tolist() == calm


def test_importance_decides_which_layers_reuse():
    similarity = np.zeros((3, 3))
    similarity[0, 1], similarity[0, 2] = 0.8, 0.7
    profile = make_profile(similarity)
    for half in ("fit", "heldout"):
        profile.arrays[f"importance.{half}"] = np.array([0.1, 0.9, 0.1])
    assert plan.plan_policy(profile, "count", count=2).layer_source == (0, 0, 2)
    assert plan.plan_policy(profile, "count", count=2, weights="importance").layer_source == (0, 1, 0)
    profile.arrays["importance.fit"][1] = np.nan
    with pytest.raises(PolicyError, match="no importance of some layers"):
        plan.plan_policy(profile, "count", count=2, weights="importance")


def test_a_kascade_head_map_makes_one_list_per_head(tmp_path):
    np.save(tmp_path / "map.npy", np.zeros((4, 2), np.int32))
    policy = plan.plan_policy(make_profile(line(4)), "kascade", anchors=[0, 2], head_map=str(tmp_path / "map.npy"))
    assert policy.lists == 2 and policy.layer_source == (0, 0, 2, 2) and policy.head_map == (0, 1, 0, 0, 0, 1, 0, 0)


def profile_of_a_long_lookup(n_ctx_train: int) -> Profile:
    """Six layers alike at 512 of 4096 cells; at 300 layer 3 finds its cells in layer 2 alone, which is as good for all others as layer 0."""
    profile = make_profile(line(6, 0.97, 0.0), n_ctx_train=n_ctx_train)
    for half in ("fit", "heldout"):
        found = profile.arrays[f"recall.layer.300.1.{half}"]
        found[[0, 1], 3] = 0.4
    return profile


@pytest.mark.parametrize("n_ctx_train, flags, source, evidence", [
    (4096, {}, 0, "recall@512"),
    (8192, {}, 2, "recall@300 min"),
    (8192, {"for_context": 4096}, 0, "recall@512"),
    (4096, {"for_context": 131072}, 2, "recall@300, which stands for 6991 tokens, min"),
])
def test_reuse_must_hold_at_the_share_of_cells_of_the_longest_context(n_ctx_train, flags, source, evidence):
    policy = plan.plan_policy(profile_of_a_long_lookup(n_ctx_train), theta=0.9, **flags)
    assert (policy.layer_source[3], policy.top_k) == (source, 512)
    assert evidence in policy.summary and policy.tool.endswith(f"for {flags.get('for_context', n_ctx_train)} tokens")


def test_budgets_stop_where_the_profile_cannot_tell_them_apart():
    """At twice the profiled length 512 cells are judged at 300 of the profile's, and nothing measured stands for 300."""
    policy = plan.plan_policy(profile_of_budgets(n_ctx_train=8192), theta=0.5, budgets="auto")
    assert (policy.top_k, policy.layer_top_k) == (512, None)


def profile_of_budgets(n_ctx_train: int = 4096, **at_300) -> Profile:
    """Layer 0 serves 1-3 and layer 4 serves 5-7 at top_k 512; at 300 the named edges of layer 4 are as given."""
    similarity = np.zeros((8, 8))
    similarity[0, 1:4] = similarity[4, 5:] = 0.95
    profile = make_profile(similarity, top_k=(300, 400, 512), n_ctx_train=n_ctx_train)
    for half in ("fit", "heldout"):
        for edge, value in at_300.items():
            profile.arrays[f"recall.layer.300.1.{half}"][int(edge[1]), int(edge[2])] = value
    return profile


@pytest.mark.parametrize("at_300, top_k, layer_top_k", [
    ({}, 300, None),
    ({"e45": 0.89}, 400, (300, 0, 0, 0, 400, 0, 0, 0)),
    ({"e45": 0.89, "e01": 0.5}, 400, None),
    ({"e45": 0.9}, 300, None),
])
def test_budgets_are_the_smallest_that_keep_theta(at_300, top_k, layer_top_k):
    policy = plan.plan_policy(profile_of_budgets(**at_300), theta=0.9, budgets="auto")
    assert policy.layer_source == (0, 0, 0, 0, 4, 4, 4, 4)
    assert (policy.top_k, policy.layer_top_k) == (top_k, layer_top_k)


def test_a_budget_also_keeps_the_sensitivity_bound():
    profile = profile_of_budgets()
    for half in ("fit", "heldout"):
        profile.arrays[f"sensitivity.layer.400.{half}"][6] = 0.2
        profile.arrays[f"sensitivity.layer.300.{half}"][6] = 0.05
    assert plan.plan_policy(profile, theta=0.9, budgets="auto").layer_top_k == (300, 0, 0, 0, 512, 0, 0, 0)


def test_a_share_of_the_cells_has_a_floor():
    profile = make_profile(line(4), top_k=(512, 1024, 2048))
    policy = plan.plan_policy(profile, top_k_fraction=0.1)
    assert (policy.top_k, policy.top_k_fraction) == (1024, 0.1)
    assert plan.plan_policy(profile, top_k_fraction=0.1, top_k=2048).top_k == 2048


def test_plan_is_fast_and_proven_for_a_model_of_64_layers():
    policy = plan.plan_policy(make_profile(line(64, 0.99, 0.01)))
    assert "not proven" not in policy.tool and dense_count(policy) <= 21
