"""What a profile hands out, its file, and the files and questions that it refuses."""

from __future__ import annotations

import json

import numpy as np
import pytest

from profiles import make_profile
from support import write_tiny_model

from hylra_gguf.errors import ProfileError
from hylra_gguf.gguf_header import strip, write_policy
from hylra_gguf.policy import Policy
from hylra_gguf.profile_data import UNIT, Profile, array_shapes, is_pair, model_identity

N, HEADS = 3, 2


def random_profile(seed=0, **changes) -> Profile:
    """Random arrays with the layer of each pair in order, 5 samples of which 2 are held out"""
    rng = np.random.default_rng(seed)
    arrays = {}
    for key, shape in array_shapes(N, HEADS, [300, 512], [1, 16]).items():
        arrays[key] = rng.random(shape)
        if is_pair(key):
            arrays[key][np.tril_indices(N, -1)] = 0
    return make_profile(np.zeros((N, N)), block_sizes=(1, 16), samples=5, heldout_samples=2, arrays=arrays, **changes)


# -- accessors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, lists, block_size, key", [
    ("recall", "layer", 1, "recall.layer.512.1"), ("recall", "layer", 16, "recall.layer.512.16"),
    ("overlap", "layer", 16, "overlap.layer.512.16"), ("overlap", "head", 1, "overlap.head.512")])
def test_matrix_is_the_mean_of_the_asked_half_or_of_all_samples(name, lists, block_size, key):
    profile = random_profile()
    fit, heldout, low = (profile.arrays[f"{key}.{part}"] for part in ("fit", "heldout", "low"))
    for split, expected in (("fit", fit), ("heldout", heldout), ("all", 0.6 * fit + 0.4 * heldout)):
        np.testing.assert_allclose(profile.matrix(name, 512, block_size, lists=lists, split=split), expected)
    np.testing.assert_array_equal(profile.matrix(name, 512, block_size, "low", lists), low)


@pytest.mark.parametrize("split", ["fit", "heldout", "all"])
def test_recall_per_head_follows_the_map_of_the_fit_half(split):
    profile = random_profile()
    mean = profile.head_recall(512, split)
    for i in range(N):
        for j in range(i, N):
            chosen = profile.head_map(512, i, j)
            assert chosen == [max(range(HEADS), key=lambda a: profile.head_recall(512, "fit")[i, j, a, b]) for b in range(HEADS)]
            expected = np.mean([mean[i, j, a, b] for b, a in enumerate(chosen)])
            assert profile.matrix("recall", 512, lists="head", split=split)[i, j] == pytest.approx(expected)


def test_overlap_free_leaves_the_forced_cells_out():
    sets = {0: set(range(260)) | set(range(300, 340)), 1: set(range(260)) | set(range(330, 370))}  # of 300 cells each, 260 forced
    shared = len(sets[0] & sets[1]) / 300
    profile = make_profile(2 * shared * np.ones((3, 3)), eligible=[True, True, False])
    free = profile.matrix("overlap_free", 300)
    assert free[0, 1] == pytest.approx(10 / 40)
    assert not free[2].any() and not free[:, 2].any() and not np.tril(free, -1).any()


@pytest.mark.parametrize("contexts, n_ctx_train, context, top_k, expected", [
    ([8192], 8192, None, 2048, 2048),
    ([8192], 32768, None, 2048, 512),
    ([8192], 16384, None, 2048, 1024),
    ([8192], 32768, 8192, 2048, 2048),
    ([8192], 8192, 2048, 2048, 2048),  # a shorter context leaves out less, which was not measured
    ([8192], 131072, None, 2048, 512),  # 128 was not measured
    ([4096, 12288], 16384, None, 2048, 1024),
    ([32768], 32768, None, 512, 512),
])
def test_the_share_of_the_cells_is_that_of_the_context_planned_for(contexts, n_ctx_train, context, top_k, expected):
    profile = make_profile(np.eye(2), top_k=(512, 1024, 2048), contexts=contexts, n_ctx_train=n_ctx_train)
    assert profile.edge_k(top_k, context) == expected


@pytest.mark.parametrize("name, top_k, lists, key", [
    ("sensitivity", 300, "layer", "sensitivity.layer.300"), ("sensitivity", 512, "head", "sensitivity.head.512"),
    ("sparsity", None, "head", "sparsity.head"), ("importance", None, "layer", "importance")])
def test_layer_statistics(name, top_k, lists, key):
    profile = random_profile()
    for statistic in ("low", "high"):
        np.testing.assert_array_equal(profile.layer(name, top_k, statistic, lists), profile.arrays[f"{key}.{statistic}"])
    np.testing.assert_array_equal(profile.layer(name, top_k, lists=lists, split="heldout"), profile.arrays[f"{key}.heldout"])


def test_layer_heads():
    profile = random_profile()
    np.testing.assert_array_equal(profile.layer_heads("sensitivity", 512, "fit"), profile.arrays["sensitivity.each_head.512.fit"])
    np.testing.assert_array_equal(profile.layer_heads("sparsity", split="heldout"), profile.arrays["sparsity.each_head.heldout"])


