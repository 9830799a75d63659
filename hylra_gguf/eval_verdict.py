"""One line of verdict and the next command: which of the failures that the paper describes the numbers look like, if any."""

from __future__ import annotations

import shlex

from . import eval_stats
from .eval_arms import DENSE, KV
from .bench import STOCK

SMALL_MASS = 0.90  # select layers that hold less of their attention on their own cells have too few of them
LOW_THETA = 0.95  # recall below which a reuse layer is given too little of what it needs
ENOUGH = "within 1 point of dense task score and 1 % of dense perplexity"


def verdict(rows: list[dict], model: str) -> dict:
    """{"verdict": line, "next": command} of the first policy that was measured."""
    name = next((one["arm"] for one in rows if one["arm"] not in (DENSE, "full", *STOCK, *KV)), None)
    if name is None:
        return {"verdict": "no policy was measured", "next": f"hylra-gguf embed-policy {shlex.quote(model)}"}
    own = [one for one in rows if one["arm"] == name]
    bad = [one for one in own if loses(one)]
    path, where = shlex.quote(model), ", ".join(str(one["n_depth"]) for one in bad or own)
    if not any(one["sparse_steps"] for one in own):
        return {"verdict": f"{name}: never sparse at {where} tokens: min_context is above it",
                "next": f"hylra-gguf eval {path} -d {2 * max(one['min_context'] for one in own)}"}
    if bad:
        return {key: text.format(name=name, where=where, model=path) for key, text in signature(bad[0]).items()}
    if any(one["verdict"] != eval_stats.OK for one in own):
        wide = ", ".join(str(one["n_depth"]) for one in own if one["verdict"] != eval_stats.OK)
        return {"verdict": f"{name}: no loss seen, but the intervals at {wide} tokens are too wide to say {ENOUGH}",
                "next": f"hylra-gguf eval {path} -d {wide.replace(' ', '')} --docs {2 * max(one['n_documents'] for one in own)} "
                        f"--questions {2 * max(one.get('n_questions', 100) for one in own)}"}
    return {"verdict": f"{name}: ok, {ENOUGH} at {where} tokens", "next": f"hylra-gguf bench {path} -d {where.replace(' ', '')}"}


def loses(one: dict) -> bool:
    """More than a margin, and more than chance explains."""
    return any(value is not None and value > limit and low is not None and low > none for value, low, limit, none in (
        (one.get("score_loss"), one.get("score_loss_low"), eval_stats.SCORE_MARGIN, 0.0),
        (one.get("ppl_ratio"), one.get("ppl_ratio_low"), 1 + eval_stats.PPL_MARGIN, 1.0)))


def signature(one: dict) -> dict:
    """Captured mass is measured here, theta is what the plan promised."""
    start = "{name}: loses " + f"{one.get('score_loss', 0.0)} points, perplexity x {one.get('ppl_ratio', 1.0)}" + " at {where} tokens: "
    mass, theta = one["captured_mass"], one["theta"]
    if mass and mass[0] < SMALL_MASS:
        return {"verdict": start + f"k too small (select layers hold {mass[0]} of their attention on their {one['top_k']} cells)",
                "next": f"hylra-gguf embed-policy {{model}} --top-k {2 * one['top_k']}"}
    if theta is not None and theta < LOW_THETA:
        return {"verdict": start + f"theta too low ({theta})",
                "next": f"hylra-gguf embed-policy {{model}} --theta {min(0.99, round((1 + theta) / 2, 3))}"}
    return {"verdict": start + "the profile does not match this text", "next": "hylra-gguf embed-policy {model} -f TEXT --minutes 10"}
