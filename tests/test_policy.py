"""The policy's rules, its JSON and GGUF forms, and what people read of it."""

from __future__ import annotations

import dataclasses
import json
import os
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hylra_gguf.errors import HylraError, PolicyError
from hylra_gguf.policy import FULL, REUSE, SELECT, Policy, ranges

PLAIN = dict(layer_mode=(1, 2, 0, 1, 2, 2), layer_source=(0, 0, -1, 3, 3, 0), head_kv_count=2)
MEASURED = {"kld": 0.005, "speedup_8192": 2.5, "model_sha256": "0f" * 32}
RICH = dict(
    PLAIN, lists=2, head_map=(0, 1) * 6, top_k=1024, top_k_fraction=0.1, block_size=32, sink_tokens=8, recent_tokens=64,
    min_context=8192, enabled=False, summary="one", tool="two", calibration="three ü", similarity="recall", theta=0.95,
    sensitivity=(0.25, 0.016, 0.1, 0.2, 0.3, 0.4), overlap=tuple(i / 36 for i in range(36)), measured=MEASURED,
)
BUDGETS = dict(PLAIN, layer_top_k=(2048, 0, 0, 512, 0, 0))
SPARSE = dict(PLAIN, sparse_select=(1, 0, 0, 0, 0, 0), top_k=1024)


def test_budgets_per_layer_survive_json_and_gguf_and_are_shown():
    policy = Policy(**BUDGETS)
    assert policy.to_gguf()["hylra.layer_top_k"] == ("u32[]", [2048, 0, 0, 512, 0, 0])
    assert Policy.from_gguf_kv(policy.to_gguf()) == Policy.from_dict(json.loads(policy.to_json())) == policy
    assert "| 512: 3, 2048: 0 " in policy.describe() and "budgets" not in Policy(**PLAIN).describe()


def test_sparse_select_layers_survive_json_and_gguf_and_are_shown():
    policy = Policy(**SPARSE)
    assert policy.to_gguf()["hylra.sparse_select"] == ("u32[]", [1, 0, 0, 0, 0, 0])
    assert Policy.from_gguf_kv(policy.to_gguf()) == Policy.from_dict(json.loads(policy.to_json())) == policy
    assert "| sparse select | 0 " in policy.describe() and all("sparse select" not in Policy(**{**PLAIN, "sparse_select": none}).describe() for none in (None, (0,) * 6))


@pytest.mark.parametrize("n_kv, cells, saved", [(8192, [1024], 0.375), (2049, [1024], 0.5 - 1024 / 2049), (2048, [], 0)])
def test_a_sparse_select_layer_saves_half_but_for_its_cells(n_kv, cells, saved):
    dense, sparse = Policy(**{**SPARSE, "sparse_select": None}), Policy(**SPARSE)
    assert sparse.sparse_select_cells(n_kv) == cells
    for policy in (dense, sparse):
        object.__setattr__(policy, "min_context", 0)
    assert sparse.reads_saved(n_kv) - dense.reads_saved(n_kv) == pytest.approx(saved / 6)


def test_top_k_of_a_share_of_the_cache():
    policy = Policy(**PLAIN, top_k=300, top_k_fraction=0.25)
    assert [policy.cells_of(0, n_kv) for n_kv in (512, 1201, 8192)] == [300, 301, 2048]


def test_budgets_per_layer_count_in_the_reads_saved():
    policy = Policy(**BUDGETS)
    assert policy.reuse_cells(8192) == [2048, 512, 2048]
    assert policy.reads_saved(8192) == pytest.approx((0.75 + 0.9375 + 0.75) / 6)
    assert policy.reads_saved(4096) == pytest.approx((0.5 + 0.875 + 0.5) / 6)


def test_floats_are_the_ones_that_gguf_stores():
    policy = Policy(**RICH)
    assert policy.theta == 0.95 and np.float32(policy.theta) == np.float32(0.95)
    assert policy.overlap[1] != 1 / 36 and np.float32(policy.overlap[1]) == np.float32(1 / 36)


