"""How the cells that a model's layers attend to lie in its cache: how many behind each other, and how many to a block of 16 or 64 cells, on real text.

    python tools/list_runs.py MODEL.gguf [-c 32000] [--samples 4] [--top-k 1024] [-o md|json]

One dense pass over the calibration texts; at sampled depths a few tokens are decoded under the model's policy, with one list for all heads and with one per KV
head, and the engine's own nodes show the lists. Refuses a model without a policy.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from hylra_gguf.attention_trace import given_cells
from hylra_gguf.bench import commit
from hylra_gguf.drift import SteppedPass
from hylra_gguf.errors import HylraError
from hylra_gguf.forward import Forward, cpu_count
from hylra_gguf.policy import Policy, require_policy
from hylra_gguf.profile import calibration_tokens
from hylra_gguf.samples import plan_samples
from hylra_gguf.tables import to_md


@dataclass
class Shapes:
    """Of every list seen under one policy at one depth: cells, runs, blocks of 16 and of 64 cells that it touches.

    A row: cells in a run, what that would be if cells lay anywhere, cells to a block of 16 and of 64 (those that it touches)."""

    counts: list[tuple[int, int, int, int]] = field(default_factory=list)

    def add(self, cells: np.ndarray) -> None:
        """cells: [n] ascending"""
        self.counts.append((len(cells), 1 + int((np.diff(cells) > 1).sum()), len(np.unique(cells // 16)), len(np.unique(cells // 64))))

    def row(self, policy: Policy, start: int) -> dict:
        cells, *parts = np.array(self.counts).sum(0)
        run, per_16, per_64 = (round(float(cells / part), 2) for part in parts)
        share = cells / len(self.counts) / start
        return {"lists": policy.lists, "top_k": policy.top_k, "n_past": start, "n_lists": len(self.counts), "run": run,
                "run_anywhere": round(float(1 / (1 - share)), 2), "per_16": per_16, "per_64": per_64}


class ListVisitor:
    def __init__(self, engine, start: int, shapes: Shapes) -> None:
        self.engine, self.start, self.shapes = engine, start, shapes

    def wants(self, _node: int, kind: int, trace) -> bool:
        return kind == self.engine.TRACE_ATTEND and bool(trace.cells)

    def take(self, _node: int, _kind: int, trace) -> None:
        for lists in given_cells(trace, self.start, self.engine.ffi.buffer):
            for cells in lists:
                self.shapes.add(cells)


def measure(args: argparse.Namespace) -> dict:
    policy = replace(require_policy(Path(args.model)), min_context=0, top_k=args.top_k, top_k_fraction=None, layer_top_k=None, head_map=None)
    policies = [replace(policy, lists=lists) for lists in (1, policy.head_kv_count)]
    shapes = [defaultdict(Shapes) for _ in policies]  # cached tokens -> what was seen there
    with Forward(args.model) as forward:
        names, token_lists = calibration_tokens(forward, None, args.n_ctx)
        samples = plan_samples(len(names), [args.n_ctx], args.samples, args.top_k)
        forward.open_context(args.n_ctx, "f16", cpu_count())
        run = SteppedPass(forward, lambda start: [(one, ListVisitor(forward.engine, start, seen[start])) for one, seen in zip(policies, shapes)])
        run.read_all(token_lists, samples, True)
    rows = [found.row(one, start) for one, seen in zip(policies, shapes) for start, found in sorted(seen.items())]
    return {"model": Path(args.model).name, "commit": commit(), "texts": names, "n_ctx": args.n_ctx, "rows": rows}


def table(result: dict) -> str:
    return to_md(result["rows"])


def main() -> int:
    parser = argparse.ArgumentParser(description="Runs of cells in a model's lists.", allow_abbrev=False)
    parser.add_argument("model", metavar="MODEL.gguf|JSON", help="a model with a policy, or a result to print as a table")
    parser.add_argument("-c", "--n-ctx", type=int, default=32000, metavar="N", help="tokens of each text (default 32000)")
    parser.add_argument("--samples", type=int, default=4, metavar="N", help="depths per text (default 4)")
    parser.add_argument("--top-k", type=int, default=1024, metavar="N", help="default 1024")
    parser.add_argument("-o", "--output", choices=("md", "json"), default="md", help="default md")
    args = parser.parse_args()
    try:
        result = json.loads(Path(args.model).read_text()) if args.model.endswith(".json") else measure(args)
    except (HylraError, OSError) as error:
        print(f"list_runs: {error}", file=sys.stderr)
        return 2
    print(json.dumps(result, indent=1) if args.output == "json" else table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
