"""What a cache goes through while it is decoded from: sequences, streams, shifts, copies, states, drafts, batches of every size.

Each scenario runs three times: under a policy whose selection covers everything, which must give the tokens of the `full` arm; under
`full` itself; and under a real selection, where every step's nodes must be NumPy's. So on five models; that with ALiBi has sink and
recent cells, since its mask tells the position of every cell.
"""

from __future__ import annotations

import ctypes
from functools import partial

import numpy as np
import pytest
from architectures import ARCHITECTURES, write_architecture
from reference import Trace, attention, cells_allowed, check_selection, probabilities
from support import Session, full_like, policy, random_tokens

from hylra_gguf import engine

engine.activate()
TOP_K = 64
# model, layers of the policy, its further fields
KINDS = {
    "RoPE": ("llama", "SRFRS", dict(head_kv_count=2, sink_tokens=0, recent_tokens=0)),
    "ALiBi": ("bloom (ALiBi)", "SRFR", dict(head_kv_count=4, sink_tokens=4, recent_tokens=16)),
    "MLA": ("deepseek2 (MLA)", "SRFR", dict(head_kv_count=1, sink_tokens=0, recent_tokens=0)),
    "sliding window": ("gemma2", "FSFRFR", dict(head_kv_count=2, sink_tokens=0, recent_tokens=0)),
    "hybrid": ("lfm2 (hybrid)", "FSFRFR", dict(head_kv_count=2, sink_tokens=0, recent_tokens=0)),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("life")
    return {kind: write_architecture(folder / f"{kind}.gguf", ARCHITECTURES[name]) for kind, (name, _, _) in KINDS.items()}


def policy_for(kind: str, **fields):
    _, pattern, own = KINDS[kind]
    return policy(pattern, **own, **{"top_k": TOP_K, **fields})


class Arm(Session):
    """A context under one policy; keeps the logits of every step and, with a trace, holds each step against NumPy."""

    def __init__(self, model, p, trace=None, left_to_stock=(), **context):
        super().__init__(model, **{"n_ctx": 2048, "eval_callback": trace and trace.callback, **context})
        engine.set_policy(self.ctx, p)
        self.policy, self.trace, self.logits = p, trace, []
        self.served = set(range(p.layer_count if p else 0)) - set(left_to_stock)

    def step(self, *entries):
        if self.trace:
            self.trace.forget()
        self.logits.append(self.decode(entries))
        if self.trace:
            check_step(self.policy, self.trace, self.served)


def forced_cells(x, p):
    """[stream][token] cells; ALiBi's mask is minus the distance of a cell."""
    if not x["max_bias"]:
        return [[[]] * x["mask"].shape[2]] * x["mask"].shape[0]
    return [[by_distance(row, p) for row in stream[0]] for stream in x["mask"]]


def by_distance(row, p):
    visible = np.flatnonzero(np.isfinite(row))
    order = visible[np.argsort(-row[visible])]  # nearest first
    return [*order[:p.recent_tokens], *order[len(order) - p.sink_tokens:]]


def check_step(p, trace, served):
    cells = None
    assert set(trace.outputs) == served, "the step did not run sparse"
    for il, x in sorted(trace.inputs.items()):
        mode, allowed = p.layer_mode[il], None
        if mode == 1:
            cells = trace.choices[il]
            check_selection(x, cells, 1, p.top_k, forced_cells(x, p))
        if mode == 2:
            np.testing.assert_array_equal(x["cells"], cells)
            allowed = cells_allowed(x, [0] * x["k"].shape[1])
        np.testing.assert_allclose(trace.outputs[il], attention(x, probabilities(x, allowed)), atol=5e-5, rtol=1e-4)


# ---- scenarios; every step of theirs must run sparse


def different_lengths(a):
    for seq, n in enumerate((600, 400, 500)):
        a.prefill(random_tokens(n, seq), seq)
    for i in range(4):
        a.step((5 + i, 600 + i, 0), (6, 400 + i, 1), (7, 500 + i, 2))
    a.step((8, 404, 1))


def added_and_removed(a):
    a.prefill(random_tokens(500, 0), 0)
    a.prefill(random_tokens(300, 1), 1)
    a.step((1, 500, 0), (2, 300, 1))
    a.remove(1)
    a.step((3, 501, 0))
    a.prefill(random_tokens(350, 2), 2)
    a.step((4, 502, 0), (5, 350, 2))
    a.remove(0)
    a.prefill(random_tokens(520, 3), 1)
    a.step((6, 351, 2), (7, 520, 1))


def cells_out_of_order(a):
    a.prefill(random_tokens(300, 1), 1)
    a.prefill(random_tokens(400, 0), 0)
    a.remove(1)
    a.prefill(random_tokens(100, 2), 0, start=400)  # into the hole before
    for i in range(3):
        a.step((5 + i, 500 + i, 0))


def context_shift(a):
    a.prefill(random_tokens(700))
    for turn in range(3):
        a.remove(0, 4, 204)
        a.api.llama_memory_seq_add(a.memory, 0, 204, -1, -200)
        for i in range(3):
            a.step((5 + i, 500 + i, 0))
        a.prefill(random_tokens(197, turn), start=503)


def sequence_copy(a):
    a.prefill(random_tokens(500))
    a.api.llama_memory_seq_cp(a.memory, 0, 1, -1, -1)
    a.step((1, 500, 0), (2, 500, 1))
    a.step((3, 501, 1))
    a.remove(0)
    a.step((4, 502, 1))
    a.api.llama_memory_seq_cp(a.memory, 1, 2, 0, 400)
    a.prefill(random_tokens(60, 5), 2, start=400)
    a.step((5, 460, 2), (6, 503, 1))


def stream_copy(a):
    """Between streams llama.cpp copies whole sequences, buffers and all."""
    a.prefill(random_tokens(500))
    a.api.llama_memory_seq_cp(a.memory, 0, 2, -1, -1)
    a.step((1, 500, 0), (2, 500, 2))
    a.remove(0)
    a.step((3, 501, 2))


def prompt_cache_hit(a):
    a.prefill(random_tokens(600))
    a.step((1, 600, 0))
    a.rewind(450)
    a.prefill(random_tokens(150, 8), start=450)
    a.step((2, 600, 0))
    a.step((3, 601, 0))


def state_saved_and_loaded(a):
    a.prefill(random_tokens(500))
    a.step((1, 500, 0))
    size = a.api.llama_state_get_size(a.ctx)
    state = (ctypes.c_uint8 * size)()
    assert a.api.llama_state_get_data(a.ctx, state, size) > 0
    a.step((2, 501, 0))
    a.api.llama_memory_clear(a.memory, True)
    assert a.api.llama_state_set_data(a.ctx, state, size) > 0
    a.step((2, 501, 0))
    np.testing.assert_allclose(a.logits[-1], a.logits[-2], atol=1e-3 * a.logits[-1].std())  # sliding windows restore their cells in another order


def sequence_state_into_holes(a):
    """The cells of a restored sequence lie where there is room: between those of another."""
    a.prefill(random_tokens(500))
    size = a.api.llama_state_seq_get_size(a.ctx, 0)
    state = (ctypes.c_uint8 * size)()
    assert a.api.llama_state_seq_get_data(a.ctx, state, size, 0) > 0
    a.prefill(random_tokens(200, 1), 1)
    a.remove(0, 100, 300)
    assert a.api.llama_state_seq_set_data(a.ctx, state, size, 2) > 0
    a.step((1, 500, 2), (2, 500, 0), (3, 200, 1))
    a.step((4, 501, 2))


def drafts_rolled_back(a):
    a.prefill(random_tokens(500))
    pos = 500
    for turn in range(8):
        a.step(*((token, pos + i, 0) for i, token in enumerate(random_tokens(1 + turn, turn))))
        pos += turn // 2  # accepted
        a.rewind(pos, 0)


def batches_of_1_to_64_tokens(a, n_past=90):
    for seq in range(8):
        a.prefill(random_tokens(n_past, seq), seq)
    for n in range(1, 65):
        a.step(*((token, n_past + i // 8, i % 8) for i, token in enumerate(random_tokens(n, n))))
        a.rewind(n_past)


def threads_changed(a):
    a.prefill(random_tokens(500))
    for i, n_threads in enumerate((1, 2, 1, 2)):
        a.api.llama_set_n_threads(a.ctx, n_threads, n_threads)
        a.step((i, 500 + i, 0))


def long_steps(a):
    a.prefill(random_tokens(600))
    for turn in range(3):
        a.step(*((token, 600 + 8 * turn + i, 0) for i, token in enumerate(random_tokens(8, turn))))


# name: (what happens, the context it happens in)
SCENARIOS = {
    "sequences of different length, one cache": (different_lengths, dict(n_seq_max=3)),
    "sequences of different length, streams": (different_lengths, dict(n_seq_max=3, unified=False, n_ctx=3072)),
    "added and removed, one cache": (added_and_removed, dict(n_seq_max=3)),
    "added and removed, streams": (added_and_removed, dict(n_seq_max=3, unified=False, n_ctx=3072)),
    "cells out of order": (cells_out_of_order, dict(n_seq_max=2)),
    "context shift": (context_shift, {}),
    "context shift, V q8_0": (context_shift, dict(type_v=8)),
    "sequence copy, one cache": (sequence_copy, dict(n_seq_max=3)),
    "sequence copy, streams": (stream_copy, dict(n_seq_max=3, unified=False, n_ctx=3072)),
    "prompt-cache hit": (prompt_cache_hit, {}),
    "state saved and loaded": (state_saved_and_loaded, {}),
    "state of a sequence loaded into holes": (sequence_state_into_holes, dict(n_seq_max=3)),
    "drafts rolled back": (drafts_rolled_back, {}),
    "batches of 1 to 64 tokens, one cache": (batches_of_1_to_64_tokens, dict(n_seq_max=8)),
    "batches of 1 to 64 tokens, streams": (partial(batches_of_1_to_64_tokens, n_past=260), dict(n_seq_max=8, unified=False, n_ctx=4096)),
    "n_ubatch 64": (long_steps, dict(n_ubatch=64)),
    "n_batch 64, n_ubatch 16": (long_steps, dict(n_batch=64, n_ubatch=16)),
    "n_ubatch 5, below a step": (long_steps, dict(n_batch=33, n_ubatch=5)),
    "K q8_0, V f16": (different_lengths, dict(n_seq_max=3, type_k=8, type_v=1)),
    "K f16, V q8_0": (different_lengths, dict(n_seq_max=3, type_k=1, type_v=8)),
    "K bf16, V q4_0": (different_lengths, dict(n_seq_max=3, type_k=30, type_v=2)),
    "K and V q8_0": (different_lengths, dict(n_seq_max=3, type_k=8, type_v=8)),
    "threads changed between calls": (threads_changed, {}),
}


REWINDING = {"cells out of order", "context shift", "context shift, V q8_0", "sequence copy, one cache", "prompt-cache hit", "drafts rolled back",
             "state of a sequence loaded into holes", "batches of 1 to 64 tokens, one cache", "batches of 1 to 64 tokens, streams"}


def possible(name, kind):
    """The V of MLA lies in its K, so they are of one type; a recurrent state can neither be rewound nor shifted."""
    context = SCENARIOS[name][1]
    return not (kind == "MLA" and context.get("type_k", 1) != context.get("type_v", 1)) and not (kind == "hybrid" and name in REWINDING)


CASES = [(name, kind) for name in SCENARIOS for kind in KINDS if possible(name, kind)]


@pytest.mark.parametrize("name, kind", CASES)
def test_a_selection_that_covers_everything_gives_the_tokens_of_full(models, kind, name):
    happens, context = SCENARIOS[name]
    logits = []
    for p in (policy_for(kind, top_k=8192), full_like(policy_for(kind))):
        with Arm(models[kind], p, **context) as arm:
            happens(arm)
            assert engine.status(arm.ctx)["sparse_steps"] >= len(arm.logits)
            logits.append(np.concatenate(arm.logits))
    got, want = logits
    np.testing.assert_array_equal(got.argmax(-1), want.argmax(-1))
    np.testing.assert_allclose(got, want, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("name, kind", CASES)
def test_a_real_selection_is_that_of_numpy_at_every_step(models, kind, name):
    happens, context = SCENARIOS[name]
    left = [il for il, layer in enumerate(ARCHITECTURES[KINDS[kind][0]].layers) if layer != "a"]
    with Arm(models[kind], policy_for(kind), Trace(), left, **context) as arm:
        happens(arm)
        assert engine.status(arm.ctx)["sparse_steps"] >= len(arm.logits)
