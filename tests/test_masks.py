"""The mask that a sparse step gets from kept rows is llama.cpp's own, bit for bit, whatever its cache has lived through."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import numpy as np
import pytest
from architectures import ARCHITECTURES, SIZES, write_architecture
from reference import tensor
from support import policy, random_tokens
from test_graphs import GgmlTensor
from test_life_cycle import KINDS, SCENARIOS, Arm, policy_for, possible

from hylra_gguf import engine

engine.activate()
MASK_SOURCE, KEPT_PARAM = 3, 1  # src of an attention node; op_params of a mask
N_SEQ, N_OPS = 4, 60


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("masks")
    return {kind: write_architecture(folder / f"{kind}.gguf", ARCHITECTURES[name]) for kind, (name, _, _) in KINDS.items()}


class Masks:
    """(layer, mask, whether it came from kept rows) of every attention node in the steps of an Arm"""

    def __init__(self):
        self.raw = engine.ffi.new("struct hylra_attn *")
        self.steps = []

    def forget(self):
        self.steps.append([])

    def callback(self, node, ask, data):
        kind = engine.lib.hylra_trace_node(engine.ffi.cast("struct ggml_tensor *", node), self.raw)
        wanted = kind in (engine.TRACE_STOCK, engine.TRACE_ATTEND)
        if wanted and not ask and self.steps:
            address = ctypes.cast(node, ctypes.c_void_p).value
            mask = GgmlTensor.from_address(GgmlTensor.from_address(address).src[MASK_SOURCE])
            a = self.raw
            rows = tensor(a.mask, np.uint16, (a.n_stream, 1, a.n_tokens, a.n_kv), a.mask_nb)
            self.steps[-1].append((a.layer, rows, mask.op_params[KEPT_PARAM] == 1))
        return wanted if ask else True


class MaskArm(Arm):
    """Records the masks of steps, not those of prefills, which run stock."""

    def __init__(self, model, p, **context):
        self.masks = Masks()
        super().__init__(model, p, **{"eval_callback": self.masks.callback, **context})

    def step(self, *entries):
        self.masks.forget()
        super().step(*entries)
        done, self.masks.steps[-1] = self.masks.steps[-1], []
        self.masks.steps[-1] = tuple(done)  # closed: a later prefill must not add to it

    def prefill(self, *args, **kwargs):
        kept, self.masks.steps = self.masks.steps, []
        super().prefill(*args, **kwargs)
        self.masks.steps = kept


def run(model, p, happens, context):
    with MaskArm(model, p, **context) as arm:
        happens(arm)
        return arm.masks.steps


def check_masks(model, p, happens, context):
    """The share of masks that came from kept rows"""
    got, want = run(model, p, happens, context), run(model, None, happens, context)
    assert len(got) == len(want) > 0
    kept = []
    for step, stock in zip(got, want):
        assert len(step) == len(stock) > 0
        for (_, rows, from_kept), (_, stock_rows, stock_kept) in zip(step, stock):
            np.testing.assert_array_equal(rows, stock_rows)
            assert not stock_kept
            kept.append(from_kept)
    return np.mean(kept)


# ALiBi's mask holds distances, that of sliding windows hides old cells: both are filled the stock way
KEPT_SHARE = {"RoPE": 1, "ALiBi": 0, "MLA": 1, "sliding window": 0.5, "hybrid": 1}
CASES = [(name, kind) for name in SCENARIOS for kind in KEPT_SHARE if possible(name, kind) and (kind == "RoPE" or "streams" in name)]


@pytest.mark.parametrize("name, kind", CASES)
def test_masks_of_sparse_steps_are_those_of_stock(models, name, kind):
    happens, context = SCENARIOS[name]
    assert check_masks(models[kind], policy_for(kind), happens, context) == KEPT_SHARE[kind]


class Life:
    """Random calls of llama.cpp's memory API, the same for every arm, and a step of some sequences after each."""

    def __init__(self, seed: int, unified: bool):
        self.seed, self.unified = seed, unified

    def __call__(self, a):
        self.a, self.rng = a, np.random.default_rng(self.seed)
        for seq in range(N_SEQ):
            a.prefill(random_tokens(300 + 17 * seq, seq), seq)
        calls = [self.cut, self.cut_out, self.copy, self.shift, self.halve, self.clear_one, self.batch]
        for _ in range(N_OPS):
            calls[self.rng.integers(len(calls))](int(self.rng.integers(N_SEQ)))
            self.step()

    def end(self, seq):
        return self.a.api.llama_memory_seq_pos_max(self.a.memory, seq) + 1

    def step(self):
        """One token each of a random choice of sequences"""
        seqs = np.flatnonzero(self.rng.random(N_SEQ) < 0.6)
        ends = [(seq, self.end(int(seq))) for seq in map(int, seqs)]
        entries = [(int(seq), end, seq) for seq, end in ends if 0 < end < 900]
        if entries:
            self.a.step(*entries)

    def cut(self, seq):
        self.a.remove(seq, max(1, self.end(seq) - int(self.rng.integers(1, 20))))

    def cut_out(self, seq):
        begin = int(self.rng.integers(0, max(1, self.end(seq) - 30)))
        self.a.remove(seq, begin, begin + 20)

    def shift(self, seq):
        """A hole in the middle is closed, as context shift does."""
        if self.end(seq) > 100:
            self.a.remove(seq, 40, 60)
            self.a.api.llama_memory_seq_add(self.a.memory, seq, 60, -1, -20)

    def halve(self, seq):
        if self.unified and self.end(seq) > 200:
            self.a.api.llama_memory_seq_div(self.a.memory, seq, 0, -1, 2)

    def copy(self, seq):
        other = (seq + 1) % N_SEQ
        if self.end(seq) > 0:
            self.a.remove(other)
            self.a.api.llama_memory_seq_cp(self.a.memory, seq, other, -1, -1)

    def clear_one(self, seq):
        self.a.remove(seq)
        self.a.prefill(random_tokens(280, seq), seq)

    def batch(self, seq):
        """A draft of several tokens, half of it taken back"""
        end = self.end(seq)
        if 0 < end < 900:
            self.a.step(*((i, end + i, seq) for i in range(6)))
            self.a.remove(seq, end + 3)


