"""`hylra-gguf report`: what it takes from each kind of file, that text and JSON agree, and that failures are one line and no file."""

from __future__ import annotations

import json
import os
import re
import sys

import numpy as np
import pytest
from profiles import make_profile
from test_gguf_header import write_model

import hylra_gguf
from hylra_gguf import cli, plots, report, report_page
from hylra_gguf.gguf_header import write_policy
from hylra_gguf.plan import plan_policy
from hylra_gguf.policy import Policy
from hylra_gguf.profile_data import Profile

SIMILARITY = [[0.9, 0.95, 0.7, 0.6], [0, 0.92, 0.97, 0.8], [0, 0, 0.93, 0.96], [0, 0, 0, 0.94]]
ODD_NAME = "<script src=http://x.example/a.js>|$_{\x1b[31m"
PROFILE_PICTURES = {"layer-map", "recall", "overlap", "overlap-free", "sensitivity", "sparsity", "importance", "sensitivity-heads",
                    "sparsity-heads", "halves-recall", "halves-overlap", "halves-sensitivity", "halves-sparsity", "frontier"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """profile.json, its default policy and a hand-made one, a model with the policy and one without, and files that do not fit."""
    monkeypatch.chdir(tmp_path)
    profile = varied(make_profile(SIMILARITY, sensitivity=[0.2, 0.01, 0.03, 0.02], block_sizes=(1, 16), model=ODD_NAME))
    profile.save("profile.json")
    varied(make_profile(SIMILARITY, samples=1, heldout_samples=0)).save("one.json")
    policy = plan_policy(profile, "explicit", layers=[1])
    policy.save("policy.json")
    Policy((0, 1, 2, 2), (-1, 1, 1, 1), 2).save("bare.json")
    Policy((1, 2), (0, 0), 2).save("short.json")
    Policy((0, 1, 2, 2), (-1, 1, 1, 1), 2, top_k=999, similarity="recall").save("unmeasured.json")
    write_model(tmp_path / "model.gguf")
    write_policy("model.gguf", policy, "hylra.gguf")
    text = (tmp_path / "profile.json").read_text()
    (tmp_path / "cut.json").write_text(text[:-50])
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "hylra.gguf").read_bytes()[:200])
    (tmp_path / "damaged.json").write_text(text.replace('"sparsity.layer.fit":[', '"sparsity.layer.fit":["x",', 1))
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "broken.json").write_text(json.dumps({**policy.to_dict(), "layer_source": [-1, 1, 1, 2]}))
    (tmp_path / "directory").mkdir()
    return tmp_path


def varied(profile: Profile) -> Profile:
    """Every statistic its own number, so that a swapped one shows."""
    for scale, key in zip(np.linspace(0.8, 1, len(profile.arrays)), sorted(profile.arrays)):
        profile.arrays[key] = np.round(profile.arrays[key] * scale, 4)
    return profile


def run(capsys, *args):
    code = cli.main(["report", *map(str, args)])
    return code, *capsys.readouterr()


def as_json(capsys, *args):
    code, out, err = run(capsys, *args, "--format", "json")
    assert (code, err) == (0, "")
    return json.loads(out)


def section(text: str, title: str) -> list[list[str]]:
    """The table rows below a heading"""
    part = text.split(f"## {title}\n")[1].split("\n## ")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if line.startswith("|")][2:]


# ---- numbers

