"""Writes the policies of an accuracy experiment into a folder, one JSON each, for `hylra-gguf eval --policy`:
`python tools/eval_policies.py theta PROFILE OUT`. What is not varied is the same in all policies of an experiment.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Callable, Dict

from hylra_gguf.plan import plan_policy
from hylra_gguf.policy import REUSE, Policy
from hylra_gguf.profile_data import Profile

Policies = Dict[str, Policy]
THETAS = [x / 100 for x in (*range(50, 100, 5), 97, 98, 99)]
TOP_K = 1024  # where small differences show; the default is 2048
N_DENSE = 10  # of 30 layers, as many as jump3 has
N_SEEDS = 5
BLOCKS = (1, 16, 32, 64, 128)
BUDGETS = (128, 256, 512, 1024, 2048, 4096)
SELECT_BUDGETS = (512, 1024, 2048)
FEW_RECENT = 64  # fits the smallest of the budgets


def theta(profile: Profile) -> Policies:
    """A theta that changes no layer is left out; no sensitivity bound, since it would hold layers that a low theta lets go."""
    found: Policies = {}
    for value in THETAS:
        policy = plan_policy(profile, theta=value, max_sensitivity=1.0)
        if policy.layer_source not in [one.layer_source for one in found.values()]:
            found[f"theta{value:.2f}"] = policy
    return found


def default(profile: Profile) -> Policies:
    """The default plan, and what could take its place: the low quantile of recall, more or fewer dense layers, other budgets."""
    plan = plan_policy(profile)
    other = {f"dense{n}": plan_policy(profile, "count", count=counts(profile, (n,))[0]) for n in (7, 12, 15)}
    return {"default": plan, "low": plan_policy(profile, statistic="low"), **other, "default-k4096": replace(plan, top_k=4096),
            "default-k1024": replace(plan, top_k=1024), "default-recent512": replace(plan, recent_tokens=512)}


def counts(profile: Profile, wanted: tuple[int, ...]) -> list[int]:
    """Scaled to the layers that can take part, of which the Needle model has 30."""
    return [max(2, round(n * sum(profile.eligible) / 30)) for n in wanted]


def strategies(profile: Profile) -> Policies:
    """The same k and the same number of dense layers, which attend to all cells, but for tidal, which has its own, and `own`, where every layer selects for itself."""
    n = counts(profile, (N_DENSE,))[0]
    every = -(-sum(profile.eligible) // n)
    flags = {"hylra-count": ("count", {"count": n}), "bottleneck": ("bottleneck", {"count": n}), "jump3": ("jump3", {}),
             f"every-{every + 1}": ("every-n", {"n": every + 1}), "tidal-2-13": ("tidal", {"layers": [2, 13]}),
             **{f"random{seed}": ("random", {"count": n, "seed": seed}) for seed in range(N_SEEDS)}}
    found = {}
    for name, (strategy, own) in flags.items():
        found[name] = plan_policy(profile, strategy, top_k=TOP_K, max_sensitivity=1.0, select="dense", **own)
    return {**found, "own": own_cells(found["hylra-count"])}


def own_cells(policy: Policy) -> Policy:
    """Quest-like: every layer attends to its own best cells. The upper bound, at half the reads of dense or more."""
    n = policy.layer_count
    return replace(policy, layer_mode=(REUSE,) * n, layer_source=tuple(range(n)), layer_top_k=None, sparse_select=None, overlap=None, theta=None, summary="")


def select(profile: Profile) -> Policies:
    """What select layers attend to, at three budgets: all cells or their own selection."""
    return {f"{kind}-k{k}": replace(plan_policy(profile, "count", count=counts(profile, (N_DENSE,))[0], select=kind), top_k=k)
            for k in SELECT_BUDGETS for kind in ("dense", "sparse")}


def blocks(profile: Profile) -> Policies:
    plan = base(profile)
    return {f"block{size}": replace(plan, block_size=size) for size in BLOCKS}


def budgets(profile: Profile) -> Policies:
    plan = base(profile)
    return {f"k{k}": replace(plan, top_k=k, recent_tokens=FEW_RECENT) for k in BUDGETS}


def lists(profile: Profile) -> Policies:
    """One list of cells per layer, one per KV head that takes that of the same head, or of the head that the profile found."""
    same, n = {"top_k": TOP_K, "count": counts(profile, (N_DENSE,))[0]}, profile.head_kv_count
    mapped = plan_policy(profile, "count", lists="head", **same)
    return {"one-list": base(profile), "head-lists": replace(base(profile), lists=n), "head-map": mapped,
            "head-no-map": replace(mapped, head_map=None), "one-list-of-head-plan": replace(mapped, head_map=None, lists=1)}


def forced(profile: Profile) -> Policies:
    """Sink and recent cells, in and out."""
    plan = base(profile)
    return {**{f"sink{n}": replace(plan, sink_tokens=n) for n in (0, 4, 64)},
            **{f"recent{n}": replace(plan, recent_tokens=n) for n in (0, 16, 64, 256, 512)},
            "sink0-recent0": replace(plan, sink_tokens=0, recent_tokens=0)}


def base(profile: Profile) -> Policy:
    return plan_policy(profile, "count", count=counts(profile, (N_DENSE,))[0], top_k=TOP_K)


EXPERIMENTS: Dict[str, Callable[[Profile], Policies]] = {
    one.__name__: one for one in (default, theta, strategies, select, blocks, budgets, lists, forced)}


def main(name: str, profile: str, folder: str) -> None:
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    for label, policy in EXPERIMENTS[name](Profile.load(profile)).items():
        policy.save(out / f"{label}.json")
        print(f"{label:22} {policy.layer_map()} k {policy.top_k}", file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:4])
