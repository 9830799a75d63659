"""How exact is dense attention at depth: stock flash attention and the engine's `full` kernel against float64, layer by layer.

    python tools/attention_error.py MODEL -d 8192,32000 > docs/attention-error.json

One decode step each behind a cache of shifted copies; q, K and V are taken from the graph, so an arm is only charged with its own error.
RNMSE per layer. Stock accumulates an F16 V in FP16. Refuses models with softcap, ALiBi or attention sinks, which it does not restate.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

import numpy as np

from hylra_gguf import engine
from hylra_gguf.attention_trace import rows_from_trace, strided
from hylra_gguf.bench import commit, cpu_info
from hylra_gguf.divergence import dense_policy
from hylra_gguf.fill import fill, make_tokens
from hylra_gguf.forward import cpu_count
from hylra_gguf.gguf_header import model_shape, read_header
from hylra_gguf.measure import rnmse
from hylra_gguf.policy import FULL, Policy
from hylra_gguf.session import Context, Model


def attention(rows, visible: np.ndarray) -> np.ndarray:
    """[n_head, n_embd_v] float64 of the first query row"""
    if rows.softcap or rows.max_bias or rows.sinks is not None:
        sys.exit("this model has softcap, ALiBi or attention sinks; take another")
    cells = np.flatnonzero(visible)
    k, v = (np.asarray(side[: cells[-1] + 1], np.float64)[cells] for side in (rows.k, rows.v))
    group = rows.q.shape[1] // k.shape[1]
    logits = np.einsum("hd,chd->hc", rows.q[0].astype(np.float64), np.repeat(k, group, 1)) * rows.scale
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("hc,chd->hd", p / p.sum(-1, keepdims=True), np.repeat(v, group, 1))


class Trace:
    """Errors of one decode step: layer -> RNMSE."""

    def __init__(self) -> None:
        self.active, self.errors, self.expected = False, {}, {}
        self.trace = engine.ffi.new("struct hylra_attn *")

    def on_node(self, node: int, ask: bool, _user_data) -> bool:
        kind = engine.lib.hylra_trace_node(engine.ffi.cast("void *", node), self.trace) if self.active else 0
        if kind not in (engine.TRACE_STOCK, engine.TRACE_ATTEND, engine.TRACE_REDUCE) or ask:
            return kind != 0
        if kind != engine.TRACE_REDUCE:
            rows = rows_from_trace(self.trace, [0], self.trace.n_kv, engine.ffi.buffer)
            self.expected[self.trace.layer] = attention(rows, rows.visible()[0])
        if kind != engine.TRACE_ATTEND:
            t = self.trace
            found = strided(engine.ffi.buffer, t.dst, np.float32, (t.n_head, t.n_embd_v), [t.dst_nb[1], t.dst_nb[0]])
            self.errors[t.layer] = rnmse(self.expected[t.layer], found.astype(np.float64))
        return True


def measure(model: Model, policy: Policy | None, depth: int, threads: int) -> dict[int, float]:
    trace = Trace()
    with Context(model, depth + 1, n_threads=threads, scratch=True, on_node=trace.on_node) as context:
        engine.set_policy(context.ctx, None)
        tokens, _ = make_tokens(model, depth + 1)
        fill(context, tokens, depth, synthetic=True)
        engine.set_policy(context.ctx, policy)
        trace.active = True
        context.decode(tokens[depth:], depth)
    return trace.errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("-d", "--n-depth", default="8192", metavar="LIST")
    parser.add_argument("-t", "--threads", type=int, default=cpu_count(), metavar="N")
    args = parser.parse_args()
    _, layers, heads = model_shape(read_header(args.model))
    full = dense_policy(Policy(layer_mode=(FULL,) * layers, layer_source=(-1,) * layers, head_kv_count=heads))
    rows = []
    with Model(args.model) as model:
        for depth in map(int, args.n_depth.split(",")):
            for arm, policy in (("stock-fa1", None), ("full", full)):
                errors = list(measure(model, policy, depth, args.threads).values())
                rows.append({"arm": arm, "n_depth": depth, "layers": len(errors), "rnmse_mean": float(np.mean(errors)),
                             "rnmse_max": float(np.max(errors)), "worst_layer": int(np.argmax(errors))})
    print(json.dumps({"model": model_shape(read_header(args.model))[0], "file": args.model.rsplit("/", 1)[-1], "type_kv": "f16",
                      "machine": f"{cpu_info()}, {args.threads} threads", "commit": commit(),
                      "test_time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
