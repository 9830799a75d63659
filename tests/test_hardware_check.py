"""The hardware check: what it derives from canned measurements, and the whole tool on a bench-kernels that prints them."""

from __future__ import annotations

import json
import sys

import hardware_check
import hardware_rows
import pytest
from hardware_rows import NOT_EXPOSED, Shape
from support import write_tiny_model
from test_engine import policy

from hylra_gguf.errors import ModelFileError
from hylra_gguf.gguf_header import write_policy

NOTHING = dict.fromkeys(hardware_rows.EVENTS)
UNCOUNTED = dict.fromkeys(hardware_rows.KINDS, NOTHING)


def result(**changes) -> dict:
    """One of bench-kernels: 10 GB/s, 1000 cells of 8 heads, 100 of them chosen"""
    return {**{"isa": "avx2", "type": "f16", "heads": 8, "kv_heads": 2, "head_size": 64, "n_kv": 1000, "top_k": 100, "lists": 2, "threads": 2,
               "repetitions": 3, "read_bytes_per_s": 1e10, "full_ms": 0.1, "full_bytes": 512000, "full_reduce_ms": 0.02,
               "select_attend_ms": 0.12, "select_attend_bytes": 512000, "select_reduce_ms": 0.02, "select_pool_ms": 0.03,
               "select_choose_ms": 0.01, "reuse_ms": 0.02, "reuse_bytes": 51200, "reuse_reduce_ms": 0.01}, **changes}


HOT = result(n_kv=128, top_k=128, threads=1, full_ms=0.0128, select_attend_ms=0.0256, reuse_ms=0.0128)

# ---- one layer


def test_time_is_split_into_memory_and_arithmetic():
    full, select, reuse = hardware_rows.layer_rows(result(), HOT, UNCOUNTED)
    assert [row["kind"] for row in (full, select, reuse)] == ["full", "select", "reuse"]
    assert [row["ms"] for row in (full, select, reuse)] == pytest.approx([0.12, 0.18, 0.03])
    assert [row["memory_ms"] for row in (full, select, reuse)] == pytest.approx([0.0512, 0.0512, 0.0051], abs=1e-4)
    # per cell 0.1 us (select 0.2 us) on one thread, two threads here, and what follows the attention
    assert [row["arithmetic_ms"] for row in (full, select, reuse)] == pytest.approx([0.05 + 0.02, 0.1 + 0.06, 0.005 + 0.01])
    assert [row["gain"] for row in (full, select, reuse)] == [1.0, 0.67, 4.0]
    assert [row["memory_gain"] for row in (full, select, reuse)] == pytest.approx([1, 1, 10], rel=0.01)
    assert [row["arithmetic_gain"] for row in (full, select, reuse)] == [1.0, 0.44, 4.67]


def test_speeds_are_of_bytes_that_must_move_and_of_both_products():
    full, _, reuse = hardware_rows.layer_rows(result(), HOT, UNCOUNTED)
    assert (full["bytes"], full["flops"], full["flops_per_byte"]) == (512000, 4 * 8 * 64 * 1000, 4.0)
    assert (reuse["bytes"], reuse["flops"]) == (51200, 4 * 8 * 64 * 100)
    assert full["gb_per_s"] == pytest.approx(512000 / 0.12e-3 / 1e9, abs=0.01)
    assert full["of_read"] == pytest.approx(full["gb_per_s"] / 10, abs=1e-3)
    assert full["gflops_per_s"] == pytest.approx(full["flops"] / 0.12e-3 / 1e9, abs=0.01)


def test_counters_of_a_layer_give_a_gain_of_their_own():
    counts = {"full": dict(NOTHING, instructions=4000.4), "select": dict(NOTHING, instructions=5000.0), "reuse": dict(NOTHING, instructions=500.0)}
    rows = hardware_rows.layer_rows(result(), HOT, counts)
    assert [row["instructions"] for row in rows] == [4000, 5000, 500] and [row["instruction_gain"] for row in rows] == [1.0, 0.8, 8.0]
    assert {row["cache_misses"] for row in rows} == {row["cycles"] for row in rows} == {NOT_EXPOSED}


def test_without_counters_the_rows_say_so():
    row = hardware_rows.layer_rows(result(), HOT, UNCOUNTED)[2]
    assert {row[name] for name in ("instructions", "cycles", "cache_misses", "instruction_gain")} == {NOT_EXPOSED}


