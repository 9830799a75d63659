"""The recall that each reuse layer of a policy really has, beside what a dense pass promises: errors of one layer reach the next.

At sampled depths the same few tokens are decoded twice on the same dense cache: once dense, where the source's cells are chosen from
undisturbed layers, and once with the policy on, where the engine's own nodes show the cells that the layer was given and the query it
had. Refuses a policy without reuse layers and contexts in which its top_k leaves too few cells out.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Callable, Sequence

import numpy as np

from . import measure
from .attention_trace import given_cells, rows_from_trace
from .errors import ProfileError
from .forward import Forward, cpu_count
from .measure import AttentionRows, Budget
from .policy import REUSE, SELECT, Policy
from .profile import Options, calibration_tokens, check_options, choose_contexts
from .profile_data import HIGH_QUANTILE, LOW_QUANTILE
from .samples import Sample, choose_top_ks, plan_samples
from .session import N_UBATCH

STEP_TOKENS = 8  # the most that one sequence may have in a batch that the engine counts as decode


@dataclass
class Recalls:
    """Of every sampled token: layer -> shares of the layer's attention mass."""

    dense: dict[int, list[float]] = field(default_factory=dict)
    chain: dict[int, list[float]] = field(default_factory=dict)


class Step:
    """One batch of tokens behind `start` cached ones; the two visitors below see it in turn."""

    def __init__(self, policy: Policy, recalls: Recalls, engine, start: int) -> None:
        self.policy, self.recalls, self.engine, self.start = policy, recalls, engine, start
        self.cells: dict[int, list[list[np.ndarray]]] = {}  # dense pass, select layer -> per token and list
        self.sinks: dict[int, np.ndarray | None] = {}  # the engine's attention node does not know them

    def rows(self, trace) -> AttentionRows:
        return rows_from_trace(trace, list(range(STEP_TOKENS)), self.start + STEP_TOKENS, self.engine.ffi.buffer)

    def masses(self, rows: AttentionRows) -> list[np.ndarray]:
        """Per token [n_lists, visible cells], each list's sum 1"""
        p, _ = measure.probabilities(rows)
        n_heads = 1 if self.policy.lists == 1 else self.policy.head_kv_count
        pooled = [measure.pool(p[t, :, :self.start + t + 1], n_heads) for t in range(STEP_TOKENS)]
        return [one / one.sum(-1, keepdims=True) for one in pooled]

    def list_of(self, layer: int) -> tuple[int, ...]:
        """The source's list that each list of this layer takes"""
        if self.policy.lists == 1:
            return (0,)
        heads = self.policy.head_kv_count
        return self.policy.head_map[layer * heads:(layer + 1) * heads] if self.policy.head_map else tuple(range(heads))

    def recall(self, layer: int, masses: list[np.ndarray], cells: list[list[np.ndarray]]) -> list[float]:
        """Per token the mean over lists of the mass on the cells taken"""
        return [float(np.mean([own[taken[source]].sum() for own, source in zip(mass, self.list_of(layer))]))
                for mass, taken in zip(masses, cells)]


class DenseVisitor:
    def __init__(self, step: Step) -> None:
        self.step, self.seen = step, set()

    def wants(self, _node: int, kind: int, trace) -> bool:
        """The first node of a layer that the policy makes sparse."""
        if kind != self.step.engine.TRACE_STOCK or trace.layer in self.seen or not 0 <= trace.layer < self.step.policy.layer_count:
            return False
        return self.step.policy.layer_mode[trace.layer] in (SELECT, REUSE)

    def take(self, _node: int, _kind: int, trace) -> None:
        step, layer = self.step, trace.layer
        self.seen.add(layer)
        rows = step.rows(trace)
        masses, step.sinks[layer] = step.masses(rows), rows.sinks
        policy, source = step.policy, step.policy.layer_source[layer]
        if source == layer:  # a select layer, or a reuse layer that takes its own cells
            budget = Budget([policy.cells_of(layer, trace.n_kv)], policy.sink_tokens, policy.recent_tokens)
            step.cells[layer] = [[chosen(scores, budget, policy.block_size) for scores in mass] for mass in masses]
        if policy.layer_mode[layer] == REUSE:
            found = step.recall(layer, masses, step.cells[source])
            step.recalls.dense.setdefault(layer, []).extend(found)


class ChainVisitor:
    def __init__(self, step: Step) -> None:
        self.step = step

    def wants(self, _node: int, kind: int, trace) -> bool:
        return kind == self.step.engine.TRACE_ATTEND and bool(trace.cells)

    def take(self, _node: int, _kind: int, trace) -> None:
        step, layer = self.step, trace.layer
        rows = replace(step.rows(trace), sinks=step.sinks.get(layer))
        cells = given_cells(trace, step.start, step.engine.ffi.buffer)
        step.recalls.chain.setdefault(layer, []).extend(step.recall(layer, step.masses(rows), cells))


def arms_of(step: Step) -> list[tuple[Policy | None, object]]:
    """Dense first: the chain is measured by what that leaves in the step."""
    return [(None, DenseVisitor(step)), (step.policy, ChainVisitor(step))]


