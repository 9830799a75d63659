"""How much longer a reuse layer takes the longer the cache is, and reading its rows alone, by kind of list; or the tables of docs/speed.md from such a result.

    python tools/reuse_growth.py BENCH_KERNELS PAGE_REACH [-t 2] [-r 31] > docs/reuse-growth-xeon.json
    python tools/reuse_growth.py docs/reuse-growth-xeon.json

A list per KV head or one for all, of cells anywhere or in runs, as a model's come (tools/list_runs.py). All lengths take turns in one process, and so do
the kinds of list, in rounds. page-reach, built beside bench-kernels, says whether huge pages are huge for the processor. Refuses what they refuse.
"""

from __future__ import annotations

import argparse
import itertools
import shlex
import sys
from pathlib import Path
from statistics import median

from bench_program import rows_of, table_or_rows
from hylra_gguf.bench import commit, cpu_info
from hylra_gguf.tables import to_md

TYPES, LISTS, RUNS, N_KV = ("f16", "q8_0"), (8, 1), (1, 2), (8192, 32768, 131072)


def times_ms(row: dict, arm: str) -> float:
    return row["reuse_ms"] + row["reuse_reduce_ms"] if arm == "reuse" else row["rows_ms"]


def growth(round_ms: list[float]) -> float:
    """Of the longest cache against the shortest, in the same process: the machine is not the same from one to the next"""
    return round_ms[-1] / round_ms[0]


def reach_table(result: dict) -> str:
    ns = {(row["step_bytes"], row["lines"]): row["ns"] for row in result["page_reach"]}
    return to_md([{"lines": lines, "ns per load, 64 bytes apart": near, "4096 bytes apart": ns[4096, lines]} for (step, lines), near in ns.items() if step == 64])


def table(result: dict) -> str:
    return to_md([shown(row) for row in result["rows"]])


def shown(row: dict) -> dict:
    reuse_ms = [median(column) for column in zip(*row["reuse_ms"])]
    growths = [median(map(growth, row[f"{arm}_ms"])) for arm in ("reuse", "rows")]
    return {"KV": row["type"], "lists": row["lists"], "cells come in runs of": row["run"], **{f"reuse ms, {n_kv} cells": f"{ms:.2f}" for n_kv, ms in zip(N_KV, reuse_ms)},
            "growth": f"{growths[0]:.2f}", "growth of rows alone": f"{growths[1]:.2f}"}


def measure(args: argparse.Namespace) -> dict:
    rows = [{"type": kind, "lists": lists, "run": run, "reuse_ms": [], "rows_ms": []} for kind, lists, run in itertools.product(TYPES, LISTS, RUNS)]
    flags = ["--n-kv", ",".join(map(str, N_KV)), "--threads", args.threads, "--repetitions", args.repetitions]
    for number, row, arm in itertools.product(range(args.rounds), rows, ("reuse", "rows")):
        command = [args.source, *flags, "--type", row["type"], "--lists", str(row["lists"]), "--run", str(row["run"]), "--only", arm]
        print(f"round {number + 1}: {shlex.join(command)}", file=sys.stderr)
        row[f"{arm}_ms"].append([times_ms(one, arm) for one in rows_of(command)])
    programs = (args.source, args.page_reach)
    command = ["reuse_growth.py", *(Path(word).name if word in programs else word for word in sys.argv[1:])]
    return {"machine": cpu_info(), "commit": commit(), "command": shlex.join(command), "n_kv": N_KV, "rows": rows, "page_reach": rows_of([args.page_reach])}


def main() -> int:
    parser = argparse.ArgumentParser(description="A reuse layer over caches of several lengths.", allow_abbrev=False)
    parser.add_argument("source", metavar="BENCH_KERNELS|JSON", help="the program to run, or a result to print as a table")
    parser.add_argument("page_reach", metavar="PAGE_REACH", nargs="?", help="the program of that name; not with a result")
    parser.add_argument("-t", "--threads", default="2", metavar="N", help="default 2")
    parser.add_argument("-r", "--repetitions", default="31", metavar="N", help="of each process (default 31)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="processes per kind of list (default 5)")
    args = parser.parse_args()
    if not args.page_reach and not args.source.endswith(".json"):
        parser.error("PAGE_REACH missing: the program that is built beside bench-kernels")
    return table_or_rows(args.source, lambda result: table(result) + "\n\n" + reach_table(result), lambda: measure(args))


if __name__ == "__main__":
    sys.exit(main())
