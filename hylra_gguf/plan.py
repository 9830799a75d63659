"""Make a policy from a profile: which layers stay dense, which of them hand out their cells, who reuses whose, and how many.

Who does what is decided in `strategies.py`; this file refuses what the profile has no evidence for.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace
from typing import Sequence

import numpy as np

from . import importers, strategies
from .errors import PolicyError
from .flags import OWN, PLAN_FLAGS, REFINE_FLAGS, check_strategy_flags, flag
from .policy import FULL, REUSE, SELECT, Policy, ranges
from .profile_data import Profile, tool_version
from .solver import NO_SOURCE, Plan, Problem

# Of SmolLM2-135M-Needle-32K at 8K tokens this holds nine of 30 layers at top_k 512, and layer 0 alone at 1024 and 2048.
DEFAULT_MAX_SENSITIVITY = 0.10
DEFAULT_TOP_K = 2048
FAR_SHORT = 0.7  # of the context planned for: half way to the next power of two
# LessIsMore with 10 % of the cells fell from 73 to 61 points on AIME when nothing kept the first tokens from a tiny budget.
FRACTION_FLOOR = 1024
SOLVED = ("hylra", "count", "bottleneck")  # strategies that the default sensitivity bound belongs to


@dataclass(frozen=True)
class View:
    """The part of a profile that one plan looks at."""

    profile: Profile
    lists: str
    similarity: str
    statistic: str
    block_size: int
    context: int | None = None  # tokens for which reuse must hold; None: what the model was trained for

    def edge_k(self, top_k: int) -> int:
        return self.profile.edge_k(top_k, self.context)

    def compared_at(self, top_k: int) -> str:
        """"recall@512", and for how long a context that stands where nothing measured comes near to the one planned for"""
        k, wanted = self.edge_k(top_k), self.context or self.profile.n_ctx_train
        stands_for = round(top_k*float(np.mean(self.profile.contexts))/k)
        return f"{self.similarity}@{k}" + (f", which stands for {stands_for} tokens," if stands_for < FAR_SHORT*wanted else "")

    def matrix(self, top_k: int) -> np.ndarray:
        """[n_layer, n_layer], row = source, as similar as they are when top_k cells are chosen in `context`"""
        return self.profile.matrix(self.similarity, self.edge_k(top_k), self.block_size, self.statistic, self.lists)

    def sensitivity(self, top_k: int) -> np.ndarray:
        return self.profile.layer("sensitivity", top_k, lists=self.lists)


def plan_policy(profile: Profile, strategy: str = "hylra", *, top_k: int | None = None, top_k_fraction: float | None = None,
                lists: str | None = None, similarity: str = "recall", statistic: str = "mean",
                max_sensitivity: float | None = None, select: str | None = None, sink: int | None = None, recent: int | None = None, block_size: int = 1,
                for_context: int | None = None, **flags) -> Policy:
    """flags: those of the strategy (see flags.STRATEGIES); the rest goes into the policy as it is (min_context).

    Raises PolicyError for flags that contradict each other or the profile.
    """
    own = {name: flags.pop(name) for name in OWN if name in flags}
    check_strategy_flags(strategy, own)
    budgets, weights, head_map = (own.pop(name, None) for name in ("budgets", "weights", "head_map"))
    view = View(profile, check_view(lists, similarity, statistic, head_map), similarity, statistic, block_size, for_context)
    sink, recent = profile.sink_tokens if sink is None else sink, profile.recent_tokens if recent is None else recent
    top_k = choose_top_k(profile, top_k, sink + recent, top_k_fraction)
    bound = sensitivity_bound(max_sensitivity, strategy)
    problem = make_problem(view, top_k, bound, weights)
    plan = strategies.choose(strategy, problem, **own)
    calm = calm_layers(view.sensitivity(top_k), sparse_bound(select, max_sensitivity, strategy))
    alone = problem.eligible if strategy in SOLVED else np.isin(np.arange(len(calm)), named_selects(own))
    plan = replace(plan, sources=own_cells(plan.sources, alone & calm))
    ks = select_budgets(view, plan, top_k, sink + recent, bound) if budgets else {layer: top_k for layer in selects_of(plan.sources)}
    top_k = max(ks.values(), default=top_k)
    return Policy(
        **layers_of(plan.sources), head_kv_count=profile.head_kv_count, lists=1 if view.lists == "layer" else profile.head_kv_count,
        head_map=head_maps(view, plan.sources, ks, head_map) if view.lists == "head" else None,
        top_k=top_k, top_k_fraction=top_k_fraction, layer_top_k=layer_top_k(len(plan.sources), ks),
        sparse_select=sparse_selects(plan.sources, calm),
        sink_tokens=sink, recent_tokens=recent, block_size=block_size, **evidence(view, plan, top_k, ks),
        tool=tool_line(strategy, own, plan, for_context or profile.n_ctx_train), calibration=profile.calibration(), theta=plan.theta, similarity=similarity, **flags)


# -- what was asked ---------------------------------------------------------------------------------------------------


def check_view(lists: str | None, similarity: str, statistic: str, head_map: str | None) -> str:
    """The kind of lists; one per layer unless a head map says otherwise."""
    for name, value, expected in (("lists", lists or "layer", ("layer", "head")), ("similarity", similarity, ("recall", "overlap")),
                                  ("statistic", statistic, ("mean", "low"))):
        if value not in expected:
            raise PolicyError(f"--{name} {value}: expected {' or '.join(expected)}")
    if lists == "layer" and head_map is not None:
        raise PolicyError("--head-map has no effect on --lists layer; leave one of them out")
    return lists or ("layer" if head_map is None else "head")


def choose_top_k(profile: Profile, top_k: int | None, forced: int, fraction: float | None) -> int:
    """Without a wish the largest profiled one up to DEFAULT_TOP_K; beside a fraction the smallest that is FRACTION_FLOOR or more."""
    if top_k is None and fraction is not None:
        top_k = min((k for k in profile.top_k if k >= FRACTION_FLOOR), default=FRACTION_FLOOR)
    if top_k is None:
        top_k = max((k for k in profile.top_k if k <= DEFAULT_TOP_K), default=min(profile.top_k))
    if fraction is not None and top_k < FRACTION_FLOOR:
        raise PolicyError(f"--top-k {top_k}: expected {FRACTION_FLOOR} or more beside --top-k-fraction, which it is the floor of")
    if top_k < forced:
        raise PolicyError(f"--top-k {top_k}: expected at least the {forced} sink and recent tokens; raise --top-k")
    if top_k not in profile.top_k:
        known = " ".join(map(str, profile.top_k))
        raise PolicyError(f"--top-k {top_k}: the profile holds {known}; take one of these or profile again with --top-k {top_k}")
    return top_k


def sensitivity_bound(max_sensitivity: float | None, strategy: str) -> float:
    if max_sensitivity is None:
        return DEFAULT_MAX_SENSITIVITY if strategy in SOLVED else math.inf
    if not max_sensitivity >= 0:
        raise PolicyError(f"--max-sensitivity {max_sensitivity}: expected 0 or more, for example {DEFAULT_MAX_SENSITIVITY}")
    return max_sensitivity


def sparse_bound(select: str | None, max_sensitivity: float | None, strategy: str) -> float:
    """Sensitivity up to which a select layer attends to nothing but its own selection"""
    if select is None:
        select = "sparse" if strategy in SOLVED else "dense"
    if select not in ("sparse", "dense"):
        raise PolicyError(f"--select {select}: expected sparse or dense")
    return -math.inf if select == "dense" else DEFAULT_MAX_SENSITIVITY if max_sensitivity is None else max_sensitivity


def calm_layers(sensitivity: Sequence[float], bound: float) -> np.ndarray:
    """bool [n_layer]: its own cells do for a layer. A layer that was not measured (NaN) is not calm, whatever the bound."""
    return np.asarray(sensitivity, float) <= bound


def make_problem(view: View, top_k: int, bound: float, weights: str | None) -> Problem:
    """Layer 0 has no earlier layer; a layer that its own top-k cells already distort must not take another's."""
    eligible = np.array(view.profile.eligible, bool)
    may_reuse = eligible & (np.arange(len(eligible)) > 0) & calm_layers(view.sensitivity(top_k), bound)
    return Problem(view.matrix(top_k), eligible, may_reuse, edge_weights(view.profile, weights, eligible))


