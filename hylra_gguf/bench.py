"""`hylra-gguf bench`: decode speed by depth, arms alternating in one run; field names are those of llama-bench.

Arms: stock-fa1 and stock-fa0 (llama.cpp with flash attention on and off; the faster one is the baseline), full (our dense kernel in
every layer: the gain of the kernel alone) and hylra (the policy; hylra:NAME for each of several).
"""

from __future__ import annotations

import contextlib
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable

from . import __version__, engine
from .divergence import dense_policy
from .errors import HylraError, PolicyError, plain_os_errors
from .files import replacing
from .fill import SYNTHETIC, fill, make_tokens
from .forward import GGML_TYPES, cpu_count
from .policy import Policy, read_policy
from .session import ALL_SEQUENCES, N_UBATCH, Context, Model
from .tables import FORMATS

STOCK = {"stock-fa1": True, "stock-fa0": False}  # flash attention
TEXT_DEPTH_TOKENS = 8192  # deepest cache that is read from text unless --fill says otherwise: minutes on two cores
GPU_WARM_UP = 4  # steps before the clock starts: a CUDA graph is captured at the third


@dataclass(frozen=True)
class Arm:
    name: str
    flash_attn: bool
    policy: Policy | None


# ---- arms


def make_arms(names: list[str], policies: dict[str, Policy]) -> list[Arm]:
    """policies: name -> policy. Raises HylraError if an arm needs one and there is none."""
    arms = []
    for name in dict.fromkeys(names):
        if name in STOCK:
            arms.append(Arm(name, STOCK[name], None))
        elif not policies:
            raise HylraError(f"arm {name} needs a policy and the model carries none; embed one with hylra-gguf embed-policy, "
                             f"give --policy FILE, or leave it out with --arms {','.join(STOCK)}")
        elif name == "full":
            arms.append(Arm(name, True, dense_policy(next(iter(policies.values())))))
        else:
            arms += [Arm(name if len(policies) == 1 else f"{name}:{label}", True, policy) for label, policy in policies.items()]
    return arms


def policies_of(args) -> dict[str, Policy]:
    """Named after their files; the file's own policy if none is given."""
    if not args.policy:
        own = read_policy(args.model)
        return {} if own is None else {"own": own}
    stems = [Path(path).stem for path in args.policy]
    names = stems if len(set(stems)) == len(stems) else args.policy
    if len(set(names)) < len(names):
        raise HylraError(f"--policy {' --policy '.join(args.policy)}: the same file twice; name each once")
    return {name: Policy.load(path) for name, path in zip(names, args.policy)}


def check_policies(arms: list, context_of: Callable[[Any], Context]) -> None:
    """Before minutes of filling. Raises PolicyError for one that does not fit the model; leaves every context dense."""
    for arm in arms:
        try:
            engine.set_policy(context_of(arm).ctx, arm.policy)
        except PolicyError as error:
            raise PolicyError(f"arm {arm.name}: {error}") from None
    for arm in arms:
        engine.set_policy(context_of(arm).ctx, None)


# ---- measuring


def is_synthetic(args) -> bool:
    """As asked; else for one sequence deeper than TEXT_DEPTH_TOKENS."""
    if args.fill:
        return args.fill == SYNTHETIC
    return args.n_seq == 1 and max(args.n_depth) > TEXT_DEPTH_TOKENS


def open_context(model: Model, flash_attn: bool, n_ctx: int, args) -> Context:
    try:
        return Context(model, n_ctx, n_seq=args.n_seq, n_threads=args.threads or cpu_count(), type_k=GGML_TYPES[args.cache_type_k],
                       type_v=GGML_TYPES[args.cache_type_v], flash_attn=flash_attn, scratch=is_synthetic(args) and args.n_seq == 1,
                       kv_on_gpu=not args.no_kv_offload)
    except HylraError as error:
        raise HylraError(f"{error}, or leave that arm out with --arms") from None


def n_warm_up(model: Model) -> int:
    return GPU_WARM_UP if model.n_gpu_layers else 1


def timed_ns(context: Context, policy: Policy | None, tokens: list[int], depth: int) -> int:
    """Nanoseconds for the steps of all sequences but the first ones, which warm up the graph. Leaves `depth` tokens."""
    engine.set_policy(context.ctx, policy)
    warm_up = n_warm_up(context.model)
    for pos, token in enumerate(tokens[:warm_up], depth):
        context.step(token, pos)
    start = time.perf_counter_ns()
    for pos, token in enumerate(tokens[warm_up:], depth + warm_up):
        context.step(token, pos)
    elapsed = time.perf_counter_ns() - start
    context.rewind(depth, ALL_SEQUENCES)
    return elapsed


