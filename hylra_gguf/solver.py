"""Choose the full/select layers and everyone's source, proven optimal, with any earlier select layer as a source.

With free sources the choice is a p-median problem, which HiGHS (scipy.optimize.milp) proves for 80 layers in about a second. A solve
that hits its time budget returns the best plan known and says `proven = False`; a number of layers that no plan has is refused.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .errors import PolicyError

NO_SOURCE = -1
BUDGET_S = 10.0  # of one call of HiGHS; a solve takes a dozen cheap ones and one that counts


@dataclass(frozen=True)
class Problem:
    """What the plan may do. A layer that is not eligible is full, never selects and is not counted."""

    similarity: np.ndarray  # [n_layer, n_layer], row = source
    eligible: np.ndarray  # bool [n_layer]
    may_reuse: np.ndarray  # bool [n_layer]; an eligible layer that may not is full or select
    weights: np.ndarray  # [n_layer] what a unit of lost similarity costs in this reuse layer

    def edges(self, theta: float) -> np.ndarray:
        """bool [n_layer, n_layer]: layer j may take the cells of layer i."""
        earlier = np.triu(np.ones(self.similarity.shape, bool), 1)
        return earlier & (self.similarity >= theta) & self.eligible[:, None] & (self.eligible & self.may_reuse)[None, :]


@dataclass(frozen=True)
class Plan:
    """sources[j] is -1 (full), j (select) or an earlier select layer (reuse)"""

    sources: list[int]
    proven: bool = True
    theta: float | None = None  # the smallest similarity that was allowed, where the objective has one


# -- objectives -------------------------------------------------------------------------------------------------------


def hylra(problem: Problem, theta: float, budget_s: float = BUDGET_S) -> Plan:
    """Fewest full/select layers, then the least weighted loss (unweighted: the largest summed similarity); every edge >= theta."""
    allowed = problem.edges(theta)
    fewest, proven = cover(problem, allowed, budget_s)
    return least_loss(problem, allowed, fewest, proven, theta, budget_s)


def count(problem: Problem, n_dense: int, budget_s: float = BUDGET_S) -> Plan:
    """Exactly n_dense full/select layers, then the least weighted loss; any edge is allowed."""
    allowed = problem.edges(-np.inf)
    fewest, _ = cover(problem, allowed, budget_s)
    return least_loss(problem, allowed, grow(problem, fewest, n_dense), True, None, budget_s)


def bottleneck(problem: Problem, n_dense: int, budget_s: float = BUDGET_S) -> Plan:
    """Exactly n_dense full/select layers, the largest smallest edge, then the least weighted loss.

    Two passes: a table over prefixes that carries (smallest edge, sum) is not optimal, since a prefix with the better smallest
    edge can hide one with the better sum that ties in the end.
    """
    levels = np.unique(problem.similarity[problem.edges(-np.inf)])
    dense, _ = cover(problem, problem.edges(-np.inf), budget_s)
    grow(problem, dense, n_dense)  # refuses an impossible number
    low, high, proven = 0, len(levels) - 1, True  # a plan at levels[low] exists
    while low < high:
        middle = (low + high + 1) // 2
        found, sure = cover(problem, problem.edges(levels[middle]), budget_s)
        if found.sum() <= n_dense:
            low, dense = middle, found
        else:
            high, proven = middle - 1, proven and sure
    theta = float(levels[low]) if len(levels) else None
    allowed = problem.edges(-np.inf if theta is None else theta)
    return least_loss(problem, allowed, grow(problem, dense, n_dense), proven, theta, budget_s)


def grow(problem: Problem, dense: np.ndarray, n_dense: int) -> np.ndarray:
    """dense with layers added up to n_dense: a reuse layer made full breaks no other edge."""
    fewest, most = int(dense.sum()), int(problem.eligible.sum())
    if not fewest <= n_dense <= most:
        raise PolicyError(f"--count {n_dense}: this model needs at least {fewest} full/select layers and has {most} that can take "
                          f"part; give a number from {fewest} to {most}")
    more = np.flatnonzero(problem.eligible & ~dense)[:n_dense - fewest]
    return dense | np.isin(np.arange(len(dense)), more)


# -- the two integer programs -----------------------------------------------------------------------------------------


def cover(problem: Problem, allowed: np.ndarray, budget_s: float) -> tuple[np.ndarray, bool]:
    """(bool [n_layer] full/select layers, proven): the fewest, such that every other eligible layer has an edge from one of them."""
    n = len(allowed)
    rows = (allowed.T | np.eye(n, dtype=bool))[problem.eligible].astype(float)
    lowest = problem.eligible & ~problem.may_reuse
    chosen, proven = minimise(np.ones(n), [(rows, 1, np.inf)], lowest, problem.eligible, n, budget_s)
    return (greedy_cover(problem, rows) if chosen is None else chosen > 0.5), proven


def greedy_cover(problem: Problem, rows: np.ndarray) -> np.ndarray:
    """What stands in when HiGHS finds nothing in time: always the layer that serves most of those still without a source."""
    dense = problem.eligible & ~problem.may_reuse
    while (missing := rows @ dense == 0).any():
        dense[(missing @ rows).argmax()] = True
    return dense


def least_loss(problem: Problem, allowed: np.ndarray, known: np.ndarray, proven: bool, theta: float | None, budget_s: float) -> Plan:
    """The p-median: as many full/select layers as `known` has, every other eligible layer on an allowed edge, least loss.

    Unknowns: dense[i] (whole), edge[i, j] (any share: with dense whole the best edge is whole too). edge[i, j] <= dense[i] stands
    per edge and not summed per source, which keeps the linear relaxation tight.
    """
    from scipy.sparse import coo_matrix

    n, (source, layer) = len(allowed), np.nonzero(allowed)
    m, edge = len(source), np.arange(len(source))
    one = np.ones
    served = coo_matrix((one(n + m), (np.r_[np.arange(n), layer], np.r_[np.arange(n), n + edge])), shape=(n, n + m)).tocsr()
    opened = coo_matrix((np.r_[one(m), -one(m)], (np.r_[edge, edge], np.r_[n + edge, source])), shape=(m, n + m)).tocsr()
    number = np.r_[one(n), np.zeros(m)][None, :]
    loss = np.r_[np.zeros(n), problem.weights[layer] * (1 - problem.similarity[source, layer])]
    constraints = [(served[problem.eligible], 1, 1), (number, known.sum(), known.sum())] + ([(opened, -np.inf, 0)] if m else [])
    lowest = np.r_[problem.eligible & ~problem.may_reuse, np.zeros(m, bool)]
    highest = np.r_[problem.eligible, np.ones(m, bool)]
    chosen, sure = minimise(loss, constraints, lowest, highest, n, budget_s)
    dense = known if chosen is None else chosen[:n] > 0.5
    return Plan(assign(problem, allowed, dense), proven and sure, theta)


def minimise(cost, constraints, lowest, highest, n_whole: int, budget_s: float) -> tuple[np.ndarray | None, bool]:
    """(the best point found or None, proven): the first n_whole unknowns are whole numbers; constraints are (matrix, low, high)."""
    from scipy.optimize import Bounds, LinearConstraint, milp  # here: only planning needs it, and it takes a while to load

    result = milp(cost, integrality=np.arange(len(cost)) < n_whole, bounds=Bounds(lowest.astype(float), highest.astype(float)),
                  constraints=[LinearConstraint(*one) for one in constraints], options={"time_limit": budget_s, "mip_rel_gap": 0.0})
    return result.x, result.status == 0


# -- from full/select layers to sources -------------------------------------------------------------------------------


def assign(problem: Problem, allowed: np.ndarray, dense: np.ndarray) -> list[int]:
    """Every eligible layer that is not dense takes its most similar allowed source."""
    value = np.where(allowed & dense[:, None], problem.similarity, -np.inf)
    sources = [layer if dense[layer] else int(value[:, layer].argmax()) if can else NO_SOURCE
               for layer, can in enumerate(problem.eligible)]
    return drop_idle(sources)


def drop_idle(sources: list[int]) -> list[int]:
    """A select layer that no layer reuses becomes full, which is cheaper at run time."""
    used = {source for layer, source in enumerate(sources) if source != layer}
    return [NO_SOURCE if source == layer and layer not in used else source for layer, source in enumerate(sources)]
