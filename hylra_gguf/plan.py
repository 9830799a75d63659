"""Decide from a profile which layers keep dense attention, which of those hand out their cells, and who reuses whose.

Exact for the plain `hylra` objective (see `solve`); refuses what the profile has no evidence for.
"""

from __future__ import annotations

import math
import sys

import numpy as np

from .errors import PolicyError
from .policy import FULL, REUSE, SELECT, Policy
from .profile_data import Profile, tool_version

# Without a theta: the strictest one that leaves at most this share of the layers full or select. A fixed theta does not carry over:
# at 8K tokens and top_k 2048, 0.98 leaves 9 of 30 layers dense in SmolLM2-135M-Instruct and 20 in its 32K descendant, 0.90 only 2.
DEFAULT_DENSE_SHARE = 1 / 3
THETAS = [thousandths / 1000 for thousandths in range(995, 495, -5)]
# Of SmolLM2-135M-Needle-32K at 8K tokens this holds layers 0, 1, 2 and 7 at top_k 512, and none at 2048.
DEFAULT_MAX_SENSITIVITY = 0.10
DEFAULT_TOP_K = 2048
STRATEGIES = ("hylra", "jump3", "every-n", "explicit")
NO_SOURCE = -1


# -- solver: sources[j] is -1 (full), j (select) or an earlier select layer (reuse) -----------------------------------


def solve(similarity: np.ndarray, theta: float, may_reuse: list[bool], may_select: list[bool]) -> list[int]:
    """Fewest full/select layers, then the largest summed similarity; every reuse edge i -> j has similarity[i, j] >= theta.

    Dynamic programming over (layer, current source), O(n_layer^2). Optimal over all plans in which a reuse layer takes the
    latest select layer before it; a layer may also be full without becoming the source. `widen` then goes beyond that class.
    """
    best = {NO_SOURCE: (0, 0.0)}  # current source -> (full/select layers so far, minus the summed similarity)
    steps = []  # per layer: current source -> (current source before, what the layer does)
    for layer in range(len(similarity)):
        reached: dict[int, tuple] = {}
        for source, cost in best.items():
            for after, step_cost, action in moves(layer, source, similarity, theta, may_reuse, may_select):
                total = (cost[0] + step_cost[0], cost[1] + step_cost[1])
                if after not in reached or total < reached[after][0]:
                    reached[after] = (total, source, action)
        best = {source: value[0] for source, value in reached.items()}
        steps.append({source: value[1:] for source, value in reached.items()})
    return drop_idle(backtrack(steps, min(best, key=best.get)))


def moves(layer: int, source: int, similarity, theta, may_reuse, may_select):
    """What a layer can do: (current source after it, (count, minus similarity), its own entry in sources)."""
    yield source, (1, 0.0), NO_SOURCE
    if may_select[layer]:
        yield layer, (1, 0.0), layer
    if may_reuse[layer] and source != NO_SOURCE and similarity[source, layer] >= theta:
        yield source, (0, -float(similarity[source, layer])), source


def backtrack(steps: list[dict], source: int) -> list[int]:
    sources = []
    for step in reversed(steps):
        source, action = step[source]
        sources.append(action)
    return sources[::-1]


def drop_idle(sources: list[int]) -> list[int]:
    """A select layer that no layer reuses becomes full, which is cheaper at run time."""
    used = {source for layer, source in enumerate(sources) if source != layer}
    return [NO_SOURCE if source == layer and layer not in used else source for layer, source in enumerate(sources)]


def widen(sources: list[int], similarity: np.ndarray, theta: float, may_reuse: list[bool]) -> list[int]:
    """Move every reuse layer to its best earlier select layer, and let full layers reuse where one now qualifies.

    Never more full/select layers, and with as many never a smaller sum. Not proven optimal over all choices of select layers:
    with any earlier source that is a p-median problem, which no table over (layer, source) solves.
    """
    before = None
    while sources != before:
        before = sources
        selects = [layer for layer, source in enumerate(sources) if source == layer]
        sources = [best_source(layer, source, selects, similarity, theta, may_reuse) for layer, source in enumerate(sources)]
        sources = drop_idle(sources)
    return sources


def best_source(layer: int, source: int, selects: list[int], similarity, theta, may_reuse) -> int:
    earlier = [i for i in selects if i < layer and similarity[i, layer] >= theta]
    if source == layer or not earlier or not may_reuse[layer]:
        return source
    return max(earlier, key=lambda i: similarity[i, layer])


# -- fixed choices of select layers -----------------------------------------------------------------------------------