def measure(arms: list[Arm], contexts: dict[bool, Context], tokens: list[int], depth: int, repetitions: int,
            report: Callable[[str], None]) -> list[tuple[Arm, list[int], dict]]:
    """(arm, nanoseconds of each repetition, status of HyLRA after the last); the arms take turns, repetition by repetition."""
    times_ns: list[list[int]] = [[] for _ in arms]
    status = [{} for _ in arms]
    for repetition in range(repetitions):
        for at, arm in enumerate(arms):
            report(f"depth {depth}, {arm.name}, repetition {repetition + 1}")
            context = contexts[arm.flash_attn]
            times_ns[at].append(timed_ns(context, arm.policy, tokens[depth:], depth))
            status[at] = engine.status(context.ctx)
    return list(zip(arms, times_ns, status))


def run(args, report: Callable[[str], None]) -> list[dict]:
    """One row per depth and arm. Caches are filled once, to the deepest depth, and cut back for the others."""
    arms = make_arms(args.arms, policies_of(args))
    depths = sorted(set(args.n_depth), reverse=True)
    with Model(args.model, args.n_gpu_layers) as model, contextlib.ExitStack() as stack:
        n_steps = args.n_gen + n_warm_up(model)
        n_ctx = depths[0] + n_steps
        contexts = {on: stack.enter_context(open_context(model, on, n_ctx, args)) for on in {arm.flash_attn: None for arm in arms}}
        check_policies(arms, lambda arm: contexts[arm.flash_attn])
        tokens, source = make_tokens(model, n_ctx)
        for on, context in contexts.items():
            report(f"filling {depths[0]} tokens, flash attention {'on' if on else 'off'}")
            source = SYNTHETIC if fill(context, tokens, depths[0], is_synthetic(args), depths) else source
        common = {**facts_of_machine(args), **facts_of_model(model), "fill": source}
        rows = []
        for depth in depths:
            for context in contexts.values():
                context.rewind(depth, ALL_SEQUENCES)
            found = measure(arms, contexts, tokens[:depth + n_steps], depth, args.repetitions, report)
            rows += [row(common, arm, depth, args, samples_ns, status) for arm, samples_ns, status in found]
    return with_ratios(sorted(rows, key=lambda one: one["n_depth"]))


# ---- rows


def cpu_info() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def gpu_info() -> str:
    return ", ".join(gpu_names())


def gpu_names(folder: Path = Path("/proc/driver/nvidia/gpus")) -> list[str]:
    """Of the cards that CUDA shows this process, as the NVIDIA driver names them"""
    texts = [path.read_text() for path in sorted(folder.glob("*/information"))]
    return visible_gpus([(fact_in(text, "Model"), fact_in(text, "GPU UUID")) for text in texts], os.environ.get("CUDA_VISIBLE_DEVICES"))


def fact_in(text: str, name: str) -> str:
    return next((line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith(f"{name}:")), "")


def visible_gpus(gpus: list[tuple[str, str]], wanted: str | None) -> list[str]:
    """gpus: (name, UUID) by PCI bus; wanted: CUDA_VISIBLE_DEVICES, of which CUDA ignores the first unknown entry and all after it.

    Unlike cards are numbered as here only with CUDA_DEVICE_ORDER=PCI_BUS_ID. A part of a card (MIG-...) has no name but its own.
    """
    if wanted is None:
        return [name for name, _ in gpus]
    found = []
    for one in map(str.strip, wanted.split(",")):
        names = [name for at, (name, uuid) in enumerate(gpus) if one == str(at) or (one.startswith("GPU-") and uuid.startswith(one))]
        names += [one] if one.startswith("MIG-") else []
        if len(names) != 1:
            break
        found += names
    return found


