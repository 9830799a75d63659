"""KL divergence of a policy against dense, on a tiny random model: zero where nothing is left out, what NumPy says where it is."""

from __future__ import annotations

import numpy as np
import pytest
from support import VOCAB, Session, random_tokens, write_tiny_model
from test_engine import full_like, policy

from hylra_gguf import engine
from hylra_gguf.divergence import Judge, log_softmax
from hylra_gguf.errors import HylraError
from hylra_gguf.session import Model

DEPTH, N = 600, 20


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


@pytest.fixture(scope="module")
def judge(tiny):
    texts = [random_tokens(DEPTH + N, seed) for seed in (1, 2)]
    with Model(str(tiny)) as model, Judge(model, texts, DEPTH, N, policy("SRSR")) as judge:
        yield judge


def test_a_selection_of_everything_changes_nothing(judge):
    found = judge.compare(policy("SRSR", top_k=2048))
    assert found.kld.shape == found.same_top.shape == (2, N) and found.same_top.all()
    assert abs(found.mean()) < 1e-6


def test_it_is_what_single_steps_give(judge, tiny):
    """Decoded eight tokens at a time in the judge, one at a time here."""
    p = policy("SRSR", top_k=24)
    logits = {}
    with Session(tiny) as s:
        tokens = random_tokens(DEPTH + N, 2)
        s.prefill(tokens[:DEPTH])
        for name, one in (("dense", full_like(p)), ("sparse", p)):
            engine.set_policy(s.ctx, one)
            logits[name] = log_softmax(s.steps(tokens[DEPTH:], DEPTH).astype(np.float64))
            s.rewind(DEPTH)
    kld = (np.exp(logits["dense"]) * (logits["dense"] - logits["sparse"])).sum(-1)
    assert kld.mean() > 1e-4
    np.testing.assert_allclose(judge.compare(p).kld[1], kld, rtol=0.05, atol=1e-4)


def test_policies_do_not_disturb_each_other(judge):
    p, q = policy("SRSR", top_k=24), policy("SRRR", top_k=32)
    first = judge.compare(p)
    assert judge.compare(q).mean() != first.mean()
    np.testing.assert_array_equal(judge.compare(p).kld, first.kld)


def test_a_short_text_is_refused(tiny):
    with Model(str(tiny)) as model, pytest.raises(HylraError, match="text 1 has 30 tokens, 600 \\+ 20 are needed"):
        Judge(model, [random_tokens(30)], DEPTH, N, policy("SRSR"))


def test_log_softmax():
    x = np.random.default_rng(0).standard_normal((3, VOCAB)) * 5
    np.testing.assert_allclose(np.exp(log_softmax(x)).sum(-1), 1)
    np.testing.assert_allclose(log_softmax(x + 100), log_softmax(x), atol=1e-9)