def test_numpy_values_become_plain_ones():
    policy = Policy(np.array(PLAIN["layer_mode"], dtype=np.int64), list(PLAIN["layer_source"]), np.int32(2), theta=np.float32(0.5),
                    overlap=np.zeros((6, 6)), enabled=np.bool_(True))
    assert policy == Policy(**PLAIN, theta=0.5, overlap=(0.0,) * 36)
    assert type(policy.layer_mode[0]) is int and type(policy.theta) is float and type(policy.enabled) is bool


@pytest.mark.parametrize("changes, words", [
    (dict(version=2), ("version 2", "newer")),
    (dict(version=0), ("version 0", "expected 1")),
    (dict(sparse_select=(1, 0)), ("sparse_select has 2 values", "expected 6")),
    (dict(sparse_select=(2, 0, 0, 0, 0, 0)), ("sparse_select[0] is 2", "0 or 1")),
    (dict(sparse_select=(1, 1, 0, 0, 0, 0)), ("sparse_select[1] is 1", "does not select")),
    (dict(layer_mode=(), layer_source=()), ("layer_mode is empty",)),
    (dict(layer_mode=(1, 2)), ("layer_source has 6 values", "expected 2")),
    (dict(layer_mode=(1, 3, 0, 1, 2, 2)), ("layer_mode[1] is 3",)),
    (dict(layer_mode="FSR"), ("layer_mode", "expected a list")),
    (dict(layer_mode=(1, 2, 0, 1, 2, True)), ("layer_mode[5] is True",)),
    (dict(layer_mode=(1, 2, 0, 1, 2, 2.0)), ("layer_mode[5] is 2.0",)),
    (dict(layer_mode=None), ("layer_mode is None",)),
    (dict(layer_source=(0, 0, 0, 3, 3, 3)), ("layer_source[2] is 0", "expected -1")),
    (dict(layer_source=(-1, 0, -1, 3, 3, 3)), ("layer_source[0] is -1", "expected 0")),
    (dict(layer_source=(0, 0, -1, 3, 5, 3)), ("layer_source[4] is 5", "before layer 4")),
    (dict(layer_source=(0, 0, -1, 3, 4, 3), layer_top_k=(512, 0, 0, 2048, 0, 0)), ("layer_source[4] is 4", "remove layer_top_k")),
    (dict(layer_source=(0, 0, -1, 3, -1, 3)), ("layer_source[4] is -1",)),
    (dict(layer_source=(0, 0, -1, 3, 2, 3)), ("layer_source[4] is 2", "no select layer")),
    (dict(layer_source=(0, 0, -1, 3, 1, 3)), ("layer_source[4] is 1", "no select layer")),
    (dict(layer_top_k=(1, 2)), ("layer_top_k has 2 values", "expected 6")),
    (dict(layer_top_k=(2048, 300, 0, 300, 0, 0)), ("layer_top_k[1] is 300", "does not select")),
    (dict(layer_top_k=(2048, 0, 0, 259, 0, 0)), ("layer_top_k[3] is 259", "expected 260")),
    (dict(layer_top_k=(2048, 0, 0, 0, 0, 0)), ("layer_top_k[3] is 0", "expected 260")),
    (dict(layer_top_k=(2048, 0, 0, 2049, 0, 0)), ("layer_top_k[3] is 2049", "to 2048 (top_k)")),
    (dict(layer_top_k=(1024, 0, 0, 512, 0, 0)), ("top_k is 2048, expected 1024",)),
    (dict(layer_top_k=(2048, 0, 0, 512, 0, 0), top_k_fraction=0.1), ("layer_top_k and top_k_fraction are both set",)),
    (dict(head_kv_count=0), ("head_kv_count is 0",)),
    (dict(lists=3), ("lists is 3", "1 or head_kv_count (2)")),
    (dict(lists=0), ("lists is 0",)),
    (dict(head_map=(0,) * 11), ("head_map has 11 values", "expected 12")),
    (dict(head_map=(0,) * 11 + (2,)), ("head_map[11] is 2", "0 to 1")),
    (dict(head_map=(-1,) + (0,) * 11), ("head_map[0] is -1",)),
    (dict(top_k=259), ("top_k is 259", "4 + 256")),
    (dict(top_k=0, sink_tokens=0, recent_tokens=0), ("top_k is 0", "at least 1")),
    (dict(top_k=2**31), ("top_k is 2147483648",)),
    (dict(top_k=-1), ("top_k is -1",)),
    (dict(top_k=True), ("top_k is True",)),
    (dict(top_k_fraction=0.0), ("top_k_fraction is 0.0",)),
    (dict(top_k_fraction=1.5), ("top_k_fraction is 1.5",)),
    (dict(block_size=0), ("block_size is 0",)),
    (dict(block_size=8), ("block_size is 8",)),
    (dict(block_size=48), ("block_size is 48",)),
    (dict(block_size=256), ("block_size is 256",)),
    (dict(prefill=1), ("prefill is 1",)),
    (dict(enabled=1), ("enabled is 1", "true or false")),
    (dict(theta=0.0), ("theta is 0.0",)),
    (dict(theta=1e-60), ("theta is 0.0",)),
    (dict(theta=1.01), ("theta is 1.01",)),
    (dict(theta=float("nan")), ("theta is nan",)),
    (dict(theta=float("inf")), ("theta is inf",)),
    (dict(theta="0.9"), ("theta is '0.9'",)),
    (dict(sensitivity=(0.1,) * 5), ("sensitivity has 5 values",)),
    (dict(sensitivity=(0.1,) * 5 + (float("nan"),)), ("sensitivity[5] is nan",)),
    (dict(overlap=(0.1,) * 6), ("overlap has 6 values", "expected 36")),
    (dict(overlap=(1e39,) * 36), ("overlap[0] is 1e+39",)),
    (dict(summary="two\nlines"), ("summary", "one line")),
    (dict(tool="\x1b[31mred"), ("tool", "one line")),
    (dict(calibration="\ud800"), ("calibration", "one line")),
    (dict(similarity=None), ("similarity is None",)),
    (dict(summary="x" * 70000), ("summary has 70000 bytes",)),
    (dict(measured={"KLD": 1.0}), ("measured.'KLD'",)),
    (dict(measured={"kld": float("nan")}), ("measured.kld is nan",)),
    (dict(measured={"kld": "0.1"}), ("measured.kld is '0.1'",)),
    (dict(measured={"model_sha256": "abc"}), ("measured.model_sha256", "64 hexadecimal")),
    (dict(measured=[1]), ("measured is [1]",)),
])
def test_a_broken_rule_is_one_line(changes, words):
    with pytest.raises(PolicyError) as caught:
        Policy(**{**PLAIN, **changes})
    assert_one_line(caught.value, words)