@pytest.mark.parametrize("ask, words", [
    (lambda p: p.matrix("recall", 1024), "top_k 1024: the profile holds 300 512"),
    (lambda p: p.matrix("recall", 512, 32), "block size 32: the profile holds 1 16"),
    (lambda p: p.matrix("recall", 512, 16, lists="head"), "lists per KV head were measured for cells only"),
    (lambda p: p.matrix("likeness", 512), "name 'likeness': expected one of recall overlap overlap_free"),
    (lambda p: p.matrix("recall", 512, statistic="high"), "statistic 'high': expected one of mean low"),
    (lambda p: p.matrix("recall", 512, statistic="low", split="fit"), "quantiles are over all samples"),
    (lambda p: p.matrix("recall", 512, split="test"), "split 'test'"),
    (lambda p: p.layer("sensitivity"), "top_k None: the profile holds"),
    (lambda p: p.layer_heads("importance"), "name 'importance'"),
    (lambda p: make_profile(np.zeros((2, 2)), samples=1, heldout_samples=0).matrix("recall", 512, split="heldout"), "no held-out samples"),
])
def test_what_was_not_measured_is_refused_in_one_line(ask, words):
    with pytest.raises(ProfileError, match=words) as caught:
        ask(random_profile())
    assert "\n" not in str(caught.value)


# -- the file ---------------------------------------------------------------------------------------------------------


def test_profile_survives_its_file(tmp_path):
    before, path = random_profile(), tmp_path / "profile.json"
    before.arrays["importance.fit"][1] = np.nan
    before.save(path)
    after = Profile.load(path)
    for name in ("model", "eligible", "top_k", "block_sizes", "contexts", "samples", "heldout_samples", "identity", "texts"):
        assert getattr(after, name) == getattr(before, name)
    for key, array in before.arrays.items():
        np.testing.assert_allclose(after.arrays[key], array, atol=UNIT / 2 + 1e-9)
    assert list(tmp_path.iterdir()) == [path]


def test_a_profile_of_64_layers_stays_below_10_megabytes():
    profile = make_profile(np.full((64, 64), 0.9876), heads=8, top_k=(512, 1024, 2048), block_sizes=(1, 16, 32, 64, 128))
    assert len(profile.to_json()) < 10e6


def drop(key):
    return lambda values: values.pop(key)


def put(key, value):
    return lambda values: values.update({key: value})


def put_array(key, value):
    return lambda values: values["arrays"].update({key: value})


@pytest.mark.parametrize("change, words", [
    (drop("version"), "no key 'version'"), (put("version", 1), "version 1, expected 3; profile the model again"),
    (put("version", "3"), "version '3', expected 3"), (put("extra", 1), "unknown: extra"), (drop("arrays"), "unknown: arrays"),
    (put("samples", 0), "samples is 0"), (put("samples", True), "samples is True"), (put("layer_count", "3"), "layer_count is '3'"),
    (put("heldout_samples", 5), "5 of 5 samples held out"), (put("eligible", [True]), "eligible is not 3 times"),
    (put("top_k", []), r"top_k is \[\]"), (put("top_k", [300, 300]), r"top_k is \[300, 300\]"),
    (put("top_k", [100, 512]), "top_k 100 is below the 260 sink and recent"), (put("contexts", [0]), "contexts is"),
    (put("block_sizes", [1]), "arrays missing or unknown, first overlap.layer.300.16"), (put("layer_count", 4), "eligible is not 4"),
    (put("texts", "a"), "texts is 'a'"), (put("identity", None), "identity is None"), (put("forward_s", -1), "forward_s is -1"),
    (put("arrays", [1]), "arrays missing or unknown"), (put("head_kv_count", 3), "array .* does not hold the expected numbers"),
    (put_array("recall.layer.300.1.fit", [1, 2]), "array recall.layer.300.1.fit"),
    (put_array("recall.layer.300.1.fit", [10002] * 6), "array recall.layer.300.1.fit"),
    (put_array("recall.layer.300.1.fit", [None] * 6), "array recall.layer.300.1.fit"),
    (put_array("sensitivity.layer.300.fit", [-1] * 3), "array sensitivity.layer.300.fit"),
    (put_array("sensitivity.layer.300.fit", ["x"] * 3), "array sensitivity.layer.300.fit"),
    (put_array("sensitivity.layer.300.fit", 5), "array sensitivity.layer.300.fit"),
    (put_array("recall.layer.1024.1.fit", [0] * 6), "1 arrays missing or unknown, first recall.layer.1024.1.fit"),
])
def test_damaged_profiles_are_one_line(tmp_path, change, words):
    values = json.loads(random_profile().to_json())
    change(values)
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(values))
    with pytest.raises(ProfileError, match=words) as caught:
        Profile.load(path)
    assert "\n" not in str(caught.value) and "profile.json" in str(caught.value)


@pytest.mark.parametrize("content, words", [
    (None, "cannot read"), (b"{", "no JSON"), (b"\xff\xfe", "no JSON"), (b"[1]", "not a profile"), (b"[" * 100_000, "no JSON")])
def test_files_that_are_no_profile(tmp_path, content, words):
    path = tmp_path / "profile.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ProfileError, match=words):
        Profile.load(path)


# -- the model --------------------------------------------------------------------------------------------------------


def test_identity_belongs_to_the_weights(tmp_path):
    model, other = (write_tiny_model(tmp_path / f"{seed}.gguf", n_layer=2, seed=seed) for seed in (0, 1))
    profile = make_profile(np.zeros((2, 2)), identity=model_identity(model))
    profile.check_model(model)
    with pytest.raises(ProfileError, match=r"1.gguf: the profile is of another model \(tiny.gguf, llama, 2 layers\)"):
        profile.check_model(other)


def test_identity_outlives_a_policy_in_the_file(tmp_path):
    model = write_tiny_model(tmp_path / "m.gguf", n_layer=2)
    before = model_identity(model)
    write_policy(model, Policy(layer_mode=[1, 2], layer_source=[0, 0], head_kv_count=2, top_k=512))
    assert model_identity(model) == before
    strip(model)
    assert model_identity(model) == before
