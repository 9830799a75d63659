"""The arms of `eval`, and one document put before one of them: predictions of the text that follows, answers, captured mass, speed.

All arms see the same tokens in batches of decode size, so that HyLRA acts. An arm whose cache cannot hold the state of another context
(other KV types; without flash attention V lies transposed) reads each document itself.
"""

from __future__ import annotations

import ctypes
import tempfile
from dataclasses import dataclass, field

import numpy as np

from . import engine
from .bench import Arm as BenchArm, make_arms as make_bench_arms, timed_ns
from .divergence import dense_policy, log_softmax
from .errors import HylraError
from .forward import GGML_TYPES
from .gguf_header import model_shape, read_header
from .policy import FULL, Policy
from .session import DECODE_TOKENS, Context, Model

DENSE = "dense"  # our F32-accumulating kernel in every layer: the reference
KV = {"kv-q8_0": "q8_0", "kv-q4_0": "q4_0"}  # stock with a quantised cache, a loss that everybody knows
MAX_ANSWER_TOKENS = 96


@dataclass(frozen=True)
class Arm:
    """policy: None for stock llama.cpp"""

    name: str
    policy: Policy | None
    flash_attn: bool = True
    type_kv: str = "f16"

    @property
    def cache(self) -> tuple[bool, str]:
        """Arms of the same cache share one context and one prefill."""
        return self.flash_attn, self.type_kv


@dataclass
class Sitting:
    """What one arm did with one document. nll, kld, same_top and change are [n_following]: minus log probability of the true token, KL
    divergence from dense, same most likely token, change of the true token's probability; answers: token ids per question."""

    nll: np.ndarray
    kld: np.ndarray
    same_top: np.ndarray
    change: np.ndarray
    answers: list[list[int]] = field(default_factory=list)
    long: list[list[int]] = field(default_factory=list)  # free text per request
    mass: dict[int, float] = field(default_factory=dict)  # captured mass per select layer
    sparse_steps: int = 0
    step_ns: float = 0.0  # of one decode step; 0: not measured


def make_arms(names: list[str], policies: dict[str, Policy], model_path: str) -> list[Arm]:
    """The dense arm comes first whether it is named or not. Raises HylraError if an arm needs a policy and there is none."""
    arms = [Arm(DENSE, all_full(model_path))]
    for name in dict.fromkeys(names):
        if name in KV:
            arms.append(Arm(name, None, type_kv=KV[name]))
        elif name != DENSE:
            arms += [of_bench(one) for one in make_bench_arms([name], policies)]
    return arms


def of_bench(arm: BenchArm) -> Arm:
    return Arm(arm.name, arm.policy, arm.flash_attn)


def all_full(model_path: str) -> Policy:
    _, layers, heads = model_shape(read_header(model_path))
    return dense_policy(Policy(layer_mode=(FULL,) * layers, layer_source=(-1,) * layers, head_kv_count=heads))


# -- state of a document ----------------------------------------------------------------------------------------------


def move_state(source: Context, target: Context) -> None:
    """Sequence 0 of one context into another of the same KV types."""
    api = source.api
    size_bytes = api.llama_state_seq_get_size(source.ctx, 0)
    state = (ctypes.c_uint8 * size_bytes)()
    api.llama_state_seq_get_data(source.ctx, state, size_bytes, 0)
    if not api.llama_state_seq_set_data(target.ctx, state, size_bytes, 0):
        raise HylraError(f"{source.model.path}: llama.cpp cannot move the state of this model between two contexts; leave out --prefill-ngl")


# -- text that follows ------------------------------------------------------------------------------------------------


class Reference:
    """Log probabilities of the dense arm, [n_following, n_vocab] F32, in a file: memory stays O(vocabulary)."""

    def __init__(self, n_following: int, n_vocab: int):
        self.file = tempfile.TemporaryFile()
        self.rows = np.memmap(self.file, np.float32, "w+", shape=(max(1, n_following), n_vocab))

    def close(self) -> None:
        del self.rows
        self.file.close()


