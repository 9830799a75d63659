"""What the documents say: every table of speeds is that of a committed result, every count of docs/trust.md that of its tests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import cuda_tables
import domains
import isa_gain
import kernel_rows
import list_runs
import reuse_growth
import trust_tables
from accuracy_tables import rendered
from speed_tables import table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = sorted((ROOT / "docs").glob("speed-*.json"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_the_tables_are_the_committed_results(path):
    assert table(json.loads(path.read_text())) in (ROOT / "docs" / "speed.md").read_text()


def test_the_readme_shows_one_of_them():
    assert table(json.loads((ROOT / "docs" / "speed-needle.json").read_text())) in (ROOT / "README.md").read_text()


def test_trust_counts_the_tests_that_there_are():
    text = trust_tables.DOCUMENT.read_text()
    assert trust_tables.filled(text) == text, "run: python tools/trust_tables.py"


@pytest.mark.parametrize("line", ["| a | `tests/test_docs.py::test_that_is_not_there` | 1 |", "| a | `docs/speed.json#none` | 1 |"])
def test_trust_names_nothing_that_is_not_there(line):
    with pytest.raises((KeyError, OSError)):
        trust_tables.count_of(trust_tables.ROW.match(line)["shown"], trust_tables.Counter({"tests/test_docs.py": 3}))


@pytest.mark.parametrize("path", [ROOT / "docs" / "accuracy.md", ROOT / "docs" / "accuracy-experiments.md", ROOT / "README.md"], ids=lambda path: path.stem)
def test_tables_of_accuracy_are_the_committed_results(path):
    text = path.read_text()
    assert "<!-- losses: " in text and rendered(text) == text


@pytest.mark.parametrize("make", [cuda_tables.decode, cuda_tables.kernels, cuda_tables.averages, cuda_tables.steps], ids=lambda make: make.__name__)
def test_tables_of_cuda_are_the_committed_results(make):
    assert "\n".join(make(ROOT / "docs" / "cuda")) in (ROOT / "docs" / "cuda.md").read_text()


KERNEL_ROWS = ("kernels", "kernels-zen4", "kernels-xeon", "kernels-avx2", "kernels-xeon-16-cores", "kernels-xeon-avx2", "kernels-xeon-two-avx2", "kernels-16-cores")
GROWTHS = ("reuse-growth-xeon", "reuse-growth-xeon-16-cores")


@pytest.mark.parametrize("name, table_of", [*((name, kernel_rows.table) for name in KERNEL_ROWS), ("kernels-vnni", isa_gain.table), ("list-runs-needle", list_runs.table),
                                            *((name, table_of) for name in GROWTHS for table_of in (reuse_growth.table, reuse_growth.reach_table))])
def test_the_tables_of_one_layer_are_the_committed_results(name, table_of):
    assert table_of(json.loads((ROOT / "docs" / f"{name}.json").read_text())) in (ROOT / "docs" / "speed.md").read_text()


def test_the_matrix_of_texts_is_the_committed_result():
    data = json.loads((ROOT / "docs" / "domains.json").read_text())
    assert domains.to_md(data) + "\n" == (ROOT / "docs" / "domains.md").read_text()
