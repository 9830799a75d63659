"""Writes the tables of docs/accuracy.md from the committed results: `python tools/accuracy_tables.py docs/accuracy.md README.md`.

A line `<!-- KIND: RESULT... -->` stands above each table and says which one it is; RESULT is a file in docs/accuracy/ without ending.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "accuracy"
MARK = re.compile(r"(<!-- (\w+): ([\w. -]+?) -->\n)((?:\|.*\n)*)")
NAMES = {"dense": "dense (F32 sums)", "stock-fa1": "stock, flash attention on", "stock-fa0": "stock, off", "kv-q8_0": "stock, KV q8_0",
         "kv-q4_0": "stock, KV q4_0"}


def rendered(text: str) -> str:
    """The text with every marked table made anew."""
    return MARK.sub(lambda found: found[1] + KINDS[found[2]]([row for name in found[3].split() for row in load(name)]), text)


def load(name: str) -> list[dict]:
    return json.loads((RESULTS / f"{name}.json").read_text())["rows"]


def markdown(head: tuple[str, ...], lines: list[list[str]]) -> str:
    return "".join("| " + " | ".join(line) + " |\n" for line in [list(head), ["---"] * len(head), *lines])


def label(row: dict) -> str:
    return NAMES.get(row["arm"], row["arm"].replace("hylra:", ""))


def interval(row: dict, name: str, form: str) -> str:
    low, high = row.get(f"{name}_low"), row.get(f"{name}_high")
    value = form.format(row[name])
    return value if low is None else f"{value} ({form.format(low)} to {form.format(high)})"


# -- kinds of tables --------------------------------------------------------------------------------------------------


def losses(rows: list[dict]) -> str:
    head = ("length", "arm", "cells read", "questions", "score", "points lost", "perplexity", "mean KLD", "same top token")
    return markdown(head, [[str(row["n_depth"]), label(row), f"{row['reads']:.3f}", *asked(row), *text(row)] for row in rows])


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


def speeds(rows: list[dict]) -> str:
    """Accuracy against what a step reads and takes; times are of that machine and its engine."""
    head = ("length", "arm", "cells read", "ms a step", "points lost", "mean KLD")
    return markdown(head, [[str(row["n_depth"]), label(row), f"{row['reads']:.3f}", "" if row["step_ms"] is None else f"{row['step_ms']:.2f}",
                            asked(row)[2], text(row)[1]] for row in rows if row["arm"] != "dense"])


def kinds(rows: list[dict]) -> str:
    """Score of each kind of question, beside dense"""
    names = list(dict.fromkeys(kind for row in rows for kind in row.get("by_kind", ())))
    lines = [[str(row["n_depth"]), label(row), *(f"{row['by_kind'][kind][1]:.0f} ({row['by_kind'][kind][0]})" if kind in row["by_kind"] else ""
                                                 for kind in names)] for row in rows if row.get("by_kind")]
    return markdown(("length", "arm", *names), lines)


def long(rows: list[dict]) -> str:
    """Free text: tokens until it leaves dense greedy text, and its length where both end"""
    head = ("length", "arm", "documents", "tokens like dense", "length against dense", "both ended")
    return markdown(head, [[str(row["n_depth"]), label(row), str(row["n_long"]), f"{row['same_tokens']:.1f}",
                            "" if row["length_ratio"] is None else f"{row['length_ratio']:.3f}", str(row["n_both_ended"])]
                           for row in rows if row.get("n_long") and row["arm"] != "dense"])


KINDS = {"losses": losses, "speeds": speeds, "kinds": kinds, "long": long}


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        path.write_text(rendered(path.read_text()))
