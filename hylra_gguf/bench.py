"""`hylra-gguf bench`: decode speed by depth, four arms alternating in one run; field names are those of llama-bench.

Arms: stock-fa1 and stock-fa0 (llama.cpp with flash attention on and off; the faster one is the baseline), full (our dense
kernel in every layer: the gain of the kernel alone) and hylra (the policy).
"""

from __future__ import annotations

import csv
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from . import __version__, engine
from .errors import HylraError, ModelFileError
from .policy import FULL, Policy, read_policy
from .forward import GGML_TYPES, N_UBATCH, cpu_count
from .texts import calibration_text

DENSE_ARMS = ("stock-fa1", "stock-fa0")


@dataclass(frozen=True)
class Arm:
    name: str
    flash_attn: bool
    policy: Policy | None


def dense_policy(policy: Policy) -> Policy:
    """Our dense kernel in every layer, from the first token on."""
    n = policy.layer_count
    return replace(policy, layer_mode=(FULL,) * n, layer_source=(-1,) * n, head_map=None, min_context=0, overlap=None, sensitivity=None)


def make_arms(names: list[str], policy: Policy) -> list[Arm]:
    known = {
        "stock-fa1": Arm("stock-fa1", True, None),
        "stock-fa0": Arm("stock-fa0", False, None),
        "full": Arm("full", True, dense_policy(policy)),
        "hylra": Arm("hylra", True, policy),
    }
    return [known[name] for name in names]


class Decoder:
    """One context whose cache is filled once and rewound after each timed run."""

    def __init__(self, api, model, path: str, flash_attn: bool, n_ctx: int, args, n_seq_max: int = 1):
        self.api = api
        params = api.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = n_ctx, N_UBATCH, N_UBATCH, n_seq_max
        params.kv_unified = True  # sequences share one cache, so that cells can move between them
        params.n_threads = params.n_threads_batch = args.threads or cpu_count()
        params.type_k, params.type_v = GGML_TYPES[args.cache_type_k], GGML_TYPES[args.cache_type_v]
        params.flash_attn_type = int(flash_attn)
        self.ctx = api.llama_init_from_model(model, params)
        if not self.ctx:
            kind = f"KV {args.cache_type_k}/{args.cache_type_v}, flash attention {'on' if flash_attn else 'off'}"
            raise HylraError(f"{path}: llama.cpp cannot open a context of {n_ctx} tokens with {kind}; leave that arm out with --arms")
        self.n_filled = 0

    def decode(self, tokens: list[int]) -> None:
        array = (self.api.llama_token * len(tokens))(*tokens)
        code = self.api.llama_decode(self.ctx, self.api.llama_batch_get_one(array, len(tokens)))
        if code != 0:
            raise HylraError(f"llama_decode stopped with code {code}")

    def fill(self, tokens: list[int], depth: int) -> None:
        for start in range(self.n_filled, depth, N_UBATCH):
            self.decode(tokens[start : min(start + N_UBATCH, depth)])
        self.n_filled = depth

    def timed_ns(self, arm: Arm, tokens: list[int]) -> int:
        """Nanoseconds for len(tokens) - 1 single-token steps; the first token warms up the graph of this arm."""
        engine.set_policy(self.ctx, arm.policy)
        self.decode(tokens[:1])
        start = time.perf_counter_ns()
        for token in tokens[1:]:
            self.decode([token])
        elapsed = time.perf_counter_ns() - start
        self.api.llama_memory_seq_rm(self.api.llama_get_memory(self.ctx), -1, self.n_filled, -1)
        return elapsed


