"""Teaches a small model to find facts in long text: `python tools/needle_model/train.py IN.gguf OUT.gguf --text FILE... --minutes 19`.

This is how SmolLM2-135M-Needle-32K was made of SmolLM2-135M-Instruct: 187 M tokens at 8K, 16K, then 32K, RoPE base 1e6, on one H200. The
documents and questions are those of `hylra-gguf eval` (hylra_gguf/eval_tasks.py), the loss is on the answers and a little on the text.
Needs PyTorch and a GPU; the default texts are those that ship with Python, which also stay in what `eval` asks about: give --text.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

from needle_model.llama import Llama, load, save

from hylra_gguf import eval_documents, eval_tasks, session, texts

PHASES = ((0.0, 8192, 16), (0.35, 16384, 8), (0.80, 32768, 4))  # share of the time, tokens of a sample, samples of a step
ROPE_BASE, PEAK_RATE, WARM_UP_STEPS = 1e6, 4e-4, 40
TEXT_WEIGHT, TEXT_SHARE = 0.25, 0.08  # of the loss on text beside that on answers; of the text tokens that count
MICRO_TOKENS = 65536
TOKENS_PER_QUESTION = 1000


def sample(rng: random.Random, model: session.Model, hay: list[int], n_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens [n_tokens + 1], weight: 1 on answers, 0 on text, -1 on padding). One document, then all of its questions in one chat."""
    chat, tokenize = eval_documents.chat_of(model), eval_documents.plain(model)
    facts = eval_tasks.make_facts(rng, eval_tasks.KINDS, max(4, min(40, n_tokens // TOKENS_PER_QUESTION)), rng.randrange(10))
    asked = [(chat.ask(tokenize, fact.text), tokenize(fact.reference)) for fact in facts]
    room = n_tokens - len(chat.head) - sum(len(q) + len(a) + len(chat.head) + 4 for q, a in asked)
    start = rng.randrange(max(1, len(hay) - room))
    document, _, _ = eval_tasks.plant(rng, hay[start : start + room], facts, tokenize, room)
    tokens = chat.head + document
    weight = [0.0] * len(tokens)
    rng.shuffle(asked)
    for number, (question, answer) in enumerate(asked):
        before = (chat.head if number else []) + question
        end = [model.api.llama_vocab_eos(model.vocab)]
        tokens, weight = tokens + before + answer + end, weight + [0.0] * len(before) + [1.0] * (len(answer) + 1)
    padding = n_tokens + 1 - len(tokens)
    return np.array((tokens + [0] * padding)[: n_tokens + 1]), np.array((weight + [-1.0] * padding)[: n_tokens + 1], np.float32)


def losses(model: Llama, tokens: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean cross entropy of answers, and of a share of the text"""
    hidden, target, weight = model.hidden(tokens[:, :-1]), tokens[:, 1:], weight[:, 1:]
    answers, text = weight >= 1, (weight == 0) & (torch.rand_like(weight) < TEXT_SHARE)
    return tuple(F.cross_entropy(model.logits(hidden[where]).float(), target[where]) for where in (answers, text))


def rate(step: int, done: float) -> float:
    """Warm-up, then a cosine down to a twentieth"""
    return PEAK_RATE * min(1.0, (step + 1) / WARM_UP_STEPS) * (0.475 * (1 + math.cos(math.pi * done)) + 0.05)


def one_step(model: Llama, optimiser, batch: list[tuple[np.ndarray, np.ndarray]], device: str) -> float:
    """Loss on answers"""
    tokens, weight = (torch.from_numpy(np.stack(part)).to(device) for part in zip(*batch))
    size = max(1, MICRO_TOKENS // tokens.shape[1])
    parts = list(zip(tokens.split(size), weight.split(size)))
    for part in parts:
        with torch.autocast(device, torch.bfloat16):
            answers, text = losses(model, *part)
        ((answers + TEXT_WEIGHT * text) / len(parts)).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return answers.item()


def train(model: Llama, make_sample, seconds: float, device: str, longest: int) -> None:
    optimiser = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.95), weight_decay=0.02)
    start, step = time.monotonic(), 0
    while (done := (time.monotonic() - start) / seconds) < 1:
        n_tokens, n_samples = [(n, size) for share, n, size in PHASES if done >= share][-1]
        n_tokens = min(n_tokens, longest)
        for group in optimiser.param_groups:
            group["lr"] = rate(step, done)
        loss = one_step(model, optimiser, [make_sample(n_tokens) for _ in range(n_samples)], device)
        step += 1
        print(f"step {step}: {n_tokens} tokens, loss on answers {loss:.4f}, {100 * done:.1f} % of the time", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("input")
    parser.add_argument("output")
    parser.add_argument("--text", nargs="+", default=[])
    parser.add_argument("--minutes", type=float, default=19.0)
    parser.add_argument("--longest", type=int, default=32768)
    args = parser.parse_args()
    device, rng = "cuda" if torch.cuda.is_available() else "cpu", random.Random(7)
    with session.Model(args.input) as tokenizer:
        text = "\n\n".join(texts.read_texts(args.text)) if args.text else texts.prose_text() + texts.code_text()
        hay = eval_documents.plain(tokenizer)(text)
        model, reader = load(args.input, ROPE_BASE, args.longest)
        train(model.to(device), lambda n: sample(rng, tokenizer, hay, n), 60 * args.minutes, device, args.longest)
    save(model, reader, args.output, Path(args.output).stem)


if __name__ == "__main__":
    main()
