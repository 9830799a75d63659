"""The search of `plan --refine` against costs that are known: it falls, never reads more, stops in time, and does not learn by heart."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from profiles import make_profile
from support import write_tiny_model

from hylra_gguf import cli, refine
from hylra_gguf.divergence import Divergence
from hylra_gguf.policy import FULL, REUSE, SELECT, Policy

N = 6
DEPTH = 8192


def policy(sources, **fields) -> Policy:
    used = {s for layer, s in enumerate(sources) if s != layer}
    modes = [FULL if s == -1 else REUSE if s != layer else SELECT for layer, s in enumerate(sources)]
    assert all((mode == SELECT) == (layer in used) for layer, mode in enumerate(modes))
    return Policy(layer_mode=modes, layer_source=sources, head_kv_count=1, **{"top_k": 1024, **fields})


class World:
    """Every reuse edge has a hidden loss; KLD is their sum times a fixed pattern over tokens, noisier on the held-out half if asked."""

    def __init__(self, seed=0, held_out_sign=1.0):
        rng = np.random.default_rng(seed)
        self.loss, self.sign, self.calls = rng.random((N, N)), held_out_sign, []
        self.pattern = 1 + 0.1 * rng.random((1, 192))

    def cost(self, p: Policy) -> float:
        budgets = p.layer_top_k or (p.top_k,) * N
        return sum(self.loss[s, layer] * 1024 / budgets[s] for layer, s in enumerate(p.layer_source) if s not in (-1, layer))

    def compare(self, p: Policy) -> Divergence:
        self.calls.append(p)
        kld = self.cost(p) * self.pattern
        turn = np.arange(192) // 8 % 2 == 0
        kld = np.where(turn, kld, self.sign * kld + 10 * (self.sign < 0))
        return Divergence(kld, np.ones_like(kld, bool))


@pytest.mark.parametrize("seed", range(5))
def test_it_ends_where_no_neighbour_is_better(seed):
    world, start = World(seed), policy([0, 0, 0, 3, 3, 3])
    found, path = refine.refine(start, world.compare, DEPTH, 1e9, lambda step: None)
    assert world.cost(found) < world.cost(start)
    assert all(world.cost(p) >= world.cost(found) - 1e-12 for _, p in refine.neighbours(found, DEPTH, refine.reads(start, DEPTH)))
    klds = [step.kld for step in path]
    assert klds == sorted(klds, reverse=True) and path[0].change == "start"
    assert all(step.reads <= path[0].reads + 1e-9 for step in path)
    assert len(world.calls) == len(set(world.calls))


def test_a_gain_that_held_out_tokens_do_not_share_is_given_back():
    world, start = World(1, held_out_sign=-1.0), policy([0, 0, 0, 3, 3, 3])
    found, path = refine.refine(start, world.compare, DEPTH, 1e9, lambda step: None)
    assert found == start and [step.change for step in path] == ["start"]


def test_it_stops_in_time():
    world, ticks = World(), itertools.count()
    refine.refine(policy([0, 0, 0, 3, 3, 3]), world.compare, DEPTH, 5, lambda step: None, clock=lambda: next(ticks))
    assert 1 <= len(world.calls) <= 5


@pytest.mark.parametrize("start", [policy([0, 0, 0, 3, 3, 3]), policy([-1, 1, 1, 1, 4, 4]),
                                   policy([0, 0, 2, 2, 0, 2], layer_top_k=(1024, 0, 512, 0, 0, 0)),
                                   policy([-1, 1, 1, 1, 4, 4], overlap=np.eye(6).ravel().tolist())])
def test_neighbours_are_valid_different_and_read_no_more(start):
    found = refine.neighbours(start, DEPTH, refine.reads(start, DEPTH))
    assert found
    for _, p in found:
        p.validate(N, 1)
        assert p != start and refine.reads(p, DEPTH) <= refine.reads(start, DEPTH) + 1e-9


def test_layers_without_evidence_stay_full():
    """A full layer whose attention never spanned the cache has an empty row in the evidence."""
    evidence = np.ones((N, N))
    evidence[2] = evidence[:, 2] = 0
    start = policy([0, 0, -1, 3, 3, 3], overlap=evidence.ravel().tolist())
    for _, p in refine.neighbours(start, DEPTH, refine.reads(start, DEPTH)):
        assert p.layer_mode[2] == FULL and 2 not in p.layer_source


@pytest.mark.parametrize("sensitivity, sparse", [
    (None, (1, 0, 0, 1, 0, 0)),  # nobody measured layer 4: it attends to all cells when it selects
    ((0.01,) * 4 + (0.1, 0.01), (1, 0, 0, 1, 1, 0)),
    ((0.01,) * 4 + (0.2, 0.01), (1, 0, 0, 1, 0, 0)),
    ((0.9,) * 6, (1, 0, 0, 1, 0, 0)),  # as planned with another bound
])
def test_a_new_select_layer_is_sparse_only_if_it_was_measured_to_be_calm(sensitivity, sparse):
    start = policy([0, 0, 0, 3, 3, 3], sparse_select=(1, 0, 0, 1, 0, 0), sensitivity=sensitivity)
    found = refine.with_sources(start, [0, 0, 0, 3, 4, 4])
    assert (found.layer_map(), found.sparse_select) == ("SRRSSR", sparse)
    assert refine.with_sources(replace(start, sparse_select=None), [0, 0, 0, 3, 4, 4]).sparse_select is None


@pytest.mark.parametrize("flags, words", [
    ("--text a.txt", "--text has no effect without --refine"),
    ("--minutes 3", "--minutes has no effect without --refine"),
    ("-t 2", "--threads has no effect without --model or --refine"),
    ("--refine m.gguf --sweep theta=0.5:0.9:0.1", "--refine has no policy to start from"),
    ("--refine other.gguf", "the profile is of another model"),
])
def test_flags_that_do_not_fit_are_one_line(flags, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_profile(np.full((4, 4), 0.9)).save("p.json")
    write_tiny_model(tmp_path / "other.gguf")
    assert cli.main(["plan", "p.json", *flags.split()]) == 2
    out, err = capsys.readouterr()
    assert out == "" and words in err.splitlines()[-1] and "Traceback" not in err