def assert_one_line(error, words):
    text = str(error)
    assert isinstance(error, HylraError) and "\n" not in text and text.isprintable() and len(text) < 300
    assert all(word in text for word in words), text


@pytest.mark.parametrize("counts, word", [((7, None), "6 layers, but the model has 7"), ((6, 4), "2 KV heads, but the model has 4")])
def test_a_policy_of_another_model_is_refused(counts, word):
    Policy(**PLAIN).validate(6, 2)
    with pytest.raises(PolicyError, match=word):
        Policy(**PLAIN).validate(*counts)


@pytest.mark.parametrize("fields", [PLAIN, RICH, SPARSE])
def test_every_form_gives_the_policy_back(fields, tmp_path):
    policy, path = Policy(**fields), tmp_path / "policy.json"
    policy.save(path)
    assert Policy.load(path) == Policy.from_dict(policy.to_dict()) == Policy.from_gguf_kv(policy.to_gguf()) == policy
    assert json.loads(path.read_text()) == policy.to_dict()
    assert os.listdir(tmp_path) == ["policy.json"]


def test_the_keys_are_those_of_the_design():
    assert list(Policy(**PLAIN).to_dict()) == [
        "version", "enabled", "layer_count", "head_kv_count", "layer_mode", "layer_source", "lists", "top_k", "block_size",
        "sink_tokens", "recent_tokens", "min_context", "prefill"]
    kv = Policy(**RICH).to_gguf()
    assert set(kv) == {"hylra." + key for key in (
        "version enabled layer_count head_kv_count layer_mode layer_source lists head_map top_k top_k_fraction block_size sink_tokens "
        "recent_tokens min_context prefill summary tool calibration theta similarity sensitivity overlap measured.kld "
        "measured.speedup_8192 measured.model_sha256").split()}
    assert kv["hylra.layer_source"] == ("i32[]", [0, 0, -1, 3, 3, 0]) and kv["hylra.enabled"] == ("bool", False)
    assert kv["hylra.measured.kld"] == ("f32", 0.005) and kv["hylra.measured.model_sha256"][0] == "string"