def test_portability_compares_like_with_like():
    rows = [{"isa": isa, "type": kind, "n_kv": 8, "kind": "full", "ms": ms}
            for isa, kind, ms in (("avx512", "f16", 1.0), ("base", "f16", 4.0), ("avx512", "q8_0", 3.0), ("base", "q8_0", 2.0))]
    assert [row["of_fastest_isa"] for row in hardware_rows.with_portability(rows)] == [1.0, 0.25, 0.667, 1.0]


# ---- counters


@pytest.mark.parametrize("text, expected", [
    ("# started on Tue\n\n123,,instructions:u,500,100.00,1.2,insn per cycle\n45,,cycles:u,500,100.00,,\n6,,cache-misses:u,500,100.00,,\n", (123, 45, 6)),
    ("<not supported>,,instructions:u,0,100.00,,\n45,,cycles:u,5,100.00,,\n<not counted>,,cache-misses:u,0,0.00,,\n", (None, 45, None)),
    ("", (None, None, None)),
    ("perf: command,failed\n", (None, None, None)),
])
def test_perf_output(text, expected):
    assert tuple(hardware_rows.parse_perf(text).values()) == expected


def test_one_repetition_is_the_difference_over_their_number():
    more, less = {"instructions": 1000, "cycles": 500, "cache-misses": None}, {"instructions": 200, "cycles": None, "cache-misses": 1}
    assert hardware_rows.difference(more, less, 4) == {"instructions": 200.0, "cycles": None, "cache-misses": None}


def test_without_perf_nothing_is_exposed(monkeypatch):
    monkeypatch.setattr(hardware_check.shutil, "which", lambda name: None)
    assert hardware_check.count_events(["false"]) == NOTHING and not hardware_check.is_exposed()


def test_a_layer_is_counted_alone_and_without_the_reads_before_it(monkeypatch):
    seen = []

    def count_events(command: list[str]) -> dict:
        seen.append(flags := dict(zip(command[1::2], command[2::2])))
        return dict(NOTHING, instructions={"full": 4400, "select": 5400, "reuse": 800, "read": 400}[flags["--only"]])

    monkeypatch.setattr(hardware_check, "count_events", count_events)
    args = hardware_check.parse("./bench-kernels -r 3 -t 2".split())
    found = hardware_check.layer_counts(args, "avx2", "f16", 500, counting=True)
    assert {kind: counts["instructions"] for kind, counts in found.items()} == {"full": 1000, "select": 1250, "reuse": 100}
    assert {(flags["--threads"], flags["--n-kv"], flags["--top-k"]) for flags in seen} == {("1", "500", "500")}


def test_a_step_is_counted_without_loading_and_filling(monkeypatch):
    monkeypatch.setattr(hardware_check, "count_events", lambda command: dict(NOTHING, cycles=10_000 + 7 * int(command[-1])))
    assert hardware_check.step_counts(["bench"], {"n_depth": 5, "arm": "full"}) == dict(NOTHING, cycles=7.0)


# ---- whole steps

SHAPE = Shape(layers=4, heads=4, head_size_k=64, head_size_v=64, heads_kv=2, weights=1_000_000, weight_bytes=500_000)


def bench_rows(**changes) -> list[dict]:
    speeds = {"stock-fa1": 100.0, "stock-fa0": 125.0, "full": 200.0, "hylra": 250.0}
    common = {"type_k": "f16", "type_v": "q8_0", "n_depth": 1000, "n_threads": 2, "fill": "synthetic", "n_generated": 8, "hylra_sparse_steps": 9}
    return [{**common, "arm": arm, "median_ts": speed, **changes} for arm, speed in speeds.items()]


@pytest.mark.parametrize("changes, cells", [
    ({}, 2 * 1000 + 2 * 64), ({"n_depth": 50}, 4 * 50), ({"hylra_sparse_steps": 0}, 4 * 1000), ({"arm": "full"}, 4 * 1000)])
def test_cells_that_a_step_reads(changes, cells):
    assert hardware_rows.cells_read({**bench_rows()[3], **changes}, policy("SRSR"), 4) == cells


def test_steps_read_the_weights_and_the_cells():
    rows = hardware_rows.step_rows(bench_rows(), SHAPE, policy("SRSR"), 1e9, {(1000, row["arm"]): NOTHING for row in bench_rows()})
    cell_bytes = 2 * (64 * 2 + 64 * 34 / 32)
    assert [row["kv_bytes"] for row in rows] == [4000 * cell_bytes] * 3 + [2128 * cell_bytes]
    assert [row["bytes"] for row in rows] == [500_000 + row["kv_bytes"] for row in rows]
    assert [row["flops"] for row in rows] == [2_000_000 + cells * 2 * 4 * 128 for cells in (4000, 4000, 4000, 2128)]
    assert [row["ms"] for row in rows] == [10.0, 8.0, 5.0, 4.0] and [row["gain"] for row in rows] == [0.8, 1.0, 1.6, 2.0]
    assert [row["memory_gain"] for row in rows] == [1.0] * 3 + [round(rows[0]["bytes"] / rows[3]["bytes"], 2)]
    assert [row["flops_gain"] for row in rows] == [1.0] * 3 + [round(rows[0]["flops"] / rows[3]["flops"], 2)]


