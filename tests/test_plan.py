"""The planner against brute force, and every request it must refuse in one line."""

from __future__ import annotations

import itertools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from profiles import make_profile

from hylra_gguf import plan
from hylra_gguf.errors import PolicyError
from hylra_gguf.policy import FULL, REUSE, SELECT, Policy


def line(n, near=0.95, decay=0.02):
    return [[near - decay * abs(i - j) for j in range(n)] for i in range(n)]


# -- the solver -------------------------------------------------------------------------------------------------------


def brute_force(similarity, theta, may_reuse, may_select) -> tuple[int, float]:
    """Best (full/select layers, minus sum) over every assignment in which a reuse layer takes the latest select layer."""
    best = (math.inf, 0.0)
    for modes in itertools.product((FULL, SELECT, REUSE), repeat=len(similarity)):
        current, count, total = -1, 0, 0.0
        for layer, mode in enumerate(modes):
            if mode == REUSE:
                if not may_reuse[layer] or current < 0 or similarity[current][layer] < theta:
                    break
                total += similarity[current][layer]
                continue
            if mode == SELECT and not may_select[layer]:
                break
            current, count = layer if mode == SELECT else current, count + 1
        else:
            best = min(best, (count, -total))
    return best


def value(sources, similarity) -> tuple[int, float]:
    edges = [(source, layer) for layer, source in enumerate(sources) if source not in (-1, layer)]
    return len(sources) - len(edges), -sum(similarity[source][layer] for source, layer in edges)


@st.composite
def problems(draw):
    n = draw(st.integers(1, 9))
    cell = st.sampled_from([0.0, 0.25, 0.5, 0.55, 0.6, 0.75, 0.9, 1.0]) if draw(st.booleans()) else st.floats(0, 1)
    similarity = np.array(draw(st.lists(st.lists(cell, min_size=n, max_size=n), min_size=n, max_size=n)))
    may_select = draw(st.lists(st.sampled_from([True, True, True, False]), min_size=n, max_size=n))
    calm = draw(st.lists(st.sampled_from([True, True, True, False]), min_size=n, max_size=n))
    may_reuse = [layer > 0 and a and b for layer, (a, b) in enumerate(zip(may_select, calm))]
    return similarity, draw(st.sampled_from([0.1, 0.5, 0.6, 0.9, 1.0])), may_reuse, may_select


def check_legal(sources, similarity, theta, may_reuse, may_select):
    for layer, source in enumerate(sources):
        if source == layer:
            assert may_select[layer] and any(s == layer for j, s in enumerate(sources) if j != layer)
        elif source != -1:
            assert source < layer and sources[source] == source and may_reuse[layer] and similarity[source, layer] >= theta


@settings(max_examples=150, deadline=None)
@given(problems())
def test_solve_equals_brute_force(problem):
    similarity, theta, may_reuse, may_select = problem
    sources = plan.solve(similarity, theta, may_reuse, may_select)
    check_legal(sources, similarity, theta, may_reuse, may_select)
    count, total = value(sources, similarity)
    best_count, best_total = brute_force(similarity.tolist(), theta, may_reuse, may_select)
    assert count == best_count and total == pytest.approx(best_total)


@settings(max_examples=300, deadline=None)
@given(problems())
def test_widen_is_legal_and_never_worse(problem):
    similarity, theta, may_reuse, may_select = problem
    narrow = plan.solve(similarity, theta, may_reuse, may_select)
    wide = plan.widen(narrow, similarity, theta, may_reuse)
    check_legal(wide, similarity, theta, may_reuse, may_select)
    (count, total), (count_before, total_before) = value(wide, similarity), value(narrow, similarity)
    assert count < count_before or (count == count_before and total <= total_before + 1e-9)
    selects = [layer for layer, source in enumerate(wide) if source == layer]
    for layer, source in enumerate(wide):
        if source not in (-1, layer):
            assert similarity[source, layer] == max(similarity[i, layer] for i in selects if i < layer)


def test_solve_is_fast_for_64_layers():
    similarity = np.random.default_rng(0).random((64, 64))
    sources = plan.solve(similarity, 0.9, [layer > 0 for layer in range(64)], [True] * 64)
    assert sources.count(-1) < 64


def test_widen_lets_a_layer_go_back_to_an_older_source_and_frees_the_one_between():
    similarity = np.zeros((4, 4))
    similarity[0, 1], similarity[0, 2], similarity[0, 3], similarity[1, 2], similarity[1, 3] = 0.6, 0.7, 0.9, 0.8, 0.7
    assert plan.widen([0, 1, 1, 1], similarity, 0.5, [False, True, True, True]) == [0, 1, 1, 0]
    similarity[0, 2] = 0.85
    assert plan.widen([0, 1, 1, 1], similarity, 0.5, [False, True, True, True]) == [0, 0, 0, 0]


# -- strategies -------------------------------------------------------------------------------------------------------

GEMMA = [False, False, True, False, True, True, False, True]