def test_a_pipe_can_hold_the_policy(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    text = Policy(**PLAIN).to_json()
    writer = threading.Thread(target=lambda: path.write_text(text))
    writer.start()
    assert Policy.load(path) == Policy(**PLAIN)
    writer.join()


def edited(**changes):
    values = {**Policy(**PLAIN).to_dict(), **changes}
    return json.dumps({key: value for key, value in values.items() if value != "gone"})


@pytest.mark.parametrize("text, words", [
    ("", ("not a policy in JSON",)),
    ("{", ("not a policy in JSON",)),
    ("[" * 100000, ("not a policy in JSON",)),
    ("[1]", ("object of keys and values",)),
    ("null", ("object of keys and values",)),
    (b"\xff\xfe{}", ("not a policy in JSON",)),
    (edited(layer_sorce=[1]), ("'layer_sorce'", "not known")),
    (edited(pad="  "), ("'pad'", "not known")),
    (edited(**{"hylra.top_k": 1}), ("'hylra.top_k'", "not known")),
    (edited(version="gone"), ("key version is missing",)),
    (edited(layer_mode="gone"), ("key layer_mode is missing",)),
    (edited(layer_count=5), ("layer_count is 5", "6 values")),
    (edited(layer_count=True), ("layer_count is True",)),
    (edited(version=2, from_the_future=1), ("version 2", "newer")),
    (edited(version="1"), ("version is '1'",)),
    (edited(theta=float("nan")), ("theta is nan",)),
    (edited(**{"measured.kld": None}), ("measured.kld is None",)),
    (edited(layer_mode=None), ("layer_mode is None",)),
    ('{"top_k": 1, "top_k": 2}', ("'top_k'", "twice")),
])
def test_a_broken_policy_file_is_one_line_that_names_it(text, words, tmp_path):
    path = tmp_path / "policy.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(PolicyError) as caught:
        Policy.load(path)
    assert_one_line(caught.value, words)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize("key, typed, words", [
    ("hylra.top_k", ("i32", 2048), ("hylra.top_k has type i32", "expected u32")),
    ("hylra.layer_mode", ("u8[]", (1,) * 6), ("hylra.layer_mode has type u8[]",)),
    ("hylra.theta", ("f64", 0.5), ("hylra.theta has type f64",)),
    ("hylra.tool", ("string[]", None), ("hylra.tool has type string[]",)),
    ("hylra.overlap", ("f32[]", None), ("hylra.overlap is too large",)),
    ("hylra.measured.kld", ("string", "0.1"), ("hylra.measured.kld has type string",)),
    ("hylra.other", ("u32", 1), ("'other'", "not known")),
    ("hylra.version", ("u32", 9), ("version 9", "newer")),
    ("hylra.version", ("string", "1"), ("version is '1'",)),
])
def test_broken_metadata_are_one_line(key, typed, words):
    kv = {**Policy(**PLAIN).to_gguf(), key: typed}
    with pytest.raises(PolicyError) as caught:
        Policy.from_gguf_kv(kv)
    assert_one_line(caught.value, words)


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "policy.json"
    Policy(**PLAIN).save(path)
    before = path.read_bytes()

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(HylraError, match="No space left on device; nothing was changed"):
        Policy(**RICH).save(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["policy.json"]


def test_layer_map_and_summary():
    policy = Policy(**PLAIN)
    assert policy.layer_map() == "SRFSRR" and policy.layer_count == 6
    assert policy.one_line() == "1 full, 2 select, 3 reuse; top_k 2048; from 4096 cached tokens"
    assert "| HyLRA       | on from 4096 cached tokens |" in policy.describe()
    assert "0 > 1 5, 3 > 4" in policy.describe()
    assert "| HyLRA       | off: hylra.enabled is false |" in Policy(**RICH).describe()


@pytest.mark.parametrize("layers, text", [([], "none"), ([0], "0"), ([0, 1], "0 1"), ([0, 1, 2, 5, 7, 8, 9], "0-2 5 7-9")])
def test_ranges(layers, text):
    assert ranges(layers) == text


def test_the_plan_and_what_is_shown_of_it_write_layers_the_same_way():
    policy = Policy((1, 2, 2, 1, 2, 1), (0, 0, 0, 3, 3, 5), 2, sparse_select=(1, 0, 0, 1, 0, 1))
    assert "| 0 > 1 2, 3 > 4 " in policy.describe() and "| sparse select | 0 3 5 " in policy.describe()


@pytest.mark.parametrize("changes, n_kv, expected", [
    ({}, 4095, 0.0),
    ({}, 4096, 3 / 6 * (1 - 2048 / 4096)),
    ({}, 16384, 3 / 6 * (1 - 2048 / 16384)),
    (dict(top_k_fraction=0.25), 16384, 3 / 6 * (1 - 4096 / 16384)),
    (dict(top_k_fraction=0.25), 4096, 3 / 6 * (1 - 2048 / 4096)),
    (dict(min_context=0), 1000, 0.0),
    (dict(min_context=0), 0, 0.0),
    (dict(enabled=False), 16384, 0.0),
    (dict(layer_source=(0, 0, -1, 3, 4, 0)), 16384, 2 / 6 * (1 - 2048 / 16384)),  # layer 4 is its own source
])
def test_reads_saved(changes, n_kv, expected):
    assert Policy(**{**PLAIN, **changes}).reads_saved(n_kv) == pytest.approx(expected)


LINE = st.text(st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp")), max_size=20)
SINGLE = st.floats(width=32, allow_nan=False, allow_infinity=False)
SHARE = st.floats(min_value=0.001, max_value=1.0)


@st.composite
def policies(draw):
    modes, sources = [], []
    for layer in range(draw(st.integers(1, 8))):
        selects = [earlier for earlier in range(layer) if modes[earlier] == SELECT]
        mode = draw(st.sampled_from([FULL, SELECT, REUSE] if selects else [FULL, SELECT]))
        modes.append(mode)
        sources.append({FULL: -1, SELECT: layer}.get(mode) if mode != REUSE else draw(st.sampled_from(selects)))
    layers, heads = len(modes), draw(st.integers(1, 4))
    sink, recent = draw(st.integers(0, 64)), draw(st.integers(0, 512))

    def vector(item, count):
        return st.none() | st.lists(item, min_size=count, max_size=count)

    return Policy(
        modes, sources, heads, lists=draw(st.sampled_from([1, heads])),
        head_map=draw(vector(st.integers(0, heads - 1), layers * heads)),
        top_k=draw(st.integers(max(1, sink + recent), 2**31 - 1)), top_k_fraction=draw(st.none() | SHARE),
        block_size=draw(st.sampled_from([1, 16, 32, 64, 128])), sink_tokens=sink, recent_tokens=recent,
        min_context=draw(st.integers(0, 2**31 - 1)), enabled=draw(st.booleans()), summary=draw(LINE), tool=draw(LINE),
        calibration=draw(LINE), similarity=draw(LINE), theta=draw(st.none() | SHARE), sensitivity=draw(vector(SINGLE, layers)),
        overlap=draw(vector(SINGLE, layers * layers)),
        measured=draw(st.dictionaries(st.from_regex("speedup_[0-9]{1,5}", fullmatch=True) | st.just("kld"), SINGLE, max_size=3)))


@settings(max_examples=150, deadline=None)
@given(policies())
def test_any_policy_survives_json_and_gguf(policy):
    assert Policy.from_gguf_kv(policy.to_gguf()) == policy
    assert Policy.from_dict(json.loads(policy.to_json())) == policy
    assert dataclasses.replace(policy, enabled=not policy.enabled) != policy
    assert len(policy.describe().splitlines()) <= 14
