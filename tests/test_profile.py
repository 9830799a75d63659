"""Numerics of one attention node against plain loops, the statistics of a pass, its sampling, its files and its refusals."""

from __future__ import annotations

import ctypes
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from hylra_gguf import measure, profile, texts
from hylra_gguf.errors import ModelFileError, ProfileError
from hylra_gguf.measure import AttentionRows, Collector, SampledRow


def random_rows(n_rows=2, n_head=6, n_head_kv=2, n_kv=40, n_embd_k=8, n_embd_v=5, seed=0, **extra) -> AttentionRows:
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal(shape).astype(np.float32) for shape in
               [(n_rows, n_head, n_embd_k), (n_kv, n_head_kv, n_embd_k), (n_kv, n_head_kv, n_embd_v)])
    return AttentionRows(q=q, k=k, v=v, **{"scale": 0.5, **extra})


def causal_mask(positions, n_kv, alibi=False, window=None) -> np.ndarray:
    cell, row = np.arange(n_kv)[None], np.array(positions)[:, None]
    hidden = (cell > row) | (cell <= row - (window or n_kv + 1))
    return np.where(hidden, -np.inf, -np.abs(row - cell) if alibi else 0).astype(np.float32)


def plain_attention(rows, r, h, slope, cells=None):
    """float64 loops over one row and head: (probability of each cell, output)"""
    g = h // (rows.q.shape[1] // rows.k.shape[1])
    weights = {}
    for j in range(len(rows.k)) if cells is None else cells:
        s = rows.scale * float(np.dot(rows.q[r, h].astype(float), rows.k[j, g].astype(float)))
        s = rows.softcap * math.tanh(s / rows.softcap) if rows.softcap else s
        weights[j] = math.exp(s + (slope * float(rows.mask[r, j]) if rows.mask is not None else 0))
    total = sum(weights.values()) + (math.exp(rows.sinks[h]) if rows.sinks is not None else 0)
    p = {j: w / total for j, w in weights.items()}
    return p, sum(p[j] * rows.v[j, g].astype(float) for j in p)


CASES = {
    "plain": {},
    "causal": {"mask": causal_mask([30, 39], 40)},
    "softcap": {"softcap": 2.0},
    "alibi, heads no power of two": {"mask": causal_mask([30, 39], 40, alibi=True), "max_bias": 8.0},
    "sinks": {"sinks": np.linspace(-1, 3, 6).astype(np.float32)},
    "all": {"mask": causal_mask([20, 39], 40, alibi=True), "max_bias": 4.0, "softcap": 3.0, "sinks": np.ones(6, np.float32)},
}
SLOPES_OF_6_HEADS = {0.0: [1] * 6, 8.0: [1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 2, 1 / 8],
                     4.0: [1 / 2, 1 / 4, 1 / 8, 1 / 16, 2 ** -0.5, 2 ** -1.5]}


