"""The default policy keeps what was planted: a real model that answers such questions at length, which is too large to be committed."""

from __future__ import annotations

import json
from pathlib import Path

from hylra_gguf.cli import main
from hylra_gguf.policy import FULL, REUSE, SELECT, Policy

RESULT = Path(__file__).resolve().parents[1] / "docs" / "accuracy" / "needle-8k.json"
MODES = {"F": FULL, "S": SELECT, "R": REUSE}


def policy_of(row: dict) -> Policy:
    """The policy that a row of docs/accuracy was measured with"""
    modes = [MODES[letter] for letter in row["policy"]]
    return Policy(layer_mode=modes, layer_source=row["sources"], head_kv_count=3, top_k=row["top_k"], recent_tokens=row["recent"],
                  sink_tokens=row["sink"], min_context=row["min_context"], sparse_select=[int(mode == SELECT) for mode in modes])


def test_the_default_policy_finds_the_needles(needle_model, tmp_path, capsys):
    row = next(one for one in json.loads(RESULT.read_text())["rows"] if one["arm"] == "hylra")
    policy_of(row).save(tmp_path / "default.json")
    line = f"eval {needle_model} -d 4608 --docs 1 --questions 12 --following 17 --time 0 --tasks single,facts,multikey --haystack noise"
    assert main([*line.split(), "--arms", "hylra", "--policy", str(tmp_path / "default.json"), "-o", "json", "--no-progress"]) == 0
    dense, hylra = json.loads(capsys.readouterr().out)["rows"]
    assert hylra["sparse_steps"] > 0 and hylra["reads"] < 0.8
    assert dense["score"] > 80 and hylra["score"] >= dense["score"] - 10