@pytest.mark.parametrize("lists, block_size", [("layer", 1), ("layer", 16), ("head", 1)])
def test_numbers_are_those_of_the_profile(folder, capsys, lists, block_size):
    profile = Profile.load("profile.json")
    plan_policy(profile, "explicit", layers=[1], lists=lists, block_size=block_size, top_k=300).save("given.json")
    data = as_json(capsys, "profile.json", "--policy", "given.json")
    assert data["top_k"] == 300 and data["plan"]["layer_map"] == "FSRR" and data["plan"]["layer_source"] == [-1, 1, 1, 1]
    for name in report.MATRICES:
        expected = profile.matrix(name, 300, block_size, lists=lists)
        assert np.allclose(np.array(data["matrices"][name], float)[np.triu_indices(4)], expected[np.triu_indices(4)], atol=6e-5)
        assert [edge[name] for edge in data["plan"]["edges"]] == pytest.approx([expected[1, 2], expected[1, 3]], abs=6e-5)
    for k in (300, 512):
        for statistic, wanted in (("mean", {}), ("low", {"statistic": "low"}), ("high", {"statistic": "high"}),
                                  ("fit", {"split": "fit"}), ("heldout", {"split": "heldout"})):
            found = data["layers"]["sensitivity"][str(k)][statistic]
            assert found == pytest.approx(profile.layer("sensitivity", k, lists=lists, **wanted), abs=6e-5), (k, statistic)
    assert np.allclose(data["heads"]["sensitivity"], profile.layer_heads("sensitivity", 300), atol=6e-5)
    assert np.allclose(data["heads"]["sparsity"], profile.layer_heads("sparsity"), atol=6e-5)


def test_halves_correlate_the_pairs_that_can_take_part(folder, capsys):
    profile = Profile.load("profile.json")
    data = as_json(capsys, "profile.json", "--policy", "policy.json")
    fit, heldout = (profile.matrix("recall", 512, split=half)[np.triu_indices(4, 1)] for half in ("fit", "heldout"))
    found = data["halves"]["recall"]
    assert data["halves"]["pairs"] == [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]]
    assert found["fit"] == pytest.approx(fit, abs=6e-5) and found["heldout"] == pytest.approx(heldout, abs=6e-5)
    assert found["correlation"] == pytest.approx(np.corrcoef(fit, heldout)[0, 1], abs=1e-3)
    assert found["largest_difference"] == pytest.approx(np.abs(fit - heldout).max(), abs=6e-5)


def test_the_text_says_what_the_json_says(folder, capsys):
    data, text = as_json(capsys, "profile.json"), run(capsys, "profile.json")[1]
    edges = {edge["layer"]: edge for edge in data["plan"]["edges"]}
    for layer, row in enumerate(section(text, "Layers")):
        edge = edges.get(layer)
        assert row[:3] == [str(layer), report_page.MODE_NAMES[data["plan"]["layer_map"][layer]], str(edge["source"]) if edge else ""]
        assert row[4:7] == [f"{edge[name]:.3f}" if edge else "" for name in report.MATRICES]
        assert row[7:9] == [f"{data['layers']['sensitivity'][k]['mean'][layer]:.3f}" for k in ("300", "512")]
        assert row[9:] == [f"{data['layers'][name]['mean'][layer]:.3f}" for name in ("sparsity", "importance")]
    assert [row[0] for row in section(text, "Frontier")] == [f"{theta:g}" for theta in report.THETAS]
    for row, found in zip(section(text, "Frontier"), data["frontier"]):
        assert row[1:4] == [str(found["dense"] - found["select"]), str(found["select"]), str(found["reuse"])]
        assert row[4] == report_page.number(found["min_recall"])
    assert section(text, "Held-out against fit")[0][2] == f"{data['halves']['recall']['correlation']:.3f}"
    line = text.split("## Recall")[1].splitlines()[7]  # of source 1, after note, column numbers and source 0
    assert line.split()[2:] == [f"{100 * value:.0f}" for value in data["matrices"]["recall"][1][1:]]


def test_frontier_needs_more_dense_layers_for_more_recall(folder, capsys):
    rows = as_json(capsys, "profile.json")["frontier"]
    assert all(row["dense"] + row["reuse"] == 4 for row in rows)
    assert all(a["dense"] <= b["dense"] for a, b in zip(rows, rows[1:])) and rows[0]["dense"] < rows[-1]["dense"]
    assert all(row["min_recall"] is None or row["min_recall"] >= row["theta"] - 1e-4 for row in rows)


def test_each_edge_is_measured_at_the_budget_of_its_source(folder, capsys):
    profile, policy = Profile.load("profile.json"), Policy.load("policy.json").to_dict()
    policy.update(layer_mode=[1, 2, 1, 2], layer_source=[0, 0, 2, 2], layer_top_k=[300, 0, 512, 0], sparse_select=[1, 0, 0, 0])
    (folder / "budgets.json").write_text(json.dumps(policy))
    edges = as_json(capsys, "profile.json", "--policy", "budgets.json")["plan"]["edges"]
    assert [(edge["layer"], edge["source"], edge["top_k"]) for edge in edges] == [(1, 0, 300), (3, 2, 512)]
    expected = [profile.matrix("recall", 300)[0, 1], profile.matrix("recall", 512)[2, 3]]
    assert [edge["recall"] for edge in edges] == pytest.approx(expected, abs=6e-5)