@pytest.mark.parametrize("case", CASES)
def test_attention_equals_plain_loops(case):
    rows = random_rows(**CASES[case])
    p, sink_share = measure.probabilities(rows)
    cells = np.stack([np.arange(0, 20, 2), np.arange(1, 20, 2)])  # one list per KV head, visible in every case
    for r in range(2):
        out = measure.dense_output(p[r], rows.v)
        sparse = measure.sparse_output(p[r], sink_share[r], rows.v, cells)
        shared = measure.sparse_output(p[r], sink_share[r], rows.v, cells[:1])
        for h, slope in enumerate(SLOPES_OF_6_HEADS[rows.max_bias]):
            plain_p, plain_out = plain_attention(rows, r, h, slope)
            np.testing.assert_allclose(p[r, h], [plain_p[j] for j in range(40)], atol=1e-6)
            np.testing.assert_allclose(out[h], plain_out, atol=2e-6)
            np.testing.assert_allclose(sparse[h], plain_attention(rows, r, h, slope, cells[h // 3])[1], atol=2e-6)
            np.testing.assert_allclose(shared[h], plain_attention(rows, r, h, slope, cells[0])[1], atol=2e-6)
        np.testing.assert_allclose(p[r].sum(-1) + sink_share[r], 1, atol=1e-6)


@pytest.mark.parametrize("n_lists", [1, 2, 3])
@pytest.mark.parametrize("top_k", [7, 12, 30, 60])
def test_select_cells(n_lists, top_k):
    rng = np.random.default_rng(top_k)
    pooled, visible = rng.random((n_lists, 60)), rng.random(60) < 0.7
    seen = np.flatnonzero(visible)
    cells = measure.select_cells(pooled, visible, top_k, sink=2, recent=5)
    for row, chosen in zip(pooled, cells):
        forced = [*seen[:2], *seen[-5:]]
        rest = sorted(set(seen) - set(forced), key=lambda j: -row[j])
        assert list(chosen) == sorted([*forced, *rest][:top_k])


def test_pool_is_the_mean_over_heads_or_groups():
    p = np.arange(24.0).reshape(6, 4)
    np.testing.assert_array_equal(measure.pool(p, 1), [p.mean(0)])
    np.testing.assert_array_equal(measure.pool(p, 2), [p[:3].mean(0), p[3:].mean(0)])


def test_rnmse():
    assert measure.rnmse(np.array([3.0, 4.0]), np.array([3.0, 3.0])) == pytest.approx(0.2)
    assert measure.rnmse(np.zeros(2), np.zeros(2)) == 0


def test_mass_on_packed_cells():
    weights = np.random.default_rng(1).random((2, 21)).astype(np.float32)  # 21: not a whole number of bytes
    cells = np.array([[0, 7, 8, 20], [1, 2, 3, 4]])
    mass = measure.mass_on(measure.pack_cells(cells, 21), weights)
    np.testing.assert_allclose(mass, [[row[c].sum() for row in weights] for c in cells], rtol=1e-6)


# -- the trace --------------------------------------------------------------------------------------------------------


def host_buffer(pointer, size_bytes):
    return (ctypes.c_char * size_bytes).from_address(pointer)


def fake_trace(q, k_bytes, v_bytes, types, mask, sinks=None, layer=3):
    """The struct as the engine fills it: arrays are numpy order, [n_head, n_tokens, d] and [n_kv, n_head_kv, bytes]."""
    n_head, n_tokens, n_embd_k = q.shape
    n_kv, n_head_kv, _ = k_bytes.shape
    mask16 = mask.astype(np.float16)
    keep = (q, k_bytes, v_bytes, mask16, sinks)
    return SimpleNamespace(
        keep=keep, layer=layer, type_k=types[0], type_v=types[1], n_embd_k=n_embd_k, n_embd_v=64, n_head=n_head,
        n_head_kv=n_head_kv, n_kv=n_kv, n_tokens=n_tokens, n_stream=1, scale=0.125, max_bias=0.0, softcap=0.0,
        q=q.ctypes.data, k=k_bytes.ctypes.data, v=v_bytes.ctypes.data, mask=mask16.ctypes.data,
        sinks=sinks.ctypes.data if sinks is not None else 0,
        q_nb=[4, q.strides[1], q.strides[0], 0], k_nb=[0, k_bytes.strides[0], k_bytes.strides[1], 0],
        v_nb=[0, v_bytes.strides[0], v_bytes.strides[1], 0], mask_nb=[2, mask16.strides[0], 0, 0])


def cache_view(values, kind):
    """A layer's rows inside a wider cache, so that strides are not those of a packed array: (view, values read back)"""
    raw = quantize(values, kind).view(np.uint8)
    wide = np.zeros((*raw.shape[:2], raw.shape[2] * 2), np.uint8)
    wide[..., :raw.shape[2]] = raw
    return wide[..., :raw.shape[2]], dequantize(raw, kind).reshape(values.shape)


@pytest.mark.parametrize("name", measure.KV_TYPES.values())
def test_rows_from_trace(name):
    rng = np.random.default_rng(2)
    kind = GGMLQuantizationType[name]
    q = rng.standard_normal((4, 10, 64)).astype(np.float32)
    (k, k_read), (v, v_read) = (cache_view(rng.standard_normal((48, 2, 64)).astype(np.float32), kind) for _ in "kv")
    mask, sinks = causal_mask(range(20, 30), 48), np.arange(4, dtype=np.float32)
    trace = fake_trace(q, k, v, (int(kind), int(kind)), mask, sinks)
    rows = measure.rows_from_trace(trace, [2, 9], 30, host_buffer)
    np.testing.assert_array_equal(rows.q, q[:, [2, 9]].transpose(1, 0, 2))
    np.testing.assert_array_equal(rows.k, k_read[:30])
    np.testing.assert_array_equal(rows.v, v_read[:30])
    np.testing.assert_array_equal(rows.mask, mask[[2, 9], :30])
    np.testing.assert_array_equal(rows.sinks, sinks)
    assert rows.scale == 0.125


@pytest.mark.parametrize("change, words", [({"type_k": 6}, "KV cache type 6"), ({"n_stream": 2}, "2 streams")])
def test_a_trace_that_cannot_be_read(change, words):
    zeros = np.zeros((48, 2, 128), np.uint8)
    trace = fake_trace(np.zeros((4, 10, 64), np.float32), zeros, zeros, (1, 1), causal_mask(range(10), 48))
    vars(trace).update(change)
    with pytest.raises(ProfileError, match=words):
        measure.rows_from_trace(trace, [0], 48, host_buffer)


# -- the collector ----------------------------------------------------------------------------------------------------


def layer_rows(layer, positions, n_kv=64, n_head_kv=2, **mask):
    return random_rows(len(positions), n_kv=n_kv, n_head_kv=n_head_kv, seed=layer, scale=1.0, mask=causal_mask(positions, n_kv, **mask))


def collect(layers=3, positions=(50, 63), top_k=(10, 20)):
    collector = Collector(layers, 2, len(positions), list(top_k), sink_tokens=1, recent_tokens=4)
    for sample, position in enumerate(positions):  # one ubatch each
        collector.begin_ubatch()
        for layer in range(layers):
            collector.add_layer(layer, [SampledRow(sample, 0, position)], layer_rows(layer, [position]))
    return collector.results()


def plain_sets(layer, position, k, n_lists):
    """(probability per list, chosen cells per list) by whole-array numpy"""
    rows = layer_rows(layer, [position])
    p = measure.pool(measure.probabilities(rows)[0][0], n_lists)
    return p, measure.select_cells(p, rows.visible()[0], k, 1, 4)


@pytest.mark.parametrize("k", [10, 20])
def test_collector_equals_plain_sets(k):
    found, positions = collect(), (50, 63)
    for i in range(3):
        for j in range(i, 3):
            recall, overlap, heads = [], [], []
            for position in positions:
                (_, cells_i), (p_j, cells_j) = plain_sets(i, position, k, 1), plain_sets(j, position, k, 1)
                recall.append(p_j[0, cells_i[0]].sum())
                overlap.append(len(set(cells_i[0]) & set(cells_j[0])) / k)
                (_, cells_i), (p_j, _) = plain_sets(i, position, k, 2), plain_sets(j, position, k, 2)
                heads.append([[p_j[h, cells].sum() for h in range(2)] for cells in cells_i])
            assert found["recall"][k][i, j] == pytest.approx(np.mean(recall), abs=1e-5)
            assert found["recall_low"][k][i, j] == pytest.approx(np.quantile(recall, 0.1), abs=1e-5)
            assert found["overlap"][k][i, j] == pytest.approx(np.mean(overlap), abs=1e-5)
            mean_heads = np.mean(heads, axis=0)
            np.testing.assert_allclose(found["head_recall"][k][i, j], mean_heads.max(0), atol=1e-5)
            np.testing.assert_array_equal(found["head_map"][k][i, j], mean_heads.argmax(0))
    assert not np.tril(found["recall"][k], -1).any()


def test_sensitivity_falls_with_top_k_and_vanishes_when_all_cells_are_kept():
    found = collect(top_k=(10, 20, 64))
    for name in ("sensitivity", "sensitivity_heads"):
        small, large, whole = (found[name][k] for k in (10, 20, 64))
        assert (small > large).all() and (large > 0.01).all() and (whole < 1e-5).all()


@pytest.mark.parametrize("what, rows, calls", [
    ("sliding window", layer_rows(1, [50], window=32), 1),
    ("ring cache: fewer cells than positions", layer_rows(1, [31], n_kv=32), 1),
    ("other number of KV heads", layer_rows(1, [50], n_head_kv=3), 1),
    ("never traced", None, 0),
])
def test_layers_that_cannot_take_part(what, rows, calls):
    collector = Collector(3, 2, 1, [10], 1, 4)
    collector.begin_ubatch()
    for layer in (0, 1, 2):
        if layer != 1 or calls:
            collector.add_layer(layer, [SampledRow(0, 0, 50)], rows if layer == 1 else layer_rows(layer, [50]))
    found = collector.results()
    assert found["eligible"] == [True, False, True], what
    assert not found["recall"][10][1].any() and not found["recall"][10][:, 1].any() and found["recall"][10][0, 2] > 0


def test_a_second_node_on_the_same_cache_layer_is_not_counted():
    collector = Collector(2, 2, 1, [10], 1, 4)
    collector.begin_ubatch()
    collector.add_layer(0, [SampledRow(0, 0, 50)], layer_rows(0, [50]))
    before = collector.results()["recall"][10].copy()
    collector.add_layer(0, [SampledRow(0, 0, 50)], layer_rows(1, [50]))
    np.testing.assert_array_equal(collector.results()["recall"][10], before)


# -- what to sample ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_ctx, asked, top_k", [
    (8192, None, [512, 1024, 2048]), (2048, None, [512, 1024]), (2561, None, [512, 1024, 2048]), (2560, None, [512, 1024]),
    (8192, [4096, 300, 300], [300, 4096]),
])
def test_choose_top_ks(n_ctx, asked, top_k):
    assert profile.choose_top_ks(n_ctx, asked, forced=260) == top_k


@pytest.mark.parametrize("n_ctx, asked, words", [
    (512, None, "context 512 is too short for top_k 512"),
    (2048, [2048], "context 2048 is too short for top_k 2048: samples must see more than 2560 tokens"),
    (8192, [259], "top_k 259 is below the 260"),
])
def test_choose_top_ks_refuses(n_ctx, asked, words):
    with pytest.raises(ProfileError, match=words):
        profile.choose_top_ks(n_ctx, asked, forced=260)


@pytest.mark.parametrize("n_tokens, samples, top_k, first, last", [
    (8192, 16, 2048, 4096, 8191), (4096, 8, 2048, 2560, 4095), (8192, 1, 512, 8191, 8191)])
def test_sample_positions(n_tokens, samples, top_k, first, last):
    positions = profile.sample_positions(n_tokens, samples, top_k)
    assert len(set(positions)) == samples and positions == sorted(positions)
    assert (positions[0], positions[-1]) == (first, last)


@pytest.mark.parametrize("samples", [0, -1, 4097])
def test_sample_positions_refuses(samples):
    with pytest.raises(ProfileError, match=f"--samples {samples}"):
        profile.sample_positions(8192, samples, 2048)


@pytest.mark.parametrize("n_tokens, sizes", [(1024, [512, 512]), (1060, [512, 512]), (1100, [512, 512, 76]), (300, [300])])
def test_ubatches_leave_out_a_decode_sized_rest(n_tokens, sizes):
    assert [len(span) for span in profile.ubatches(n_tokens)] == sizes


def test_split_samples_over_texts():
    shares = profile.split_samples(8192, 7, 3, 2048)
    assert [len(share) for share in shares] == [3, 2, 2]
    with pytest.raises(ProfileError, match="--samples 2"):
        profile.split_samples(8192, 2, 3, 2048)


# -- the pass, with a stand-in for llama.cpp --------------------------------------------------------------------------


class FakeEngine:
    """Nodes are numbers; layer_count of them are attention nodes, the rest is of no interest."""

    TRACE_STOCK = 1

    def __init__(self, layer_count):
        self.layer_count, self.trace, self.done, self.taken = layer_count, SimpleNamespace(), 0, []
        self.ffi = SimpleNamespace(cast=lambda _kind, node: node, buffer=host_buffer)
        self.lib = SimpleNamespace(hylra_trace_node=self.fill)

    def fill(self, node, trace):
        if node >= self.layer_count:
            return 0
        rng = np.random.default_rng(node)
        n_kv, first, size = 1536, self.done, self.size
        q = rng.standard_normal((4, size, 64)).astype(np.float32)
        k, v = (rng.standard_normal((n_kv, 2, 64)).astype(np.float32).view(np.uint8) for _ in "kv")
        vars(trace).update(vars(fake_trace(q, k, v, (0, 0), causal_mask(range(first, first + size), n_kv), layer=node)))
        return 1

    def decode(self, dense, size):
        self.size = size
        for node in range(self.layer_count + 2):
            if dense.on_node(node, True, None):
                self.taken.append((self.done, node))
                dense.on_node(node, False, None)
        self.done += size
        return 0


@pytest.fixture
def fake_pass():
    fake = FakeEngine(layer_count=2)
    dense = profile.DensePass.__new__(profile.DensePass)
    vars(dense).update(path="tiny.gguf", ctx=None, sampled=[], failure=None, trace=fake.trace, analysis_s=0.0, engine=fake)
    dense.collector = Collector(2, 2, 3, [300], 4, 256)
    dense.api = SimpleNamespace(
        llama_token=ctypes.c_int32, llama_get_memory=lambda ctx: None, llama_memory_clear=lambda memory, data: None,
        llama_batch_get_one=lambda tokens, n: n, llama_decode=lambda ctx, n: fake.decode(dense, n))
    return dense, fake


def test_only_ubatches_with_samples_are_split(fake_pass):
    dense, fake = fake_pass
    steps = []
    dense.read([1] * 1536, [700, 1500, 1535], 0, SimpleNamespace(update=steps.append))
    assert steps == [512, 512, 512]
    assert fake.taken == [(512, 0), (512, 1), (1024, 0), (1024, 1)]
    found = dense.collector.results()
    assert found["eligible"] == [True, True] and 0 < found["recall"][300][0, 1] < 1 and dense.analysis_s > 0


def test_an_error_in_the_callback_surfaces_after_the_decode(fake_pass):
    dense, fake = fake_pass
    fake.lib.hylra_trace_node = lambda node, trace: 1 / 0
    with pytest.raises(ZeroDivisionError):
        dense.read([1] * 512, [500], 0, SimpleNamespace(update=print))


def test_a_failed_decode_is_one_line(fake_pass):
    dense, _ = fake_pass
    dense.api.llama_decode = lambda ctx, n: 1
    with pytest.raises(ProfileError, match="tiny.gguf: llama.cpp stopped with code 1 at token 0"):
        dense.read([1] * 512, [500], 0, SimpleNamespace(update=print))


def test_a_missing_model_needs_no_engine(tmp_path):
    with pytest.raises(ModelFileError, match="no such file"):
        profile.profile_model(str(tmp_path / "none.gguf"))


def test_an_unknown_kv_type():
    with pytest.raises(ProfileError, match="-ctk q5_1: expected one of f32 f16"):
        profile.profile_model("model.gguf", type_kv="q5_1")


# -- files ------------------------------------------------------------------------------------------------------------


def small_profile() -> profile.Profile:
    return profile.Profile(
        model="tiny.gguf", arch="llama", layer_count=3, head_kv_count=2, context=64, samples=2, top_k=[10, 20], sink_tokens=1,
        recent_tokens=4, type_kv="f16", text="synthetic", forward_s=1.5, analysis_s=0.5, tool="hylra-gguf 0", **collect())


def test_profile_survives_its_file(tmp_path):
    before, path = small_profile(), tmp_path / "profile.json"
    before.save(path)
    after = profile.Profile.load(path)
    for name in ("model", "eligible", "top_k", "samples", "forward_s", "tool"):
        assert getattr(after, name) == getattr(before, name)
    for name in profile.ARRAYS:
        for k in before.top_k:
            np.testing.assert_allclose(getattr(after, name)[k], getattr(before, name)[k], atol=1e-5)
    assert list(tmp_path.iterdir()) == [path]
    assert "3 layers, 3 can take part" in profile.describe(after)


def drop(key):
    return lambda values: values.pop(key)


def put(key, value):
    return lambda values: values.update({key: value})


@pytest.mark.parametrize("change, words", [
    (drop("version"), "no key 'version'"), (put("version", 2), "version 2, expected 1"), (put("extra", 1), "unknown: extra"),
    (drop("recall"), "recall"), (put("samples", 0), "samples is 0"), (put("eligible", [True]), "eligible"),
    (put("layer_count", "3"), "layer_count is '3'"), (put("recall", 5), "wrong type"), (put("recall", {"10": [[1]]}), "recall for top_k 10"),
    (put("sensitivity", {"10": [float("nan")] * 3, "20": [0, 0, 0]}), "sensitivity for top_k 10"),
    (put("head_map", {"10": [[[2, 2]] * 3] * 3, "20": [[[0, 0]] * 3] * 3}), "head_map names a KV head outside 0 to 1"),
    (put("top_k", []), "top_k is empty"), (put("top_k", [30]), "for top_k 30"),
])
def test_damaged_profiles_are_one_line(tmp_path, change, words):
    values = json.loads(small_profile().to_json())
    change(values)
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(values))
    with pytest.raises(ProfileError, match=words) as caught:
        profile.Profile.load(path)
    assert "\n" not in str(caught.value) and "profile.json" in str(caught.value)


