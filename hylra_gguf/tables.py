"""Rows of the same keys as text: a Markdown table, CSV or JSON."""

from __future__ import annotations

import csv
import io
import json


def to_md(rows: list[dict]) -> str:
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
    return "\n".join(lines + ["| " + " | ".join(str(row[name]) for name in names) + " |" for row in rows])


def to_csv(rows: list[dict]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().rstrip()


FORMATS = {"md": to_md, "csv": to_csv, "json": lambda rows: json.dumps(rows, indent=2)}
