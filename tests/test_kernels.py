"""Kernels of every instruction set against their scalar twins and a float64 NumPy statement of attention."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from gguf import GGMLQuantizationType as T
from gguf import quants
from support import instruction_sets

from hylra_gguf import engine

HERE = instruction_sets()
HIDDEN = -1.0


def test_the_environment_names_the_instruction_set():
    def found(wanted):
        return subprocess.run([sys.executable, "-c", "from hylra_gguf import engine; print(engine.isa())"], env={**os.environ, "HYLRA_ISA": wanted},
                              capture_output=True, text=True, check=True).stdout.strip()

    assert found("") == found("mmx") == HERE[-1]
    assert [found(isa) for isa in HERE] == HERE


class Problem:
    """A random attention problem in a KV cache laid out as llama.cpp's: [cell][kv head][dim], one view per stream."""

    def __init__(self, type_k=T.F16, type_v=None, n_embd_k=64, n_embd_v=None, group=3, n_head_kv=3, n_kv=700, n_tokens=1, n_stream=1,
                 softcap=0.0, max_bias=0.0, sinks=False, visible=0.8, seed=0):
        self.__dict__.update(locals())
        self.type_v = type_v or type_k
        self.n_embd_v = n_embd_v or n_embd_k
        self.n_head = group * n_head_kv
        rng = np.random.default_rng(seed)
        self.scale = np.float32(1 / np.sqrt(n_embd_k))
        self.q = rng.standard_normal((n_stream, self.n_head, n_tokens, n_embd_k)).astype(np.float32) * 2
        self.k_raw, self.k = self.store(rng, self.type_k, n_embd_k)
        self.v_raw, self.v = self.store(rng, self.type_v, self.n_embd_v)
        self.mask = self.make_mask(rng)
        self.sink_values = rng.standard_normal(self.n_head).astype(np.float32) if sinks else None

    def store(self, rng, kind, n_embd):
        """(raw rows [stream, cell, bytes], the float32 values they stand for [stream, kv head, cell, dim])."""
        x = rng.standard_normal((self.n_stream, self.n_kv, self.n_head_kv * n_embd)).astype(np.float32)
        raw = np.ascontiguousarray(quants.quantize(x, kind))
        values = quants.dequantize(raw, kind).reshape(self.n_stream, self.n_kv, self.n_head_kv, n_embd)
        return raw.view(np.uint8), values.transpose(0, 2, 1, 3).astype(np.float32)

    def make_mask(self, rng):
        seen = rng.random((self.n_stream, self.n_tokens, self.n_kv)) < self.visible
        seen[..., 0] = True
        distance = -np.abs(np.arange(self.n_kv) - self.n_kv).astype(np.float16) if self.max_bias else np.float16(0)
        return np.where(seen, distance, np.float16(-np.inf)).astype(np.float16)

    def struct(self, cells=None):
        a = engine.ffi.new("struct hylra_attn *")
        for name in ("n_embd_k", "n_embd_v", "n_head", "n_head_kv", "n_kv", "n_tokens", "n_stream", "scale", "max_bias", "softcap"):
            setattr(a, name, getattr(self, name))
        a.layer, a.type_k, a.type_v = 0, int(self.type_k), int(self.type_v)
        pointer = lambda x: engine.ffi.cast("void *", x.ctypes.data)
        a.q, a.k, a.v, a.mask = pointer(self.q), pointer(self.k_raw), pointer(self.v_raw), pointer(self.mask)
        if self.sink_values is not None:
            a.sinks = pointer(self.sink_values)
        token = 4 * self.n_embd_k
        a.q_nb = [4, token, token * self.n_tokens, token * self.n_tokens * self.n_head]
        for nb, raw in ((a.k_nb, self.k_raw), (a.v_nb, self.v_raw)):
            row = raw.shape[-1]
            nb[0:4] = [0, row, row // self.n_head_kv, row * self.n_kv]
        a.mask_nb = [2, 2 * self.n_kv, 2 * self.n_kv * self.n_tokens, 2 * self.n_kv * self.n_tokens]
        if cells is not None:
            a.cells, a.n_cells, a.lists = pointer(cells), cells.shape[-1], cells.shape[-2]
        return a

    def run(self, isa, cells=None, head_list=None, score_lists=0, scores_only=False, n_threads=1):
        """(out [stream, token, head, dim] or None, scores [stream, token, list, cell] or None) of one kernel set."""
        out = None if scores_only else np.full((self.n_stream, self.n_tokens, self.n_head, self.n_embd_v), np.nan, np.float32)
        scores = np.full((self.n_stream, self.n_tokens, score_lists, self.n_kv), np.nan, np.float32) if score_lists else None
        heads = np.asarray(head_list if head_list is not None else [0] * self.n_head_kv, np.int32)
        floats = lambda x: engine.ffi.NULL if x is None else engine.ffi.cast("float *", x.ctypes.data)
        code = engine.lib.hylra_test_attend(isa.encode(), self.struct(cells), engine.ffi.cast("int32_t *", heads.ctypes.data),
                                            floats(out), floats(scores), score_lists, n_threads)
        assert code == 0
        return out, scores

    def slopes(self):
        if not self.max_bias:
            return np.ones(self.n_head)
        n_log2 = 2 ** int(np.floor(np.log2(self.n_head)))
        m0, m1 = 2.0 ** (-self.max_bias / n_log2), 2.0 ** (-self.max_bias / 2 / n_log2)
        return np.array([m0 ** (h + 1) if h < n_log2 else m1 ** (2 * (h - n_log2) + 1) for h in range(self.n_head)])

    def expected(self, allowed=None):
        """float64 attention: (out, probabilities [stream, token, head, cell]); allowed: [stream, token, kv head, cell] bool."""
        k, v = (np.repeat(x.astype(np.float64), self.group, axis=1) for x in (self.k, self.v))
        s = np.einsum("shtd,shcd->sthc", self.q.astype(np.float64), k) * self.scale
        if self.softcap:
            s = self.softcap * np.tanh(s / self.softcap)
        s = s + self.slopes()[:, None] * self.mask.astype(np.float64)[:, :, None, :]
        if allowed is not None:
            s = np.where(np.repeat(allowed, self.group, axis=2), s, -np.inf)
        sink = self.sink_values.astype(np.float64)[:, None] if self.sink_values is not None else np.full((self.n_head, 1), -np.inf)
        top = np.maximum(s.max(-1, keepdims=True), sink)
        e = np.exp(s - top)
        p = e / (e.sum(-1, keepdims=True) + np.exp(sink - top))
        return np.einsum("sthc,shcd->sthd", p, v), p


CASES = {
    "f16": {},
    "f32": dict(type_k=T.F32),
    "bf16": dict(type_k=T.BF16),
    "q8_0": dict(type_k=T.Q8_0),
    "q4_0": dict(type_k=T.Q4_0),
    "q5_1, no reader of its own": dict(type_k=T.Q5_1),
    "k q8_0, v f16": dict(type_k=T.Q8_0, type_v=T.F16),
    "q8_0, head 128, group 8": dict(type_k=T.Q8_0, n_embd_k=128, group=8, n_head_kv=2),
    "q8_0, MLA 576/512": dict(type_k=T.Q8_0, n_embd_k=576, n_embd_v=512, group=5, n_head_kv=1, n_kv=300),
    "q8_0, group 1, 3 streams of 2 tokens": dict(type_k=T.Q8_0, group=1, n_tokens=2, n_stream=3, n_kv=333),
    "q4_0, head 96, group 4, 4 tokens": dict(type_k=T.Q4_0, n_embd_k=96, group=4, n_tokens=4),
    "head 80": dict(n_embd_k=80, group=2),
    "head 96": dict(n_embd_k=96, group=4),
    "head 128": dict(n_embd_k=128, group=5, n_head_kv=2),
    "head 256": dict(n_embd_k=256, group=7, n_head_kv=1),
    "head 20, padded": dict(n_embd_k=20, n_embd_v=12),
    "MLA 576/512": dict(n_embd_k=576, n_embd_v=512, group=16, n_head_kv=1, n_kv=300),
    "group 1": dict(group=1, n_head_kv=5),
    "group 16": dict(group=16, n_head_kv=2),
    "softcap": dict(softcap=5.0),
    "ALiBi": dict(max_bias=8.0),
    "ALiBi, 6 heads": dict(max_bias=8.0, group=2),
    "sinks": dict(sinks=True),
    "4 tokens": dict(n_tokens=4),
    "3 streams of 2 tokens": dict(n_tokens=2, n_stream=3, n_kv=333),
    "64 tokens": dict(n_tokens=64, n_kv=80),
    "1 cell": dict(n_kv=1),
    "31 cells": dict(n_kv=31),
    "many chunks": dict(n_kv=5000, n_head_kv=1),
    "few visible": dict(visible=0.01, n_kv=3000, n_head_kv=1),
}


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("case", CASES)
def test_dense(case, isa):
    problem = Problem(**CASES[case])
    out, scores = problem.run(isa, score_lists=problem.n_head_kv)
    want, p = problem.expected()
    np.testing.assert_allclose(out, want, atol=2e-5, rtol=2e-5)
    pooled = p.reshape(*p.shape[:2], problem.n_head_kv, problem.group, problem.n_kv).mean(3)
    hidden = np.broadcast_to((problem.mask == -np.inf)[:, :, None], pooled.shape)
    np.testing.assert_allclose(scores, np.where(hidden, HIDDEN, pooled), atol=1e-6, rtol=1e-4)
    _, shared = problem.run(isa, score_lists=1)
    np.testing.assert_allclose(shared[:, :, 0], np.where(hidden[:, :, 0], HIDDEN, pooled.mean(2)), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("case", CASES)
def test_scores_alone_are_those_of_dense_attention_and_v_stays_unread(case, isa):
    problem = Problem(**CASES[case])
    want = problem.run(isa, score_lists=1)[1]
    problem.v_raw[:] = 0xFF  # not a number in every type that has one
    np.testing.assert_array_equal(problem.run(isa, score_lists=1, scores_only=True)[1], want)


def random_lists(problem, lists, n_cells, seed=1):
    """Ascending cells per token and list, hidden ones among them, -1 at the end; and what each KV head may see."""
    rng = np.random.default_rng(seed)
    head_list = rng.integers(0, lists, problem.n_head_kv) if lists > 1 else np.zeros(problem.n_head_kv, int)
    cells = np.full((problem.n_stream, problem.n_tokens, lists, n_cells), -1, np.int32)
    allowed = np.zeros((problem.n_stream, problem.n_tokens, problem.n_head_kv, problem.n_kv), bool)
    for s, t, i in np.ndindex(*cells.shape[:3]):
        n = min(n_cells - rng.integers(0, 3), problem.n_kv)
        cells[s, t, i, :n] = np.sort(np.append(rng.choice(np.arange(1, problem.n_kv), n - 1, replace=False), 0)) if n > 1 else 0
    for s, t, h in np.ndindex(*allowed.shape[:3]):
        listed = cells[s, t, head_list[h]]
        allowed[s, t, h, listed[listed >= 0]] = True
    return cells, head_list, allowed


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("lists", ["shared", "per head"])
@pytest.mark.parametrize("case", [c for c in CASES if c != "1 cell"])
def test_gather(case, lists, isa):
    problem = Problem(**CASES[case])
    cells, head_list, allowed = random_lists(problem, 1 if lists == "shared" else problem.n_head_kv, min(200, problem.n_kv))
    out, _ = problem.run(isa, cells, head_list)
    want, _ = problem.expected(allowed)
    np.testing.assert_allclose(out, want, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("case", [c for c in CASES if c != "1 cell"])
def test_tasks_that_share_heads_compute_the_same(case, isa):
    """As where there are more threads than chunks; all KV heads of a chunk in one task otherwise."""
    problem = Problem(**CASES[case])
    for lists in (0, 1, problem.n_head_kv):
        listed = random_lists(problem, lists, min(200, problem.n_kv))[:2] if lists else ()
        for want, shared in zip(*(problem.run(isa, *listed, score_lists=0 if lists else 1, n_threads=n) for n in (1, 10000))):
            np.testing.assert_array_equal(shared, want)


@pytest.mark.parametrize("isa", HERE)
def test_every_f16_number_is_read_exactly(isa):
    """One visible cell has weight 1, so the output is its V: subnormal numbers, infinities and NaN too."""
    problem = Problem(n_kv=1, group=1, n_head_kv=128, n_embd_k=64, n_embd_v=256, n_stream=2)
    problem.v_raw[:] = np.arange(65536, dtype=np.uint16).view(np.uint8).reshape(problem.v_raw.shape)
    want = np.arange(65536, dtype=np.uint16).view(np.float16).astype(np.float32)
    np.testing.assert_array_equal(problem.run(isa)[0].ravel(), want)


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("kind, block", [(T.Q8_0, 34), (T.Q4_0, 18)])
def test_the_largest_numbers_of_q_and_k_fit(kind, block, isa):
    """Whole rows of the largest and the smallest byte, against a q whose numbers are all as large as its largest: sums in whole
    numbers are at their limit then."""
    problem = Problem(type_k=kind, type_v=T.F32, n_embd_k=128, n_embd_v=64, group=4, n_kv=64)
    raw = problem.k_raw.reshape(64, -1, block)
    raw[..., :2] = np.array([2**-9], np.float16).view(np.uint8)
    raw[:, :, 2:] = np.array([0x80, 0x7F, 0x00, 0xFF], np.uint8)[np.arange(64) % 4][:, None, None]
    problem.k[:] = quants.dequantize(problem.k_raw.reshape(-1, block), kind).reshape(1, 64, 3, 128).transpose(0, 2, 1, 3)
    problem.q[:] = np.sign(problem.q[..., :1]) * 3.0
    np.testing.assert_allclose(problem.run(isa)[0], problem.expected()[0], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("kind", [T.Q8_0, T.Q4_0])
@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-25, 1e25])
def test_queries_of_any_size_are_read(size, kind, isa):
    """Of the vanishing ones every cell weighs the same; of the largest one cell takes all."""
    problem = Problem(type_k=kind)
    problem.q *= np.float32(size)
    np.testing.assert_allclose(problem.run(isa)[0], problem.expected()[0], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("kind", [T.Q8_0, T.Q4_0])
@pytest.mark.parametrize("outlier", [1, 20])
def test_what_a_kernel_loses_is_far_below_the_rounding_of_k(outlier, kind, isa):
    """Also of a q with one number that is much larger than the others, which a common unit of them has to reach."""
    rounded, exact = (Problem(type_k=k, type_v=T.F32, n_embd_k=128, group=4, n_kv=2000) for k in (kind, T.F32))  # of the same numbers
    for problem in (rounded, exact):
        problem.q[..., 5] *= outlier
    want = rounded.expected()[0]
    lost, rounding = (np.sqrt(np.mean((x - want) ** 2) / np.mean(want**2)) for x in (rounded.run(isa)[0], exact.expected()[0]))
    assert lost < 1e-5 and 500 * lost < rounding < 0.5


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("kind", [T.Q8_0, T.Q4_0])
@pytest.mark.parametrize("outlier", [1, 30])
def test_what_a_kernel_loses_is_far_below_the_rounding_of_v(outlier, kind, isa):
    """Also of tiles with one cell whose numbers are much larger than those of the others."""
    rounded, exact = (Problem(type_k=T.F32, type_v=k, n_embd_k=128, group=4, n_kv=2000) for k in (kind, T.F32))  # of the same numbers
    scale_v(rounded, slice(None, None, 32), outlier)
    exact.v[:, :, ::32] *= np.float32(outlier)
    want = rounded.expected()[0]
    lost, rounding = (np.sqrt(np.mean((x - want) ** 2) / np.mean(want**2)) for x in (rounded.run(isa)[0], exact.expected()[0]))
    assert lost < 5e-6 and 1000 * lost < rounding < 0.5


def scale_v(problem, cells, factor, dims=slice(None)):
    """Multiplies the scales of these cells and blocks of 32 dimensions, in the raw rows and in the values."""
    blocks = problem.v_raw.reshape(problem.n_stream, problem.n_kv, problem.n_head_kv, problem.n_embd_v // 32, -1)
    scale = np.ascontiguousarray(blocks[..., :2]).view(np.float16)
    with np.errstate(invalid="ignore", over="ignore"):
        scale[:, cells, :, dims] *= np.float16(factor)
        blocks[..., :2] = scale.view(np.uint8)
        values = quants.dequantize(blocks.reshape(-1, blocks.shape[-1]), problem.type_v)
    problem.v[:] = values.reshape(problem.n_stream, problem.n_kv, problem.n_head_kv, -1).transpose(0, 2, 1, 3)


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("kind", [T.Q8_0, T.Q4_0])
def test_scales_of_v_may_be_negative_and_those_of_hidden_cells_anything(kind, isa):
    problem = Problem(type_k=T.F32, type_v=kind, n_embd_v=128, group=4, n_kv=300)
    scale_v(problem, slice(5, 150, 7), -1.0, slice(1, 3))
    hidden = np.flatnonzero(problem.mask[0, 0] == -np.inf)
    scale_v(problem, hidden[::2], 2000.0)
    scale_v(problem, hidden[1::2], -2000.0)
    np.testing.assert_allclose(problem.run(isa)[0], problem.expected()[0], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("factor", [np.inf, np.nan])
def test_a_scale_of_v_that_is_not_finite_shows_in_its_block_alone(factor, isa):
    problem = Problem(type_k=T.F32, type_v=T.Q8_0, n_embd_v=128, group=4, n_kv=300)
    scale_v(problem, 0, factor, 2)
    finite = np.isfinite(problem.run(isa)[0])
    assert finite[..., :64].all() and finite[..., 96:].all() and not finite[..., 64:96].any()


def test_no_visible_cell_gives_zeros():
    problem = Problem(n_kv=100)
    problem.mask[:] = -np.inf
    for isa in HERE:
        assert not problem.run(isa)[0].any()


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("lists", [1, 3])
def test_weights_that_are_no_numbers_count_as_nothing(lists, isa):
    """A model that overflows makes them. Kernels that choose compare the bits of scores, so that a NaN would stand above all."""
    problem = Problem(n_kv=333)
    problem.q[:, : problem.group] = np.nan  # [stream, head, token, dim]
    scores = problem.run(isa, score_lists=lists)[1][0, 0]
    hidden = problem.mask[0, 0] == -np.inf
    assert (scores[:, hidden] == HIDDEN).all() and (scores[:, ~hidden] >= 0).all()
    assert lists == 1 or (scores[0, ~hidden] == 0).all()
    assert (scores[-1, ~hidden] > 0).any()