@pytest.mark.parametrize("tied", [True, False])
def test_the_embedding_is_read_where_it_is_the_output(tied, tmp_path):
    shape = hardware_rows.read_shape(str(write_tiny_model(tmp_path / "tiny.gguf", tied=tied)))
    per_layer = 2 * 64 + 64 * (4 * 64 + 2 * 2 * 64 + 4 * 64) + 3 * 64 * 96
    weights = 4 * per_layer + 64 + 96 * 64
    assert (shape.layers, shape.heads, shape.heads_kv, shape.weights, shape.weight_bytes) == (4, 4, 2, weights, 4 * weights)
    assert shape.cell_bytes("f16", "f16") == 2 * 2 * 64 * 2


def test_a_model_with_a_sliding_window_is_refused(tmp_path):
    path = str(write_tiny_model(tmp_path / "tiny.gguf", sliding_window=64))
    with pytest.raises(ModelFileError, match="llama.attention.sliding_window is set"):
        hardware_rows.read_shape(path)


# ---- the tool

FAKE = """#!{python}
import json, sys
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if flags["--isa"] == "ref":
    sys.exit("bench-kernels: --isa ref: this build or machine does not have it")
print(json.dumps([{{**json.loads('{result}'), "isa": flags["--isa"], "type": flags["--type"], "n_kv": int(flags["--n-kv"])}}]))
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A bench-kernels that prints canned numbers; a model with a policy; no counters, a known peak"""
    (tmp_path / "bench-kernels").write_text(FAKE.format(python=sys.executable, result=json.dumps(result())))
    (tmp_path / "bench-kernels").chmod(0o755)
    write_policy(write_tiny_model(tmp_path / "plain.gguf"), policy("SRSR"), tmp_path / "tiny.gguf")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hardware_check, "is_exposed", lambda: False)
    monkeypatch.setattr(hardware_check, "peak_flops_per_s", lambda threads: 1e11)
    return tmp_path


def test_the_whole_tool(fake, capsys):
    line = "./bench-kernels --n-kv 1000,2000 --type f16,q8_0 --isa avx2,base --model tiny.gguf -d 300 -n 1 -r 1 -t 1 -o json --png roof.png"
    assert hardware_check.main(line.split()) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["layers"]) == 2 * 2 * 2 * 3 and {row["of_fastest_isa"] for row in found["layers"]} == {1.0}
    assert [row["arm"] for row in found["steps"]] == ["stock-fa1", "stock-fa0", "full", "hylra"]
    assert found["machine"]["counters"] == NOT_EXPOSED and found["machine"]["read_bytes_per_s"] == pytest.approx(1e10, rel=0.01)
    assert (fake / "roof.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_tables(fake, capsys):
    assert hardware_check.main("./bench-kernels --n-kv 1000 --type f16 --isa avx2".split()) == 0
    assert [line.split(" | ")[5] for line in capsys.readouterr().out.splitlines() if line.startswith("| avx2")] == ["full", "select", "reuse"]


@pytest.mark.parametrize("line, words", [
    ("./nothing", "./nothing: No such file or directory; name a program"),
    ("./bench-kernels --isa ref", "bench-kernels failed: bench-kernels: --isa ref: this build or machine does not have it"),
    ("./bench-kernels --isa avx2 --model plain.gguf", "plain.gguf"),
    ("./bench-kernels --isa avx2 --model none.gguf", "none.gguf"),
])
def test_errors_are_one_line(fake, capsys, line, words):
    assert hardware_check.main([*line.split(), "-r", "1"]) == 2
    out = capsys.readouterr()
    assert out.out == "" and words in out.err.splitlines()[-1]


def test_a_point_under_the_roof_is_limited_by_one_of_both():
    assert [hardware_rows.roof(x, 1e10, 1e11) for x in (1, 10, 100)] == [1e10, 1e11, 1e11]
    low, high = hardware_rows.spread_of([{"flops_per_byte": 3.0}, {"flops_per_byte": 9.0}])
    assert low < 3 and high > 9