def every_nth(eligible: list[bool], n: int) -> list[int]:
    """Every n-th of the layers that can take part, from the first one on."""
    return [layer for layer, can in enumerate(eligible) if can][::n]


def nearest(selects: list[int], may_reuse: list[bool]) -> list[int]:
    """Every layer that may reuse takes the latest select layer before it; layers before the first one are full."""
    sources, current = [], NO_SOURCE
    for layer, may in enumerate(may_reuse):
        if layer in selects:
            current = layer
        sources.append(layer if layer in selects else current if may else NO_SOURCE)
    return drop_idle(sources)


def explicit(layers: list[int], eligible: list[bool]) -> list[int]:
    for layer in layers:
        if not 0 <= layer < len(eligible):
            raise PolicyError(f"--layers: layer {layer} is not in the model; expected 0 to {len(eligible) - 1}")
        if not eligible[layer]:
            raise PolicyError(f"--layers: layer {layer} cannot select, its attention does not span the whole cache; leave it out")
    return sorted(set(layers))


# -- policy -----------------------------------------------------------------------------------------------------------


def plan_policy(profile: Profile, strategy: str = "hylra", theta: float | None = None, top_k: int | None = None, *,
                n: int | None = None, layers: list[int] | None = None, lists: str = "layer", similarity: str = "recall",
                max_sensitivity: float | None = None, sink: int | None = None, recent: int | None = None,
                **settings) -> Policy:
    """theta and a default sensitivity bound belong to the `hylra` strategy; layers to `explicit`, n to `every-n`; lists is
    "layer" or "head".

    settings go into the policy as they are (min_context, block_size).
    """
    check_flags(strategy, theta, n, layers)
    sink, recent = profile.sink_tokens if sink is None else sink, profile.recent_tokens if recent is None else recent
    top_k = choose_top_k(profile, top_k, sink, recent)
    matrix = similarity_matrix(profile, top_k, lists, similarity)
    hylra = strategy == "hylra"
    bound = DEFAULT_MAX_SENSITIVITY if max_sensitivity is None and hylra else max_sensitivity
    may_reuse = reusable(profile, own_sensitivity(profile, top_k, lists), bound)
    if hylra:
        sources, theta = plan_hylra(matrix, theta, may_reuse, profile.eligible)
    else:
        sources = nearest(fixed_selects(profile, strategy, n, layers), may_reuse)
    modes = [FULL if s == NO_SOURCE else SELECT if s == layer else REUSE for layer, s in enumerate(sources)]
    return Policy(
        layer_mode=modes, layer_source=sources, head_kv_count=profile.head_kv_count,
        lists=1 if lists == "layer" else profile.head_kv_count,
        head_map=head_map(profile, sources, top_k) if lists == "head" else None,
        top_k=top_k, sink_tokens=sink, recent_tokens=recent, summary=summary(modes, sources, matrix, top_k, similarity),
        tool=f"{tool_version()}, strategy {strategy}", calibration=profile.calibration(), theta=theta, similarity=similarity,
        sensitivity=own_sensitivity(profile, top_k, lists), overlap=matrix, **settings)


def check_flags(strategy: str, theta: float | None, n: int | None, layers: list[int] | None) -> None:
    if strategy not in STRATEGIES:
        raise PolicyError(f"--strategy {strategy}: expected one of {' '.join(STRATEGIES)}")
    for flag, value, owner in (("theta", theta, "hylra"), ("n", n, "every-n"), ("layers", layers, "explicit")):
        if value is not None and strategy != owner:
            raise PolicyError(f"--{flag} has no effect on --strategy {strategy}; leave it out or take --strategy {owner}")


def fixed_selects(profile: Profile, strategy: str, n: int | None, layers: list[int] | None) -> list[int]:
    if strategy == "jump3":
        return every_nth(profile.eligible, 3)
    if strategy == "every-n":
        if n is None or n < 1:
            raise PolicyError(f"--strategy every-n: found --n {n}, expected 1 or more; add for example --n 4")
        return every_nth(profile.eligible, n)
    if not layers:
        raise PolicyError("--strategy explicit: no select layers given; add for example --layers 0,2,13")
    return explicit(layers, profile.eligible)


def choose_top_k(profile: Profile, top_k: int | None, sink: int, recent: int) -> int:
    if top_k is None:
        top_k = max((k for k in profile.top_k if k <= DEFAULT_TOP_K), default=min(profile.top_k))
    if top_k < sink + recent:
        raise PolicyError(f"--top-k {top_k}: expected at least the {sink} sink + {recent} recent tokens; raise --top-k")
    if top_k not in profile.top_k:
        known = " ".join(map(str, profile.top_k))
        raise PolicyError(f"--top-k {top_k}: the profile holds {known}; take one of these or profile again with --top-k {top_k}")
    return top_k


