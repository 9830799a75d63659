"""`hylra-gguf bench` on a tiny model: what the rows say, ratios of medians, sequences, fills, several policies, errors in one line."""

from __future__ import annotations

import csv
import io
import json
import statistics
import sys

import pytest
from support import silence, write_tiny_model
from test_engine import policy

import hylra_gguf
from hylra_gguf import bench, engine
from hylra_gguf.cli import main
from hylra_gguf.gguf_header import write_policy

ALL_ARMS = ["stock-fa1", "stock-fa0", "full", "hylra"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """plain.gguf without a policy, own.gguf with one; a.json, b.json and other/a.json fit, wide.json does not"""
    folder = tmp_path_factory.mktemp("bench")
    write_tiny_model(folder / "plain.gguf")
    write_policy(folder / "plain.gguf", policy("SRSR"), folder / "own.gguf")
    (folder / "other").mkdir()
    for name, one in (("a", policy("SRRR")), ("b", policy("FSRR", top_k=32)), ("other/a", policy("SRSR")), ("wide", policy("SRRRR"))):
        one.save(str(folder / f"{name}.json"))
    return folder


@pytest.fixture
def run(folder, capsys, monkeypatch):
    """Exit code, stdout and stderr of a bench command line"""
    monkeypatch.chdir(folder)
    silence(engine.activate())  # of the tiny model's vocabulary

    def run(line: str) -> tuple[int, str, str]:
        code = main(["bench", *line.split(), "-t", "1", "--no-progress"])
        out = capsys.readouterr()
        return code, out.out, out.err

    return run


def rows_of(run, line: str) -> list[dict]:
    code, out, err = run(line + " -o json")
    assert (code, err) == (0, "")
    return json.loads(out)


@pytest.fixture
def rows(run):
    return rows_of(run, "own.gguf -d 300,0 -n 3 -r 3")


def test_a_row_per_depth_and_arm_with_the_status_of_hylra(rows):
    assert [(row["n_depth"], row["arm"]) for row in rows] == [(depth, arm) for depth in (0, 300) for arm in ALL_ARMS]
    steps = {(row["n_depth"], row["arm"]): row["hylra_sparse_steps"] for row in rows}
    assert steps == {(depth, arm): 4 * (arm == "full" or (arm, depth) == ("hylra", 300)) for depth, arm in steps}
    assert [row["hylra_on"] for row in rows] == [False, False, True, True] * 2
    assert {row["policy"] for row in rows} == {"", "FFFF", "SRSR"} and {row["fill"] for row in rows} == {"random"}
    assert all((row["n_gen"], row["n_seq"], row["n_generated"], row["n_threads"]) == (3, 1, 9, 1) for row in rows)


def test_speeds_are_those_of_the_samples(rows):
    for row in rows:
        speeds = [3e9 / ns for ns in row["samples_ns"]]
        assert len(speeds) == 3 and row["samples_ts"] == pytest.approx(speeds, abs=1e-3)
        expected = {"median_ts": statistics.median(speeds), "min_ts": min(speeds), "max_ts": max(speeds),
                    "avg_ts": statistics.mean(speeds), "stddev_ts": statistics.stdev(speeds)}
        assert {name: row[name] for name in expected} == pytest.approx(expected, abs=1e-3)
        assert row["avg_ns"] == round(statistics.mean(row["samples_ns"]))


def test_the_speedup_is_of_medians_against_the_faster_stock_arm(rows):
    for row in rows:
        stock = [one["median_ts"] for one in rows if one["n_depth"] == row["n_depth"] and one["arm"].startswith("stock")]
        assert row["speedup"] == pytest.approx(row["median_ts"] / max(stock), abs=1e-3)


@pytest.mark.parametrize("medians, expected", [
    ({"stock-fa1": 20.0, "stock-fa0": 25.0, "hylra": 50.0}, [0.8, 1.0, 2.0]),
    ({"stock-fa1": 20.0, "hylra": 50.0}, [1.0, 2.5]),
    ({"hylra": 50.0}, [None]),
])
def test_ratios(medians, expected):
    rows = [{"n_depth": 1, "arm": arm, "median_ts": speed, "avg_ts": 999.0} for arm, speed in medians.items()]
    other = {"n_depth": 2, "arm": "stock-fa1", "median_ts": 500.0}
    assert [row["speedup"] for row in bench.with_ratios([*rows, other])] == [*expected, 1.0]


def test_several_sequences_are_decoded_together(run):
    rows = rows_of(run, "own.gguf -d 300 -n 2 -r 1 -np 3")
    assert [row["arm"] for row in rows] == ALL_ARMS
    for row in rows:
        assert (row["n_seq"], row["n_gen"], row["n_generated"], row["fill"]) == (3, 2, 6, "random")
        assert row["median_ts"] == pytest.approx(6e9 / row["samples_ns"][0], abs=1e-3)
    assert rows[3]["hylra_sparse_steps"] == 3  # steps of all sequences at once


@pytest.mark.parametrize("flags, deep, expected", [
    ("--fill synthetic", 8192, "synthetic"), ("--fill text", 299, "random"), ("", 299, "synthetic"), ("", 300, "random"),
    ("-np 2", 299, "random"),
])
def test_rows_say_how_the_cache_was_filled(run, flags, deep, expected, monkeypatch):
    monkeypatch.setattr(bench, "TEXT_DEPTH_TOKENS", deep)
    rows = rows_of(run, f"plain.gguf -d 300,10 -n 1 -r 1 --arms stock-fa1,stock-fa0 {flags}")
    assert [row["fill"] for row in rows] == [expected] * 4


@pytest.mark.parametrize("line, arms, maps", [
    ("--policy a.json", ["full", "hylra"], ["FFFF", "SRRR"]),
    ("--policy a.json --policy b.json", ["full", "hylra:a", "hylra:b"], ["FFFF", "SRRR", "FSRR"]),
    ("--policy a.json --policy other/a.json", ["full", "hylra:a.json", "hylra:other/a.json"], ["FFFF", "SRRR", "SRSR"]),
])
def test_each_policy_is_an_arm(run, line, arms, maps):
    rows = rows_of(run, f"own.gguf -d 300 -n 1 -r 1 --arms full,hylra,full {line}")
    assert ([row["arm"] for row in rows], [row["policy"] for row in rows]) == (arms, maps)
    assert all(row["hylra_on"] and row["hylra_sparse_steps"] == 2 and row["speedup"] is None for row in rows)


def test_tables_and_the_picture_hold_the_same_rows(run, folder):
    code, out, err = run("own.gguf -d 0,300 -n 1 -r 2 -o csv --png sweep.png")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert (code, err, len(rows)) == (0, "", 8) and "samples_ns" not in rows[0] and float(rows[7]["median_ts"]) > 0
    assert (folder / "sweep.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    code, out, err = run("own.gguf -d 0 -n 1 -r 1")
    table = [line.strip("| ").split(" | ") for line in out.splitlines()]
    assert table[0] == list(bench.COLUMNS) and [row[1] for row in table[2:]] == ALL_ARMS


def test_the_picture_has_a_line_with_spread_per_arm():
    from hylra_gguf import plots

    with plots.plain_style():
        figure = plots.speeds([0, 100], {"stock-fa1": [[9, 5], [8, 4], [10, 6]], "hylra:a": [[9, 8], [8, 7], [10, 9]]}, "t", "tokens/s")
    ax, = figure.axes
    assert [line.get_label() for line in ax.containers] == ["stock-fa1", "hylra:a"] and ax.get_ylim()[0] == 0
    line, _, (spread,) = ax.containers[1]
    assert line.get_xydata().tolist() == [[0, 9], [100, 8]]
    assert [bar.tolist() for bar in spread.get_segments()] == [[[0, 8], [0, 10]], [[100, 7], [100, 9]]]


@pytest.mark.parametrize("line, words", [
    ("plain.gguf -d 0", "arm full needs a policy and the model carries none"),
    ("plain.gguf -d 0 --arms hylra", "arm hylra needs a policy and the model carries none"),
    ("none.gguf -d 0 --arms stock-fa1", "none.gguf"),
    ("own.gguf -d 0 --policy a.json --policy a.json", "the same file twice"),
    ("own.gguf -d 0 --policy wide.json", "arm full: "),
    ("own.gguf -d 0 --policy a.json --policy wide.json --arms hylra", "arm hylra:wide: "),
    ("own.gguf -d 300 -np 2 --fill synthetic", "a synthetic fill is for one sequence, not 2"),
    ("own.gguf -d 0 -ctv q8_0", "KV f16/q8_0, flash attention off; use a shorter one, or leave that arm out with --arms"),
])
def test_errors_are_one_line(run, line, words):
    code, out, err = run(line + " -n 1 -r 1")
    assert (code, out) == (2, "") and err.count("\n") == 1 and words in err, err


def test_without_matplotlib_nothing_is_measured(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "hylra_gguf.plots", raising=False)
    monkeypatch.delattr(hylra_gguf, "plots", raising=False)
    monkeypatch.setattr(bench, "run", lambda *args: pytest.fail("measured before the picture was refused"))
    code, out, err = run("own.gguf -d 0 --png x.png")
    assert (code, out) == (2, "") and "pip install 'hylra-gguf[report]'" in err


def test_rows_say_where_the_cache_lies(run):
    line = "own.gguf -d 300 -n 2 -r 1 --arms stock-fa1,hylra"
    assert [{row["no_kv_offload"] for row in rows_of(run, line + flag)} for flag in ("", " -nkvo")] == [{False}, {True}]


@pytest.mark.parametrize("wanted, names", [
    (None, ["NVIDIA H100", "NVIDIA H200", "NVIDIA L4"]),
    ("", []),
    ("1", ["NVIDIA H200"]),
    ("2,0", ["NVIDIA L4", "NVIDIA H100"]),
    ("0, 1", ["NVIDIA H100", "NVIDIA H200"]),
    ("0,-1,1", ["NVIDIA H100"]),
    ("3", []),
    ("GPU-b2", ["NVIDIA H200"]),
    ("GPU-", []),  # the beginning of all of them
    ("MIG-77", ["MIG-77"]),
    ("none", []),
])
def test_rows_name_the_cards_that_cuda_shows(wanted, names, tmp_path, monkeypatch):
    for at, (name, uuid) in enumerate([("NVIDIA H100", "GPU-a1"), ("NVIDIA H200", "GPU-b2"), ("NVIDIA L4", "GPU-c3")]):
        (tmp_path / f"0000:0{at}:00.0").mkdir()
        (tmp_path / f"0000:0{at}:00.0" / "information").write_text(f"Model: \t\t {name}\nIRQ:   \t\t 0\nGPU UUID: \t {uuid}\nDevice Minor: \t {at}\n")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if wanted is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", wanted)
    assert bench.gpu_names(tmp_path) == names


def test_the_commit_in_a_row_is_the_one_that_the_environment_names(monkeypatch):
    """Results of a copy of the tree named the commit of the checkout that the copy lay on."""
    monkeypatch.setenv("HYLRA_COMMIT", "abc1234")
    assert bench.commit() == "abc1234"
