"""Prints the tables of docs/cuda.md from the results that tools/gpu.sh has written.

    python tools/cuda_tables.py docs/cuda
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def rows_of(folder: Path, kind: str = ""):
    """(file name without suffix, row) of the results whose names begin with a kind, or of those of bench"""
    for path in sorted(folder.glob("*.json")):
        own = next((prefix for prefix in ("kernels-", "steps-") if path.name.startswith(prefix)), "")
        if own == kind:
            yield from ((path.stem, row) for row in json.loads(path.read_text()))


def place(name: str, row: dict) -> str:
    """The card, and where the cache lies; of a machine's two cards only the runs named -two have used both."""
    card = row["gpu_info"].split(",")[0].split()[1]
    return f"two {card}" if name.endswith("-two") else f"{card}, cache in host memory" if row.get("no_kv_offload") else card


def decode(folder: Path):
    yield "| model shape | KV | on | sequences | depth | stock | policy | HyLRA | ratio |\n" + "| --- " * 9 + "|"
    stock = {}
    for name, row in rows_of(folder):
        if row["arm"] == "stock-fa1":
            stock[name, row["n_depth"]] = row["median_ts"]
            continue
        shape = row["model_filename"].removesuffix(".gguf")
        policy = row["arm"].removeprefix("hylra").removeprefix(":").removeprefix(shape).removeprefix("-") or "per-head"
        yield (f"| {shape} | {row['type_k']} | {place(name, row)} | {row['n_seq']} | {row['n_depth']} | {stock[name, row['n_depth']]:.1f} | {policy} | "
               f"{row['median_ts']:.1f} | {row['speedup']:.2f} |")


def kernels(folder: Path):
    yield ("| shape | KV | sequences | cells | llama.cpp dense | select | of it attend | sparse select | reuse | dense / reuse | select / dense | sparse / dense | "
           "attend, of copy | scores, of copy | reuse, of copy |\n" + "| --- " * 15 + "|")
    for name, row in rows_of(folder, "kernels-"):
        shape = name.removeprefix("kernels-").removesuffix(f"-{row['streams']}").removesuffix(f"-{row['type']}")
        yield (f"| {shape} | {row['type']} | {row['streams']} | {row['n_kv']} | {row['stock_us']:.0f} | {row['select_us']:.0f} | "
               f"{row['select_attend_us']:.0f} | {row['sparse_select_us']:.0f} | {row['reuse_us']:.1f} | {row['stock_us'] / row['reuse_us']:.1f} | "
               f"{row['select_us'] / row['stock_us']:.2f} | {row['sparse_select_us'] / row['stock_us']:.2f} | {row['select_share_of_copy']:.0%} | "
               f"{row['scoring_share_of_copy']:.0%} | {row['reuse_share_of_copy']:.0%} |")


LAYERS = {"llama-3.1-8b": 32, "qwq-32b": 64}  # layer 0 full, of the others the first of every 8 selects


def averages(folder: Path):
    yield "| shape | sequences | dense | average of the policy's layers | ratio | with sparse select | ratio |\n" + "| --- " * 7 + "|"
    for name, row in rows_of(folder, "kernels-"):
        shape = name.removeprefix("kernels-").removesuffix(f"-{row['streams']}")
        if row["n_kv"] == 131072 and shape in LAYERS:
            n = LAYERS[shape]
            select = len(range(1, n, 8))
            dense, sparse = ((row["stock_us"] + select * row[column] + (n - 1 - select) * row["reuse_us"]) / n for column in ("select_us", "sparse_select_us"))
            yield (f"| {shape} | {row['streams']} | {row['stock_us']:.0f} | {dense:.1f} | {row['stock_us'] / dense:.2f} | "
                   f"{sparse:.1f} | {row['stock_us'] / sparse:.2f} |")


def of_kernels(row: dict, *parts: str) -> float:
    """Milliseconds of the kernels whose names hold one of these"""
    return sum(kernel["us"] for kernel in row["kernels"] if any(part in kernel["name"] for part in parts)) / 1e3


def steps(folder: Path):
    yield "| model shape | sequences | depth | arm | host | wait | step | matrix products | dense attention |\n" + "| --- " * 9 + "|"
    for name, row in rows_of(folder, "steps-"):
        shape = name.removeprefix("steps-").removesuffix(f"-{row['n_seq']}")
        arm = Path(row["arm"]).stem.removeprefix(shape).removeprefix("-")
        yield (f"| {shape} | {row['n_seq']} | {row['n_depth']} | {arm} | {row['host_ms']:.2f} | {row['wait_ms']:.2f} | {row['step_ms']:.2f} | "
               f"{of_kernels(row, 'mul_mat', 'quantize_q8_1'):.2f} | {of_kernels(row, 'flash_attn'):.2f} |")


def main() -> None:
    folder = Path(sys.argv[1])
    for title, table in (("decode, tokens/s over all sequences", decode), ("one layer, microseconds", kernels),
                         ("average over a policy's layers at 131072 cells, microseconds", averages), ("a step, milliseconds", steps)):
        print(f"{title}\n\n" + "\n".join(table(folder)) + "\n")


if __name__ == "__main__":
    main()
