"""Teaches a small model to find facts in long text: `python tools/needle_model/train.py IN.gguf OUT.gguf --text FILE... --minutes 19`.

This is how SmolLM2-135M-Needle-32K was made of SmolLM2-135M-Instruct: 187 M tokens at 8K, 16K, then 32K, RoPE base 1e6, on one H200. The
documents and questions are those of `hylra-gguf eval` (hylra_gguf/eval_tasks.py), the loss is on the answers and a little on the text.
Needs PyTorch and a GPU; several share the samples of each step: `torchrun --nproc-per-node N tools/needle_model/train.py ...`.
The default texts are those that ship with Python, which also stay in what `eval` asks about: give --text.
stdout is the result: what was trained on what, and the loss of each length, as JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import random
import sys
import time
from pathlib import Path
from typing import Callable, Iterator

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

from needle_model.llama import Llama, load, save

from hylra_gguf import bench, eval_documents, eval_tasks, session, texts

PHASES = ((0.0, 8192, 16), (0.35, 16384, 8), (0.80, 32768, 4))  # share of the time, tokens of a sample, samples of a step
ROPE_BASE, PEAK_RATE, WARM_UP_STEPS = 1e6, 4e-4, 40
TEXT_WEIGHT, TEXT_SHARE = 0.25, 0.08  # of the loss on text beside that on answers; of the text tokens that count
MICRO_TOKENS = 32768  # forward and backward at once, which sets the GPU memory it takes
TOKENS_PER_QUESTION = 1000
MOST_WORKERS = 12  # processes that make samples; one alone makes fewer than a GPU reads
RANK, N_GPUS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # as torchrun sets them
STEPS_PER_LINE = 10  # steps between losses that are read: each reading makes the processor wait for the GPU


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


class Samples(IterableDataset):
    """Endless samples of the length that `n_tokens` holds at the time; each worker has a seed of its own."""

    def __init__(self, make: Callable[[random.Random, int], tuple[np.ndarray, np.ndarray]], longest: int):
        self.make, self.longest = make, longest
        self.n_tokens = multiprocessing.Value("i", min(PHASES[0][1], longest))

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        rng = random.Random(get_worker_info().seed)
        while True:
            yield self.make(rng, self.n_tokens.value)

    def start(self, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Forks the workers: to be called before the GPU is used. Each GPU has samples of its own."""
        torch.manual_seed(seed * N_GPUS + RANK)
        n_workers = max(1, min(MOST_WORKERS, (os.cpu_count() or 2) // N_GPUS - 2))
        return iter(DataLoader(self, batch_size=None, num_workers=n_workers, prefetch_factor=4, multiprocessing_context="fork"))

    def batch(self, made: Iterator, n_tokens: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """[size, n_tokens + 1] each; samples of an earlier length are dropped"""
        self.n_tokens.value = n_tokens
        right = (sample for sample in made if len(sample[0]) == n_tokens + 1)
        return tuple(torch.stack(part) for part in zip(*(next(right) for _ in range(size))))


def losses(model: Llama, tokens: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean cross entropy of answers, and of a share of the text"""
    hidden, target, weight = model.hidden(tokens[:, :-1]), tokens[:, 1:], weight[:, 1:]
    answers, text = weight >= 1, (weight == 0) & (torch.rand_like(weight) < TEXT_SHARE)
    return tuple(F.cross_entropy(model.logits(hidden[where]).float(), target[where]) for where in (answers, text))


def rate(step: int, done: float) -> float:
    """Warm-up, then a cosine down to a twentieth"""
    return PEAK_RATE * min(1.0, (step + 1) / WARM_UP_STEPS) * (0.475 * (1 + math.cos(math.pi * done)) + 0.05)


def mean_over_gpus(model: Llama) -> None:
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad, dist.ReduceOp.AVG)


def of_first_gpu(value: float) -> float:
    """One clock for all, so that they change lengths and stop together"""
    shared = torch.tensor(value, device="cuda")
    dist.broadcast(shared, 0)
    return shared.item()


def one_step(model: Llama, optimiser, tokens: torch.Tensor, weight: torch.Tensor, device: str) -> torch.Tensor:
    """Loss on answers, [] on the device"""
    tokens, weight = tokens.to(device), weight.to(device)
    size = max(1, MICRO_TOKENS // (tokens.shape[1] - 1))
    parts = list(zip(tokens.split(size), weight.split(size)))
    for part in parts:
        with torch.autocast(device, torch.bfloat16):
            answers, text = losses(model, *part)
        ((answers + TEXT_WEIGHT * text) / len(parts)).backward()
    if N_GPUS > 1:
        mean_over_gpus(model)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return answers.detach()


def train(model: Llama, samples: Samples, made: Iterator, seconds: float, device: str) -> list[dict]:
    """A record per length of samples; `loss`: on answers, the mean of the last ten that were read"""
    optimiser = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.95), weight_decay=0.02, fused=device == "cuda")
    start, step, phases = time.monotonic(), 0, {}
    while True:
        done = (time.monotonic() - start) / seconds
        done = of_first_gpu(done) if N_GPUS > 1 else done
        if done >= 1:
            break
        n_tokens, n_samples = [(min(n, samples.longest), max(1, size // N_GPUS)) for share, n, size in PHASES if done >= share][-1]
        phase = phases.setdefault(n_tokens, {"sample_tokens": n_tokens, "steps": 0, "tokens": 0, "losses": []})
        for group in optimiser.param_groups:
            group["lr"] = rate(step, done)
        loss = one_step(model, optimiser, *samples.batch(made, n_tokens, n_samples), device)
        if phase["steps"] % STEPS_PER_LINE == 0: # the first of each length too: no phase is without a loss
            phase["losses"].append(loss.item())
            print(f"step {step}: {n_tokens} tokens, loss on answers {loss.item():.4f}, {100 * done:.1f} % of the time", file=sys.stderr)
        step += 1
        phase["steps"] += 1
        phase["tokens"] += n_tokens * n_samples * N_GPUS
        phase["end_s"] = round(time.monotonic() - start, 1)
    for phase in phases.values():
        phase["loss"] = float(np.mean(phase.pop("losses")[-10:]))
    return list(phases.values())


def compile_blocks(model: Llama) -> None:
    """All blocks are one program per shape; PyTorch's limit of shapes counts each block and length."""
    torch._dynamo.config.recompile_limit = 4 * len(model.blk)
    for block in model.blk:
        block.compile(dynamic=False)


def machine(device: str) -> dict:
    if device == "cpu":
        return {"machine": bench.cpu_info(), "torch": torch.__version__}
    return {"machine": torch.cuda.get_device_name(), "torch": torch.__version__, "gpu_memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("input")
    parser.add_argument("output")
    parser.add_argument("--text", nargs="+", default=[])
    parser.add_argument("--minutes", type=float, default=19.0)
    parser.add_argument("--longest", type=int, default=32768)
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with session.Model(args.input) as tokenizer:
        text = "\n\n".join(texts.read_texts(args.text)) if args.text else texts.prose_text() + texts.code_text()
        hay = eval_documents.plain(tokenizer)(text)
        samples = Samples(lambda rng, n_tokens: sample(rng, tokenizer, hay, n_tokens), args.longest)
        made = samples.start(args.seed)
        model, reader = load(args.input, ROPE_BASE, args.longest)
        if device == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
            compile_blocks(model)
        if N_GPUS > 1:
            dist.init_process_group("nccl")
        phases = train(model.to(device), samples, made, 60 * args.minutes, device)
    if N_GPUS > 1:
        dist.destroy_process_group()
    if RANK > 0:
        return
    tokens = sum(phase["tokens"] for phase in phases)
    save(model, reader, args.output, Path(args.output).stem)
    print(json.dumps({**machine(device), "gpus": N_GPUS, "seed": args.seed, "commit": bench.commit(), "hay_tokens": len(hay), "tokens": tokens, "phases": phases}, indent=1))


if __name__ == "__main__":
    main()