def commit() -> str:
    """What the environment variable HYLRA_COMMIT says, else the commit of the checkout that this runs from, else the version.

    The variable comes first: a copy of the working tree may lie on another commit than the one that it is a copy of.
    """
    if os.environ.get("HYLRA_COMMIT"):
        return os.environ["HYLRA_COMMIT"]
    folder = Path(__file__).resolve().parent
    done = subprocess.run(["git", "-C", str(folder), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else __version__


def facts_of_machine(args) -> dict:
    return {
        "build_commit": commit(),
        "engine": engine.version(),
        "hylra_isa": engine.isa(),
        "cpu_info": cpu_info(),
        "gpu_info": gpu_info() if getattr(args, "n_gpu_layers", 0) else "",
        "backends": "CUDA, CPU" if getattr(args, "n_gpu_layers", 0) else "CPU",
        "n_gpu_layers": getattr(args, "n_gpu_layers", 0),
        "no_kv_offload": getattr(args, "no_kv_offload", False),
        "n_batch": N_UBATCH,
        "n_ubatch": N_UBATCH,
        "n_threads": args.threads or cpu_count(),
        "type_k": args.cache_type_k,
        "type_v": args.cache_type_v,
        "test_time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def facts_of_model(model: Model) -> dict:
    import ctypes

    name = ctypes.create_string_buffer(128)
    model.api.llama_model_desc(model.handle, name, len(name))
    return {
        "model_filename": Path(model.path).name,
        "model_type": name.value.decode(),
        "model_size": model.api.llama_model_size(model.handle),
        "model_n_params": model.api.llama_model_n_params(model.handle),
    }


def row(common: dict, arm: Arm, depth: int, args, samples_ns: list[int], status: dict) -> dict:
    """Speeds are tokens/s over all sequences; n_gen is per sequence and repetition, n_generated what was timed in all."""
    samples_ts = [args.n_seq * args.n_gen * 1e9 / ns for ns in samples_ns]
    return {
        **common,
        "flash_attn": int(arm.flash_attn),
        "n_prompt": 0,
        "n_gen": args.n_gen,
        "n_depth": depth,
        "n_seq": args.n_seq,
        "n_generated": args.n_seq * args.n_gen * len(samples_ns),
        "arm": arm.name,
        "hylra_on": status["on"],
        "hylra_sparse_steps": status["sparse_steps"],
        "policy": arm.policy.layer_map() if arm.policy else "",
        "top_k": arm.policy.top_k if arm.policy else 0,
        "avg_ns": round(statistics.mean(samples_ns)),
        "stddev_ns": round(spread(samples_ns)),
        "avg_ts": round(statistics.mean(samples_ts), 3),
        "stddev_ts": round(spread(samples_ts), 3),
        "median_ts": round(statistics.median(samples_ts), 3),
        "min_ts": round(min(samples_ts), 3),
        "max_ts": round(max(samples_ts), 3),
        "samples_ns": samples_ns,
        "samples_ts": [round(ts, 3) for ts in samples_ts],
    }


def spread(samples: list) -> float:
    return statistics.stdev(samples) if len(samples) > 1 else 0.0


def with_ratios(rows: list[dict]) -> list[dict]:
    """`speedup`: of medians, against the faster stock arm of the same depth; None if no stock arm ran."""
    for one in rows:
        stock = [r["median_ts"] for r in rows if r["n_depth"] == one["n_depth"] and r["arm"] in STOCK]
        one["speedup"] = round(one["median_ts"] / max(stock), 3) if stock else None
    return rows


# ---- output

COLUMNS = ("model_type", "arm", "type_k", "type_v", "n_threads", "n_seq", "n_depth", "fill", "n_generated", "median_ts", "min_ts",
           "max_ts", "speedup", "hylra_on", "hylra_sparse_steps")


def to_text(rows: list[dict], kind: str) -> str:
    """md: COLUMNS; csv: all but the samples; json: everything."""
    if kind == "md":
        rows = [{name: "" if one[name] is None else one[name] for name in COLUMNS} for one in rows]
    elif kind == "csv":
        rows = [{name: value for name, value in one.items() if not isinstance(value, list)} for one in rows]
    return FORMATS[kind](rows)


def write_png(rows: list[dict], path: str) -> None:
    """Tokens/s against depth, a line per arm and its fastest and slowest repetition around it."""
    from .report import load_plots

    plots = load_plots()
    lines = {arm: [[one[name] for one in rows if one["arm"] == arm] for name in ("median_ts", "min_ts", "max_ts")]
             for arm in dict.fromkeys(one["arm"] for one in rows)}
    first = rows[0]
    title = f"{first['model_type']}, KV {first['type_k']}/{first['type_v']}, threads: {first['n_threads']}"
    if first["n_seq"] > 1:
        title += f", sequences: {first['n_seq']}"
    depths = sorted({one["n_depth"] for one in rows})
    with plots.plain_style(), plain_os_errors(path), replacing(path) as fd, open(fd, "wb", closefd=False) as file:
        file.write(plots.png(plots.speeds(depths, lines, title, f"median tokens/s ({first['fill']} cache)")))


def cmd_bench(args) -> None:
    if args.png:
        from .report import load_plots

        load_plots()  # refused before minutes of measuring
    report = (lambda line: None) if args.no_progress else (lambda line: print(line, file=sys.stderr))
    rows = run(args, report)
    print(to_text(rows, args.format))
    if args.png:
        write_png(rows, args.png)
