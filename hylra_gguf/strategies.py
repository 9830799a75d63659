"""The ways of choosing layers that `plan --strategy` offers: our solver's objectives, and fixed choices to compare them with.

Each gives sources (see solver.Plan) for a Problem and refuses layers that the model does not have or that cannot select.
"""

from __future__ import annotations

from typing import Callable, Dict

import numpy as np

from . import importers, solver
from .errors import PolicyError
from .solver import NO_SOURCE, Plan, Problem, drop_idle

# Without a theta: the strictest one that leaves at most this share of the layers full or select. A fixed theta does not carry over:
# of the 30 layers of SmolLM2-135M-Needle-32K at 8K tokens 0.95 leaves 12 dense at top_k 2048 and 25 at 1024, 0.90 leaves 5 and 11.
DEFAULT_DENSE_SHARE = 1 / 3
THETAS = [thousandths / 1000 for thousandths in range(995, 495, -5)]


def choose(strategy: str, problem: Problem, **flags) -> Plan:
    """flags: those of flags.STRATEGIES[strategy] that were given"""
    return CHOOSERS[strategy](problem, **flags)


# -- our solver -------------------------------------------------------------------------------------------------------


def hylra(problem: Problem, theta: float | None = None) -> Plan:
    if theta is None:
        theta = automatic_theta(problem)
    if not 0 < theta <= 1:
        raise PolicyError(f"--theta {theta}: expected a number above 0 and up to 1, for example 0.95")
    return solver.hylra(problem, theta)


def automatic_theta(problem: Problem) -> float:
    """See DEFAULT_DENSE_SHARE. A stricter theta never needs fewer full/select layers, so bisection finds it; else the loosest."""
    allowed = max(1, round(DEFAULT_DENSE_SHARE * int(problem.eligible.sum())))
    low, high = 0, len(THETAS) - 1
    while low < high:
        middle = (low + high) // 2
        dense, _ = solver.cover(problem, problem.edges(THETAS[middle]), solver.BUDGET_S)
        low, high = (low, middle) if dense.sum() <= allowed else (middle + 1, high)
    return THETAS[low]


def given_count(solve: Callable[[Problem, int], Plan]) -> Callable[..., Plan]:
    return lambda problem, count=None: solve(problem, required_count(count))


def required_count(count: int | None) -> int:
    if count is None:
        raise PolicyError("--count is missing: this strategy needs the number of full and select layers; add for example --count 8")
    return count


# -- fixed choices ----------------------------------------------------------------------------------------------------


def every_n(problem: Problem, n: int | None = None) -> Plan:
    """Every n-th of the layers that can take part, from the first one on."""
    if n is None or n < 1:
        raise PolicyError(f"--strategy every-n: found --n {n}, expected 1 or more; add for example --n 4")
    return nearest(problem, np.flatnonzero(problem.eligible)[::n].tolist())


def tidal(problem: Problem, layers: list[int] | None = None) -> Plan:
    """TidalDecode (arXiv 2410.05076): dense up to layer S, which selects, and a second selection in layer C."""
    if layers is None or len(set(layers)) != 2:
        raise PolicyError(f"--strategy tidal: found --layers {layers}, expected the two layers that select; "
                          "add for example --layers 2,13")
    return explicit(problem, layers)


def random(problem: Problem, count: int | None = None, seed: int = 0) -> Plan:
    """As many full/select layers as `count` plans have: those that must be, and others drawn at random."""
    count, able = required_count(count), np.flatnonzero(problem.eligible)
    must = [layer for layer in able if layer == able[0] or not problem.may_reuse[layer]]
    if not len(must) <= count <= len(able):
        raise PolicyError(f"--count {count}: this model needs at least {len(must)} full/select layers and has {len(able)} that can "
                          f"take part; give a number from {len(must)} to {len(able)}")
    others = np.setdiff1d(able, must)
    drawn = np.random.default_rng(seed).choice(others, count - len(must), replace=False)
    return nearest(problem, [*must, *drawn])


def explicit(problem: Problem, layers: list[int] | None = None, sources: list[int] | None = None) -> Plan:
    if sources is not None and layers is None:
        return by_source(problem, sources)
    if not layers or sources is not None:
        raise PolicyError("--strategy explicit: expected the select layers or every layer's source; "
                          "add for example --layers 0,2,13, or --sources")
    return nearest(problem, layers)


def by_source(problem: Problem, sources: list[int]) -> Plan:
    """One source per layer, as HShare publishes them: its own number where a layer selects, -1 where it is full."""
    importers.check_length("--sources", len(sources), problem)
    for layer, source in enumerate(sources):
        if source > layer or (source != NO_SOURCE and sources[source] != source):
            raise PolicyError(f"--sources: layer {layer} has source {source}, expected -1, {layer} or an earlier layer "
                              "that is its own source")
        if source == layer:
            importers.check_selects("--sources", layer, problem)
    return Plan(drop_idle([source if source == layer or problem.may_reuse[layer] else NO_SOURCE
                           for layer, source in enumerate(sources)]))


def nearest(problem: Problem, selects: list[int], where: str = "--layers") -> Plan:
    """Every layer that may reuse takes the latest select layer before it; layers before the first one are full."""
    for layer in selects:
        importers.check_selects(where, layer, problem)
    first = min(selects)
    return importers.linked("".join("S" if layer in selects else "R" if layer > first else "F"
                                    for layer in range(len(problem.eligible))), problem, where)


def kascade(problem: Problem, anchors: list[int] | None = None) -> Plan:
    """Kascade (github.com/microsoft/kascade): each layer reuses the anchor before it. Our anchors attend densely, all of them."""
    if not anchors:
        raise PolicyError("--strategy kascade: no anchor layers given; add for example --anchors 0,2,8,13,14")
    return nearest(problem, anchors, "--anchors")


CHOOSERS: Dict[str, Callable[..., Plan]] = {
    "hylra": hylra,
    "count": given_count(solver.count),
    "bottleneck": given_count(solver.bottleneck),
    "jump3": lambda problem: every_n(problem, 3),
    "every-n": every_n,
    "tidal": tidal,
    "random": random,
    "explicit": explicit,
    "kascade": kascade,
    "ucm": importers.ucm,
    "pattern": importers.pattern,
}
