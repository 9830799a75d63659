"""Where the time of dense, select and reuse layers and of whole decode steps goes on this machine: memory or arithmetic.

    cmake -B build/tools -DHYLRA_BUILD_TOOLS=ON && cmake --build build/tools --target bench-kernels
    python tools/hardware_check.py build/tools/bench-kernels --n-kv 8192,32768 --type f16,q8_0 --isa avx512,avx2,base \\
        --model MODEL -d 8192 -o json --png docs/roofline.png > docs/hardware-check.json

Instructions, cycles and cache misses come from `perf stat` where the machine exposes them, else the rows say "not exposed"; then the
arithmetic is what the same kernel takes on cells that lie in the processor's cache. Refuses what bench-kernels and bench refuse.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from contextlib import suppress

from hardware_rows import (EVENTS, KINDS, NOT_EXPOSED, Shape, difference, layer_rows, parse_perf, read_shape, roof, spread_of,
                           step_rows, with_portability)
from hylra_gguf.bench import commit, cpu_info
from hylra_gguf.cli import KV_TYPES
from hylra_gguf.errors import HylraError, plain_os_errors
from hylra_gguf.files import replacing
from hylra_gguf.flags import count, list_of, one_of
from hylra_gguf.forward import cpu_count
from hylra_gguf.policy import Policy
from hylra_gguf.report import load_plots
from hylra_gguf.tables import to_md

ISAS = ("avx512vnni", "avx512", "avx2", "base", "ref")
HOT_CELLS = 128  # K and V of all heads stay in the second-level cache, whatever their type
HOT_REPETITIONS = 99
COUNTED_STEPS = (4, 36)  # of two runs: the difference leaves out loading and filling
BENCH = [sys.executable, "-m", "hylra_gguf", "bench", "--no-progress", "-o", "json"]
PEAK = """
import time, numpy
a = numpy.ones((1536, 1536), numpy.float32)
def once():
    start = time.perf_counter(); a @ a; return time.perf_counter() - start
print(2 * len(a) ** 3 / min(once() for _ in range(5)))
"""


# ---- running


def output_of(command: list[str], **environment: str) -> str:
    """Raises HylraError with the last line that a failed command has printed."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    except OSError as error:
        raise HylraError(f"{command[0]}: {error.strerror}; name a program, bench-kernels is built as the head of this file says") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise HylraError(f"{os.path.basename(command[0])} failed: {lines[-1]}")
    return done.stdout


def count_events(command: list[str]) -> dict[str, int | None]:
    """Events in user mode of the whole process; None for those that the machine, the kernel or a missing `perf` does not give"""
    if not shutil.which("perf"):
        return dict.fromkeys(EVENTS)
    with tempfile.NamedTemporaryFile("r") as result:
        events = ",".join(f"{name}:u" for name in EVENTS)
        with suppress(HylraError):
            output_of(["perf", "stat", "-x,", "-e", events, "-o", result.name, "--", *command])
        return parse_perf(result.read())


def is_exposed() -> bool:
    return any(number is not None for number in count_events(["true"]).values())


def peak_flops_per_s(threads: int) -> float:
    """Of an F32 matrix product by NumPy's BLAS"""
    limits = {f"{library}_NUM_THREADS": str(threads) for library in ("OMP", "OPENBLAS", "MKL", "BLIS")}
    return float(output_of([sys.executable, "-c", PEAK], **limits))


# ---- one attention layer


def kernel_command(args, isa: str, kind: str, n_kv: int, top_k: int, **flags: object) -> list[str]:
    values = {"isa": isa, "type": kind, "n_kv": n_kv, "top_k": min(top_k, n_kv), **flags}
    return [args.bench_kernels, *(text for name, value in values.items() for text in (f"--{name.replace('_', '-')}", str(value)))]