class Model:
    """The model file with everything that a row says about it."""

    def __init__(self, api, path: str):
        from llama_cpp._logger import set_verbose

        set_verbose(False)
        api.llama_backend_init()
        self.api, self.path = api, path
        self.handle = api.llama_model_load_from_file(os.fsencode(path), api.llama_model_default_params())
        if not self.handle:
            raise ModelFileError(f"{path}: llama.cpp cannot load this model; check that the GGUF file is whole")

    def tokens(self, count: int) -> list[int]:
        text = calibration_text(count * 8)[0].encode()
        room = (self.api.llama_token * (len(text) + 8))()
        vocab = self.api.llama_model_get_vocab(self.handle)
        n = self.api.llama_tokenize(vocab, text, len(text), room, len(room), True, False)
        if n <= 0:
            raise ModelFileError(f"{self.path}: this model has no tokenizer; bench needs one")
        return (list(room[:n]) * (count // n + 1))[:count]

    def facts(self) -> dict:
        import ctypes

        name = ctypes.create_string_buffer(128)
        self.api.llama_model_desc(self.handle, name, len(name))
        return {
            "model_filename": Path(self.path).name,
            "model_type": name.value.decode(),
            "model_size": self.api.llama_model_size(self.handle),
            "model_n_params": self.api.llama_model_n_params(self.handle),
        }


def cpu_info() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def commit() -> str:
    """Of the checkout that this runs from, else the version."""
    folder = Path(__file__).resolve().parent
    done = subprocess.run(["git", "-C", str(folder), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else __version__


def policy_of(args) -> Policy:
    policy = Policy.load(args.policy) if args.policy else read_policy(args.model)
    if policy is None:
        raise HylraError(f"{args.model} carries no policy; run `hylra-gguf embed-policy {args.model}` first, or give --policy FILE")
    return policy


def run(args, report) -> list[dict]:
    """One row per depth and arm. At each depth the arms take turns, repetition by repetition."""
    policy = policy_of(args)
    arms = make_arms(args.arms, policy)
    model = Model(engine.activate(), args.model)
    depths = sorted(set(args.n_depth))
    n_ctx = depths[-1] + args.n_gen + 1
    tokens = model.tokens(n_ctx)
    decoders = {fa: Decoder(model.api, model.handle, args.model, fa, n_ctx, args) for fa in {arm.flash_attn for arm in arms}}
    common = {**facts_of_machine(args), **model.facts()}
    rows = []
    for depth in depths:
        for fa, decoder in decoders.items():
            report(f"filling {depth} tokens, flash attention {'on' if fa else 'off'}")
            engine.set_policy(decoder.ctx, None)
            decoder.fill(tokens, depth)
        times: dict[str, list[int]] = {arm.name: [] for arm in arms}
        for repetition in range(args.repetitions):
            for arm in arms:
                report(f"depth {depth}, {arm.name}, repetition {repetition + 1}")
                times[arm.name].append(decoders[arm.flash_attn].timed_ns(arm, tokens[depth : depth + args.n_gen + 1]))
                times.setdefault(f"{arm.name} status", []).append(engine.status(decoders[arm.flash_attn].ctx))
        rows += [row(common, arm, depth, args, times) for arm in arms]
    return with_ratios(rows)


def facts_of_machine(args) -> dict:
    return {
        "build_commit": commit(),
        "engine": engine.version(),
        "cpu_info": cpu_info(),
        "gpu_info": "",
        "backends": "CPU",
        "n_batch": N_UBATCH,
        "n_ubatch": N_UBATCH,
        "n_threads": args.threads or cpu_count(),
        "type_k": args.cache_type_k,
        "type_v": args.cache_type_v,
        "test_time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def row(common: dict, arm: Arm, depth: int, args, times: dict) -> dict:
    samples_ns = times[arm.name]
    samples_ts = [args.n_gen * 1e9 / ns for ns in samples_ns]
    status = times[f"{arm.name} status"][-1]
    return {
        **common,
        "flash_attn": int(arm.flash_attn),
        "n_prompt": 0,
        "n_gen": args.n_gen,
        "n_depth": depth,
        "arm": arm.name,
        "hylra_on": status["on"],
        "hylra_sparse_steps": status["sparse_steps"],
        "policy": arm.policy.layer_map() if arm.policy else "",
        "top_k": arm.policy.top_k if arm.policy else 0,
        "avg_ns": round(statistics.mean(samples_ns)),
        "stddev_ns": round(statistics.stdev(samples_ns)) if len(samples_ns) > 1 else 0,
        "avg_ts": round(statistics.mean(samples_ts), 3),
        "stddev_ts": round(statistics.stdev(samples_ts), 3) if len(samples_ts) > 1 else 0.0,
        "samples_ns": samples_ns,
    }


def with_ratios(rows: list[dict]) -> list[dict]:
    """`speedup`: against the faster stock arm of the same depth; absent if no stock arm ran."""
    for one in rows:
        stock = [r["avg_ts"] for r in rows if r["n_depth"] == one["n_depth"] and r["arm"] in DENSE_ARMS]
        if stock:
            one["speedup"] = round(one["avg_ts"] / max(stock), 3)
    return rows


# ---- output

COLUMNS = ("model_type", "arm", "type_k", "type_v", "n_threads", "n_depth", "n_gen", "avg_ts", "stddev_ts", "speedup", "hylra_on", "hylra_sparse_steps")


def to_md(rows: list[dict]) -> str:
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    lines += ["| " + " | ".join(str(r.get(c, "")) for c in COLUMNS) + " |" for r in rows]
    return "\n".join(lines)


def to_csv(rows: list[dict]) -> str:
    out = io.StringIO()
    names = [name for name in rows[0] if name != "samples_ns"]
    writer = csv.DictWriter(out, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().rstrip()


FORMATS = {"md": to_md, "csv": to_csv, "json": lambda rows: json.dumps(rows, indent=2)}


def cmd_bench(args) -> None:
    report = (lambda line: None) if args.no_progress else (lambda line: print(line, file=sys.stderr))
    print(FORMATS[args.format](run(args, report)))
