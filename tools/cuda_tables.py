"""Prints the tables of docs/cuda.md from the results that tools/gpu.sh has written.

    python tools/cuda_tables.py docs/cuda
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def rows_of(folder: Path, kernels: bool):
    """(file name without suffix, row) of the kernel results or of the others"""
    for path in sorted(folder.glob("*.json")):
        if path.name.startswith("kernels-") == kernels:
            yield from ((path.stem, row) for row in json.loads(path.read_text()))


def decode(folder: Path):
    yield "| model shape | KV | sequences | depth | stock | policy | HyLRA | ratio |\n| --- | --- | --- | --- | --- | --- | --- | --- |"
    stock = {}
    for name, row in rows_of(folder, kernels=False):
        if row["arm"] == "stock-fa1":
            stock[name, row["n_depth"]] = row["median_ts"]
            continue
        shape = row["model_filename"].removesuffix(".gguf")
        policy = row["arm"].removeprefix("hylra").removeprefix(":").removeprefix(shape).removeprefix("-") or "per-head"
        yield (f"| {shape} | {row['type_k']} | {row['n_seq']} | {row['n_depth']} | {stock[name, row['n_depth']]:.1f} | {policy} | "
               f"{row['median_ts']:.1f} | {row['speedup']:.2f} |")


def kernels(folder: Path):
    yield ("| shape | KV | sequences | cells | llama.cpp dense | select | of it attend | reuse | dense / reuse | select / dense | "
           "attend, of copy | reuse, of copy |\n" + "| --- " * 12 + "|")
    for name, row in rows_of(folder, kernels=True):
        shape = name.removeprefix("kernels-").removesuffix(f"-{row['streams']}").removesuffix("-q8_0")
        yield (f"| {shape} | {row['type']} | {row['streams']} | {row['n_kv']} | {row['stock_us']:.0f} | {row['select_us']:.0f} | "
               f"{row['select_attend_us']:.0f} | {row['reuse_us']:.1f} | {row['stock_us'] / row['reuse_us']:.1f} | {row['select_us'] / row['stock_us']:.2f} | "
               f"{row['select_share_of_copy']:.0%} | {row['reuse_share_of_copy']:.0%} |")


LAYERS = {"llama-3.1-8b": 32, "qwq-32b": 64}  # layer 0 full, of the others the first of every 8 selects


def averages(folder: Path):
    yield "| shape | sequences | dense | average of the policy's layers | ratio |\n| --- | --- | --- | --- | --- |"
    for name, row in rows_of(folder, kernels=True):
        shape = name.removeprefix("kernels-").removesuffix(f"-{row['streams']}")
        if row["n_kv"] == 131072 and shape in LAYERS:
            n = LAYERS[shape]
            select = len(range(1, n, 8))
            mean = (row["stock_us"] + select * row["select_us"] + (n - 1 - select) * row["reuse_us"]) / n
            yield f"| {shape} | {row['streams']} | {row['stock_us']:.0f} | {mean:.1f} | {row['stock_us'] / mean:.2f} |"


def main() -> None:
    folder = Path(sys.argv[1])
    for title, table in (("decode, tokens/s over all sequences", decode), ("one layer, microseconds", kernels),
                         ("average over a policy's layers at 131072 cells, microseconds", averages)):
        print(f"{title}\n\n" + "\n".join(table(folder)) + "\n")


if __name__ == "__main__":
    main()
