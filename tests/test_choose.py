"""Choosing cells by score, by every instruction set and by the serial twin of the CUDA selection, against the scalar twin."""

from __future__ import annotations

import numpy as np
import pytest
from support import instruction_sets

from hylra_gguf import engine

CHOOSERS = [*instruction_sets(), "radix"]  # the latter: kernels for a GPU, arithmetic that any machine can test
FORCED, HIDDEN = 2.0, -1.0


def choose(isa, scores, top_k, block_size=1):
    scores = np.ascontiguousarray(scores, np.float32)
    out = np.full(top_k, -7, np.int32)
    n = engine.lib.hylra_test_choose(isa.encode(), engine.ffi.cast("float *", scores.ctypes.data), len(scores), top_k, block_size,
                                     engine.ffi.cast("int32_t *", out.ctypes.data))
    assert (out[n:] == -1).all()
    return out[:n]


def random_scores(n_kv, seed, ties):
    rng = np.random.default_rng(seed)
    scores = rng.random(n_kv).astype(np.float32) ** 8
    if ties:
        scores = np.round(scores, 2)
    scores[rng.random(n_kv) < 0.05] += FORCED
    scores[rng.random(n_kv) < 0.2] = HIDDEN
    return scores


@pytest.mark.parametrize("block_size", [1, 16, 128])
@pytest.mark.parametrize("n_kv,top_k", [(1, 1), (300, 40), (5000, 1024), (5000, 5000), (513, 512), (40000, 2), (40000, 2048), (40000, 39999)])
@pytest.mark.parametrize("ties", [False, True])
def test_choose_equals_twin(n_kv, top_k, block_size, ties):
    for seed in range(5):
        scores = random_scores(n_kv, seed, ties)
        forced = np.flatnonzero(scores >= FORCED)
        if len(forced) > top_k:
            scores[forced[top_k:]] -= FORCED
        want = choose("ref", scores, top_k, block_size)
        for isa in CHOOSERS:
            np.testing.assert_array_equal(choose(isa, scores, top_k, block_size), want)


def test_choose_in_long_rows_that_a_sample_misleads():
    """A row is narrowed down by every n-th score first; these rows have their best scores where that does not look, or all alike."""
    n_kv = 8192
    hidden_from_sample = np.full(n_kv, 0.001, np.float32)
    hidden_from_sample[1::8] = 0.5 + np.arange(1024) / 4096
    only_sample = np.full(n_kv, 0.001, np.float32)
    only_sample[::8] = 0.5
    alike = np.full(n_kv, 0.25, np.float32)
    all_hidden = np.full(n_kv, HIDDEN, np.float32)
    last = all_hidden.copy()
    last[-1] = 0.5
    for scores in (hidden_from_sample, only_sample, alike, all_hidden, last):
        for top_k in (1, 100, 1024, 5000):
            want = choose("ref", scores, top_k)
            for isa in CHOOSERS:
                np.testing.assert_array_equal(choose(isa, scores, top_k), want)


def test_choose_takes_the_best_ascending_forced_first_hidden_never():
    scores = np.array([0.1, 0.9, HIDDEN, 0.3, FORCED, 0.3, 0.8], np.float32)
    for isa in CHOOSERS:
        assert choose(isa, scores, 3).tolist() == [1, 4, 6]
        assert choose(isa, scores, 4).tolist() == [1, 3, 4, 6]  # of equals the lower cell
        assert choose(isa, scores, 7).tolist() == [0, 1, 3, 4, 5, 6]


def test_choose_blocks_takes_whole_blocks_while_they_fit():
    scores = np.zeros(64, np.float32)
    scores[16:32], scores[48], scores[0] = 0.01, 0.9, FORCED
    for isa in CHOOSERS:
        assert choose(isa, scores, 33, 16).tolist() == [0, *range(16, 32), *range(48, 64)]
        assert choose(isa, scores, 32, 16).tolist() == [0, *range(48, 64)]


@pytest.mark.parametrize("share", [0.1, 1.0])
@pytest.mark.parametrize("isa", CHOOSERS)
def test_scores_that_are_no_numbers_overrun_no_list(isa, share):
    """A model that overflows may make them. Which cells are chosen then is nobody's concern; the list has top_k of them at most."""
    scores, top_k = np.random.default_rng(0).random(5000).astype(np.float32), 512
    scores[: int(share * scores.size)] = np.nan
    out = np.full(scores.size, -7, np.int32)
    pointer = lambda kind, x: engine.ffi.cast(kind, x.ctypes.data)
    n = engine.lib.hylra_test_choose(isa.encode(), pointer("float *", scores), scores.size, top_k, 1, pointer("int32_t *", out))
    assert 0 <= n <= top_k and (out[top_k:] == -7).all() and (np.diff(out[:n]) > 0).all()