@pytest.mark.parametrize("unified", [True, False], ids=["one cache", "streams"])
@pytest.mark.parametrize("seed", range(3))
def test_masks_after_random_calls_are_those_of_stock(models, seed, unified):
    context = dict(n_ctx=1024 * N_SEQ, n_seq_max=N_SEQ, unified=unified)
    assert check_masks(models["RoPE"], policy_for("RoPE"), Life(seed, unified), context) > 0.9


# ---- pictures: cells of one position, ordered by row and column

PICTURE = (3, 2)  # columns, rows
PICTURE_POLICY = policy("SRRS")


def write_picture_model(path):
    a = ARCHITECTURES["qwen2"]
    return write_architecture(path, replace(a, arch="qwen2vl", keys={**a.keys, "rope.dimension_sections": [4, 6, 6, 0]}))


def see_picture(a, first_pos: int):
    """One batch of embeddings, all at the same position, as the M-RoPE models get a picture"""
    columns, rows = PICTURE
    n, width = columns * rows, SIZES["E"]
    batch = a.api.llama_batch_init(n, width, 1)
    positions = np.concatenate([np.full(n, first_pos), first_pos + np.arange(n) // columns, first_pos + np.arange(n) % columns, np.zeros(n)]).astype(np.int32)
    batch.n_tokens = n
    text_pos = ctypes.cast(batch.pos, ctypes.c_void_p).value  # batch.pos itself would follow the next line
    batch.pos = positions.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
    np.ctypeslib.as_array(batch.embd, (n, width))[:] = np.random.default_rng(1).standard_normal((n, width))
    for i in range(n):
        batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, 0, 1
    assert a.api.llama_decode(a.ctx, batch) == 0
    batch.pos = ctypes.cast(text_pos, ctypes.POINTER(ctypes.c_int32))
    a.api.llama_batch_free(batch)


def picture_then_text(a):
    a.prefill(random_tokens(500))
    a.masks.forget()
    see_picture(a, 500)
    a.step((1, 500 + max(PICTURE), 0))


def test_masks_of_a_picture_are_those_of_stock(tmp_path):
    model = write_picture_model(tmp_path / "picture.gguf")
    assert check_masks(model, PICTURE_POLICY, picture_then_text, {}) == 1
    (_, rows, _), *_ = run(model, PICTURE_POLICY, picture_then_text, {})[0]
    visible = (rows[0, 0] == 0).sum(-1) - 500
    np.testing.assert_array_equal(visible, np.arange(1, 1 + PICTURE[0] * PICTURE[1]))  # in reading order
