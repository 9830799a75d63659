"""The frontier of thetas, the choice from it, and flags that contradict each other."""

from __future__ import annotations

import csv
import io
import json

import numpy as np
import pytest

from hylra_gguf import cli, sweep
from hylra_gguf.errors import PolicyError
from hylra_gguf.flags import parse_sweep
from hylra_gguf.policy import Policy
from profiles import make_profile
from test_cost import MODEL
from test_plan import line

DEPTHS = [1024, 65536]


def rows(profile, thetas, model=MODEL, **options):
    return sweep.frontier(profile, thetas, options, model, DEPTHS)


@pytest.mark.parametrize("text, thetas", [
    ("theta=0.5:0.95:0.05", [0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95]),
    ("theta=0.9:0.9:0.1", [0.9]), ("theta=0.5:0.99:0.3", [0.5, 0.8]),
])
def test_parse_sweep(text, thetas):
    assert parse_sweep(text) == thetas


@pytest.mark.parametrize("text", ["", "0.5:0.9:0.1", "count=1:5:1", "theta=0.5:0.9", "theta=a:0.9:0.1", "theta=0.9:0.5:0.1",
                                  "theta=0:0.5:0.1", "theta=0.5:1.5:0.1", "theta=0.5:0.9:0", "theta=0.5:0.9:nan"])
def test_parse_sweep_refuses(text):
    with pytest.raises(Exception, match="expected theta=LOW:HIGH:STEP"):
        parse_sweep(text)


def test_a_stricter_theta_never_needs_fewer_dense_layers():
    rng = np.random.default_rng(1)
    similarity = np.clip(np.array(line(16, 0.97, 0.02)) - 0.05 * rng.random((16, 16)), 0, 1)
    found = [one.row for one in rows(make_profile(similarity), parse_sweep("theta=0.5:0.95:0.05"))]
    assert [row["dense"] for row in found] == sorted(row["dense"] for row in found) and found[0]["dense"] < found[-1]["dense"]
    speeds = [row[f"tokens_per_s_{DEPTHS[-1]}"] for row in found]
    assert speeds == sorted(speeds, reverse=True)
    for row in found:
        assert row["proven"] and (row["min_recall"] or 1) >= row["theta"] and row["dense"] + row["reuse"] == 16


def test_a_row_says_what_is_lost_and_what_it_brings():
    # line(8): an edge over d layers has recall 0.95 - 0.02 d; at 0.925 every source serves one layer
    one, = rows(make_profile(line(8)), [0.925])
    assert one.row == {
        "theta": 0.925, "dense": 4, "select": 4, "reuse": 4, "min_recall": 0.93, "mean_recall": 0.93, "loss": 0.035, "proven": True,
        "layers": "SRSRSRSR", "tokens_per_s_1024": one.row["tokens_per_s_1024"], "speedup_1024": one.row["speedup_1024"],
        "tokens_per_s_65536": round(1 / (0.012 + 4 * 0.3e-6 * 65536 + 8 * 512e-6), 2),
        "speedup_65536": round((0.020 + 8 * 0.5e-6 * 65536) / (0.012 + 4 * 0.3e-6 * 65536 + 8 * 512e-6), 3),
        "break_even": one.row["break_even"]}
    assert one.row["break_even"] == round(MODEL.break_even(one.policy, [True] * 8))


def test_loss_is_over_the_layers_that_can_take_part():
    eligible = [True, False, True, True]
    one, = rows(make_profile(line(4), eligible), [0.5], model=None)
    assert (one.row["dense"], one.row["reuse"]) == (1, 2)
    assert one.row["loss"] == round((0.09 + 0.11) / 3, 5) and "break_even" not in one.row


def candidate(dense, loss, speedup):
    policy = Policy((0,), (-1,), 1)
    return sweep.Candidate(policy, {"dense": dense, "loss": loss, "speedup_8192": speedup})


TABLE = [candidate(2, 0.07, 2.0), candidate(2, 0.05, 1.9), candidate(4, 0.02, 1.5), candidate(6, 0.01, 1.1)]


@pytest.mark.parametrize("target, most, chosen", [
    (1.4, None, 2), (1.6, None, 1), (1.95, None, 0), (None, 0.06, 1), (None, 0.02, 2), (None, 1, 1), (1.05, 0.05, 3), (1.5, 0.05, 2),
])
def test_choice(target, most, chosen):
    assert sweep.choose(TABLE, [4096, 8192], target, most) is TABLE[chosen]


