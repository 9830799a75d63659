"""Writes the tables of docs/accuracy*.md from the committed results: `python tools/accuracy_tables.py docs/accuracy*.md README.md`.

A line `<!-- KIND: RESULT... -->` stands above each table and says which one it is; RESULT is a file in docs/accuracy/ without ending.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np

from hylra_gguf.eval_stats import paired_interval, pareto

PLACES = (*((start, start + 20) for start in range(0, 100, 20)), (20, 100))  # percent of the text
PLANS = ("hylra:hylra-count", "hylra:default")  # what the others of an experiment are compared with
RESULTS = Path(__file__).resolve().parents[1] / "docs" / "accuracy"
MARK = re.compile(r"(<!-- (\w+): ([\w. -]+?) -->\n)((?:\|.*\n)*)")
NAMES = {"dense": "dense", "stock-fa1": "stock, flash attention on", "stock-fa0": "stock, off", "kv-q8_0": "stock, KV q8_0",
         "kv-q4_0": "stock, KV q4_0"}


def rendered(text: str) -> str:
    """The text with every marked table made anew."""
    return MARK.sub(lambda found: found[1] + KINDS[found[2]]([load(name) for name in found[3].split()]), text)


def load(name: str):
    return json.loads((RESULTS / f"{name}.json").read_text())


def rows_of(results: list) -> list[dict]:
    """Of all results; policies in the order of the numbers in their names."""
    rows = [row for result in results for row in result["rows"]]
    return sorted(rows, key=lambda row: (row["n_depth"], row["arm"].startswith("hylra:"), natural(row["arm"]) if ":" in row["arm"] else []))


def natural(name: str) -> list:
    return [float(part) if part[:1].isdigit() else part for part in re.split(r"(\d+(?:\.\d+)?)", name)]


def markdown(head: tuple[str, ...], lines: list[list[str]]) -> str:
    return "".join("| " + " | ".join(line) + " |\n" for line in [list(head), ["---"] * len(head), *lines])


def label(row: dict) -> str:
    return NAMES.get(row["arm"], row["arm"].replace("hylra:", ""))


def interval(row: dict, name: str, form: str) -> str:
    return spelled((row[name], row.get(f"{name}_low"), row.get(f"{name}_high")), form)


def spelled(triple, form: str) -> str:
    """Of a value and the ends of its interval, None where they are not known"""
    value, low, high = (None if x is None else form.format(x) for x in triple)
    return value if low is None else f"{value} ({low} to {high})"


def alike(triples) -> tuple[float, float, float]:
    """(mean, low, high) of independent symmetric intervals, each counted once however much lies behind it"""
    values, low, high = np.array(triples, float).T
    middle, half = ((low + high) / 2).mean(), np.hypot.reduce((high - low) / 2) / len(triples)
    return values.mean(), middle - half, middle + half


def timed_plan(row: dict) -> tuple:
    """What has one speed: a policy by its name, k and how many layers of it are full, select and reuse"""
    return row["arm"], "".join(sorted(row["policy"])), row["top_k"]


def speeds(rows: list[dict], timed: list[dict]) -> dict:
    """{(arm, depth): the row of bench} for those rows whose policy was timed, by the same name and with as many layers of each mode"""
    plans = {timed_plan(row) for row in rows}
    return {(one["arm"], one["n_depth"]): one for one in timed if timed_plan(one) in plans}


# -- kinds of tables --------------------------------------------------------------------------------------------------


def losses(results: list) -> str:
    head = ("length", "arm", "cells read", "questions", "score", "points lost", "perplexity", "mean KLD", "same top token")
    lines = [(str(row["n_depth"]), label(row), f"{row['reads']:.3f}", *asked(row), *text(row)) for row in rows_of(results)]
    return markdown(head, [list(line) for line in dict.fromkeys(lines)])  # runs of the same documents have the same dense


def asked(row: dict) -> list[str]:
    if not row.get("n_questions"):
        return ["", "", ""]
    lost = "" if row["arm"] == "dense" else interval(row, "score_loss", "{:.1f}")
    return [str(row["n_questions"]), f"{row['score']:.1f}", lost]


def text(row: dict) -> list[str]:
    if row.get("mean_kld") is None:
        return ["", "", ""]
    if row["arm"] == "dense":
        return [f"{row['ppl']:.3f}", "", ""]
    return ["x " + interval(row, "ppl_ratio", "{:.4f}"), interval(row, "mean_kld", "{:.4f}"), f"{row['same_top_p']:.1f} %"]


def costs(results: list) -> str:
    """The last of the results is one of bench, with the same policies at several depths. Fronts are those of one length, with the speed at
    that depth: no other policy is as fast and loses as little."""
    *results, timed = results
    rows = [row for row in rows_of(results) if row["arm"] != "dense"]
    speed = speeds(rows, timed)
    depths = sorted({one["n_depth"] for one in timed})
    timed_rows = [row for row in rows if (row["arm"], row["n_depth"]) in speed]
    fronts = {word: [row for depth in depths for row in front([row for row in timed_rows if row["n_depth"] == depth], name, speed)]
              for word, name in (("points", "score_loss"), ("KLD", "mean_kld"))}
    head = ("length", "arm", "cells read", "points lost", "perplexity", "mean KLD", *(f"tokens/s at {depth}" for depth in depths), "on the front of")
    return markdown(head, [
        [str(row["n_depth"]), label(row), f"{row['reads']:.3f}", asked(row)[2], *text(row)[:2],
         *("{median_ts:.1f} ({speedup:.2f}x)".format(**speed[row["arm"], depth]) if (row["arm"], depth) in speed else "" for depth in depths),
         ", ".join(word for word, best in fronts.items() if row in best)] for row in rows])


def front(rows: list[dict], name: str, speed: dict) -> list[dict]:
    best = pareto([(row[name], speed[row["arm"], row["n_depth"]]["median_ts"]) for row in rows])
    return [row for row, is_best in zip(rows, best) if is_best]


def together(results: list) -> str:
    """The questions of all lengths as one sample, and each length, whose documents are its own, counted once"""
    lines = []
    for arm in list(results[0]["questions"][0]["scores"])[1:]:
        parts = [[100 * (one["scores"]["dense"] - one["scores"][arm]) for one in result["questions"]] for result in results]
        lost = [one for part in parts for one in part]
        each = [points_interval(part) for part in parts]
        lines.append([NAMES.get(arm, arm), str(len(lost)), str(sum(x > 0 for x in lost)), str(sum(x < 0 for x in lost)),
                      spelled(points_interval(lost), "{:.2f}"), spelled(alike(each), "{:.2f}")])
    return markdown(("arm", "questions", "worse than dense", "better", "points lost", "points lost, each length counted once"), lines)


def points_interval(points: list[float]) -> list[float]:
    return [100 * x for x in paired_interval(np.array(points) / 100)]


def against_plan(results: list) -> str:
    """Each policy's points behind HyLRA's plan, paired by question"""
    rows, questions = rows_of(results), [one for result in results for one in result["questions"]]
    plan = next(arm for arm in PLANS if arm in questions[0]["scores"])
    lines = []
    for row in rows:
        if row["arm"] in ("dense", plan):
            continue
        behind = [one["scores"][plan] - one["scores"][row["arm"]] for one in questions if one["n_depth"] == row["n_depth"]]
        lines.append([str(row["n_depth"]), label(row), str(len(behind)), spelled([100 * x for x in paired_interval(behind)], "{:.1f}")])
    return markdown(("length", "policy", "questions", "points behind the plan"), lines)


def kinds(results: list) -> str:
    """Score of each kind of question, beside dense"""
    rows = rows_of(results)
    names = list(dict.fromkeys(kind for row in rows for kind in row.get("by_kind", ())))
    lines = [[str(row["n_depth"]), label(row), *(f"{row['by_kind'][kind][1]:.0f} ({row['by_kind'][kind][0]})" if kind in row["by_kind"] else ""
                                                 for kind in names)] for row in rows if row.get("by_kind")]
    return markdown(("length", "arm", *names), lines)


def places(results: list) -> str:
    """Points lost by where in the text the facts stand, and for all places but the first; a place without facts has no row"""
    questions = [one for result in results for one in result["questions"]]
    parts = {f"{low} to {high} %": [one for one in questions if low <= 100 * one["where"] < high or one["where"] == 1 and high == 100]
             for low, high in PLACES}
    arms = list(questions[0]["scores"])[1:]
    lines = [[place, str(len(part)), f"{100 * np.mean([one['scores']['dense'] for one in part]):.1f}",
              *(spelled(points_interval([100 * (one["scores"]["dense"] - one["scores"][arm]) for one in part]), "{:.1f}") for arm in arms)]
             for place, part in parts.items() if part]
    return markdown(("place in the text", "questions", "dense", *(f"points lost, {NAMES.get(arm, arm)}" for arm in arms)), lines)


def long(results: list) -> str:
    """Free text: tokens until it leaves dense greedy text, its length where both end, how many end; in the last lines all lengths"""
    rows = [row for row in rows_of(results) if row["arm"] != "dense"]
    lines = [long_line(str(row["n_depth"]), [row]) for row in rows]
    lines += [long_line("all", [row for row in rows if row["arm"] == arm]) for arm in dict.fromkeys(row["arm"] for row in rows)]
    return markdown(("length", "arm", "texts", "ended in dense", "ended", "in both", "tokens like dense", "length against dense"), lines)


def long_line(length: str, rows: list[dict]) -> list[str]:
    """Of one arm; a ratio of several lengths counts each once"""
    texts, *ended = (sum(row[name] for row in rows) for name in ("n_long", "n_ended_dense", "n_ended", "n_both_ended"))
    ratio = alike([[row[f"length_ratio{end}"] for end in ("", "_low", "_high")] for row in rows])
    return [length, label(rows[0]), str(texts), *map(str, ended), f"{sum(row['n_long'] * row['same_tokens'] for row in rows) / texts:.1f}",
            spelled(ratio, "{:.2f}")]


KINDS = {"losses": losses, "costs": costs, "together": together, "against_plan": against_plan,
         "kinds": kinds, "places": places, "long": long}


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        path.write_text(rendered(path.read_text()))
