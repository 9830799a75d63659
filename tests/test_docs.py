"""What the documents say: every measured figure in the README is in a committed result."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ARMS = ("stock-fa1", "stock-fa0", "full", "hylra")


def test_speed_table_is_the_committed_result():
    rows = json.loads((ROOT / "docs" / "bench-smollm2-135m.json").read_text())
    readme = (ROOT / "README.md").read_text()
    for depth in sorted({row["n_depth"] for row in rows}):
        arms = {row["arm"]: row for row in rows if row["n_depth"] == depth}
        speeds = " | ".join(f"{arms[arm]['avg_ts']:.1f}" for arm in ARMS)
        assert f"| {depth} | {speeds} | {arms['hylra']['speedup']:.2f} |" in readme
