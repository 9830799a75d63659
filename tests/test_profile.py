"""A whole profile of tiny models: what is sampled, what comes out, and what is refused."""

from __future__ import annotations

import argparse
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest

from support import VOCAB, random_tokens, write_tiny_model

from hylra_gguf import profile, residual, samples, texts
from hylra_gguf.errors import ModelFileError, ProfileError
from hylra_gguf.forward import Forward, ubatches
from hylra_gguf.profile import Options, profile_model
from hylra_gguf.profile_data import Profile

SMALL = Options(contexts=[1024], top_k=[300], samples=4, n_threads=1, progress=False)
TEXTS = [("one", "a"), ("two", "b")]


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A model without tokenizer: each text is 2048 random tokens of its own."""
    monkeypatch.setattr(Forward, "tokenize", lambda self, text: random_tokens(2048, seed=ord(text[0])))
    return str(write_tiny_model(tmp_path / "tiny.gguf"))


# -- what to sample ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_ctx, asked, top_k", [
    (8192, None, [512, 1024, 2048]), (2048, None, [512, 1024]), (2561, None, [512, 1024, 2048]), (2560, None, [512, 1024]),
    (8192, [4096, 300, 300], [300, 4096]),
])
def test_choose_top_ks(n_ctx, asked, top_k):
    assert samples.choose_top_ks(n_ctx, asked, forced=260) == top_k


@pytest.mark.parametrize("n_ctx, asked, words", [
    (512, None, "context 512 is too short for top_k 512"),
    (2048, [2048], "context 2048 is too short for top_k 2048: samples must see more than 2560 tokens"),
    (8192, [259], "top_k 259 is below the 260"),
])
def test_choose_top_ks_refuses(n_ctx, asked, words):
    with pytest.raises(ProfileError, match=words):
        samples.choose_top_ks(n_ctx, asked, forced=260)


@pytest.mark.parametrize("n_tokens, count, top_k, first, last", [
    (8192, 16, 2048, 4096, 8191), (4096, 8, 2048, 2560, 4095), (8192, 1, 512, 8191, 8191)])
def test_sample_positions(n_tokens, count, top_k, first, last):
    positions = samples.sample_positions(n_tokens, count, top_k)
    assert len(set(positions)) == count and positions == sorted(positions)
    assert (positions[0], positions[-1]) == (first, last)


@pytest.mark.parametrize("n_texts, contexts, count, words", [
    (1, [8192], 0, "--samples 0: expected 1 or more"), (1, [8192], -1, "--samples -1"),
    (1, [8192], 4097, "--samples 4097: only 4096 positions"),
    (3, [4096, 8192], 5, "--samples 5: expected at least one for each of 3 texts at 2 lengths")])
def test_plan_samples_refuses(n_texts, contexts, count, words):
    with pytest.raises(ProfileError, match=words):
        samples.plan_samples(n_texts, contexts, count, 2048)


def test_samples_are_spread_over_texts_and_lengths_and_no_row_comes_twice():
    found = samples.plan_samples(2, [6000, 8192], 18, 2048)
    assert len({(s.text, s.position) for s in found}) == 18
    assert found == sorted(found, key=lambda s: (s.text, s.position))
    short = [s for s in found if s.position < 4096]
    assert [sum(s.text == text for s in found) for text in (0, 1)] == [10, 8] and {s.text for s in short} == {0, 1}


def test_halves_are_blocks_of_equal_depth():
    found = samples.plan_samples(1, [8192], 16, 2048)
    assert [s.heldout for s in found] == [False] * 4 + [True] * 8 + [False] * 4
    means = [np.mean([s.position for s in found if s.heldout == half]) for half in (False, True)]
    assert means[0] == pytest.approx(means[1], rel=0.01)


def test_single_samples_of_several_texts_alternate():
    assert [s.heldout for s in samples.plan_samples(4, [8192], 4, 2048)] == [False, True, False, True]


KEY, OTHER = list(range(20, 28)), [26, 27, 99]  # eight tokens, and the last two of them before something else


@pytest.mark.parametrize("tokens, distance, expected", [
    (KEY + [1] + OTHER + KEY + [1, 5], 10, [19]),  # the row of the last token of the second KEY
    (KEY + [1] + OTHER + KEY + [1, 5], 13, []),  # too near
    (KEY + [1] + OTHER + KEY + [2, 5], 10, []),  # goes on in another way
    (KEY + [1, 7, 8, 9] + KEY + [1, 5], 10, []),  # two tokens tell as much as eight
    (list(range(50)), 1, []),
])
def test_repeats_are_rows_that_look_something_up(tokens, distance, expected):
    assert samples.repeats(tokens, distance) == expected


def test_every_second_sample_moves_to_a_repeat():
    tokens = list(range(1000, 1400))
    tokens[100:109], tokens[150:153], tokens[252:261] = KEY + [1], OTHER, KEY + [1]
    found = [samples.Sample(0, at, False) for at in (200, 220, 240, 300)]
    assert [s.position for s in samples.at_repeats(found, [tokens], 50)] == [200, 220, 259, 300]
    assert samples.at_repeats(found, [list(range(400))], 50) == found


@pytest.mark.parametrize("n_tokens, sizes", [(1024, [512, 512]), (1060, [512, 512]), (1100, [512, 512, 76]), (300, [300])])
def test_ubatches_leave_out_a_decode_sized_rest(n_tokens, sizes):
    assert [len(span) for span in ubatches(n_tokens)] == sizes


# -- a whole profile --------------------------------------------------------------------------------------------------


def test_profile_of_two_texts_and_lengths(tiny, tmp_path):
    found = profile_model(tiny, TEXTS, Options(contexts=[2048, 1024], top_k=[300, 512], samples=9, n_threads=1, progress=False))
    assert (found.contexts, found.texts, found.samples, found.block_sizes) == ([1024, 2048], ["one", "two"], 9, [1, 16, 32, 64, 128])
    assert found.eligible == [True] * 4 and 3 <= found.heldout_samples <= 6
    found.check_model(tiny)
    own = np.diagonal(found.matrix("recall", 512))
    assert (own > found.matrix("recall", 512)[0, 1:].max()).all() and (own > np.diagonal(found.matrix("recall", 300))).all()
    assert (np.diagonal(found.matrix("overlap", 512, 1)) == 1).all()
    assert (found.layer("sensitivity", 300) > found.layer("sensitivity", 512)).all()
    assert "4 layers, 4 can take part; one, two; 9 rows of 1024 2048 tokens, KV f16" in profile.describe(found)
    found.save(str(tmp_path / "p.json"))
    assert Profile.load(str(tmp_path / "p.json")).texts == ["one", "two"]


@pytest.mark.parametrize("type_kv", ["bf16", "q8_0", "q4_0", "q8_0/bf16", "f16/q8_0"])
def test_kv_types_agree_within_their_rounding(tiny, type_kv):
    exact = profile_model(tiny, TEXTS, SMALL)
    found = profile_model(tiny, TEXTS, Options(**{**vars(SMALL), "type_kv": type_kv}))
    np.testing.assert_allclose(found.matrix("recall", 300), exact.matrix("recall", 300), atol=0.1 if type_kv == "q4_0" else 0.02)
    assert not np.array_equal(found.matrix("recall", 300), exact.matrix("recall", 300))


@pytest.mark.parametrize("shape", [dict(n_head=4, n_head_kv=4, n_embd_head=80), dict(n_head=3, n_head_kv=1, n_embd_head=128)])
def test_other_head_sizes(tmp_path, monkeypatch, shape):
    monkeypatch.setattr(Forward, "tokenize", lambda self, text: random_tokens(1024))
    found = profile_model(str(write_tiny_model(tmp_path / "m.gguf", **shape)), TEXTS, SMALL)
    assert found.eligible == [True] * 4 and found.head_recall(300).shape == (4, 4, shape["n_head_kv"], shape["n_head_kv"])


GEMMA2 = dict(arch="gemma2", norms=("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"), sliding_window=256, tied=True)
COHERE2 = dict(arch="cohere2", n_embd_head=16, norms=("attn_norm",), sliding_window=256, tied=True)


@pytest.mark.parametrize("shape, eligible, importance", [
    (GEMMA2, [False, True, False, True], True),
    (COHERE2, [False, False, False, True], False),  # attention and feed-forward are added together
])
def test_sliding_window_layers_are_left_out(tmp_path, monkeypatch, shape, eligible, importance):
    monkeypatch.setattr(Forward, "tokenize", lambda self, text: random_tokens(1024))
    found = profile_model(str(write_tiny_model(tmp_path / "m.gguf", **shape)), TEXTS, SMALL)
    assert found.eligible == eligible
    assert np.isfinite(found.layer("importance")[np.array(eligible)]).all() == importance
    assert not found.matrix("recall", 300)[:, ~np.array(eligible)].any()


# -- importance -------------------------------------------------------------------------------------------------------


def test_importance_is_that_of_the_residual_stream(tiny, monkeypatch):
    """The rows that llama.cpp names l_out (x of the next layer) and ffn_inp (x + attn)"""
    rows, original = {}, profile.LayerVisitor.wants

    def also_named(self, node, kind, trace):
        name = residual.Tensor.from_address(node).name.decode()
        return original(self, node, kind, trace) or name.startswith(("l_out", "ffn_inp"))

    def take(self, node, kind, trace):
        tensor = residual.Tensor.from_address(node)
        rows[tensor.name.decode()] = residual.rows_of(tensor, [row.token for row in self.sampled])
        if kind or node in self.residual.made:
            taken(self, node, kind, trace)

    taken = profile.LayerVisitor.take
    monkeypatch.setattr(profile.LayerVisitor, "wants", also_named)
    monkeypatch.setattr(profile.LayerVisitor, "take", take)
    found = profile_model(tiny, TEXTS[:1], Options(**{**vars(SMALL), "samples": 1}))
    for layer in (1, 2, 3):
        expected = residual.turn(rows[f"l_out-{layer - 1}"], rows[f"ffn_inp-{layer}"])
        assert found.layer("importance")[layer] == pytest.approx(expected[0], abs=1e-5)
    assert (found.layer("importance") > 1e-4).all()


def test_importance_that_the_graph_does_not_show_is_absent_and_said(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(residual, "ancestors", lambda node: set())
    found = profile_model(tiny, TEXTS[:1], SMALL)
    assert np.isnan(found.layer("importance")).all() and "importance is missing" in profile.describe(found)
    found.save(str(tmp_path / "p.json"))
    assert np.isnan(Profile.load(str(tmp_path / "p.json")).layer("importance")).all()


def test_the_command_leaves_the_profile_and_nothing_else(tiny, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "p.json.part.kv.tmp").write_text("of a killed run")
    args = argparse.Namespace(model=tiny, output=str(tmp_path / "p.json"), file=[str(tmp_path / "a.txt")], ctx_size=[1024], top_k=[300],
                              samples=2, block_sizes=[16], threads=1, no_progress=True)
    profile.cmd_profile(args)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "p.json", "tiny.gguf"]
    assert Profile.load(args.output).block_sizes == [1, 16] and "4 can take part; a.txt" in capsys.readouterr().err


# -- refused ----------------------------------------------------------------------------------------------------------


def test_an_error_in_the_callback_surfaces_after_the_decode(tiny, monkeypatch):
    monkeypatch.setattr(profile.LayerVisitor, "take", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        profile_model(tiny, TEXTS, SMALL)


def test_a_failed_decode_is_one_line(tiny, monkeypatch):
    monkeypatch.setattr(Forward, "tokenize", lambda self, text: [VOCAB + 7] * 2048)
    with pytest.raises(ProfileError, match="tiny.gguf: llama.cpp stopped with code -1 at token 0"):
        profile_model(tiny, TEXTS, SMALL)


@pytest.mark.parametrize("change, words", [
    ({"type_kv": "q5_1"}, "-ctk q5_1: expected one of f16 q4_0 q8_0 bf16"), ({"type_kv": "f32"}, "-ctk f32: expected one of f16"),
    ({"type_kv": "q8_0/q5_1"}, "-ctv q5_1: expected one of f16 q4_0 q8_0 bf16"),
    ({"block_sizes": (8,)}, "--block-sizes 8: expected 1 16 32 64 128"), ({"block_sizes": (1, 48)}, "--block-sizes 48: expected 1 16 32 64 128"),
    ({"contexts": [1 << 20]}, r"-c 1048576: beyond the \d+ tokens that this model was trained for; lower -c"),
    ({"contexts": [4096]}, "one: 2048 tokens, shorter than the context of 4096; lower -c or give a longer text"),
    ({"contexts": [40]}, "-c 40: too short to profile"), ({"samples": 0}, "--samples 0"), ({"top_k": [200]}, "top_k 200 is below the 260"),
    ({"contexts": [512, 1024], "top_k": [500]}, "context 512 is too short for top_k 500"),
])
def test_what_cannot_be_profiled(tiny, change, words):
    with pytest.raises(ProfileError, match=words) as caught:
        profile_model(tiny, TEXTS, Options(**{**vars(SMALL), **change}))
    assert "\n" not in str(caught.value)


def test_a_missing_model_needs_no_engine(tmp_path):
    with pytest.raises(ModelFileError, match="no such file"):
        profile_model(str(tmp_path / "none.gguf"))


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


def test_entries_are_repeated_word_for_word_after_others():
    text, what = texts.lookup_text(50_000)
    lines = [line for line in text.splitlines() if line.startswith("The entry for ")]
    first = {line: lines.index(line) for line in lines}
    again = [at - first[line] for at, line in enumerate(lines) if at > first[line]]
    assert texts.lookup_text(50_000)[0] == text and what.endswith("with entries to look up")
    assert len(again) > 100 and np.mean(np.array(again) >= 8) > 0.7 and max(again) <= 3 * texts.ENTRY_REACH * 2
    assert len({line.split(" reads ")[0] for line in first}) == len(first)  # one value per key


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


def test_memory_does_not_grow_with_tokens_times_cells(tmp_path, monkeypatch):
    """4096 tokens: the attention of one head of one of four layers would be 64 MiB. The first pass brings in what is imported late."""
    monkeypatch.setattr(Forward, "tokenize", lambda self, text: random_tokens(4096, seed=1))
    model, options = str(write_tiny_model(tmp_path / "tiny.gguf")), {"top_k": [300], "n_threads": 1, "progress": False}
    profile_model(model, TEXTS[:1], Options(contexts=[1024], samples=4, **options))
    tracemalloc.start()
    profile_model(model, TEXTS[:1], Options(contexts=[4096], samples=16, **options))
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 8 << 20
