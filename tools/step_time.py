"""Where a decode step's time goes on a GPU: how long the host takes until all is under way, how long it then waits, and which kernels run.

    python tools/step_time.py model.gguf --policy policy.json -d 65536 -np 8 > step.json

Stock and the policy take turns on one context. Kernels come from PyTorch's profiler, which sees those of the whole process; without
PyTorch only the two times of the host are given. Prints one JSON array, a row per arm.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

from hylra_gguf import engine
from hylra_gguf.bench import GPU_WARM_UP, commit, gpu_info
from hylra_gguf.fill import fill, make_tokens
from hylra_gguf.policy import Policy
from hylra_gguf.session import Context, Model

N_PROFILED = 4  # steps: enough to see, few enough that the trace stays small


def timed_step(context: Context, token: int, pos: int) -> tuple[float, float]:
    """(milliseconds until llama_decode returns, milliseconds until the GPU has finished)"""
    start = time.perf_counter()
    context._decode([(token, pos, seq, True) for seq in range(context.n_seq)])
    under_way = time.perf_counter()
    context.api.llama_synchronize(context.ctx)
    return (under_way - start) * 1e3, (time.perf_counter() - under_way) * 1e3


def kernels_of(run) -> list[dict]:
    """Name, launches and microseconds per step of what the GPU did while run() made N_PROFILED steps, longest first"""
    try:
        from torch.profiler import ProfilerActivity, profile
    except ImportError:
        return []
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        run()
    rows = [{"name": one.key, "count": one.count / N_PROFILED, "us": round(one.self_device_time_total / N_PROFILED, 1)} for one in trace.key_averages()]
    return sorted((row for row in rows if row["us"] > 0), key=lambda row: -row["us"])


def measure(context: Context, policy: Policy | None, tokens: list[int], depth: int, n_steps: int) -> dict:
    engine.set_policy(context.ctx, policy)
    pos = iter(range(depth, depth + len(tokens)))
    for _ in range(GPU_WARM_UP):
        timed_step(context, tokens[0], next(pos))
    times = [timed_step(context, tokens[i], next(pos)) for i in range(n_steps)]
    kernels = kernels_of(lambda: [timed_step(context, tokens[0], next(pos)) for _ in range(N_PROFILED)])
    context.rewind(depth, -1)
    host_ms, wait_ms = (round(statistics.median(column), 3) for column in zip(*times))
    return {"host_ms": host_ms, "wait_ms": wait_ms, "step_ms": round(statistics.median(map(sum, times)), 3),
            "gpu_us": round(sum(row["us"] for row in kernels), 1), "kernels": kernels}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--policy", action="append", required=True, metavar="POLICY")
    parser.add_argument("-d", dest="depth", type=int, default=65536)
    parser.add_argument("-np", dest="n_seq", type=int, default=1)
    parser.add_argument("-n", dest="n_steps", type=int, default=24)
    args = parser.parse_args()
    arms = [("stock", None)] + [(path, Policy.load(path)) for path in args.policy]
    n_ctx = args.depth + GPU_WARM_UP + args.n_steps + N_PROFILED
    common = {"build_commit": commit(), "engine": engine.version(), "gpu_info": gpu_info(), "n_depth": args.depth, "n_seq": args.n_seq}
    with Model(args.model, 99) as model, Context(model, n_ctx, n_seq=args.n_seq, scratch=args.n_seq == 1) as context:
        tokens, _ = make_tokens(model, n_ctx)
        fill(context, tokens, args.depth, synthetic=args.n_seq == 1)
        rows = [{**common, "arm": name, **measure(context, policy, tokens, args.depth, args.n_steps)} for name, policy in arms]
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