def predict(context: Context, start: int, following: list[int]):
    """(index of the first, [up to DECODE_TOKENS, n_vocab] log probabilities) of every token that follows the first; the cache holds
    `start` tokens before and after."""
    for at in range(0, len(following) - 1, DECODE_TOKENS):
        part = following[at : min(at + DECODE_TOKENS, len(following) - 1)]
        context.decode(part, start + at, outputs=range(len(part)))
        yield at, log_softmax(context.logits(len(part)))
    context.rewind(start)


def teacher_forced(context: Context, start: int, following: list[int], reference: Reference, is_dense: bool) -> Sitting:
    n = max(0, len(following) - 1)
    out = Sitting(*(np.zeros(n) for _ in range(2)), np.ones(n, bool), np.zeros(n))
    for at, log_q in predict(context, start, following):
        rows = slice(at, at + len(log_q))
        if is_dense:
            reference.rows[rows] = log_q
        log_p = reference.rows[rows]
        index = (np.arange(len(log_q)), following[at + 1 : at + 1 + len(log_q)])
        out.nll[rows] = -log_q[index]
        if not is_dense:
            out.kld[rows] = (np.exp(log_p) * (log_p - log_q)).sum(-1)
            out.same_top[rows] = log_p.argmax(-1) == log_q.argmax(-1)
            out.change[rows] = np.exp(log_q[index]) - np.exp(log_p[index])
    return out


# -- answers ----------------------------------------------------------------------------------------------------------


def greedy(context: Context, start: int, prompt: list[int], guess: list[int], max_tokens: int) -> list[int]:
    """The greedy answer without its end token. guess: tokens likely to come; they are computed along in one batch, which gives the same
    answer in fewer steps. The cache holds `start` tokens before and after."""
    pos, out = start, []
    for at in range(0, len(prompt), DECODE_TOKENS):
        part = prompt[at : at + DECODE_TOKENS]
        context.decode(part, pos)
        pos += len(part)
    best = int(context.logits(1)[0].argmax())
    while not context.api.llama_vocab_is_eog(context.model.vocab, best) and len(out) < max_tokens:
        out.append(best)
        ahead = guess[len(out) : len(out) + DECODE_TOKENS - 1] if out == guess[: len(out)] else []
        best, pos = verified(context, pos, out, ahead, max_tokens)
    context.rewind(start)
    return out[:max_tokens]


def verified(context: Context, pos: int, out: list[int], ahead: list[int], max_tokens: int) -> tuple[int, int]:
    """One batch of the last token and guesses; right ones join `out`. Returns the token that comes next and its position."""
    batch = [out[-1], *ahead]
    context.decode(batch, pos, outputs=range(len(batch)))
    best = context.logits(len(batch)).argmax(-1)
    right = 0
    while right < len(ahead) and int(best[right]) == ahead[right]:
        right += 1
    out += ahead[:right]
    pos += 1 + right
    if right < len(ahead):
        context.rewind(pos)
    return int(best[right]), pos


# -- a sitting --------------------------------------------------------------------------------------------------------


def sit(arm: Arm, context: Context, document, prompts: list[list[int]], guesses: list[list[int]], long_prompts: list[list[int]],
        long_guesses: list[list[int]], reference: Reference, *, n_long: int, n_timed: int) -> Sitting:
    """The cache holds the document. guesses: what each answer may be."""
    start = len(document.tokens)
    engine.set_policy(context.ctx, arm.policy)
    out = teacher_forced(context, start, document.following, reference, arm.name == DENSE)
    out.answers = [greedy(context, start, prompt, guess, MAX_ANSWER_TOKENS) for prompt, guess in zip(prompts, guesses)]
    out.long = [greedy(context, start, prompt, guess, n_long) for prompt, guess in zip(long_prompts, long_guesses)]
    status = engine.status(context.ctx)
    out.mass, out.sparse_steps = status["captured_mass"], status["sparse_steps"]
    if n_timed:
        out.step_ns = timed_ns(context, arm.policy, document.tokens[: n_timed + 1], start) / n_timed
    return out


def open_context(model: Model, arm: Arm, n_ctx: int, n_threads: int) -> Context:
    kind = GGML_TYPES[arm.type_kv]
    try:
        return Context(model, n_ctx, n_threads=n_threads, type_k=kind, type_v=kind, flash_attn=arm.flash_attn)
    except HylraError as error:
        raise HylraError(f"{error}, or leave arm {arm.name} out with --arms") from None
