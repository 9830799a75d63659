"""The fixed ways of choosing layers, as tables, and what each refuses."""

from __future__ import annotations

import numpy as np
import pytest

from hylra_gguf import strategies
from hylra_gguf.errors import PolicyError
from hylra_gguf.flags import STRATEGIES
from hylra_gguf.solver import Problem

GEMMA = [False, False, True, False, True, True, False, True]
ALL = [True] * 8


def make_problem(eligible=ALL, sensitive=()) -> Problem:
    n = len(eligible)
    distance = np.abs(np.subtract.outer(np.arange(n), np.arange(n)))
    may_reuse = np.array([can and 0 < layer not in sensitive for layer, can in enumerate(eligible)])
    return Problem(0.95 - 0.02 * distance, np.array(eligible), may_reuse, np.ones(n))


@pytest.mark.parametrize("strategy, flags, eligible, expected", [
    ("jump3", {}, ALL, [0, 0, 0, 3, 3, 3, 6, 6]),
    ("jump3", {}, GEMMA, [-1, -1, 2, -1, 2, 2, -1, -1]),
    ("every-n", {"n": 4}, ALL, [0, 0, 0, 0, 4, 4, 4, 4]),
    ("every-n", {"n": 1}, [True] * 4, [-1, -1, -1, -1]),
    ("every-n", {"n": 2}, GEMMA, [-1, -1, 2, -1, 2, 5, -1, 5]),
    ("explicit", {"layers": [5, 1]}, ALL, [-1, 1, 1, 1, 1, 5, 5, 5]),
    ("explicit", {"layers": [0]}, [True] * 3, [0, 0, 0]),
    ("explicit", {"sources": [0, 1, 0, 1, 0, -1, 6, 6]}, ALL, [0, 1, 0, 1, 0, -1, 6, 6]),
    ("explicit", {"sources": [0, 1, 1]}, [True] * 3, [-1, 1, 1]),
    ("explicit", {"sources": [-1, -1, 2, 2, 2, 2, 2, 2]}, GEMMA, [-1, -1, 2, -1, 2, 2, -1, 2]),
    ("tidal", {"layers": [2, 5]}, ALL, [-1, -1, 2, 2, 2, 5, 5, 5]),
    ("kascade", {"anchors": [0, 2, 6]}, ALL, [0, 0, 2, 2, 2, 2, 6, 6]),
    ("hylra", {"theta": 0.9}, [True] * 6, [0, 0, 0, 3, 3, 3]),
    ("hylra", {"theta": 1.0}, [True] * 4, [-1, -1, -1, -1]),
    ("hylra", {"theta": 0.1}, GEMMA, [-1, -1, 2, -1, 2, 2, -1, 2]),
    ("count", {"count": 8}, ALL, [-1] * 8),
    ("count", {"count": 1}, ALL, [0] * 8),
    ("bottleneck", {"count": 2}, [True] * 4, [0, 0, 2, 2]),
])
def test_choices(strategy, flags, eligible, expected):
    assert strategies.choose(strategy, make_problem(eligible), **flags).sources == expected


def test_every_strategy_of_the_flag_table_can_be_chosen():
    assert set(strategies.CHOOSERS) == set(STRATEGIES)


@pytest.mark.parametrize("seed", range(5))
def test_random_keeps_the_number_of_dense_layers_that_it_is_compared_at(seed):
    problem = make_problem([True] * 6 + [False] + [True] * 9, sensitive=(4,))
    sources = strategies.choose("random", problem, count=6, seed=seed).sources
    assert sum(source in (-1, layer) for layer, source in enumerate(sources) if layer != 6) == 6
    assert sources[4] in (-1, 4) and sources[0] in (-1, 0) and sources[6] == -1
    assert sources == strategies.choose("random", problem, count=6, seed=seed).sources


def test_random_draws_differ_by_seed():
    problem = make_problem([True] * 24)
    assert len({tuple(strategies.choose("random", problem, count=8, seed=seed).sources) for seed in range(8)}) > 4


def test_a_layer_above_the_sensitivity_bound_is_full_in_fixed_choices_too():
    problem = make_problem(sensitive=(2,))
    assert strategies.choose("jump3", problem).sources == [0, 0, -1, 3, 3, 3, 6, 6]
    assert strategies.choose("explicit", problem, sources=[0, 0, 0, 0, 4, 4, 4, 4]).sources == [0, 0, -1, 0, 4, 4, 4, 4]


