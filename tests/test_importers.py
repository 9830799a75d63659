"""Published layer choices are taken as their systems mean them, or refused because they are for another number of layers."""

from __future__ import annotations

import json

import numpy as np
import pytest

from hylra_gguf import importers, strategies
from hylra_gguf.errors import PolicyError
from test_strategies import GEMMA, make_problem

GLM5_HALF = "FFSFSSSFSSFFFSSSFFFSFSSSSSSFFSFFSFFSSFFFFFFSFFFFFSFFSSSSSSFSFFFSFSSSFSFFSFFSSS"
GLM5_QUARTER = "FFSFSSSFSSFSFSSSSSSSFSSSSSSFSSSFSFSSSSFFFFFSSSFFSSSFSSSSSSSSFSSSFSSSSSSFSFSSSS"


def span(text: str) -> list[int]:
    """"0-2 7" -> [0, 1, 2, 7]"""
    ends = [part.split("-") for part in text.split()]
    return [layer for end in ends for layer in range(int(end[0]), int(end[-1]) + 1)]


# name: (layers, dense, select)
UCM = {
    "qwen3-32b": (64, "0-6 61-63", "7 8 10 12-20 24 30 32 33 34 36 38 39 45"),
    "qwen3-32b before 2026-01-20, shifted by one": (64, "0-5 61-63", "6 7 9 11-19 23 29 31 32 33 35 37 38 44"),
    "qwen3-coder-30b": (48, "0-2", "3-7 10 11 13 18 19 32 34 44"),
    "qwen3-4b": (36, "0-6", "7-17 19 30 31 35"),
    "deepseek-r1": (61, "0-5", "6-9 12 14-21 24-26 34 49"),
    "deepseek-r1 before 2026-03-02": (61, "0-5", "6 8 9 12 14-21 24-26 34 49"),
    "deepseek-v2-lite, truncated from r1": (27, "0-5", "6-9 12 14-21 24 25"),
}


def ucm_file(folder, layers, dense, select, **changes):
    """As UCM writes them: the skip list holds true for the rollback layers too."""
    values = {"model_name": "x", "num_hidden_layers": layers, "vllm_hash_attention_rollback_layers": span(dense),
              "vllm_hash_attention_skip_layers": [layer not in span(select) for layer in range(layers)], **changes}
    path = folder / "gsa.json"
    path.write_text(json.dumps(values))
    return str(path)


@pytest.mark.parametrize("name", UCM)
def test_ucm_lists(name, tmp_path):
    layers, dense, select = UCM[name]
    path = ucm_file(tmp_path, layers, dense, select)
    sources = strategies.choose("ucm", make_problem([True] * layers), ucm=path).sources
    selects, fulls = span(select), span(dense)
    for layer, source in enumerate(sources):
        if layer in fulls:
            assert source == -1
        elif layer in selects:
            assert source == layer or (source == -1 and (layer + 1 in selects + fulls or layer == layers - 1))
        else:
            assert source == max(one for one in selects if one < layer)
    for other in {27, 36, 48, 61, 64} - {layers}:
        with pytest.raises(PolicyError, match=f"written for {layers} layers, but the model has {other}"):
            strategies.choose("ucm", make_problem([True] * other), ucm=path)


@pytest.mark.parametrize("changes, words", [
    ({"vllm_hash_attention_skip_layers": [True] * 8}, "layer 2 reuses, but no layer before it selects"),
    ({"vllm_hash_attention_skip_layers": [False] * 7}, "written for 7 layers"),
    ({"vllm_hash_attention_skip_layers": [2, 3]}, "true or false per layer"),
    ({"vllm_hash_attention_rollback_layers": [0, 8]}, "names layers 0 to 8, expected 0 to 7"),
    ({"num_hidden_layers": 9}, "written for 9 layers, but the model has 8"),
])
def test_ucm_refusals(changes, words, tmp_path):
    with pytest.raises(PolicyError, match=words) as caught:
        strategies.choose("ucm", make_problem(), ucm=ucm_file(tmp_path, 8, "0-1", "2 5", **changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text, words", [
    (json.dumps({"num_hidden_layers": 64, "top_k_ratio_per_layer": [1] * 64}), "names no layers"),  # as for QwQ-32B
    ("[]", "names no layers"),
    ("{", "not JSON"),
    (None, "cannot read the configuration"),
])
def test_ucm_files_without_lists(text, words, tmp_path):
    path = tmp_path / "gsa.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(PolicyError, match=words):
        strategies.choose("ucm", make_problem(), ucm=str(path))


@pytest.mark.parametrize("pattern, layers, full", [
    (GLM5_HALF, 78, 40), (GLM5_QUARTER, 78, 22), (GLM5_HALF[:61], 61, 32), ("FFSFSS", 6, 3),
])
def test_patterns(pattern, layers, full):
    assert pattern.count("F") == full
    sources = strategies.choose("pattern", make_problem([True] * layers), pattern=pattern).sources
    for layer, source in enumerate(sources):
        nearest = pattern.rindex("F", 0, layer + 1)
        assert source == nearest or (source == -1 and pattern[layer:layer + 2] in ("FF", "F"))
    for other in {61, 78} - {layers}:
        with pytest.raises(PolicyError, match=f"written for {layers} layers, but the model has {other}"):
            strategies.choose("pattern", make_problem([True] * other), pattern=pattern)


@pytest.mark.parametrize("pattern, words", [
    ("", "no pattern given"), ("FFSx", "found 'x'"), ("FSR", "found 'R'"), ("FS", "written for 2 layers, but the model has 8"),
    ("SFSSSSSS", "layer 0 reuses, but no layer before it selects"),
])
def test_pattern_refusals(pattern, words):
    with pytest.raises(PolicyError, match=words) as caught:
        strategies.choose("pattern", make_problem(), pattern=pattern)
    assert "\n" not in str(caught.value)


def test_a_pattern_skips_layers_with_a_sliding_window():
    assert strategies.choose("pattern", make_problem(GEMMA), pattern="SSFSSFSS").sources == [-1, -1, 2, -1, 2, 5, -1, 5]
    with pytest.raises(PolicyError, match="layer 2 reuses, but no layer before it selects"):
        strategies.choose("pattern", make_problem(GEMMA), pattern="SSSSSFSS")


def test_kascade_head_map(tmp_path):
    np.save(tmp_path / "map.npy", np.arange(8, dtype=np.int32).reshape(4, 2) % 2)
    assert importers.head_map(str(tmp_path / "map.npy"), 4, 2).tolist() == [[0, 1]] * 4


@pytest.mark.parametrize("array, words", [
    (np.zeros((36, 8), np.int32), r"found \[36, 8\], expected whole numbers of \[4 layers, 2 KV heads\]"),
    (np.zeros((4, 2)), "expected whole numbers"),
    (np.full((4, 2), 2), "names KV heads 2 to 2, expected 0 to 1"),
    (np.array([[None, 1]] * 4), "not a .npy file"),
])
def test_head_maps_of_other_models_are_refused(array, words, tmp_path):
    np.save(tmp_path / "map.npy", array)
    with pytest.raises(PolicyError, match=words) as caught:
        importers.head_map(str(tmp_path / "map.npy"), 4, 2)
    assert "\n" not in str(caught.value)


def test_a_missing_head_map_is_one_line(tmp_path):
    with pytest.raises(PolicyError, match="No such file"):
        importers.head_map(str(tmp_path / "none.npy"), 4, 2)