@pytest.mark.parametrize("content, words", [
    (None, "cannot read"), (b"{", "no JSON"), (b"\xff\xfe", "no JSON"), (b"[1]", "not a profile")])
def test_files_that_are_no_profile(tmp_path, content, words):
    path = tmp_path / "profile.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ProfileError, match=words):
        profile.Profile.load(path)


def test_an_output_folder_that_is_not_there_is_noticed_before_the_pass(tmp_path):
    args = SimpleNamespace(model="model.gguf", output=str(tmp_path / "none" / "profile.json"))
    with pytest.raises(ProfileError, match="cannot write here"):
        profile.cmd_profile(args)


# -- texts ------------------------------------------------------------------------------------------------------------


def test_calibration_text_is_long_enough_mixed_and_repeatable():
    text, what = texts.calibration_text(50_000)
    assert 50_000 <= len(text) < 60_000 and "Python 3" in what
    assert texts.calibration_text(50_000)[0] == text
    assert "The \"assert\" statement" in text and "Command-line parsing library" in text[6000:9100]
    assert texts.calibration_text(20_000)[0] == text[:len(texts.calibration_text(20_000)[0])]


def test_calibration_text_gives_all_there_is():
    assert len(texts.calibration_text(10 ** 9)[0]) > 400_000


@pytest.mark.parametrize("content, words", [(None, "cannot read"), (b"ab\xff", "byte 2 is not UTF-8"), (b" \n", "empty")])
def test_texts_refused(tmp_path, content, words):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ProfileError, match=words) as caught:
        texts.read_texts([str(path)])
    assert str(path) in str(caught.value)


def test_read_texts(tmp_path):
    for name in "ab":
        (tmp_path / name).write_text(f"text {name} ä", encoding="utf-8")
    assert texts.read_texts([str(tmp_path / name) for name in "ab"]) == ["text a ä", "text b ä"]