def edge_weights(profile: Profile, weights: str | None, eligible: np.ndarray) -> np.ndarray:
    """[n_layer]; ones without a wish"""
    if weights is None:
        return np.ones(len(eligible))
    if weights != "importance":
        raise PolicyError(f"--weights {weights}: expected importance")
    found = profile.layer("importance")
    if np.isnan(found[eligible]).any():
        raise PolicyError("--weights importance: the profile has no importance of some layers, which this model's graph does not show; "
                          "leave --weights out")
    return found


# -- from the plan to the policy --------------------------------------------------------------------------------------


def named_selects(own: dict) -> list[int]:
    """Layers that the user wants to select, though nobody may take their cells: with --select sparse they attend to them themselves."""
    return [*(own.get("layers") or ()), *(layer for layer, source in enumerate(own.get("sources") or ()) if source == layer)]


def own_cells(sources: Sequence[int], calm: Sequence[bool]) -> list[int]:
    """A full layer that is not sensitive selects, for nobody but itself: it then reads half of what it would."""
    return [layer if source == NO_SOURCE and calm[layer] else source for layer, source in enumerate(sources)]


def sparse_selects(sources: Sequence[int], calm: Sequence[bool]) -> list[int] | None:
    """[n_layer]: 1 for a select layer whose own cells do for it; None if there is none"""
    found = [int(source == layer and bool(calm[layer])) for layer, source in enumerate(sources)]
    return found if any(found) else None


def layers_of(sources: list[int]) -> dict:
    modes = [FULL if source == NO_SOURCE else SELECT if source == layer else REUSE for layer, source in enumerate(sources)]
    return {"layer_mode": modes, "layer_source": sources}


