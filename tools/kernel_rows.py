"""Runs bench-kernels over cache types and lengths and prints the rows as JSON, or the table of docs/speed.md from committed rows.

    python tools/kernel_rows.py build/tools/bench-kernels [--n-kv 8192,32768,131072] [--type f16,q8_0] [-t 2] [-r 15] [--isa avx2] > docs/kernels.json
    python tools/kernel_rows.py docs/kernels.json

tools/hardware_check.py says how bench-kernels is built. Refuses what bench-kernels refuses.
"""

from __future__ import annotations

import argparse
import itertools
import shlex
import sys
from pathlib import Path

from bench_program import rows_of, table_or_rows
from hylra_gguf.bench import commit, cpu_info

HEAD = ("KV", "cells", "full ms", "of read", "select ms", "of read", "pooling and top-k", "reuse ms", "scores ms", "of read", "sparse select ms")
THREADS_HEAD = ("KV", "cells", "threads", "full ms", "times less", "reuse ms", "times less")


def cells_of(row: dict) -> tuple:
    """Select is all four nodes; sparse select is scores, pooling, top-k and what reuse takes. Shares are of the bandwidth of the same run."""
    chosen_ms = row["select_pool_ms"] + row["select_choose_ms"]
    select_ms = row["select_attend_ms"] + row["select_reduce_ms"] + chosen_ms
    read = row["select_attend_bytes"] / row["read_bytes_per_s"] / (select_ms / 1e3)
    reuse_ms = row["reuse_ms"] + row["reuse_reduce_ms"]
    return (row["type"], row["n_kv"], f"{row['full_ms']:.2f}", f"{row['full_of_read']:.0%}", f"{select_ms:.2f}", f"{read:.0%}",
            f"{chosen_ms / select_ms:.0%}", f"{reuse_ms:.2f}",
            f"{row['scores_ms']:.2f}", f"{row['scores_of_read']:.0%}", f"{row['scores_ms'] + chosen_ms + reuse_ms:.2f}")


def threads_cells_of(row: dict, rows: list[dict]) -> tuple:
    """Milliseconds, and how many times less than those of the first row of the type and cells"""
    first = next(one for one in rows if (one["type"], one["n_kv"]) == (row["type"], row["n_kv"]))
    times_ms = [(one["full_ms"], one["reuse_ms"] + one["reuse_reduce_ms"]) for one in (row, first)]
    return (row["type"], row["n_kv"], row["threads"], *(cell for ms, first_ms in zip(*times_ms) for cell in (f"{ms:.2f}", f"{first_ms / ms:.1f}")))


def table(result: dict) -> str:
    """By cells, or by threads where rows differ in them"""
    rows = result["rows"]
    if len({row["threads"] for row in rows}) > 1:
        lines = [THREADS_HEAD, ("---",) * len(THREADS_HEAD), *(threads_cells_of(row, rows) for row in rows)]
    else:
        lines = [HEAD, ("---",) * len(HEAD), *map(cells_of, rows)]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def measure(args: argparse.Namespace) -> dict:
    rows = []
    for kind, threads in itertools.product(args.type.split(","), args.threads.split(",")):
        command = [args.source, "--n-kv", args.n_kv, "--type", kind, "--threads", threads, "--repetitions", args.repetitions,
                   *(["--isa", args.isa] if args.isa else [])]
        print(shlex.join(command), file=sys.stderr)
        rows += rows_of(command)
    command = ["kernel_rows.py", Path(args.source).name, *(word for word in sys.argv[1:] if word != args.source)] # where it lies is the machine's affair
    return {"machine": cpu_info(), "commit": commit(), "command": shlex.join(command), "rows": rows}


def main() -> int:
    parser = argparse.ArgumentParser(description="Times of one attention layer.", allow_abbrev=False)
    parser.add_argument("source", metavar="BENCH_KERNELS|JSON", help="the program to run, or rows to print as a table")
    parser.add_argument("--n-kv", default="8192,32768,131072", metavar="LIST", help="cells (default 8192,32768,131072)")
    parser.add_argument("--type", default="f16,q8_0", metavar="LIST", help="of the KV cache (default f16,q8_0)")
    parser.add_argument("-t", "--threads", default="2", metavar="LIST", help="default 2")
    parser.add_argument("--isa", metavar="NAME", help="instruction set of the kernels (default the fastest of this processor)")
    parser.add_argument("-r", "--repetitions", default="15", metavar="N", help="default 15")
    args = parser.parse_args()
    return table_or_rows(args.source, table, lambda: measure(args))


if __name__ == "__main__":
    sys.exit(main())
