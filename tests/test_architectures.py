"""Every architecture of architectures.py: covering selections equal full, real ones equal NumPy, layers left dense are named."""

from __future__ import annotations

import numpy as np
import pytest
from architectures import ARCHITECTURES, write_architecture
from reference import Trace, attention, cells_allowed, check_selection, probabilities
from support import Session, full_like, policy, random_tokens

from hylra_gguf import engine

engine.activate()
N_PAST, N_STEPS = 500, 4
NAMES = list(ARCHITECTURES)
WHY = {"w": "sliding-window attention", "r": "no attention over the KV cache"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Written once per architecture."""
    folder, written = tmp_path_factory.mktemp("architectures"), {}

    def path(name):
        if name not in written:
            written[name] = write_architecture(folder / f"{NAMES.index(name)}.gguf", ARCHITECTURES[name])
        return written[name]

    return path


def pattern_of(name: str) -> str:
    """Attention layers take turns: select, reuse, full, reuse; the others must be full."""
    turns = iter("SRFR" * len(ARCHITECTURES[name].layers))
    return "".join(next(turns) if kind == "a" else "F" for kind in ARCHITECTURES[name].layers)


def policy_of(name: str, **fields):
    return policy(pattern_of(name), head_kv_count=ARCHITECTURES[name].head_kv_count, **fields)


def decode(path, p, trace=None):
    """(logits of a few steps, status); a context of its own, since a recurrent state cannot be rewound."""
    with Session(path, eval_callback=trace and trace.callback) as s:
        s.prefill(random_tokens(N_PAST))
        engine.set_policy(s.ctx, p)
        return s.steps(random_tokens(N_STEPS, 9), N_PAST), engine.status(s.ctx)


@pytest.mark.parametrize("name", NAMES)
def test_a_selection_that_covers_everything_equals_full(model, name):
    p = policy_of(name, top_k=4096)
    (got, status), (want, _), (stock, _) = decode(model(name), p), decode(model(name), full_like(p)), decode(model(name), None)
    assert status["sparse_steps"] == N_STEPS
    scale = want.std()
    np.testing.assert_allclose(got, want, atol=2e-4 * scale, rtol=1e-4)
    np.testing.assert_allclose(want, stock, atol=0.05 * scale)  # stock accumulates V in F16
    assert np.abs(want - stock).max() > 0, "the full arm must be our own kernel"


@pytest.mark.parametrize("name", NAMES)
def test_layers_left_dense_are_named(model, name):
    layers = ARCHITECTURES[name].layers
    _, status = decode(model(name), policy_of(name))
    assert status["on"] and status["left_to_stock"] == {il: WHY[kind] for il, kind in enumerate(layers) if kind in WHY}


def shared_kv(x):
    """Layers 24 and 29 have no KV cache of their own; they read that of layer 19."""
    return np.array_equal(x[24]["k"], x[19]["k"]) and np.array_equal(x[29]["v"], x[19]["v"]) and not np.array_equal(x[14]["k"], x[19]["k"])


# what makes the architecture special is there: else the tests below would show nothing
SPECIAL = {
    "gemma2": lambda x: x[1]["softcap"] == 5.0,
    "gpt-oss": lambda x: x[1]["sinks"] is not None and np.abs(x[1]["sinks"]).min() > 0,
    "bloom (ALiBi)": lambda x: x[0]["max_bias"] == 8.0 and x[0]["mask"][0, 0, 0, 0] == -N_PAST - N_STEPS + 1,
    "mpt (ALiBi, six heads)": lambda x: x[0]["max_bias"] == 8.0 and x[0]["q"].shape[1] == 6,
    "falcon": lambda x: x[0]["k"].shape[1] == 1,
    "gemma3n": shared_kv,
    "deepseek2 (MLA)": lambda x: x[0]["k"].shape[1::2] == (1, 576) and np.array_equal(x[0]["v"], x[0]["k"][..., :512]),
}


@pytest.mark.parametrize("name", SPECIAL)
def test_what_makes_it_special_is_there(model, name):
    trace = Trace()
    decode(model(name), policy_of(name), trace)
    assert SPECIAL[name](trace.inputs)


@pytest.mark.parametrize("name", NAMES)
def test_a_real_selection_equals_numpy(model, name):
    p, trace = policy_of(name), Trace()
    decode(model(name), p, trace)
    last = N_PAST + N_STEPS - 1
    forced = [[[*range(4), *range(last - 15, last + 1)]]]
    source = None
    served = [il for il, kind in enumerate(ARCHITECTURES[name].layers) if kind == "a"]
    assert sorted(trace.outputs) == served
    for il in served:
        x, mode = trace.inputs[il], pattern_of(name)[il]
        if mode == "S":
            source = trace.choices[il]
            check_selection(x, source, 1, 64, forced)
        allowed = cells_allowed(x, [0] * x["k"].shape[1]) if mode == "R" else None
        if mode == "R":
            np.testing.assert_array_equal(x["cells"], source)
        want = attention(x, probabilities(x, allowed))
        np.testing.assert_allclose(trace.outputs[il], want, atol=2e-5 * max(1, np.abs(want).max()), rtol=1e-4, err_msg=f"layer {il}")