def selects_of(sources: list[int]) -> list[int]:
    return [layer for layer, source in enumerate(sources) if source == layer]


def edges_of(sources: Sequence[int]) -> list[tuple[int, int]]:
    """(source, reuse layer) of each reuse layer"""
    return [(source, layer) for layer, source in enumerate(sources) if source not in (NO_SOURCE, layer)]


def select_budgets(view: View, plan: Plan, top_k: int, forced: int, bound: float) -> dict[int, int]:
    """Per select layer the smallest measured top_k at which its edges keep theta and its reuse layers the sensitivity bound."""
    budgets = {layer: top_k for layer in selects_of(plan.sources)}
    # where several are compared at one measured top_k, only the largest has evidence
    told_apart = {view.edge_k(k): k for k in sorted(k for k in view.profile.top_k if forced <= k <= top_k)}.values()
    for k in sorted((k for k in told_apart if k < top_k), reverse=True):
        matrix, calm = view.matrix(k), calm_layers(view.sensitivity(k), bound)
        bad = {source for source, layer in edges_of(plan.sources) if matrix[source, layer] < plan.theta or not calm[layer]}
        bad |= {layer for layer in selects_of(plan.sources) if not calm[layer]}
        # from large to small: a layer that needs more than the next larger k stays where it is
        larger = min(other for other in told_apart if k < other)
        budgets.update({layer: k for layer, found in budgets.items() if found == larger and layer not in bad})
    return budgets


def layer_top_k(layers: int, ks: dict[int, int]) -> list[int] | None:
    """None where one top_k says it all"""
    return [ks.get(layer, 0) for layer in range(layers)] if len(set(ks.values())) > 1 else None


def head_maps(view: View, sources: list[int], ks: dict[int, int], path: str | None) -> list[int]:
    """n_layer * n_head_kv: the source head whose cells a head takes; the head itself where nothing is reused."""
    profile = view.profile
    given = None if path is None else importers.head_map(path, profile.layer_count, profile.head_kv_count)
    rows = [list(range(profile.head_kv_count)) for _ in sources]
    for source, layer in edges_of(sources):
        rows[layer] = profile.head_map(view.edge_k(ks[source]), source, layer) if given is None else given[layer]
    return [int(head) for row in rows for head in row]


def evidence(view: View, plan: Plan, top_k: int, ks: dict[int, int]) -> dict:
    """What `show` and `report` need; the row of a select layer is at its own budget."""
    matrix = view.matrix(top_k)
    for layer, k in ks.items():
        matrix[layer] = view.matrix(k)[layer]
    return {"sensitivity": view.sensitivity(top_k), "overlap": matrix,
            "summary": summary(plan.sources, matrix, ks, top_k, view.compared_at(top_k))}


def summary(sources: list[int], matrix: np.ndarray, ks: dict[int, int], top_k: int, similarity: str) -> str:
    edges = [float(matrix[edge]) for edge in edges_of(sources)]
    full = [layer for layer, source in enumerate(sources) if source == NO_SOURCE]
    budget = f"{min(ks.values(), default=top_k)} to {top_k}" if len(set(ks.values())) > 1 else str(top_k)
    line = f"{len(sources)} layers: full {ranges(full)}; select {ranges(selects_of(sources))}; reuse {len(edges)}; top_k {budget}"
    if edges:
        line += f"; {similarity} min {min(edges):.2f} mean {sum(edges) / len(edges):.2f}"
    return line


def tool_line(strategy: str, own: dict, plan: Plan, context: int) -> str:
    numbers = "".join(f" --{name} {own[name]}" for name in ("count", "n", "seed") if name in own)
    return f"{tool_version()}, strategy {strategy}{numbers} for {context} tokens" + ("" if plan.proven else ", not proven to be the best: out of time")


# -- command ----------------------------------------------------------------------------------------------------------


def plan_options(args) -> dict:
    """The planning flags of the command line as arguments of plan_policy; what was not given is left out."""
    options = {name: getattr(args, name, None) for name in PLAN_FLAGS}
    return {name: value for name, value in options.items() if value is not None}


def cmd_plan(args) -> None:
    from . import sweep  # here: sweep.py plans with this module

    check_refine_flags(args)
    profile = Profile.load(args.profile)
    policy = sweep.cmd_sweep(args, profile) if sweep.wanted(args) else plan_policy(profile, **plan_options(args))
    if policy is None:  # the sweep was the result
        return
    if args.refine is not None:
        from .refine import cmd_refine

        policy = cmd_refine(args, profile, policy)
    show_and_save(policy, args.output)


def check_refine_flags(args) -> None:
    for name in REFINE_FLAGS:
        if args.refine is None and getattr(args, name) is not None:
            raise PolicyError(f"{flag(name)} has no effect without --refine; add --refine MODEL")
    if args.threads is not None and args.model is None and args.refine is None:
        raise PolicyError("--threads has no effect without --model or --refine, which it is for")


def show_and_save(policy: Policy, output: str | None) -> None:
    print(policy.describe(), file=sys.stderr)
    if output:
        policy.save(output)
    else:
        print(policy.to_json(), end="")