def measure_layer(args, isa: str, kind: str, n_kv: int, counting: bool) -> list[dict]:
    [cold] = json.loads(output_of(kernel_command(args, isa, kind, n_kv, args.top_k, threads=args.threads, repetitions=args.repetitions)))
    [hot] = json.loads(output_of(kernel_command(args, isa, kind, HOT_CELLS, HOT_CELLS, threads=1, repetitions=HOT_REPETITIONS, cache="hot")))
    return layer_rows(cold, hot, layer_counts(args, isa, kind, n_kv, counting))


def layer_counts(args, isa: str, kind: str, n_kv: int, counting: bool) -> dict[str, dict[str, float | None]]:
    """Per kind of layer. One thread, since a thread that waits counts too; the reads that empty the cache are taken off."""
    if not counting:
        return {name: dict.fromkeys(EVENTS) for name in KINDS}
    found = {only: count_events(kernel_command(args, isa, kind, n_kv, args.top_k, threads=1, repetitions=args.repetitions, only=only))
             for only in (*KINDS, "read")}
    return {name: difference(found[name], found["read"], args.repetitions + 1) for name in KINDS}


# ---- whole steps


def load_model(args) -> tuple[Policy, Shape]:
    path = args.policy or args.model
    with plain_os_errors(path):
        return Policy.load(path), read_shape(args.model)


def measure_steps(args, policy: Policy, shape: Shape, read_bytes_per_s: float, counting: bool) -> list[dict]:
    common = [*BENCH, args.model, "--fill", "synthetic", *(["--policy", args.policy] if args.policy else [])]
    rows = json.loads(output_of([*common, "-d", ",".join(map(str, args.n_depth)), "-n", str(args.n_gen), "-r", str(args.repetitions),
                                 "-t", str(args.threads), "-ctk", args.cache_type, "-ctv", args.cache_type, *arms_for(args.cache_type)]))
    common += ["-r", "1", "-t", "1", "-ctk", args.cache_type, "-ctv", args.cache_type]
    counts = {(row["n_depth"], row["arm"]): step_counts(common, row) if counting else dict.fromkeys(EVENTS) for row in rows}
    return step_rows(rows, shape, policy, read_bytes_per_s, counts)


def arms_for(cache_type: str) -> list[str]:
    """llama.cpp has no quantised V without flash attention."""
    return [] if cache_type in ("f16", "f32", "bf16") else ["--arms", "stock-fa1,full,hylra"]


def step_counts(common: list[str], row: dict) -> dict[str, float | None]:
    few, many = (count_events([*common, "-d", str(row["n_depth"]), "--arms", row["arm"], "-n", str(steps)]) for steps in COUNTED_STEPS)
    return difference(many, few, COUNTED_STEPS[1] - COUNTED_STEPS[0])


# ---- the picture


