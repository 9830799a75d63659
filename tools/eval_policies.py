"""Writes the policies of an accuracy experiment into a folder, one JSON each, for `hylra-gguf eval --policy`:
`python tools/eval_policies.py theta PROFILE OUT`. What is not varied is the same in all policies of an experiment.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Callable, Dict

from hylra_gguf import plan
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


def planned(profile: Profile, *args, **flags) -> Policy:
    """For contexts as long as the profile's, which is where most experiments measure"""
    return plan.plan_policy(profile, *args, **{"for_context": max(profile.contexts), **flags})


def theta(profile: Profile) -> Policies:
    """A theta that changes no layer is left out; no sensitivity bound, since it would hold layers that a low theta lets go."""
    found: Policies = {}
    for value in THETAS:
        policy = planned(profile, theta=value, max_sensitivity=1.0)
        if policy.layer_source not in [one.layer_source for one in found.values()]:
            found[f"theta{value:.2f}"] = policy
    return found


def default(profile: Profile) -> Policies:
    """The default plan, and what could take its place: the low quantile of recall, more or fewer dense layers, other budgets."""
    found = planned(profile)
    other = {f"dense{n}": planned(profile, "count", count=counts(profile, (n,))[0]) for n in (7, 12, 15)}
    return {"default": found, "low": planned(profile, statistic="low"), **other, "default-k4096": replace(found, top_k=4096),
            "default-k1024": replace(found, top_k=1024), "default-recent512": replace(found, recent_tokens=512)}


def context(profile: Profile) -> Policies:
    """For how long a context reuse is judged, of a model trained for 32768 tokens, and what else could mend a plan for too short a one."""
    short, long = planned(profile), {"for_context": 4 * max(profile.contexts)}
    own = own_cells(planned(profile, "count", count=counts(profile, (N_DENSE,))[0]))
    more = {f"for32768-dense{n}": planned(profile, "count", count=counts(profile, (n,))[0], **long) for n in (12, 15)}
    return {"for8192": short, "for16384": planned(profile, for_context=2 * max(profile.contexts)), "for32768": planned(profile, **long), **more,
            "for32768-low": planned(profile, statistic="low", **long), "for8192-low": planned(profile, statistic="low"),
            "for8192-k4096": replace(short, top_k=4096), "for8192-select-dense": planned(profile, select="dense"),
            "for8192-theta0.97": planned(profile, theta=0.97), "own": own, "own-k4096": replace(own, top_k=4096)}


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
        found[name] = planned(profile, strategy, top_k=TOP_K, max_sensitivity=1.0, select="dense", **own)
    return {**found, "own": own_cells(found["hylra-count"])}


def own_cells(policy: Policy) -> Policy:
    """Quest-like: every layer attends to its own best cells. The upper bound, at half the reads of dense or more."""
    n = policy.layer_count
    return replace(policy, layer_mode=(REUSE,) * n, layer_source=tuple(range(n)), layer_top_k=None, sparse_select=None, overlap=None, theta=None, summary="")


def select(profile: Profile) -> Policies:
    """What select layers attend to, at three budgets: all cells or their own selection."""
    return {f"{kind}-k{k}": replace(planned(profile, "count", count=counts(profile, (N_DENSE,))[0], select=kind), top_k=k)
            for k in SELECT_BUDGETS for kind in ("dense", "sparse")}


def blocks(profile: Profile) -> Policies:
    found = base(profile)
    return {f"block{size}": replace(found, block_size=size) for size in BLOCKS}


def budgets(profile: Profile) -> Policies:
    found = base(profile)
    return {f"k{k}": replace(found, top_k=k, recent_tokens=FEW_RECENT) for k in BUDGETS}


def lists(profile: Profile) -> Policies:
    """One list of cells per layer, one per KV head that takes that of the same head, or of the head that the profile found."""
    same, n = {"top_k": TOP_K, "count": counts(profile, (N_DENSE,))[0]}, profile.head_kv_count
    mapped = planned(profile, "count", lists="head", **same)
    return {"one-list": base(profile), "head-lists": replace(base(profile), lists=n), "head-map": mapped,
            "head-no-map": replace(mapped, head_map=None), "one-list-of-head-plan": replace(mapped, head_map=None, lists=1)}


def forced(profile: Profile) -> Policies:
    """Sink and recent cells, in and out."""
    found = base(profile)
    return {**{f"sink{n}": replace(found, sink_tokens=n) for n in (0, 4, 64)},
            **{f"recent{n}": replace(found, recent_tokens=n) for n in (0, 16, 64, 256, 512)},
            "sink0-recent0": replace(found, sink_tokens=0, recent_tokens=0)}


def base(profile: Profile) -> Policy:
    return planned(profile, "count", count=counts(profile, (N_DENSE,))[0], top_k=TOP_K)


EXPERIMENTS: Dict[str, Callable[[Profile], Policies]] = {
    one.__name__: one for one in (default, context, theta, strategies, select, blocks, budgets, lists, forced)}


def main(name: str, profile: str, folder: str) -> None:
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    for label, policy in EXPERIMENTS[name](Profile.load(profile)).items():
        policy.save(out / f"{label}.json")
        print(f"{label:22} {policy.layer_map()} k {policy.top_k}", file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:4])