@pytest.mark.parametrize("target, most, words", [
    (None, 0.005, "--max-loss 0.005: the least of the sweep is 0.01"),
    (2.5, None, "--target-speedup 2.5: the most at 8192 tokens is 2.0"),
    (1.8, 0.02, "--target-speedup 1.8: the most at 8192 tokens is 1.5"),
])
def test_a_choice_that_no_row_meets_is_refused(target, most, words):
    with pytest.raises(PolicyError, match=words):
        sweep.choose(TABLE, [8192], target, most)


@pytest.fixture
def files(tmp_path, monkeypatch):
    make_profile(line(8), top_k=(512, 1024)).save(str(tmp_path / "p.json"))
    MODEL.save(str(tmp_path / "cost.json"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(capsys, text):
    code = cli.main(["plan", "p.json", *text.split()])
    return (code, *capsys.readouterr())


@pytest.mark.parametrize("format", ["md", "csv", "json"])
def test_the_table_is_the_result(format, files, capsys):
    code, out, err = run(capsys, f"--sweep theta=0.85:0.95:0.05 -d 4096 --cost cost.json --format {format}")
    assert code == 0 and err.startswith("cost model:")
    if format == "md":
        assert [line.split(" | ")[0] for line in out.splitlines()] == ["| theta", "| ---", "| 0.85", "| 0.9", "| 0.95"]
        return
    found = json.loads(out) if format == "json" else list(csv.DictReader(io.StringIO(out)))
    assert [float(row["theta"]) for row in found] == [0.85, 0.9, 0.95] and float(found[0]["speedup_4096"]) > 1


def test_depths_where_stock_is_faster_are_marked(files, capsys):
    out = run(capsys, "--sweep theta=0.9:0.9:1 -d 100,65536 --cost cost.json")[1].splitlines()
    cells = dict(zip(out[0].split(" | "), out[2].split(" | ")))
    assert cells["speedup_100"].endswith("(slower)") and "slower" not in cells["speedup_65536"]


def test_without_a_cost_model_the_table_has_no_speed_and_says_how_to_get_it(files, capsys):
    code, out, err = run(capsys, "--sweep theta=0.9:0.9:1")
    assert code == 0 and "tokens_per_s" not in out and err.startswith("no tokens/s without a cost model") and err.count("\n") == 1


def test_a_choice_makes_the_policy_the_result(files, capsys):
    code, out, err = run(capsys, "--max-loss 0.05")
    policy = Policy.from_dict(json.loads(out))
    assert code == 0 and "| theta |" in err and policy.layer_map().count("R") >= 4
    code, out, err = run(capsys, "--sweep theta=0.5:0.95:0.05 --target-speedup 1.01 --cost cost.json -d 65536 -o q.json")
    assert (code, out) == (0, "") and Policy.load("q.json").theta is not None


@pytest.mark.parametrize("text, words", [
    ("-d 4096", "-d has no effect without --sweep"),
    ("--cost cost.json", "--cost has no effect without --sweep"),
    ("--format csv", "--format has no effect without --sweep"),
    ("--sweep theta=0.5:0.9:0.1 --theta 0.9", "--theta has no effect beside --sweep"),
    ("--sweep theta=0.5:0.9:0.1 --strategy jump3", "--strategy jump3 has no effect beside --sweep"),
    ("--max-loss 0.1 --strategy count --count 3", "--strategy count has no effect beside --max-loss"),
    ("--sweep theta=0.5:0.9:0.1 -o q.json", "-o has no policy to write"),
    ("--sweep theta=0.5:0.9:0.1 -d 4096", "-d needs a cost model"),
    ("--target-speedup 1.2", "--target-speedup needs a cost model"),
    ("--sweep theta=0.5:0.9:0.1 --cost cost.json -t 2", "--threads has no effect without --model or --refine"),
    ("--sweep theta=0.5:0.9:0.1 --cost none.json", "none.json: cannot read the cost model"),
    ("--sweep theta=0.5 --cost cost.json", "--sweep theta=0.5: expected theta=LOW:HIGH:STEP"),
    ("--sweep theta=0.5:0.6:0.1 --max-loss 0.0001", "the least of the sweep is"),
    ("--max-loss 2", "argument --max-loss: '2' is no number from 0 to 1"),
    ("--sweep theta=0.5:0.9:0.1 --count 3", "--count has no effect on --strategy hylra"),
])
def test_refusals_are_one_line(text, words, files, capsys):
    code, out, err = run(capsys, text)
    assert (code, out) == (2, "") and words in err and err.splitlines()[-1].startswith("hylra-gguf: error: ")
    assert not (files / "q.json").exists()
