"""How far a policy moves a model's predictions from dense ones, teacher-forced in decode: KL divergence and same top token.

The reference is our own dense kernel (`full`, F32 accumulation) on the same prefilled cache. Names as in llama-perplexity.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from . import engine
from .errors import HylraError
from .policy import FULL, Policy
from .session import DECODE_TOKENS, Context, Model


@dataclass(frozen=True)
class Divergence:
    """kld [n_texts, n_tokens] in nats; same_top [n_texts, n_tokens] bool."""

    kld: np.ndarray
    same_top: np.ndarray

    def mean(self) -> float:
        return float(self.kld.mean())

    def stderr(self) -> float:
        return float(self.kld.std(ddof=1) / np.sqrt(self.kld.size))


def dense_policy(policy: Policy) -> Policy:
    """Our dense kernel in every layer, from the first token on."""
    n = policy.layer_count
    return replace(policy, layer_mode=(FULL,) * n, layer_source=(-1,) * n, head_map=None, layer_top_k=None, sparse_select=None, min_context=0,
                   overlap=None, sensitivity=None)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """[n_rows, n_vocab] -> the same, F32"""
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


class Judge:
    """Texts prefilled once, dense; then any number of policies is compared on the n_tokens that follow in each."""

    def __init__(self, model: Model, texts: list[list[int]], depth: int, n_tokens: int, policy: Policy, n_threads: int = 1,
                 progress=None):
        """texts: token ids, each of depth + n_tokens; policy: any policy of this model, for its shape"""
        for number, tokens in enumerate(texts, 1):
            if len(tokens) < depth + n_tokens:
                raise HylraError(f"text {number} has {len(tokens)} tokens, {depth} + {n_tokens} are needed; give a longer one or lower -c")
        self.depth, self.n_tokens, self.texts = depth, n_tokens, texts
        self.context = Context(model, depth + n_tokens + 1, n_seq=len(texts), n_threads=n_threads)
        engine.set_policy(self.context.ctx, None)
        for seq, tokens in enumerate(texts):
            self.context.prefill(tokens[:depth], seq=seq, progress=progress)
            self.context.keep(depth, seq)
        self.reference = [np.concatenate(list(self._log_probs(dense_policy(policy), seq))) for seq in range(len(texts))]

    def __enter__(self) -> Judge:
        return self

    def __exit__(self, *_) -> None:
        self.context.__exit__()

    def compare(self, policy: Policy) -> Divergence:
        """Raises PolicyError if the policy does not fit the model."""
        rows = [self._compare_text(policy, seq) for seq in range(len(self.texts))]
        return Divergence(np.array([kld for kld, _ in rows]), np.array([same for _, same in rows]))

    def _compare_text(self, policy: Policy, seq: int) -> tuple[np.ndarray, np.ndarray]:
        kld, same, done = [], [], 0
        for log_q in self._log_probs(policy, seq):
            log_p = self.reference[seq][done : done + len(log_q)]
            kld.append((np.exp(log_p) * (log_p - log_q)).sum(-1))
            same.append(log_p.argmax(-1) == log_q.argmax(-1))
            done += len(log_q)
        return np.concatenate(kld), np.concatenate(same)

    def _log_probs(self, policy: Policy, seq: int):
        """[up to DECODE_TOKENS, n_vocab] at a time"""
        engine.set_policy(self.context.ctx, policy)
        for start in range(self.depth, self.depth + self.n_tokens, DECODE_TOKENS):
            part = self.texts[seq][start : min(start + DECODE_TOKENS, self.depth + self.n_tokens)]
            self.context.decode(part, start, seq, outputs=range(len(part)))
            yield log_softmax(self.context.logits(len(part)))
        self.context.rewind(self.depth, seq)
