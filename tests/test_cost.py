"""The cost model: the fit finds what made the numbers, break-even is where two step times cross, foreign files are refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hylra_gguf import cost
from hylra_gguf.cost import CostModel
from hylra_gguf.errors import HylraError
from hylra_gguf.policy import Policy
from hylra_gguf.profile_data import model_identity
from architectures import ARCHITECTURES, write_architecture
from profiles import make_profile
from support import write_tiny_model
from test_plan import GEMMA, line

ALL = [True] * 8
# 8 layers: stock 10 ms and 8 us per cell with flash attention, without it 20 ms and 4 us; they cross at 2500 cells
STOCK = {"stock-fa1": (0.010, 1e-6), "stock-fa0": (0.020, 0.5e-6)}
MODEL = CostModel("0" * 32, 8, t0_s=0.012, dense_s=0.5e-6, select_s=0.1e-6, sparse_s=0.3e-6, reuse_s=1e-6, stock=STOCK)


def policy(**changes) -> Policy:
    """One select layer, three that reuse it, four full ones"""
    return Policy(**{**dict(layer_mode=(1, 2, 2, 2, 0, 0, 0, 0), layer_source=(0, 0, 0, 0, -1, -1, -1, -1), head_kv_count=2,
                            top_k=1000), **changes})


@pytest.mark.parametrize("depth, expected_s", [(0, 0.010), (2500, 0.030), (10000, 0.060)])
def test_stock_is_the_faster_arm(depth, expected_s):
    assert MODEL.stock_s(depth) == pytest.approx(expected_s)


@pytest.mark.parametrize("changes, depth, expected_s", [
    ({}, 500, 0.012 + 5 * 0.5e-6 * 500 + 0.1e-6 * 500 + 3 * 500e-6),
    ({}, 8000, 0.012 + 5 * 0.5e-6 * 8000 + 0.1e-6 * 8000 + 3 * 1000e-6),
    ({"sparse_select": (1, 0, 0, 0, 0, 0, 0, 0)}, 2000, 0.012 + 5 * 0.5e-6 * 2000 + 0.1e-6 * 2000 + 3 * 1000e-6),  # not yet
    ({"sparse_select": (1, 0, 0, 0, 0, 0, 0, 0)}, 8000, 0.012 + 4 * 0.5e-6 * 8000 + 0.3e-6 * 8000 + 4 * 1000e-6),
    ({"layer_source": (0, 0, 2, 0, -1, -1, -1, -1)}, 8000, 0.012 + 6 * 0.5e-6 * 8000 + 0.1e-6 * 8000 + 2 * 1000e-6),  # layer 2 its own source: dense
    ({"top_k_fraction": 0.5}, 8000, 0.012 + 5 * 0.5e-6 * 8000 + 0.1e-6 * 8000 + 3 * 4000e-6),
    ({"layer_source": (0, 0, 2, 2, 2, -1, -1, -1), "layer_mode": (1, 2, 1, 2, 2, 0, 0, 0),
      "layer_top_k": (500, 0, 1000, 0, 0, 0, 0, 0)}, 8000, 0.012 + 5 * 0.5e-6 * 8000 + 2 * 0.1e-6 * 8000 + 2500e-6),
])
def test_a_step_under_a_policy(changes, depth, expected_s):
    assert MODEL.policy_s(policy(**changes), ALL, depth) == pytest.approx(expected_s)


def test_layers_with_a_sliding_window_do_not_grow_with_the_depth():
    modes, sources = (0, 0, 1, 0, 2, 2, 0, 2), (-1, -1, 2, -1, 2, 2, -1, 2)
    found = MODEL.policy_s(policy(layer_mode=modes, layer_source=sources), GEMMA, 8000)
    assert found == pytest.approx(0.012 + 0.6e-6 * 8000 + 3 * 1000e-6)


def test_break_even_is_the_crossing():
    # stock 10 ms + 8 us per cell; up to 1000 cells the reuse layers gather all of them: 12 ms + 2.6 us + 3 us per cell
    assert MODEL.break_even(policy(), ALL) == pytest.approx(0.002 / 2.4e-6)
    # up to 300 cells as above, then 12.9 ms + 2.6 us per cell
    assert MODEL.break_even(policy(top_k=300), ALL) == pytest.approx(0.0029 / 5.4e-6)
    assert MODEL.break_even(policy(layer_mode=(0,) * 8, layer_source=(-1,) * 8), ALL) == pytest.approx(0.002 / 4e-6)


@pytest.mark.parametrize("changes, expected", [
    ({"t0_s": 0.009, "reuse_s": 0.5e-6}, 0.0), ({"dense_s": 1e-6}, None), ({"t0_s": 9.0}, None)])
def test_a_policy_that_always_or_never_pays(changes, expected):
    model = CostModel(**{**MODEL.__dict__, **changes})
    assert model.break_even(policy(), ALL) == expected


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(1e-8, 1e-5), min_size=4, max_size=4), st.floats(1e-4, 0.1), st.floats(0.001, 1), st.integers(300, 50_000))
def test_beyond_break_even_the_policy_is_faster_and_just_below_it_is_not(slopes, t0_s, fraction, top_k):
    dense_s, select_s, sparse_s, reuse_s = slopes
    model = CostModel("", 8, t0_s, dense_s, select_s, sparse_s, reuse_s, STOCK)
    for one in (policy(top_k=top_k), policy(top_k=top_k, sparse_select=(1, 0, 0, 0, 0, 0, 0, 0)), policy(top_k=top_k, top_k_fraction=fraction)):
        at = model.break_even(one, ALL)

        def faster(depth):
            # where the lines all but touch, rounding decides
            return model.stock_s(depth) - model.policy_s(one, ALL, depth) > 1e-9 * model.stock_s(depth)

        for depth in np.geomspace(1, cost.DEEPEST_TOKENS, 50):
            if at is not None and depth > at * 1.001 + 1:
                assert model.policy_s(one, ALL, depth) < model.stock_s(depth) * (1 + 1e-9)
        if at is None:
            assert not faster(cost.DEEPEST_TOKENS)
        elif at > 1:
            assert not faster(at * 0.9999 - 0.01)


@settings(max_examples=50, deadline=None)
@given(st.floats(1e-3, 1), *[st.floats(1e-8, 1e-5)] * 4)
def test_the_fit_recovers_the_coefficients(t0_s, dense_s, select_s, sparse_s, reuse_s):
    profile = make_profile(line(8), identity="a" * 32)
    true = CostModel("a" * 32, 8, t0_s, dense_s, select_s, sparse_s, reuse_s, STOCK)
    points = [(name, one, depth, true.policy_s(one, ALL, depth))
              for name, one in cost.probes(profile).items() for depth in cost.DEPTHS_TOKENS]
    points += [(arm, None, depth, a + b * 8 * depth) for arm, (a, b) in STOCK.items() for depth in cost.DEPTHS_TOKENS]
    found = cost.fit_model(points, profile, "here")
    for name in ("t0_s", "dense_s", "select_s", "sparse_s", "reuse_s"):
        assert getattr(found, name) * 8192 == pytest.approx(getattr(true, name) * 8192, rel=1e-4, abs=1e-6)
    assert {arm: pytest.approx(pair, rel=1e-4) for arm, pair in found.stock.items()} == STOCK
    assert (found.identity, found.layer_count, found.note) == ("a" * 32, 8, "here; fit within 0 %")


def test_probes_leave_layers_with_a_sliding_window_full():
    probes = cost.probes(make_profile(line(8), GEMMA))
    assert [one.layer_map() for one in probes.values()] == ["FFFFFFFF", "FFSFRRFR", "FFSFRSFR", "FFSFRSFR"]


def test_a_cost_model_survives_its_file(tmp_path):
    profile = make_profile(line(8))
    MODEL.save(str(tmp_path / "cost.json"))
    assert cost.load(str(tmp_path / "cost.json"), profile) == MODEL


@pytest.mark.parametrize("change, words", [
    (lambda values: values.update(identity="f" * 32), "another model than the profile's \\(tiny.gguf\\)"),
    (lambda values: values.update(layer_count=9), "another model"),
    (lambda values: values.update(t0_s=float("inf")), "not a cost model"),
    (lambda values: values.update(t0_s=-1), "not a cost model"),
    (lambda values: values.update(t0_s="1"), "not a cost model"),
    (lambda values: values.update(extra=1), "not a cost model"),
    (lambda values: values.pop("dense_s"), "not a cost model"),
    (lambda values: values.update(stock={}), "not a cost model"),
    (lambda values: values.update(stock={"a": [1]}), "not a cost model"),
])
def test_files_that_are_no_cost_model_of_this_model_are_refused(change, words, tmp_path):
    MODEL.save(str(tmp_path / "cost.json"))
    values = json.loads((tmp_path / "cost.json").read_text())
    change(values)
    (tmp_path / "cost.json").write_text(json.dumps(values))
    with pytest.raises(HylraError, match=words) as caught:
        cost.load(str(tmp_path / "cost.json"), make_profile(line(8)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text, words", [("[]", "not a cost model"), ("{", "not a cost model"), (None, "No such file")])
def test_other_files_are_refused(text, words, tmp_path):
    if text is not None:
        (tmp_path / "cost.json").write_text(text)
    with pytest.raises(HylraError, match=words):
        cost.load(str(tmp_path / "cost.json"), make_profile(line(8)))


def test_the_measurement_on_a_tiny_model_gives_a_cost_model_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(cost, "DEPTHS_TOKENS", (300, 600))
    path = str(write_tiny_model(tmp_path / "tiny.gguf"))
    found = cost.measure(path, make_profile(line(4), identity=model_identity(path)), 1)
    assert found.layer_count == 4 and set(found.stock) == {"stock-fa1", "stock-fa0"} and found.stock_s(600) > 0


@pytest.mark.parametrize("name", ["lfm2 (hybrid)", "jamba (hybrid)", "falcon-h1 (attention beside Mamba)"])
def test_models_with_recurrent_layers_are_measured_too(name, tmp_path, monkeypatch):
    """Their state has no past: the measurement keeps it at every depth that it goes back to."""
    monkeypatch.setattr(cost, "DEPTHS_TOKENS", (300, 600))
    a = ARCHITECTURES[name]
    path, able = str(write_architecture(tmp_path / "m.gguf", a)), [kind == "a" for kind in a.layers]
    profile = make_profile(line(len(able)), able, heads=a.head_kv_count, identity=model_identity(path))
    found = cost.measure(path, profile, 1)
    assert found.layer_count == sum(able) and found.policy_s(cost.probes(profile)["full"], able, 600) > 0