def roofline(result: dict):
    """The deepest cache of every type, slower instruction sets hollow, and whole steps at the largest depth."""
    plots = load_plots()
    machine, layers, steps = result["machine"], deepest(result["layers"], "n_kv"), deepest(result["steps"], "n_depth")
    figure, ax = plots.axes(f"{machine['cpu_info']}, threads: {machine['n_threads']}\none layer of {layers[0]['n_kv']} cells, "
                            "slower instruction sets hollow", 5.2)
    draw_roof(ax, machine, layers + steps)
    colours, markers = dict(zip(KINDS, (plots.COLOURS[letter] for letter in "FSR"))), dict(zip(KV_TYPES, "osD^v"))
    for row in layers:
        fastest, colour = row["of_fastest_isa"] == 1, colours[row["kind"]]
        ax.scatter([row["flops_per_byte"]], [row["gflops_per_s"]], 34, colour if fastest else "none", marker=markers[row["type"]],
                   edgecolors=colour, linewidths=0.8, label=f"{row['kind']}, {row['type']}" if fastest else None)
    for row in steps:
        ax.scatter([row["flops_per_byte"]], [row["gflops_per_s"]], 40, plots.ARMS[row["arm"]], marker="*",
                   label=f"whole step at {row['n_depth']}, {row['arm']}")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def draw_roof(ax, machine: dict, rows: list[dict]) -> None:
    from matplotlib.ticker import LogLocator

    ends = spread_of(rows)
    ridge = machine["peak_flops_per_s"] / machine["read_bytes_per_s"]
    xs = sorted({*ends, min(max(ridge, ends[0]), ends[1])})
    ax.plot(xs, [roof(x, machine["read_bytes_per_s"], machine["peak_flops_per_s"]) / 1e9 for x in xs], color="black", linewidth=1,
            label="read bandwidth, F32 peak")
    ax.set(xscale="log", yscale="log", xlabel="FLOP per byte that must move", ylabel="GFLOP/s")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(LogLocator(10, (1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")


def deepest(rows: list[dict], key: str) -> list[dict]:
    return [row for row in rows if row[key] == max(one[key] for one in rows)]


def write_png(result: dict, path: str) -> None:
    plots = load_plots()
    with plots.plain_style(), plain_os_errors(path), replacing(path) as fd, open(fd, "wb", closefd=False) as file:
        file.write(plots.png(roofline(result)))


# ---- command line


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Where decode time goes on this machine: memory or arithmetic.", allow_abbrev=False)
    parser.add_argument("bench_kernels", metavar="BENCH_KERNELS", help="program built with -DHYLRA_BUILD_TOOLS=ON")
    parser.add_argument("--n-kv", type=list_of(count(1)), metavar="LIST", default=[8192, 32768], help="cells of the layer")
    parser.add_argument("--top-k", type=count(1), metavar="K", default=1024)
    parser.add_argument("--type", type=list_of(one_of(KV_TYPES)), metavar="LIST", default=["f16", "q8_0"], help="of K and V")
    parser.add_argument("--isa", type=list_of(one_of(ISAS)), metavar="LIST", default=["avx512", "avx2", "base"])
    parser.add_argument("-t", "--threads", type=count(1), metavar="N", default=cpu_count())
    parser.add_argument("-r", "--repetitions", type=count(1), metavar="N", default=9)
    parser.add_argument("--model", metavar="MODEL", help="GGUF file for whole decode steps (default: layers alone)")
    parser.add_argument("--policy", metavar="FILE", help="instead of the one in MODEL")
    parser.add_argument("-d", "--n-depth", type=list_of(count(1)), metavar="LIST", default=[8192], help="cached tokens of whole steps")
    parser.add_argument("-n", "--n-gen", type=count(1), metavar="N", default=16)
    parser.add_argument("-ct", "--cache-type", choices=KV_TYPES, default="f16", help="of whole steps")
    parser.add_argument("--png", metavar="FILE", help="the roofline")
    parser.add_argument("-o", "--output", dest="format", choices=("md", "json"), default="md")
    return parser.parse_args(argv)


def check(args) -> dict:
    model = load_model(args) if args.model else None  # refused before anything runs
    counting = is_exposed()
    layers = []
    for isa in args.isa:
        for kind in args.type:
            for n_kv in args.n_kv:
                print(f"{isa}, {kind}, {n_kv} cells", file=sys.stderr)
                layers += measure_layer(args, isa, kind, n_kv, counting)
    read = statistics.median(row["bytes"] / row["memory_ms"] * 1e3 for row in layers)
    machine = {"cpu_info": cpu_info(), "build_commit": commit(), "n_threads": args.threads, "read_bytes_per_s": round(read),
               "peak_flops_per_s": round(peak_flops_per_s(args.threads)), "counters": "perf stat" if counting else NOT_EXPOSED,
               "command": " ".join(map(os.path.basename, sys.argv))}
    return {"machine": machine, "layers": with_portability(layers), "steps": measure_steps(args, *model, read, counting) if model else []}


def to_text(result: dict) -> str:
    facts = "\n".join(f"{name}: {value}" for name, value in result["machine"].items())
    return "\n\n".join([facts, *(to_md(result[name]) for name in ("layers", "steps") if result[name])])


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        if args.png:
            load_plots()  # refused before minutes of measuring
        result = check(args)
        print(json.dumps(result, indent=1) if args.format == "json" else to_text(result))
        if args.png:
            write_png(result, args.png)
    except HylraError as error:
        print(f"hardware_check.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
