"""What tools say of reuse over long caches: how lists lie in a cache, and the table of growth."""

from __future__ import annotations

import json

import list_runs
import numpy as np
import pytest
import reuse_growth
from support import policy

from hylra_gguf.gguf_header import write_policy


def test_runs_and_blocks_are_counted():
    shapes = list_runs.Shapes()
    shapes.add(np.array([0, 1, 2, 3, 16, 17, 70, 72]))  # four runs, three blocks of 16, two of 64
    row = shapes.row(policy("SRSR"), 800)
    assert (row["n_lists"], row["run"], row["per_16"], row["per_64"]) == (1, 2.0, round(8 / 3, 2), 4.0)
    assert row["run_anywhere"] == round(1 / (1 - 8 / 800), 2)


def test_a_model_shows_its_lists(smollm2, tmp_path, capsys, monkeypatch):
    write_policy(smollm2, policy("F" + "SR" * 14 + "R", head_kv_count=3), tmp_path / "m.gguf")
    monkeypatch.setattr("sys.argv", ["list_runs.py", str(tmp_path / "m.gguf"), "-c", "700", "--samples", "2", "--top-k", "128", "-o", "json"])
    assert list_runs.main() == 0
    result = json.loads(capsys.readouterr().out)
    shared, per_head = ([row for row in result["rows"] if row["lists"] == lists] for lists in (1, 3))
    assert len(shared) == len(per_head) > 0
    for one, three in zip(shared, per_head):
        assert three["n_past"] == one["n_past"] and three["n_lists"] == 3 * one["n_lists"] > 0
        assert 1 < one["run_anywhere"] < one["run"] < 128 and one["per_16"] <= one["per_64"]


def test_a_model_without_a_policy_is_refused_in_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["list_runs.py", str(tmp_path / "none.gguf")])
    assert list_runs.main() == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_growth_is_that_of_each_process():
    """The second process ran on a machine of half the speed, which is no growth."""
    row = {"type": "f16", "lists": 8, "run": 1, "reuse_ms": [[1.0, 1.1, 1.2], [2.0, 2.2, 2.4], [1.0, 1.1, 1.2]], "rows_ms": [[1.0, 1.0, 1.1]] * 3}
    assert reuse_growth.table({"rows": [row]}).splitlines()[-1] == "| f16 | 8 | 1 | 1.00 | 1.10 | 1.20 | 1.20 | 1.10 |"


@pytest.mark.parametrize("arm, ms", [("reuse", 3.0), ("rows", 4.0)])
def test_a_reuse_layer_ends_with_its_reduction(arm, ms):
    assert reuse_growth.times_ms({"reuse_ms": 1.0, "reuse_reduce_ms": 2.0, "rows_ms": 4.0}, arm) == ms


def test_reach_is_shown_by_distance():
    rows = [{"step_bytes": step, "lines": lines, "ns": step + lines} for step in (64, 4096) for lines in (512, 1024)]
    assert reuse_growth.reach_table({"page_reach": rows}).splitlines()[2:] == ["| 512 | 576 | 4608 |", "| 1024 | 1088 | 5120 |"]