def similarity_matrix(profile: Profile, top_k: int, lists: str, similarity: str) -> np.ndarray:
    """[n_layer, n_layer], row = source"""
    if lists not in ("layer", "head"):
        raise PolicyError(f"--lists {lists}: expected layer or head")
    if similarity not in ("recall", "overlap"):
        raise PolicyError(f"--similarity {similarity}: expected recall or overlap")
    return profile.matrix(similarity, top_k, lists=lists)


def own_sensitivity(profile: Profile, top_k: int, lists: str) -> np.ndarray:
    return profile.layer("sensitivity", top_k, lists=lists)


def plan_hylra(matrix: np.ndarray, theta: float | None, may_reuse: list[bool], eligible: list[bool]) -> tuple[list[int], float]:
    """(sources, theta); for theta None see DEFAULT_DENSE_SHARE"""
    if theta is not None and not 0 < theta <= 1:
        raise PolicyError(f"--theta {theta}: expected a number above 0 and up to 1, for example 0.95")
    dense_allowed = eligible.count(False) + max(1, round(DEFAULT_DENSE_SHARE * eligible.count(True)))
    sources: list[int] = []
    for used in THETAS if theta is None else [theta]:
        sources = widen(solve(matrix, used, may_reuse, eligible), matrix, used, may_reuse)
        if sum(source in (NO_SOURCE, layer) for layer, source in enumerate(sources)) <= dense_allowed:
            break
    return sources, used


def reusable(profile: Profile, sensitivity: np.ndarray, max_sensitivity: float | None) -> list[bool]:
    """Layer 0 has no earlier layer; a layer that its own top-k cells already distort must not take another's."""
    bound = math.inf if max_sensitivity is None else max_sensitivity
    if not bound >= 0:
        raise PolicyError(f"--max-sensitivity {max_sensitivity}: expected 0 or more, for example {DEFAULT_MAX_SENSITIVITY}")
    return [layer > 0 and can and bool(value <= bound) for layer, (can, value) in enumerate(zip(profile.eligible, sensitivity))]


def head_map(profile: Profile, sources: list[int], top_k: int) -> tuple[int, ...]:
    """n_layer * n_head_kv: the source head whose cells hold most of this head's mass; the head itself where nothing is reused."""
    heads = range(profile.head_kv_count)
    rows = [profile.head_map(top_k, source, layer) if 0 <= source != layer else heads for layer, source in enumerate(sources)]
    return tuple(int(head) for row in rows for head in row)


def summary(modes: list[int], sources: list[int], matrix: np.ndarray, top_k: int, similarity: str) -> str:
    layers = {mode: [layer for layer, m in enumerate(modes) if m == mode] for mode in (FULL, SELECT, REUSE)}
    edges = [float(matrix[sources[layer], layer]) for layer in layers[REUSE]]
    line = f"{len(modes)} layers: full {ranges(layers[FULL])}; select {ranges(layers[SELECT])}; reuse {len(edges)}; top_k {top_k}"
    if edges:
        line += f"; {similarity} min {min(edges):.2f} mean {sum(edges) / len(edges):.2f}"
    return line


def ranges(layers: list[int]) -> str:
    """[0, 1, 2, 5] -> "0-2 5"; "none" for no layers"""
    parts: list[list[int]] = []
    for layer in layers:
        if parts and parts[-1][-1] == layer - 1:
            parts[-1].append(layer)
        else:
            parts.append([layer])
    return " ".join(f"{p[0]}-{p[-1]}" if len(p) > 2 else " ".join(map(str, p)) for p in parts) or "none"


# -- command ----------------------------------------------------------------------------------------------------------


def parse_layers(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise PolicyError(f"--layers {text}: expected layer numbers with commas, for example 0,2,13") from None


def plan_options(args) -> dict:
    """The planning flags of the command line as arguments of plan_policy; what was not given is left out."""
    names = ("strategy", "theta", "top_k", "n", "lists", "similarity", "max_sensitivity", "sink", "recent", "min_context", "block_size")
    options = {name: getattr(args, name, None) for name in names}
    options["layers"] = parse_layers(getattr(args, "layers", None))
    return {name: value for name, value in options.items() if value is not None}


def cmd_plan(args) -> None:
    policy = plan_policy(Profile.load(args.profile), **plan_options(args))
    print(policy.describe(), file=sys.stderr)
    if args.output:
        policy.save(args.output)
    else:
        print(policy.to_json(), end="")
