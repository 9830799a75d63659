"""The solver against brute force over every choice of full/select layers and sources, for all three objectives."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hylra_gguf import solver
from hylra_gguf.errors import PolicyError
from hylra_gguf.solver import NO_SOURCE, Problem


@st.composite
def problems(draw, most=12):
    """Up to 12 layers, in every other one just 12; half of the cells come from a few values, so that ties and thresholds that are hit exactly occur."""
    n = draw(st.just(most) | st.integers(1, most))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    similarity = rng.random((n, n))
    if draw(st.booleans()):
        similarity = rng.choice([0.0, 0.25, 0.5, 0.55, 0.6, 0.75, 0.9, 1.0], (n, n))
    elif draw(st.booleans()):  # near-banded, as real models are
        distance = np.abs(np.subtract.outer(np.arange(n), np.arange(n)))
        similarity = np.clip(1 - 0.08 * distance - 0.1 * similarity, 0, 1)
    eligible = rng.random(n) < draw(st.sampled_from([1.0, 0.8]))
    may_reuse = eligible & (np.arange(n) > 0) & (rng.random(n) < draw(st.sampled_from([1.0, 0.7])))
    weights = rng.random(n) if draw(st.booleans()) else np.ones(n)
    return Problem(similarity, eligible, may_reuse, weights)


def loss(problem, edges) -> float:
    return sum(problem.weights[j] * (1 - problem.similarity[i, j]) for i, j in edges)


def every_plan(problem, theta):
    """(number of full/select layers, their best edges) for each set of full/select layers that serves all other layers."""
    eligible = np.flatnonzero(problem.eligible)
    for size in range(len(eligible) + 1):
        for dense in itertools.combinations(eligible.tolist(), size):
            edges = []
            for j in set(eligible.tolist()) - set(dense):
                sources = [i for i in dense if i < j and problem.similarity[i, j] >= theta]
                if not sources or not problem.may_reuse[j]:
                    break
                edges.append((max(sources, key=lambda i: problem.similarity[i, j]), j))
            else:
                yield size, edges


def read(problem, plan):
    """(number of full/select layers, edges), after checking that the plan is legal"""
    for layer, source in enumerate(plan.sources):
        if source == layer:
            assert problem.eligible[layer] and plan.sources.count(layer) > 1
        elif source != NO_SOURCE:
            assert source < layer and plan.sources[source] == source and problem.may_reuse[layer]
            assert plan.theta is None or problem.similarity[source, layer] >= plan.theta
    edges = [(source, layer) for layer, source in enumerate(plan.sources) if source not in (NO_SOURCE, layer)]
    return int(problem.eligible.sum()) - len(edges), edges


@settings(max_examples=120, deadline=None)
@given(problems(), st.sampled_from([0.1, 0.5, 0.6, 0.9, 1.0]))
def test_hylra_equals_brute_force(problem, theta):
    plan = solver.hylra(problem, theta)
    size, edges = read(problem, plan)
    best = min((size, loss(problem, edges)) for size, edges in every_plan(problem, theta))
    assert plan.proven and plan.theta == theta
    assert size == best[0] and loss(problem, edges) == pytest.approx(best[1], abs=1e-6)


@settings(max_examples=120, deadline=None)
@given(problems(), st.data())
def test_count_equals_brute_force(problem, data):
    plans = list(every_plan(problem, -math.inf))
    wanted = data.draw(st.sampled_from(sorted({size for size, _ in plans})))
    plan = solver.count(problem, wanted)
    size, edges = read(problem, plan)
    assert plan.proven and size == wanted
    assert loss(problem, edges) == pytest.approx(min(loss(problem, e) for s, e in plans if s == wanted), abs=1e-6)


@settings(max_examples=100, deadline=None)
@given(problems(), st.data())
def test_bottleneck_equals_brute_force(problem, data):
    def key(edges):
        return -min((problem.similarity[edge] for edge in edges), default=math.inf)

    def best_of(size):
        """The smallest edge decides first; below it any source will do, so the sum is taken over the plans at that threshold."""
        smallest = min(key(edges) for s, edges in plans if s == size)
        return smallest, min(loss(problem, edges) for s, edges in plans if s == size and key(edges) <= smallest)

    plans = list(every_plan(problem, -math.inf))
    wanted = data.draw(st.sampled_from(sorted({size for size, _ in plans})))
    plan = solver.bottleneck(problem, wanted)
    size, edges = read(problem, plan)
    smallest, least = best_of(wanted)
    assert plan.proven and size == wanted and key(edges) == smallest
    assert loss(problem, edges) == pytest.approx(least, abs=1e-6)


def banded(n, noise=0.02):
    rng = np.random.default_rng(n)
    distance = np.abs(np.subtract.outer(np.arange(n), np.arange(n)))
    similarity = np.clip(0.99 - 0.01 * distance - 0.1 * rng.random(n) + noise * rng.standard_normal((n, n)), 0, 1)
    return Problem(similarity, np.ones(n, bool), np.arange(n) > 0, np.ones(n))


@pytest.mark.parametrize("n", [32, 64, 80])
def test_model_sized_problems_are_proven_within_the_budget(n):
    problem = banded(n)
    assert solver.hylra(problem, 0.85).proven
    assert solver.count(problem, n // 4).proven
    assert solver.bottleneck(problem, n // 4).proven


@pytest.mark.parametrize("objective, asked", [(solver.hylra, 0.9), (solver.count, 9), (solver.bottleneck, 9)])
def test_without_time_the_plan_is_legal_and_says_that_it_is_not_proven(objective, asked, monkeypatch):
    monkeypatch.setattr(solver, "minimise", lambda *_: (None, False))
    problem = banded(40)
    plan = objective(problem, asked)
    size, _ = read(problem, plan)
    assert not plan.proven and (size == asked or objective is solver.hylra)


def test_a_layer_may_go_back_to_an_older_source():
    similarity = np.zeros((4, 4))
    similarity[0, 1], similarity[0, 3], similarity[1, 2] = 0.5, 0.9, 0.9
    problem = Problem(similarity, np.ones(4, bool), np.array([False, True, True, True]), np.ones(4))
    assert solver.count(problem, 2).sources == [0, 1, 1, 0]


def test_weights_move_the_loss_to_layers_that_matter_little():
    similarity = np.zeros((3, 3))
    similarity[0, 1], similarity[0, 2] = 0.8, 0.7
    for weights, expected in (([1, 1, 1], [0, 0, -1]), ([1, 9, 1], [0, -1, 0])):
        problem = Problem(similarity, np.ones(3, bool), np.array([False, True, True]), np.array(weights, float))
        assert solver.count(problem, 2).sources == expected


@pytest.mark.parametrize("solve", [solver.count, solver.bottleneck])
@pytest.mark.parametrize("n_dense", [0, 1, 6])
def test_an_impossible_number_is_refused(solve, n_dense):
    problem = Problem(np.ones((6, 6)), np.array([True] * 5 + [False]), np.array([False, False, True, True, True, False]), np.ones(6))
    with pytest.raises(PolicyError, match=f"--count {n_dense}: .* from 2 to 5"):
        solve(problem, n_dense)
