"""Writes the tables of docs/accuracy.md from the committed results: `python tools/accuracy_tables.py docs/accuracy.md README.md`.

A line `<!-- KIND: RESULT... -->` stands above each table and says which one it is; RESULT is a file in docs/accuracy/ without ending.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from hylra_gguf.eval_stats import paired_interval, pareto

PLAN = "hylra:hylra-count"
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
    low, high = row.get(f"{name}_low"), row.get(f"{name}_high")
    value = form.format(row[name])
    return value if low is None else f"{value} ({form.format(low)} to {form.format(high)})"


# -- kinds of tables --------------------------------------------------------------------------------------------------


def losses(results: list) -> str:
    head = ("length", "arm", "cells read", "questions", "score", "points lost", "perplexity", "mean KLD", "same top token")
    return markdown(head, [[str(row["n_depth"]), label(row), f"{row['reads']:.3f}", *asked(row), *text(row)] for row in rows_of(results)])


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
    """The last of the results is one of bench, with the same policies at several depths. Fronts are those of speed at the depth of the
    questions: no other policy is as fast and loses as little."""
    *results, timed = results
    speed = {(one["arm"], one["n_depth"]): one for one in timed}
    depths = sorted({one["n_depth"] for one in timed})
    rows = [row for row in rows_of(results) if row["arm"] != "dense"]
    timed_rows = [row for row in rows if (row["arm"], row["n_depth"]) in speed]
    fronts = {word: [row for row, best in zip(timed_rows, pareto([(one[name], speed[one["arm"], one["n_depth"]]["median_ts"])
                                                                  for one in timed_rows])) if best]
              for word, name in (("points", "score_loss"), ("KLD", "mean_kld"))}
    head = ("length", "arm", "cells read", "points lost", "perplexity", "mean KLD", *(f"tokens/s at {depth}" for depth in depths), "on the front of")
    return markdown(head, [
        [str(row["n_depth"]), label(row), f"{row['reads']:.3f}", asked(row)[2], *text(row)[:2],
         *("{median_ts:.1f} ({speedup:.2f}x)".format(**speed[row["arm"], depth]) if (row["arm"], depth) in speed else "" for depth in depths),
         ", ".join(word for word, best in fronts.items() if row in best)] for row in rows])


def together(results: list) -> str:
    """The questions of all lengths as one sample; documents: every length has its own"""
    asked_of = [one for result in results for one in result["questions"]]
    lines = []
    for arm in list(asked_of[0]["scores"])[1:]:
        lost = [one["scores"]["dense"] - one["scores"][arm] for one in asked_of]
        mean, low, high = (f"{100 * x:.2f}" for x in paired_interval(lost))
        lines.append([NAMES.get(arm, arm), str(len(lost)), str(sum(x > 0 for x in lost)), str(sum(x < 0 for x in lost)), f"{mean} ({low} to {high})"])
    return markdown(("arm", "questions", "worse than dense", "better", "points lost"), lines)


def against_plan(results: list) -> str:
    """Each strategy's points behind HyLRA's plan, paired by question"""
    rows, questions = rows_of(results), [one for result in results for one in result["questions"]]
    lines = []
    for row in rows:
        if row["arm"] in ("dense", PLAN):
            continue
        behind = [one["scores"][PLAN] - one["scores"][row["arm"]] for one in questions if one["n_depth"] == row["n_depth"]]
        mean, low, high = (f"{100 * x:.1f}" for x in paired_interval(behind))
        lines.append([str(row["n_depth"]), label(row), str(len(behind)), f"{mean} ({low} to {high})"])
    return markdown(("length", "strategy", "questions", "points behind the plan"), lines)


def kinds(results: list) -> str:
    """Score of each kind of question, beside dense"""
    rows = rows_of(results)
    names = list(dict.fromkeys(kind for row in rows for kind in row.get("by_kind", ())))
    lines = [[str(row["n_depth"]), label(row), *(f"{row['by_kind'][kind][1]:.0f} ({row['by_kind'][kind][0]})" if kind in row["by_kind"] else ""
                                                 for kind in names)] for row in rows if row.get("by_kind")]
    return markdown(("length", "arm", *names), lines)


def length_ratio(row: dict) -> str:
    if row["length_ratio"] is None:
        return ""
    low, high = row.get("length_ratio_low"), row.get("length_ratio_high")
    return f"{row['length_ratio']:.3f}" + (f" ({low:.2f} to {high:.2f})" if low is not None else "")


def long(results: list) -> str:
    """Free text: tokens until it leaves dense greedy text, and its length where both end"""
    head = ("length", "arm", "texts", "tokens like dense", "length against dense", "both ended")
    return markdown(head, [[str(row["n_depth"]), label(row), str(row["n_long"]), f"{row['same_tokens']:.1f}",
                            length_ratio(row), str(row["n_both_ended"])]
                           for row in rows_of(results) if row.get("n_long") and row["arm"] != "dense"])


KINDS = {"losses": losses, "costs": costs, "together": together, "against_plan": against_plan,
         "kinds": kinds, "long": long}


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        path.write_text(rendered(path.read_text()))