@pytest.mark.parametrize("strategy, extra, eligible, expected", [
    ("jump3", {}, [True] * 8, [0, 0, 0, 3, 3, 3, 6, 6]),
    ("jump3", {}, GEMMA, [-1, -1, 2, -1, 2, 2, -1, -1]),
    ("every-n", {"n": 4}, [True] * 8, [0, 0, 0, 0, 4, 4, 4, 4]),
    ("every-n", {"n": 1}, [True] * 4, [-1, -1, -1, -1]),
    ("every-n", {"n": 2}, GEMMA, [-1, -1, 2, -1, 2, 5, -1, 5]),
    ("explicit", {"layers": [5, 1]}, [True] * 8, [-1, 1, 1, 1, 1, 5, 5, 5]),
    ("explicit", {"layers": [0]}, [True] * 3, [0, 0, 0]),
    ("hylra", {"theta": 0.9}, [True] * 8, [0, 0, 0, 3, 3, 3, 6, 6]),
    ("hylra", {"theta": 1.0}, [True] * 4, [-1, -1, -1, -1]),
    ("hylra", {"theta": 0.1}, GEMMA, [-1, -1, 2, -1, 2, 2, -1, 2]),
])
def test_strategies(strategy, extra, eligible, expected):
    policy = plan.plan_policy(make_profile(line(len(eligible)), eligible), strategy, **extra)
    assert list(policy.layer_source) == expected
    modes = [FULL if s == -1 else SELECT if s == layer else REUSE for layer, s in enumerate(expected)]
    assert list(policy.layer_mode) == modes


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
    policy = plan.plan_policy(make_profile(np.zeros((6, 6))))
    assert (policy.layer_map(), policy.theta) == ("FFFFFF", 0.5)


def test_layers_that_cannot_take_part_do_not_use_up_the_dense_share():
    policy = plan.plan_policy(make_profile(line(8), GEMMA))
    assert policy.layer_map() == "FFSFRRFR"


def test_a_layer_beyond_the_sensitivity_bound_never_reuses():
    profile = make_profile(line(6), sensitivity=[0.9, 0.01, 0.3, 0.01, 0.01, 0.01])
    assert plan.plan_policy(profile, theta=0.5, max_sensitivity=1.0).layer_source == (0,) * 6
    assert plan.plan_policy(profile, theta=0.5).layer_source[2] in (-1, 2)
    assert plan.plan_policy(profile, "jump3").layer_source == (0, 0, 0, 3, 3, 3)
    assert plan.plan_policy(profile, "jump3", max_sensitivity=0.2).layer_source == (0, 0, -1, 3, 3, 3)


def test_policy_carries_the_evidence(tmp_path):
    profile = make_profile(line(4), eligible=[False, True, True, True])
    policy = plan.plan_policy(profile, theta=0.9, top_k=512)
    assert policy.summary == "4 layers: full 0; select 1; reuse 2; top_k 512; recall min 0.91 mean 0.92"
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


@pytest.mark.parametrize("layers, text", [([], "none"), ([0], "0"), ([0, 1], "0 1"), ([0, 1, 2, 5, 7, 8, 9], "0-2 5 7-9")])
def test_ranges(layers, text):
    assert plan.ranges(layers) == text


@pytest.mark.parametrize("options, words", [
    ({"theta": math.nan}, "--theta nan"),
    ({"theta": 0.0}, "--theta 0.0"),
    ({"theta": 1.01}, "--theta 1.01"),
    ({"theta": -1}, "--theta -1"),
    ({"strategy": "jump3", "theta": 0.9}, "--theta has no effect on --strategy jump3"),
    ({"n": 3}, "--n has no effect on --strategy hylra"),
    ({"strategy": "jump3", "layers": [1]}, "take --strategy explicit"),
    ({"top_k": 259}, "4 sink \\+ 256 recent"),
    ({"recent": 600}, "--top-k 512: expected at least the 4 sink \\+ 600 recent"),
    ({"block_size": 5}, "block_size"),
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
    with pytest.raises(PolicyError, match=words) as caught:
        plan.plan_policy(profile, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text, layers", [(None, None), ("2", [2]), ("0, 2,13", [0, 2, 13])])
def test_parse_layers(text, layers):
    assert plan.parse_layers(text) == layers


@pytest.mark.parametrize("text", ["", "a", "1,,2", "1.5"])
def test_parse_layers_refuses(text):
    with pytest.raises(PolicyError, match="--layers"):
        plan.parse_layers(text)


def test_cmd_plan_writes_the_policy_and_shows_the_layer_map(tmp_path, capsys):
    make_profile(line(8)).save(tmp_path / "profile.json")
    flags = {"profile": str(tmp_path / "profile.json"), "output": str(tmp_path / "policy.json"), "strategy": "explicit",
             "layers": "1,5", "min_context": 512, "recent": 128, "theta": None}
    plan.cmd_plan(SimpleNamespace(**flags))
    policy = Policy.load(tmp_path / "policy.json")
    assert (policy.layer_map(), policy.min_context, policy.recent_tokens, policy.sink_tokens) == ("FSRRRSRR", 512, 128, 4)
    out, err = capsys.readouterr()
    assert out == "" and "FSRRRSRR" in err
    plan.cmd_plan(SimpleNamespace(**{**flags, "output": None}))
    assert Policy.from_dict(json.loads(capsys.readouterr().out)) == policy
