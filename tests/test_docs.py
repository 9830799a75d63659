"""What the documents say: every table of speeds is that of a committed result."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from accuracy_tables import rendered
from speed_tables import table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = sorted((ROOT / "docs").glob("speed-*.json"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_the_tables_are_the_committed_results(path):
    assert table(json.loads(path.read_text())) in (ROOT / "docs" / "speed.md").read_text()


def test_the_readme_shows_one_of_them():
    assert table(json.loads((ROOT / "docs" / "speed-needle.json").read_text())) in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("path", [ROOT / "docs" / "accuracy.md", ROOT / "README.md"], ids=lambda path: path.stem)
def test_tables_of_accuracy_are_the_committed_results(path):
    text = path.read_text()
    assert "<!-- losses: " in text and rendered(text) == text
