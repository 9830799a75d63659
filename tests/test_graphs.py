"""Graphs and their buffers over a long life: node and leaf counts, reuse, memory.

llama.cpp plans buffers anew only if a graph has another number of nodes or of leafs than the one planned before, or a tensor that is
larger at the same place (ggml_gallocr_needs_realloc). Two graphs of equal counts and other lifetimes would share memory wrongly.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import replace

import numpy as np
import pytest
from architectures import ARCHITECTURES, write_architecture
from support import Session, full_like, policy, random_tokens

from hylra_gguf import engine

engine.activate()
N_PAST = 500
OP_NONE, PARAM = 0, 4  # GGML_OP_NONE, GGML_TENSOR_FLAG_PARAM


class GgmlTensor(ctypes.Structure):
    """struct ggml_tensor of the pinned llama.cpp, up to its name"""

    _fields_ = [("type", ctypes.c_int), ("buffer", ctypes.c_void_p), ("ne", ctypes.c_int64 * 4), ("nb", ctypes.c_size_t * 4),
                ("op", ctypes.c_int), ("op_params", ctypes.c_int32 * 16), ("flags", ctypes.c_int32), ("src", ctypes.c_void_p * 10),
                ("view_src", ctypes.c_void_p), ("view_offs", ctypes.c_size_t), ("data", ctypes.c_void_p), ("name", ctypes.c_char * 64)]


class Census:
    """The nodes of every graph that is computed, as addresses; counts what ggml counts."""

    def __init__(self):
        self.nodes = []

    def callback(self, node, ask, data):
        self.nodes.append(ctypes.cast(node, ctypes.c_void_p).value)
        return False  # not asked for its data

    def counts(self):
        """(nodes, leafs) of the graph of the last batch, whose tensors still stand"""
        nodes = set(self.nodes)
        sources = {src for node in nodes for src in GgmlTensor.from_address(node).src if src}
        leafs = [src for src in sources - nodes if GgmlTensor.from_address(src).op == OP_NONE and not GgmlTensor.from_address(src).flags & PARAM]
        return len(self.nodes), len(leafs)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_architecture(tmp_path_factory.mktemp("graphs") / "m.gguf", ARCHITECTURES["llama"])


def counts_of(path, p, n_tokens=1):
    census = Census()
    with Session(path, eval_callback=census.callback) as s:
        engine.set_policy(s.ctx, p)
        s.prefill(random_tokens(N_PAST))
        census.nodes.clear()
        s.decode([(i, N_PAST + i, 0) for i in range(n_tokens)])
        return census.counts()


@pytest.mark.parametrize("pattern, more_nodes, more_leafs", [("FFFFF", 5, 0), ("SRRRR", 7, 1), ("FSRSR", 9, 1), ("SRFRS", 9, 1), ("SSSSS", 15, 1)])
def test_our_graphs_differ_in_their_counts_from_those_of_stock(model, pattern, more_nodes, more_leafs):
    """Attend and reduce for one node of llama.cpp, pool and choose per select layer, and the leaf of forced cells."""
    nodes, leafs = counts_of(model, None)
    assert counts_of(model, None, 64) == (nodes, leafs), "a prefill has the same counts, so it is they that must differ"
    assert counts_of(model, policy(pattern)) == (nodes + more_nodes, leafs + more_leafs)


# two select layers, three reuse layers: equal counts and sizes, but the list of the one or the other is read last
SOURCES = [(0, 1, 1), (1, 0, 0), (0, 1, 0), (1, 0, 1)]


def test_policies_of_equal_counts_take_turns(model):
    """Fails if hylra_set_policy does not make llama.cpp plan its buffers anew: a list would be overwritten before its last reader."""
    policies = [replace(policy("SSRRR", top_k=256), layer_source=(0, 1, *sources)) for sources in SOURCES]
    assert len({counts_of(model, p) for p in policies}) == 1
    fresh = []
    for p in policies:
        with Session(model) as s:
            engine.set_policy(s.ctx, p)
            s.prefill(random_tokens(N_PAST))
            fresh.append(s.steps(random_tokens(3, 9), N_PAST))
    with Session(model) as s:
        s.prefill(random_tokens(N_PAST))
        for i in (0, 1, 2, 3, 0, 2, 1, 3, 0):
            engine.set_policy(s.ctx, policies[i])
            np.testing.assert_array_equal(s.steps(random_tokens(3, 9), N_PAST), fresh[i], err_msg=str(SOURCES[i]))
            s.rewind(N_PAST)


# ---- ten thousand steps

N_STEPS, N_CTX, MIN_CONTEXT, LOW, HIGH = 10_000, 2048, 512, 300, 1900


class Mallinfo2(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]


def allocated_bytes() -> int:
    """What malloc has given out in this process, llama.cpp's buffers among it"""
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = Mallinfo2
    info = libc.mallinfo2()
    return info.uordblks + info.hblkhd


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


def many_steps(path, p):
    """Greedy steps that climb from LOW to HIGH cached tokens and fall back: (tokens, allocated and resident bytes on the way, reused graphs,
    sparse steps)"""
    with Session(path, n_ctx=N_CTX) as s:
        engine.set_policy(s.ctx, p)
        s.prefill(random_tokens(LOW))
        pos, token, tokens, memory = LOW, 1, np.zeros(N_STEPS, np.int32), []  # an array, so that keeping them takes no memory
        for i in range(N_STEPS):
            token = int(s.decode([(token, pos, 0)])[0].argmax())
            tokens[i] = token
            pos += 1
            if pos == HIGH:
                s.rewind(LOW)
                pos = LOW
                memory.append((allocated_bytes(), resident_bytes()))
        return tokens, memory, s.api.llama_perf_context(s.ctx).n_reused, engine.status(s.ctx)["sparse_steps"]


@pytest.mark.slow
def test_ten_thousand_steps_cost_no_memory_and_reuse_graphs_as_stock(tmp_path):
    path = write_architecture(tmp_path / "m.gguf", ARCHITECTURES["qwen2"])
    p = policy("SRRS", min_context=MIN_CONTEXT)
    _, _, stock_reused, _ = many_steps(path, None)
    tokens, memory, reused, sparse = many_steps(path, p)
    covering, full = (many_steps(path, q)[0] for q in (policy("SRRS", min_context=MIN_CONTEXT, top_k=8192), full_like(p)))
    assert len(memory) == 6 and len(set(tokens.tolist())) > 3
    assert sparse == sum(MIN_CONTEXT <= LOW + i % (HIGH - LOW) for i in range(N_STEPS))
    assert reused == stock_reused > 0.99 * N_STEPS
    np.testing.assert_array_equal(covering, full)
    (first_allocated, first_resident), (last_allocated, last_resident) = memory[0], memory[-1]
    assert last_allocated - first_allocated < 4 << 10, "malloc"
    assert last_resident - first_resident < 256 << 10, "RSS"
