"""`plan --sweep`: the frontier of thetas with what each loses and how fast it would be, and the choice of one policy from it.

Refuses flags that have no effect on a sweep, and a choice that no row meets.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from . import cost, tables
from .errors import PolicyError
from .flags import CHOOSING, SWEEP_FLAGS, flag, parse_sweep
from .plan import edges_of, plan_options, plan_policy
from .policy import Policy
from .profile_data import Profile

DEFAULT_SWEEP = "theta=0.5:0.99:0.01"
HOW_TO_MEASURE = "add --model MODEL (some ten seconds), or --cost FILE from an earlier run"


@dataclass(frozen=True)
class Candidate:
    """One theta: its policy, and its row of the table"""

    policy: Policy
    row: dict


def wanted(args) -> bool:
    return any(getattr(args, name, None) is not None for name in SWEEP_FLAGS)


def cmd_sweep(args, profile: Profile) -> Policy | None:
    """Prints the frontier; returns the policy that was chosen from it, if one was asked for."""
    check_flags(args)
    thetas, options = parse_sweep(args.sweep or DEFAULT_SWEEP), plan_options(args)
    model = cost_model(args, profile)
    depths = sorted(set(args.n_depth or [max(profile.contexts)])) if model else []
    note = f"cost model: {model.note}" if model else f"no tokens/s without a cost model of this machine; {HOW_TO_MEASURE}"
    print(note, file=sys.stderr)
    candidates = frontier(profile, thetas, options, model, depths)
    table = FORMATS[args.format or "md"]([candidate.row for candidate in candidates])
    choosing = args.target_speedup is not None or args.max_loss is not None
    print(table, file=sys.stderr if choosing else sys.stdout)
    return choose(candidates, depths, args.target_speedup, args.max_loss).policy if choosing else None


def check_flags(args) -> None:
    choosing = [name for name in CHOOSING if getattr(args, name) is not None]
    given = [name for name in SWEEP_FLAGS if getattr(args, name) is not None]
    if args.sweep is None and not choosing:
        name = "-d" if given[0] == "n_depth" else flag(given[0])
        raise PolicyError(f"{name} has no effect without --sweep; add --sweep {DEFAULT_SWEEP}")
    if args.theta is not None or args.strategy not in (None, "hylra"):
        odd = "--theta" if args.theta is not None else f"--strategy {args.strategy}"
        raise PolicyError(f"{odd} has no effect beside {flag(given[0])}, which goes through thetas of strategy hylra; "
                          "leave one of them out")
    if args.output is not None and not choosing:
        raise PolicyError("-o has no policy to write: --sweep prints a table; add --target-speedup or --max-loss to choose from it")
    if args.refine is not None and not choosing:
        raise PolicyError("--refine has no policy to start from: --sweep prints a table; add --target-speedup or --max-loss to choose from it")
    measured = args.cost is not None or args.model is not None
    if not measured and (args.n_depth is not None or args.target_speedup is not None):
        needs = "-d" if args.n_depth is not None else "--target-speedup"
        raise PolicyError(f"{needs} needs a cost model of this machine; {HOW_TO_MEASURE}")


def cost_model(args, profile: Profile) -> cost.CostModel | None:
    """Measured with --model, and then kept in --cost; else read from --cost."""
    if args.model is None:
        return None if args.cost is None else cost.load(args.cost, profile)
    model = cost.measure(args.model, profile, args.threads, lambda line: print(line, file=sys.stderr))
    if args.cost is not None:
        model.save(args.cost)
    return model


# -- rows -------------------------------------------------------------------------------------------------------------


def frontier(profile: Profile, thetas: list[float], options: dict, model: cost.CostModel | None, depths: list[int]) -> list[Candidate]:
    candidates = []
    for theta in thetas:
        policy = plan_policy(profile, **{**options, "theta": theta})
        row = {"theta": theta, **quality(profile, policy, options.get("for_context"))}
        candidates.append(Candidate(policy, {**row, **speed(profile, policy, model, depths)} if model else row))
    return candidates


def quality(profile: Profile, policy: Policy, context: int | None = None) -> dict:
    """Layers and recall. `loss` is the mean of 1 - recall over all layers that can take part; full and select layers lose nothing.

    Recall is the mean over samples whatever theta is compared with, each edge at its select layer's own budget (Profile.edge_k).
    """
    lists = "layer" if policy.lists == 1 else "head"
    edges = edges_of(policy.layer_source)
    ks = policy.layer_top_k or (policy.top_k,) * policy.layer_count
    matrices = {ks[source]: profile.matrix("recall", profile.edge_k(ks[source], context), policy.block_size, "mean", lists) for source, _ in edges}
    recalls = [float(matrices[ks[source]][source, layer]) for source, layer in edges]
    return {
        "dense": sum(profile.eligible) - len(edges),
        "select": policy.layer_map().count("S"),
        "reuse": len(edges),
        "min_recall": round(min(recalls), 4) if edges else None,
        "mean_recall": round(sum(recalls) / len(edges), 4) if edges else None,
        "loss": round(sum(1 - recall for recall in recalls) / sum(profile.eligible), 5),
        "proven": "not proven" not in policy.tool,
        "layers": policy.layer_map(),
    }


def speed(profile: Profile, policy: Policy, model: cost.CostModel, depths: list[int]) -> dict:
    """Predicted tokens/s and speedup against the faster stock arm per depth, as if min_context did not hold the policy back there;
    break_even: below this depth the policy is slower, so min_context belongs there or above."""
    row = {}
    for depth in depths:
        stock_s, policy_s = model.stock_s(depth), model.policy_s(policy, profile.eligible, depth)
        row[f"tokens_per_s_{depth}"] = round(1 / policy_s, 2)
        row[f"speedup_{depth}"] = round(stock_s / policy_s, 3)
    at = model.break_even(policy, profile.eligible)
    return {**row, "break_even": None if at is None else round(at)}


# -- choice -----------------------------------------------------------------------------------------------------------


def choose(candidates: list[Candidate], depths: list[int], target_speedup: float | None, max_loss: float | None) -> Candidate:
    """With a speedup the row that loses least among those fast enough (and within max_loss); else that with fewest dense layers."""
    fits = [one for one in candidates if max_loss is None or one.row["loss"] <= max_loss]
    if not fits:
        least = min(one.row["loss"] for one in candidates)
        raise PolicyError(f"--max-loss {max_loss}: the least of the sweep is {least}; allow more, sweep higher thetas or raise --top-k")
    if target_speedup is None:
        return min(fits, key=lambda one: (one.row["dense"], one.row["loss"]))
    name = f"speedup_{depths[-1]}"
    fast = [one for one in fits if one.row[name] >= target_speedup]
    if not fast:
        best = max(one.row[name] for one in fits)
        raise PolicyError(f"--target-speedup {target_speedup}: the most at {depths[-1]} tokens is {best}; ask for less, allow a larger "
                          "--max-loss, sweep lower thetas or look at a deeper -d")
    return min(fast, key=lambda one: (one.row["loss"], -one.row[name]))


# -- output -----------------------------------------------------------------------------------------------------------


def to_md(rows: list[dict]) -> str:
    return tables.to_md([{name: cell(name, value) for name, value in row.items()} for row in rows])


def cell(name: str, value) -> str:
    """A depth below break-even is marked: there the policy is slower than stock."""
    if value is None:
        return "never" if name == "break_even" else ""
    return f"{value} (slower)" if name.startswith("speedup_") and value < 1 else str(value)


FORMATS = {**tables.FORMATS, "md": to_md}