def test_layers_that_take_no_part_stay_blank(folder, capsys):
    make_profile(SIMILARITY, eligible=[True, False, True, True]).save("window.json")
    data = as_json(capsys, "window.json")
    assert data["matrices"]["recall"][0] == [0.9, None, 0.7, 0.6] and data["matrices"]["recall"][1] == [None] * 4
    assert data["layers"]["sparsity"]["mean"][1] is None and data["heads"]["sensitivity"][1] == [None, None]
    assert data["halves"]["pairs"] == [[0, 2], [0, 3], [2, 3]]
    assert set(report.pictures(data)) == PROFILE_PICTURES


# ---- what a file holds

@pytest.mark.parametrize("file, kind, pictures, left_out", [
    ("profile.json", "profile", PROFILE_PICTURES, []),
    ("one.json", "profile", {name for name in PROFILE_PICTURES if "halves" not in name}, ["held-out against fit"]),
    ("policy.json", "policy", {"layer-map", "recall", "sensitivity"}, list(report.ONLY_IN_PROFILE)),
    ("hylra.gguf", "model", {"layer-map", "recall", "sensitivity"}, list(report.ONLY_IN_PROFILE)),
    ("bare.json", "policy", {"layer-map"}, ["similarity of layer pairs", "sensitivity", *report.ONLY_IN_PROFILE]),
])
def test_each_kind_of_file_gives_what_it_holds_and_names_the_rest(folder, capsys, file, kind, pictures, left_out):
    data = as_json(capsys, file)
    assert (data["kind"], data["left_out"]) == (kind, left_out)
    code, out, _ = run(capsys, file, "-o", "r.html", "--png", "png")
    assert code == 0 and {name.split(".")[0] for name in os.listdir("png")} == pictures
    lines = [line for line in out.splitlines() if line.startswith("| left out")]
    assert len(lines) == bool(left_out) and all(name in lines[0] for name in left_out)
    html = (folder / "r.html").read_text()
    assert html.count("<img ") == len(pictures) and all(name in html for name in left_out)


def test_a_policy_file_and_the_model_that_carries_it_say_the_same(folder, capsys):
    of_file, of_model = as_json(capsys, "policy.json"), as_json(capsys, "hylra.gguf")
    policy = Policy.load("policy.json")
    assert {**of_model, "file": 0, "kind": 0} == {**of_file, "file": 0, "kind": 0}
    assert of_file["layers"]["sensitivity"]["512"]["mean"] == pytest.approx(policy.sensitivity, abs=6e-5)
    assert [edge["recall"] for edge in of_file["plan"]["edges"]] == pytest.approx([policy.overlap[4 + 2], policy.overlap[4 + 3]], abs=6e-5)


def test_a_policy_whose_matrix_holds_nothing_has_no_mean(folder, capsys):
    policy = {**Policy.load("policy.json").to_dict(), "overlap": [0.0] * 16}
    (folder / "empty.json").write_text(json.dumps(policy))
    plan = as_json(capsys, "empty.json")["plan"]
    assert (plan["smallest"], plan["mean"]) == (None, None) and [edge["recall"] for edge in plan["edges"]] == [None, None]
    assert run(capsys, "empty.json", "-o", "r.html")[0] == 0


def test_the_name_of_a_picture_is_never_taken_from_the_file(folder, capsys):
    policy = {**Policy.load("policy.json").to_dict(), "similarity": "../../escaped"}
    (folder / "odd.json").write_text(json.dumps(policy))
    assert run(capsys, "odd.json", "--png", "png")[0] == 0
    assert set(os.listdir("png")) == {"layer-map.png", "similarity.png", "sensitivity.png"}


