"""Why a layer stays llama.cpp's: every reason that a model and a batch on the CPU can lead to, with what the step then computes.

Sliding windows, recurrent layers, trained sparsity and other kinds of caches are in test_architectures.py, a head that no kernel takes
is in test_engine.py, a cache on a device without our kernels in test_remote_device.py.
"""

from __future__ import annotations

import numpy as np
import pytest
from architectures import GATED, NORMS, Architecture, write_architecture
from support import Session, full_like, policy, random_tokens

from hylra_gguf import engine

engine.activate()
NO_CACHE, SCRATCH, SOURCE = "attention without a KV cache", "the batch needs too much memory", "its source layer was not served"

# Llama-3.1-Nemotron-51B's architecture: layers of one model with other numbers of heads. 64 heads, 64 tokens and more than 16384 cells
# are more softmax weights than the engine keeps (256 MiB), 8 heads are not.
N_HEAD = (64, 8, 8, 8)
N_CACHED, N_SEQ = 16500, 8


def many_heads() -> Architecture:
    """64 heads of 4 columns in layer 0, 8 in the others, all with 4 KV heads"""
    qkv = "attn_q E {0}; attn_k E 16; attn_v E 16; attn_output {0} E; "
    return Architecture("deci", "baaa", NORMS + GATED, {"attention.head_count": list(N_HEAD), "attention.head_count_kv": [4] * 4,
                        "attention.key_length": 4, "attention.value_length": 4, "rope.dimension_count": 4},
                        {"b": qkv.format(256), "a": qkv.format(32)})


def full_batch():
    """Eight tokens of each of eight sequences; the first one is long."""
    return [(i, (N_CACHED if seq == 0 else 0) + i, seq) for seq in range(N_SEQ) for i in range(8)]


@pytest.fixture(scope="module")
def long_session(tmp_path_factory):
    path = write_architecture(tmp_path_factory.mktemp("states") / "deci.gguf", many_heads(), context=32768)
    with Session(path, n_ctx=N_CACHED + 500, n_seq_max=N_SEQ + 1, n_batch=512) as s:
        s.fill(N_CACHED, 256)
        yield s


def step(s, p, entries):
    """(logits, status) of one batch; the cache is as before afterwards"""
    engine.set_policy(s.ctx, p)
    logits, status = s.decode(entries), engine.status(s.ctx)
    s.rewind(N_CACHED, 0)
    for seq in range(1, N_SEQ):
        s.remove(seq)
    return logits, status


def test_a_batch_that_needs_too_much_memory_leaves_its_layer_and_those_that_reuse_it(long_session):
    p = policy("SRSR", head_kv_count=4, top_k=32768)
    (got, status), (want, _) = step(long_session, p, full_batch()), step(long_session, full_like(p), full_batch())
    assert status["on"] and status["sparse_steps"] == 1 and status["left_to_stock"] == {0: SCRATCH, 1: SOURCE}
    np.testing.assert_allclose(got, want, atol=0.05 * want.std())  # layer 1: stock sums V in F16
    _, status = step(long_session, p, full_batch()[:1])
    assert status["left_to_stock"] == {}, "one token is not too much"


def test_where_no_source_is_served_the_batch_is_dense_and_the_reason_is_the_first(long_session):
    (got, status), (want, _) = (step(long_session, p, full_batch()) for p in (policy("SRRR", head_kv_count=4), None))
    np.testing.assert_array_equal(got, want)
    assert not status["on"] and status["sparse_steps"] == 0 and status["reason"] == f"no layer can be served: {SCRATCH}"
    assert status["left_to_stock"] == {0: SCRATCH, 1: SOURCE, 2: SOURCE, 3: SOURCE}


# ---- an encoder and a decoder that looks at it

ATTENTION = "attn_q E Q; attn_k E Q; attn_v E Q; attn_o Q E; "
CROSS = ATTENTION.replace("attn_", "cross_attn_")


def t5() -> Architecture:
    """The decoder's own attention has a bias per distance, which llama.cpp computes without flash attention; the other has no KV cache."""
    layers = [f"{side}.blk.{il}.{line.strip()}" for side, lines in
              (("enc", "attn_norm E; " + ATTENTION), ("dec", "attn_norm E; cross_attn_norm E; " + ATTENTION + CROSS))
              for il in range(2) for line in (lines + "ffn_norm E; ffn_up E F; ffn_down F E").split(";")]
    biases = [f"{side}.blk.0.attn_rel_b H 32" for side in ("enc", "dec")]
    return Architecture("t5", "cc", "", {"attention.head_count_kv": 4, "attention.relative_buckets_count": 32, "attention.key_length": 32,
                        "attention.value_length": 32, "decoder_start_token_id": 0}, model="; ".join([*layers, *biases, "enc.output_norm E",
                        "dec.output_norm E", "output E V"]), head_kv_count=4)


def encode(s, tokens):
    batch = s.api.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, i, 1, 0, 1
    assert s.api.llama_encode(s.ctx, batch) == 0
    s.api.llama_batch_free(batch)


def test_a_decoder_that_attends_to_an_encoder_stays_dense_and_says_so(tmp_path):
    path, rows = write_architecture(tmp_path / "t5.gguf", t5()), []
    for p in (policy("SR", head_kv_count=4), None):
        with Session(path) as s:
            engine.set_policy(s.ctx, p)
            encode(s, random_tokens(40, 1))
            s.prefill(random_tokens(500))
            rows.append(s.steps(random_tokens(3, 9), 500))
            if p:
                status = engine.status(s.ctx)
    np.testing.assert_array_equal(*rows)
    assert not status["on"] and status["sparse_steps"] == 0 and status["left_to_stock"] == {0: NO_CACHE, 1: NO_CACHE}
    assert status["reason"] == f"no layer can be served: {NO_CACHE}"
