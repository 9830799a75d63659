"""One line of verdict and the next command: which of the failures that the paper describes the numbers look like, if any."""

from __future__ import annotations

import shlex

from . import eval_stats
from .eval_arms import DENSE, KV
from .bench import STOCK

LOW_THETA = 0.95  # recall below which the next plan to try is a stricter one
SMALL_MASS = 0.90  # select layers that hold less of their attention on their own cells may have too few of them
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
        return {key: text.format(name=name, where=where, model=path) for key, text in signature(bad[0], rows).items()}
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


def signature(one: dict, rows: list[dict]) -> dict:
    """{"verdict", "next"} for a row that loses: the first cause, in this order, that nothing measured speaks against.

    Sources come before k: no measured loss of points beyond chance was of top_k alone, and those whose cause was found went away with other sources at the same
    top_k (docs/accuracy: theta, strategies, sisters). The mass of select layers does not tell: it was 0.90 in plans that lost and in plans that did not. What
    tells is an arm in which every layer attends to cells of its own (`alone`): if it loses as much, sources are not what is wrong.
    """
    start = "{name}: loses " + f"{one.get('score_loss', 0.0)} points, perplexity x {one.get('ppl_ratio', 1.0)}" + " at {where} tokens: "
    mass, theta, judge = one["captured_mass"], one["theta"], next((row for row in rows if alone(row) and same_cells(row, one)), None)
    cells, more = f"{one['top_k']} cells", f"hylra-gguf embed-policy {{model}} --top-k {2 * one['top_k']}"
    if judge and loses(judge) and (one.get("score_loss") or 0.0) <= (judge.get("score_loss") or 0.0) + eval_stats.SCORE_MARGIN:
        return {"verdict": start + f"k too small (layers that choose their own {cells} lose as much)", "next": more}
    if theta is None:
        return {"verdict": start + "theta unknown: the policy was not planned for a recall", "next": "hylra-gguf embed-policy {model}"}
    if theta < LOW_THETA:
        return {"verdict": start + f"theta too low ({theta})",
                "next": f"hylra-gguf embed-policy {{model}} --theta {round((1 + theta) / 2, 3)}"}
    if mass and mass[0] < SMALL_MASS and not judge:
        return {"verdict": start + f"k too small (select layers hold {mass[0]} of their attention on their {cells})", "next": more}
    return {"verdict": start + "the profile does not match this text", "next": "hylra-gguf embed-policy {model} -f TEXT --minutes 10"}


def alone(one: dict) -> bool:
    """Some layers are sparse, and all of these attend to cells of their own: nothing is reused."""
    sparse = [(il, source) for il, (source, mode) in enumerate(zip(one.get("sources") or [], one["policy"] or "")) if mode in "SR"]
    return bool(sparse) and all(source == il for il, source in sparse)


def same_cells(one: dict, other: dict) -> bool:
    return all(one.get(name) == other.get(name) for name in ("n_depth", "top_k", "block_size"))