def test_halves_that_do_not_vary_have_no_correlation(folder, capsys):
    make_profile([[0.9] * 3] * 3).save("flat.json")
    assert as_json(capsys, "flat.json")["halves"]["recall"]["correlation"] is None
    assert section(run(capsys, "flat.json", "-o", "r.html")[1], "Held-out against fit")[0][2] == "-"


# ---- the page and the pictures

def test_the_page_is_self_contained_and_escaped(folder, capsys):
    code, out, err = run(capsys, "profile.json", "-o", "r.html")
    html = (folder / "r.html").read_text()
    assert code == 0 and err.startswith("r.html: ") and len(html) < 2 << 20
    sources = re.findall(r"""\b(?:src|href|srcset|data|action)\s*=\s*["']?([^"'\s>]*)""", re.sub(r"&lt;.*?&gt;", "", html))
    assert len(sources) == len(PROFILE_PICTURES) and all(source.startswith("data:image/png;base64,iVBORw0KGgo") for source in sources)
    assert not re.search(r"<(?:script|link|iframe|object|embed)|url\(|@import|\son\w+=", html, re.I)
    assert "&lt;script src=http://x.example/a.js&gt;" in html and 'name="viewport"' in html
    assert "\x1b" not in html + out and "\\|$_{?[31m" in out


def test_png_files_are_the_pictures_of_the_page(folder, capsys):
    run(capsys, "policy.json", "--png", "deep/png")
    content = (folder / "deep/png/recall.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width_px = int.from_bytes(content[16:20], "big")
    assert width_px == round(plots.WIDTH_INCH * plots.DPI)


def test_without_a_target_only_text_is_printed(folder, capsys, monkeypatch):
    monkeypatch.setattr(report, "load_plots", lambda: pytest.fail("the text must not load matplotlib"))
    before = sorted(os.listdir())
    assert run(capsys, "profile.json")[0] == 0 and sorted(os.listdir()) == before


# ---- failures

@pytest.mark.parametrize("args, named, said", [
    (["missing.json"], "missing.json", "No such file"),
    (["directory"], "directory", "not a regular file"),
    (["cut.json"], "cut.json", "neither GGUF nor JSON"),
    (["list.json"], "list.json", "expected a GGUF model, a profile or a policy"),
    (["damaged.json"], "damaged.json", "sparsity.layer.fit"),
    (["broken.json"], "broken.json", "layer_source[3]"),
    (["cut.gguf"], "cut.gguf", ""),
    (["model.gguf"], "model.gguf", "no policy in this model"),
    (["policy.json", "--policy", "policy.json"], "policy.json", "--policy has no effect on a policy"),
    (["profile.json", "--policy", "short.json"], "2 layers", "the model has 4"),
    (["profile.json", "--policy", "missing.json"], "missing.json", "No such file"),
    (["profile.json", "--policy", "unmeasured.json"], "top_k 999", "the profile holds 300 512"),
    (["profile.json", "-o", "hylra.gguf"], "hylra.gguf", "ends in .html"),
    (["policy.json", "-o", "nowhere/r.html"], "nowhere/r.html", "No such file"),
    (["policy.json", "--png", "policy.json"], "policy.json", "File exists"),
])
def test_failures_are_one_line_and_write_nothing(folder, capsys, args, named, said):
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    code, out, err = run(capsys, *args)
    assert (code, out) == (2, "") and err.count("\n") == 1 and named in err and said in err
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def test_without_matplotlib_one_line_says_how_to_get_it(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "hylra_gguf.plots")
    monkeypatch.delattr(hylra_gguf, "plots")
    code, out, err = run(capsys, "policy.json", "-o", "r.html")
    assert (code, out) == (2, "") and err.count("\n") == 1 and "pip install 'hylra-gguf[report]'" in err and not os.path.exists("r.html")
    assert run(capsys, "policy.json")[0] == 0


def test_a_failed_write_leaves_the_old_report(folder, capsys, monkeypatch):
    (folder / "r.html").write_text("old")
    before = sorted(os.listdir())

    def full_disk(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    code, out, err = run(capsys, "policy.json", "-o", "r.html")
    assert (code, out) == (2, "") and "No space left" in err and err.count("\n") == 1
    assert (folder / "r.html").read_text() == "old" and sorted(os.listdir()) == before
