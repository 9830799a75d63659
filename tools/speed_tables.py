"""The tables of docs/speed.md and the README from the committed results: `python tools/speed_tables.py docs/speed-needle.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

ARMS = {"stock-fa1": "stock, flash attention on", "stock-fa0": "stock, off", "full": "full (our dense kernel)", "hylra": "HyLRA"}


def table(rows: list[dict]) -> str:
    """Median tokens/s by depth; full and HyLRA with their ratio to the faster stock arm."""
    arms = [arm for arm in ARMS if any(row["arm"] == arm for row in rows)]
    lines = ["| depth | " + " | ".join(ARMS[arm] for arm in arms) + " |", "|" + " --- |" * (len(arms) + 1)]
    for depth in sorted({row["n_depth"] for row in rows}):
        found = {row["arm"]: row for row in rows if row["n_depth"] == depth}
        lines.append(f"| {depth} | " + " | ".join(cell(found[arm]) for arm in arms) + " |")
    return "\n".join(lines)


def cell(row: dict) -> str:
    speed = f"{row['median_ts']:.1f}"
    return speed if row["arm"].startswith("stock") else f"{speed} ({row['speedup']:.2f}x)"


if __name__ == "__main__":
    for path in sys.argv[1:]:
        print(table(json.loads(Path(path).read_text())))