@pytest.mark.parametrize("strategy, flags, words", [
    ("hylra", {"theta": 1.01}, "--theta 1.01: expected"),
    ("count", {}, "--count is missing"),
    ("count", {"count": 9}, "--count 9: .* from 1 to 8"),
    ("random", {}, "--count is missing"),
    ("random", {"count": 0}, "--count 0: .* from 1 to 8"),
    ("every-n", {}, "--n None"),
    ("every-n", {"n": 0}, "--n 0"),
    ("tidal", {}, "--layers None, expected the two layers"),
    ("tidal", {"layers": [2, 2]}, "expected the two layers"),
    ("tidal", {"layers": [2, 13]}, "layer 13 is not in the model; expected 0 to 7"),
    ("explicit", {}, "expected the select layers or every layer's source"),
    ("explicit", {"layers": []}, "expected the select layers"),
    ("explicit", {"layers": [1], "sources": [0] * 8}, "expected the select layers or"),
    ("explicit", {"layers": [0, 8]}, "layer 8 .* expected 0 to 7"),
    ("explicit", {"layers": [-1]}, "layer -1"),
    ("explicit", {"sources": [0] * 7}, "written for 7 layers, but the model has 8"),
    ("explicit", {"sources": [0, 0, 1, 0, 0, 0, 0, 0]}, "layer 2 has source 1"),
    ("explicit", {"sources": [0, 0, 3, 3, 0, 0, 0, 0]}, "layer 2 has source 3"),
    ("kascade", {}, "--anchors 0,2,8,13,14"),
    ("kascade", {"anchors": [0, 9]}, "--anchors: layer 9 is not in the model"),
])
def test_refusals_are_one_line(strategy, flags, words):
    with pytest.raises(PolicyError, match=words) as caught:
        strategies.choose(strategy, make_problem(), **flags)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("strategy, flags", [
    ("explicit", {"layers": [0, 2]}), ("explicit", {"sources": [0, 0, 0, 0, 4, 4, 4, 4]}), ("pattern", {"pattern": "FSFSFSFS"}),
])
def test_a_layer_with_a_sliding_window_never_selects(strategy, flags):
    with pytest.raises(PolicyError, match="layer 0 cannot select"):
        strategies.choose(strategy, make_problem(GEMMA), **flags)


# HShare's map for Llama-2-7B-chat: layer 12 goes back to 8 although 11 selects
HSHARE = [0, 1, 2, 2, 2, 2, 6, 7, 8, 8, 8, 11, 8, 8, 14, 14, 14, 14, 14, 19, 20, 20, 22, 22, 24, 25, 24, 27, 27, 29, 27, 31]


def test_published_sources_that_are_not_the_nearest():
    plan = strategies.choose("explicit", make_problem([True] * 32), sources=HSHARE)
    lonely = {0, 1, 6, 7, 11, 19, 25, 29, 31}
    assert plan.sources == [-1 if layer in lonely else source for layer, source in enumerate(HSHARE)]


def test_dense_layers_between_select_layers():
    """OmniKV's: the layer after each select layer is dense."""
    sources = [-1, -1, 2, -1, *[2] * 4, 8, -1, *[8] * 8, 18, -1, *[18] * 12]
    assert strategies.choose("explicit", make_problem([True] * 32), sources=sources).sources == sources


@pytest.mark.parametrize("strategy, layers, n_layer", [
    ("kascade", [0, 2, 8, 13, 14], 32), ("kascade", [0, 2, 4, 8, 13, 16], 32), ("kascade", [0, 2, 7, 14, 23], 36),
    ("tidal", [2, 13], 32), ("tidal", [2, 12], 36), ("tidal", [2, 20], 36), ("explicit", [0, 1, 2, 14, 22], 28),
    ("explicit", [2, 8, 18], 32), ("kascade", [0, 2, 8, 11, 13, 14], 32), ("kascade", [0, 2, 7, 13, 17, 23], 36),
    ("explicit", [4, 19, 41], 80), ("explicit", [0, 1, *range(2, 75, 4)], 78),
])
def test_published_lists(strategy, layers, n_layer):
    flags = {"anchors" if strategy == "kascade" else "layers": layers}
    sources = strategies.choose(strategy, make_problem([True] * n_layer), **flags).sources
    served = {max(one for one in layers if one <= layer) for layer in range(layers[0], n_layer) if layer not in layers}
    assert {source for source in sources if source != -1} == served
    with pytest.raises(PolicyError, match=f"layer {layers[-1]} is not in the model"):
        strategies.choose(strategy, make_problem([True] * layers[-1]), **flags)
