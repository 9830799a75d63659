"""Draws the pictures of docs/accuracy*.md from committed results: `python tools/accuracy_plots.py FOLDER`.

Each picture names its results of `hylra-gguf eval`; a frontier takes its speeds from a result of `hylra-gguf bench` of the same policies,
since a tiny model on a GPU that others use says nothing about speed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from accuracy_tables import speeds
from hylra_gguf import eval_plots, plots
from hylra_gguf.files import replacing

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "accuracy"
HEADLINE = ("needle-8k", "needle-16k", "needle-32k")
YARDSTICKS = ("yardsticks", "yardsticks-16k", "yardsticks-32k")  # of fewer documents: only for arms that the headline does not have
SPEED = "speed"
FRONTIERS = {"frontier-theta": "theta-8k", "frontier-strategies": "strategies-32k"}


def load(name: str):
    return json.loads((RESULTS / f"{name}.json").read_text())


def with_speeds(rows: list[dict], timed: list[dict]) -> list[dict]:
    """The rows that were timed at their length, each with the speed-up that bench found"""
    policies = [one for one in rows if one["arm"].startswith("hylra")]
    found = speeds(policies, timed)
    return [{**one, "speedup": found[one["arm"], one["n_depth"]]["speedup"]} for one in policies if (one["arm"], one["n_depth"]) in found]


def figures():
    """File name without ending, figure"""
    headline = [load(name) for name in HEADLINE]
    rows = [row for one in headline for row in one["rows"]]
    arms = {row["arm"] for row in rows}
    rows += [row for name in YARDSTICKS for row in load(name)["rows"] if row["arm"] not in arms]
    yield "needle-grid", eval_plots.needle_grid([asked for one in headline for asked in one["questions"]])
    yield "kld-depth", eval_plots.kld_by_depth([row for row in rows if row["arm"] != "dense"])
    for name, result in FRONTIERS.items():
        timed = with_speeds(load(result)["rows"], load(SPEED))
        yield name, eval_plots.frontier(timed, timed[0]["n_depth"])


def main(folder: str) -> None:
    with plots.plain_style():
        for name, figure in figures():
            path = Path(folder) / f"{name}.png"
            with replacing(path) as fd, open(fd, "wb", closefd=False) as file:
                file.write(plots.png(figure))


if __name__ == "__main__":
    main(sys.argv[1])
