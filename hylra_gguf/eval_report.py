"""What `eval` says: rows per depth and arm, answers by kind, a verdict with the next command; as JSON, Markdown and pictures."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from typing import Iterable

import numpy as np

from . import eval_stats, eval_verdict, tables
from .bench import STOCK
from .errors import plain_os_errors
from .eval_arms import DENSE, Arm
from .files import replacing

COLUMNS = ("n_depth", "arm", "score", "score_loss", "ppl_ratio", "mean_kld", "same_top_p", "reads", "speedup", "verdict")
TEXT_KEYS = ("nll", "kld", "same_top", "change")


def result(facts: dict, arms: list[Arm], records: list, args) -> dict:
    settings = {name: getattr(args, name) for name in ("docs", "questions", "following", "generate", "tasks", "haystack")}
    rows = [row(arm, depth, [one for one in records if one.depth == depth], args.generate)
            for depth in dict.fromkeys(one.depth for one in records) for arm in arms]
    with_speedups(rows)
    return {"facts": {**facts, **settings}, "rows": rows, "questions": [asked for one in records for asked in questions(one)],
            **eval_verdict.verdict(rows, args.model)}


# -- rows -------------------------------------------------------------------------------------------------------------


def row(arm: Arm, depth: int, records: list, long_limit: int) -> dict:
    out = {"n_depth": depth, "arm": arm.name, "n_documents": len(records), **about(arm, depth)}
    sittings = [one.sittings[arm.name] for one in records]
    dense = [one.sittings[DENSE] for one in records]
    read = [i for i, one in enumerate(sittings) if one.nll.size]
    if read:
        parts = [[getattr(sittings[i], key) for i in read] for key in TEXT_KEYS]
        out.update(eval_stats.text_row(parts[0], [dense[i].nll for i in read], *parts[1:]))
    if any(one.scores[arm.name] for one in records):
        out.update(eval_stats.task_row([s for one in records for s in one.scores[arm.name]],
                                       [s for one in records for s in one.scores[DENSE]]))
        out["by_kind"] = by_kind(arm.name, records)
    if long_limit:
        pairs = [pair for a, b in zip(sittings, dense) for pair in zip(a.long, b.long)]
        out.update(eval_stats.long_row([len(a) for a, _ in pairs], [len(b) for _, b in pairs],
                                       [eval_stats.leading_equal(a, b) for a, b in pairs], long_limit))
    out["verdict"] = worst(out.get("ppl_verdict"), out.get("score_verdict"))
    return {**out, **at_run_time(sittings)}


def about(arm: Arm, depth: int) -> dict:
    """reads: cells that a decode step reads, all layers, as a share of dense"""
    p = arm.policy
    if p is None:
        return {"policy": "", "type_kv": arm.type_kv, "flash_attn": int(arm.flash_attn), "reads": 1.0}
    return {"policy": p.layer_map(), "sources": list(p.layer_source), "top_k": p.top_k, "lists": p.lists, "head_map": p.head_map is not None,
            "block_size": p.block_size, "sink": p.sink_tokens, "recent": p.recent_tokens, "theta": p.theta,
            "min_context": p.min_context, "reads": round(1 - p.reads_saved(depth), 4)}


def at_run_time(sittings: list) -> dict:
    """captured_mass: [mean, smallest] over select layers; step_ms: median over documents of one decode step"""
    masses = defaultdict(list)
    for one in sittings:
        for layer, mass in one.mass.items():
            masses[layer].append(mass)
    means = [float(np.mean(values)) for values in masses.values()]
    times = [one.step_ns for one in sittings if one.step_ns]
    return {
        "sparse_steps": sum(one.sparse_steps for one in sittings),
        "captured_mass": [round(float(np.mean(means)), 4), round(min(means), 4)] if means else None,
        "step_ms": round(float(np.median(times)) / 1e6, 3) if times else None,
    }


def by_kind(arm: str, records: list) -> dict:
    """kind -> [questions, score, dense score]"""
    found = defaultdict(list)
    for one in records:
        for question, score, dense in zip(one.document.questions, one.scores[arm], one.scores[DENSE]):
            found[question.kind].append((score, dense))
    return {kind: [len(pairs), *(round(100 * float(x), 1) for x in np.mean(pairs, axis=0))] for kind, pairs in found.items()}


def worst(*verdicts) -> str:
    given = [one for one in verdicts if one]
    return next((one for one in (eval_stats.LOST, eval_stats.OPEN, eval_stats.OK) if one in given), "")


def with_speedups(rows: list[dict]) -> None:
    """Against the fastest stock arm of the depth, or dense where no stock arm ran; None where nothing was timed."""
    for one in rows:
        same = [r for r in rows if r["n_depth"] == one["n_depth"] and r["step_ms"]]
        stock = [r["step_ms"] for r in same if r["arm"] in STOCK] or [r["step_ms"] for r in same if r["arm"] == DENSE]
        one["speedup"] = round(min(stock) / one["step_ms"], 3) if stock and one["step_ms"] else None


def questions(record) -> Iterable[dict]:
    for i, question in enumerate(record.document.questions):
        yield {"n_depth": record.depth, "haystack": record.document.haystack, "kind": question.kind, "where": round(question.depth, 3),
               "scores": {arm: round(scores[i], 3) for arm, scores in record.scores.items()}}


# -- output -----------------------------------------------------------------------------------------------------------


def to_json(result: dict) -> str:
    """One row or question per line."""
    parts = []
    for key, value in result.items():
        if isinstance(value, list) and value:
            value = "[\n" + ",\n".join("    " + json.dumps(one) for one in value) + "\n  ]"
            parts.append(f"  {json.dumps(key)}: {value}")
        else:
            parts.append(f"  {json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(parts) + "\n}"


def to_md(result: dict) -> str:
    rows = [{name: cell(one, name) for name in COLUMNS} for one in result["rows"]]
    lines = [tables.to_md(rows), "", f"{result['verdict']}", f"next: {result['next']}"]
    return "\n".join(lines)


def cell(one: dict, name: str) -> str:
    """A value, with its interval where it has one."""
    value = one.get(name)
    if value is None:
        return ""
    low, high = one.get(f"{name}_low"), one.get(f"{name}_high")
    return str(value) if low is None or high is None else f"{value} ({low} to {high})"


def measured(result: dict) -> dict[str, float]:
    """hylra.measured.* names -> values, of the file's own policy"""
    out = {}
    for one in result["rows"]:
        if one["arm"] != "hylra":
            continue
        for key, name in (("mean_kld", "kld"), ("same_top_p", "same_top"), ("ppl_ratio", "ppl_ratio"), ("score", "score"),
                          ("score_dense", "score_dense"), ("speedup", "speedup")):
            if one.get(key) is not None:
                out[f"{name}_{one['n_depth']}"] = one[key]
    return out


def save_pictures(result: dict, folder: str) -> None:
    from . import eval_plots, plots

    with plain_os_errors(folder):
        os.makedirs(folder, exist_ok=True)
    with plots.plain_style():
        for name, figure in eval_plots.figures(result):
            path = os.path.join(folder, f"{name}.png")
            with plain_os_errors(path), replacing(path) as fd, open(fd, "wb", closefd=False) as file:
                file.write(plots.png(figure))