def chosen(scores: np.ndarray, budget: Budget, block_size: int) -> np.ndarray:
    ranking = measure.rank(scores, budget, block_size)
    return np.concatenate([budget.forced(len(scores)), ranking.cells[:ranking.counts[0]]])


# -- the pass ---------------------------------------------------------------------------------------------------------


def measure_drift(model_path: str, policy: Policy, texts: list[tuple[str, str]] | None = None,
                  options: Options = Options()) -> list[dict]:
    """One row per reuse layer: its source, the recall a dense pass promises and the recall in the chain, over all sampled tokens.

    Raises ProfileError for texts and contexts that do not fit, PolicyError for a policy that does not fit the model.
    """
    check_options(options)
    if REUSE not in policy.layer_mode:
        raise ProfileError(f"the policy has no reuse layer ({policy.one_line()}), so nothing can drift; plan with a lower --theta")
    recalls = Recalls()
    with Forward(model_path) as forward:
        contexts = choose_contexts(options.contexts, forward.api.llama_model_n_ctx_train(forward.model.handle))
        top_k, = choose_top_ks(contexts[0], [max(policy.reuse_cells(contexts[-1]), default=policy.top_k)], policy.sink_tokens + policy.recent_tokens)
        names, token_lists = calibration_tokens(forward, texts, contexts[-1])
        samples = plan_samples(len(names), contexts, options.samples, top_k)
        forward.open_context(contexts[-1], options.type_kv, options.n_threads or cpu_count())
        always = replace(policy, min_context=0)
        forward.engine.set_policy(forward.ctx, always)  # refused here, before minutes of reading
        SteppedPass(forward, lambda start: arms_of(Step(always, recalls, forward.engine, start))).read_all(token_lists, samples, options.progress)
    return rows_of(policy, recalls)


class SteppedPass:
    """Reads texts densely; at sampled positions decodes the next tokens on the cache as it is, once for each of arms(cached tokens): a policy
    (None: dense) and the visitor that sees its nodes."""

    def __init__(self, forward: Forward, arms: Callable[[int], Sequence[tuple[Policy | None, object]]]) -> None:
        self.forward, self.arms = forward, arms

    def read_all(self, token_lists: list[list[int]], samples: list[Sample], progress: bool) -> None:
        from tqdm import tqdm

        with tqdm(total=sum(map(len, token_lists)), unit="tok", desc="drift", disable=None if progress else True) as bar:
            for text, tokens in enumerate(token_lists):
                self.forward.clear()
                self.forward.engine.set_policy(self.forward.ctx, None)
                done = 0
                for start in sorted({min(s.position, len(tokens) - STEP_TOKENS) for s in samples if s.text == text}):
                    self.prefill(tokens, done, start)
                    bar.update(start - done)
                    done = start
                    self.decode_arms(tokens[start:start + STEP_TOKENS], start)
                bar.update(len(tokens) - done)

    def prefill(self, tokens: list[int], done: int, stop: int) -> None:
        self.forward.visitor = None
        for start in range(done, stop, N_UBATCH):
            self.forward.decode(tokens[start:min(start + N_UBATCH, stop)], start, [])

    def decode_arms(self, tokens: list[int], start: int) -> None:
        forward = self.forward
        forward.context.keep(start)
        for policy, visitor in self.arms(start):
            forward.engine.set_policy(forward.ctx, policy)
            forward.visitor = visitor
            forward.decode(tokens, start, list(range(len(tokens))))
            forward.context.rewind(start)
        forward.engine.set_policy(forward.ctx, None)


def rows_of(policy: Policy, recalls: Recalls) -> list[dict]:
    rows = []
    for layer, source in enumerate(policy.layer_source):
        if policy.layer_mode[layer] != REUSE:
            continue
        if layer not in recalls.chain or layer not in recalls.dense:
            raise ProfileError(f"layer {layer} did not run sparse: the engine left it to llama.cpp; plan on a profile of this model")
        dense, chain = np.array(recalls.dense[layer]), np.array(recalls.chain[layer])
        change = chain - dense
        rows.append({
            "layer": layer, "source": source, "tokens": len(chain), "planned": rounded(dense.mean()), "in_chain": rounded(chain.mean()),
            "in_chain_low": rounded(np.quantile(chain, LOW_QUANTILE)), "drift": rounded(change.mean()),
            "drift_low": rounded(np.quantile(change, LOW_QUANTILE)), "drift_high": rounded(np.quantile(change, HIGH_QUANTILE))})
    return rows


def rounded(value: float) -> float:
    return round(float(value), 4) + 0.0  # no -0.0


def describe(rows: list[dict]) -> str:
    planned, chain = (sum(row[name] for row in rows) / len(rows) for name in ("planned", "in_chain"))
    worst = min(rows, key=lambda row: row["drift"])
    return (f"{len(rows)} reuse layers: recall planned {planned:.3f}, in the chain {chain:.3f}; "
            f"largest loss {-worst['drift']:.4f} in layer {worst['layer']}")
