"""How much faster one attention layer is with one instruction set than with another, cells in the processor's cache.

    python tools/isa_gain.py BENCH_KERNELS > docs/kernels-vnni.json    measures: the two in turn, the smallest median of each
    python tools/isa_gain.py docs/kernels-vnni.json                    prints the table of docs/speed.md

Refuses what bench-kernels refuses. One thread, pinned where the machine can: a second one would share the cache.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys

from bench_program import rows_of, table_or_rows
from hylra_gguf.bench import commit, cpu_info

ISAS = ("avx512", "avx512vnni")  # without, with
TYPES = ("q8_0", "q4_0")
SHAPES = ((32, 8, 128), (32, 4, 128), (9, 3, 64), (8, 8, 128))  # query heads, KV heads, head size
ARMS = ("full", "scores", "reuse")
FLAGS = ("--threads", "1", "--cache", "hot", "--n-kv", "8192", "--top-k", "1024", "--repetitions", "101")
HEAD = "| KV | query heads, KV heads, head size | full | scores | reuse |\n| --- | --- | --- | --- | --- |"


def times_ms(program: str, kind: str, shape: tuple[int, int, int], isa: str) -> list[float]:
    heads, kv_heads, head_size = map(str, shape)
    command = [program, *FLAGS, "--type", kind, "--isa", isa, "--heads", heads, "--kv-heads", kv_heads, "--head-size", head_size, "--lists", kv_heads]
    [row] = rows_of(command)
    return [row[f"{arm}_ms"] for arm in ARMS]


def measure(program: str, rounds: int) -> dict:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    rows = []
    for kind in TYPES:
        for shape in SHAPES:
            best = {isa: [float("inf")] * len(ARMS) for isa in ISAS}
            for _ in range(rounds):
                for isa in ISAS:
                    best[isa] = [min(pair) for pair in zip(best[isa], times_ms(program, kind, shape, isa))]
            print(f"{kind} {shape}: {best}", file=sys.stderr)
            rows.append({"type": kind, "shape": shape, **{isa: dict(zip(ARMS, best[isa])) for isa in ISAS}})
    return {"machine": cpu_info(), "commit": commit(), "command": f"isa_gain.py bench-kernels --rounds {rounds}", "flags": shlex.join(FLAGS), "rows": rows}


def table(result: dict) -> str:
    """Gain of the second instruction set, and milliseconds without and with it"""
    lines = [HEAD]
    for row in result["rows"]:
        slow, fast = (row[isa] for isa in ISAS)
        cells = [f"{slow[arm] / fast[arm]:.2f}x ({slow[arm]:.2f} to {fast[arm]:.2f} ms)" for arm in ARMS]
        lines.append(f"| {row['type']} | {', '.join(map(str, row['shape']))} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("source", metavar="BENCH_KERNELS|JSON", help="the program to run, or a result to print as a table")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="of each instruction set (default 5)")
    args = parser.parse_args()
    return table_or_rows(args.source, table, lambda: measure(args.source, args.rounds))


if __name__ == "__main__":
    sys.exit(main())
