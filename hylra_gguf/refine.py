"""`plan --refine MODEL`: changes single layers, sources and budgets of a policy while the measured KL divergence of this very file falls.

A change may not make a decode step read more cells. Half of the tokens decides, the other half only reports, so that what is shown is
no product of the search.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, replace
from typing import Iterator

import numpy as np
from tqdm import tqdm

from .divergence import Divergence, Judge
from .forward import cpu_count
from .plan import DEFAULT_MAX_SENSITIVITY, calm_layers, sparse_selects, summary
from .policy import FULL, REUSE, SELECT, Policy
from .profile_data import Profile
from .session import Model
from .texts import lookup_text, read_texts

N_TOKENS = 192  # per text: half of them decides
# A change counts when the paired mean falls by this many standard errors. KL divergence has a heavy tail: with 2, a change that cut it by
# 23 % here and by 30 % on the other half was passed over.
MIN_GAIN_STDERR = 1.0
BUDGET_STEPS = (0.5, 1.5)  # a select layer's top_k is tried at these shares of what it is
BUDGET_UNIT = 64
DEFAULT_MINUTES = 5.0
ALL_CHARS = 1 << 30
MAX_SOURCES = 3  # earlier select layers tried for a reuse layer, most similar first


@dataclass(frozen=True)
class Step:
    """One accepted policy on the path; kld and stderr on the deciding half, held_out on the other."""

    change: str
    kld: float
    stderr: float
    held_out: float
    reads: float  # cells read in a decode step, all layers, as a share of dense
    tried: int  # policies measured so far
    seconds: float


# -- neighbours of a policy -------------------------------------------------------------------------------------------


def reads(policy: Policy, depth: int) -> float:
    """Cells that a decode step reads at `depth`, over all layers, as a share of a dense step."""
    return 1 - policy.reads_saved(depth)


def evidence(policy: Policy) -> np.ndarray:
    """[n_layer, n_layer] similarity that orders what is tried; without it nearer layers count as more similar."""
    n = policy.layer_count
    if policy.overlap:
        return np.array(policy.overlap, float).reshape(n, n)
    return 1 / (1 + np.abs(np.subtract.outer(np.arange(n), np.arange(n))))


def with_sources(policy: Policy, sources: list[int]) -> Policy:
    """The same policy with other sources; a select layer that nobody reuses becomes full, unless its own cells do for it.

    Keeps the budgets of layers that still select.
    """
    calm = calm_in(policy)
    used = {s for layer, s in enumerate(sources) if s != layer or (s != -1 and calm[layer])}
    modes = [REUSE if s not in (-1, layer) else SELECT if layer in used else FULL for layer, s in enumerate(sources)]
    sources = [-1 if mode == FULL else s for mode, s in zip(modes, sources)]
    sparse = sparse_selects(sources, calm)
    budgets = policy.layer_top_k
    if budgets:
        budgets = [(budgets[layer] or policy.top_k) if mode == SELECT else 0 for layer, mode in enumerate(modes)]
    return with_budgets(replace(policy, layer_mode=tuple(modes), layer_source=tuple(sources), layer_top_k=None, sparse_select=sparse), budgets)


def calm_in(policy: Policy) -> list[bool]:
    """Layers that may select sparsely: none if none does so far, else those that do and those that the planner's default bound lets."""
    if not policy.sparse_select:
        return [False] * policy.layer_count
    measured = calm_layers(policy.sensitivity or [np.nan] * policy.layer_count, DEFAULT_MAX_SENSITIVITY)
    return [bool(sparse) or bool(calm) for sparse, calm in zip(policy.sparse_select, measured)]


def with_budgets(policy: Policy, budgets: list[int] | None) -> Policy:
    if not budgets or not any(budgets):
        return replace(policy, layer_top_k=None)
    return replace(policy, layer_top_k=tuple(budgets), top_k=max(budgets))


def other_sources(policy: Policy, similarity: np.ndarray) -> Iterator[tuple[float, str, Policy]]:
    """A reuse layer takes the cells of another select layer."""
    sources = list(policy.layer_source)
    selects = [layer for layer, mode in enumerate(policy.layer_mode) if mode == SELECT]
    for layer in (i for i, mode in enumerate(policy.layer_mode) if mode == REUSE):
        others = sorted((s for s in selects if s < layer and s != sources[layer]), key=lambda s: -similarity[s, layer])
        for source in others[:MAX_SOURCES]:
            change = [source if i == layer else s for i, s in enumerate(sources)]
            yield similarity[source, layer] - similarity[sources[layer], layer], f"layer {layer} reuses {source}", with_sources(policy, change)


def swapped_layers(policy: Policy, similarity: np.ndarray) -> Iterator[tuple[float, str, Policy]]:
    """A dense layer and a reuse layer change places; whoever loses its source takes the best one left."""
    dense = [layer for layer, mode in enumerate(policy.layer_mode) if mode != REUSE and takes_part(policy, similarity, layer)]
    for out in dense[1:]:
        for into in (i for i, mode in enumerate(policy.layer_mode) if mode == REUSE):
            chosen = sorted({*dense, into} - {out})
            sources = best_sources(policy, similarity, chosen)
            if sources:
                yield total(similarity, sources) - total(similarity, policy.layer_source), f"layer {into} dense, not {out}", with_sources(policy, sources)


def takes_part(policy: Policy, similarity: np.ndarray, layer: int) -> bool:
    """A full layer of a kind that cannot select (sliding window) has no evidence and stays as it is."""
    return policy.layer_mode[layer] == SELECT or not policy.overlap or similarity[layer, layer] > 0


def best_sources(policy: Policy, similarity: np.ndarray, dense: list[int]) -> list[int] | None:
    """Every other layer takes its most similar earlier dense layer, which then selects; None if one has none."""
    out = []
    for layer, mode in enumerate(policy.layer_mode):
        earlier = [i for i in dense if i < layer]
        if layer in dense:
            out.append(layer)
        elif mode == FULL and not takes_part(policy, similarity, layer):
            out.append(-1)
        elif not earlier:
            return None
        else:
            out.append(max(earlier, key=lambda i: similarity[i, layer]))
    return out


def total(similarity: np.ndarray, sources) -> float:
    return float(sum(similarity[s, layer] for layer, s in enumerate(sources) if s not in (-1, layer)))


def moved_budgets(policy: Policy, similarity: np.ndarray) -> Iterator[tuple[float, str, Policy]]:
    """One select layer emits more cells, or one more and another fewer."""
    if policy.top_k_fraction:
        return
    selects = [layer for layer, mode in enumerate(policy.layer_mode) if mode == SELECT]
    budgets = list(policy.layer_top_k or (policy.top_k if mode == SELECT else 0 for mode in policy.layer_mode))
    least = max(1, policy.sink_tokens + policy.recent_tokens)
    for more in selects:
        for less in (s for s in selects if s != more):
            change = list(budgets)
            for layer, factor in ((less, BUDGET_STEPS[0]), (more, BUDGET_STEPS[1])):
                change[layer] = max(least, round(budgets[layer] * factor / BUDGET_UNIT) * BUDGET_UNIT)
            yield 0.0, f"layer {more} hands out {change[more]} cells, layer {less} {change[less]}", with_budgets(policy, change)


def neighbours(policy: Policy, depth: int, limit: float) -> list[tuple[str, Policy]]:
    """What is one change away and reads no more than `limit`, the most promising first."""
    similarity = evidence(policy)
    found = [*other_sources(policy, similarity), *swapped_layers(policy, similarity), *moved_budgets(policy, similarity)]
    found.sort(key=lambda one: -one[0])
    return [(change, one) for _, change, one in found if reads(one, depth) <= limit + 1e-9]


# -- search -----------------------------------------------------------------------------------------------------------


def halves(divergence: Divergence) -> tuple[np.ndarray, np.ndarray]:
    """KL divergence of the deciding and of the held-out tokens: stretches of eight in turn, since neighbours are alike."""
    turn = np.arange(divergence.kld.shape[1]) // 8 % 2 == 0
    return divergence.kld[:, turn].ravel(), divergence.kld[:, ~turn].ravel()


def better(new: np.ndarray, old: np.ndarray) -> bool:
    """Paired: the mean falls by more than chance explains."""
    fall = old - new
    return bool(fall.mean() > MIN_GAIN_STDERR * fall.std(ddof=1) / np.sqrt(fall.size))


def refine(policy: Policy, compare, depth: int, budget_s: float, report, clock=time.monotonic) -> tuple[Policy, list[Step]]:
    """First improvement: the first neighbour that is better becomes the policy, until none is or the time is over.

    compare(policy) -> Divergence; report(Step) is called for every accepted step, the starting point included. Returns the policy of
    the step whose held-out half is best, so that a search that has only learnt its tokens by heart gives back the start.
    """
    start, limit, seen, path = clock(), reads(policy, depth), set(), []
    todo = [("start", policy)]
    decided = None
    while todo and clock() - start <= budget_s:
        change, candidate = todo.pop(0)
        if candidate in seen:
            continue
        seen.add(candidate)
        new, held_out = halves(compare(candidate))
        if decided is None or better(new, decided):
            decided = new
            step = Step(change, float(new.mean()), float(new.std(ddof=1) / np.sqrt(new.size)), float(held_out.mean()),
                        reads(candidate, depth), len(seen), clock() - start)
            path.append((candidate, step))
            report(step)
            todo = neighbours(candidate, depth, limit)
    best = min(range(len(path)), key=lambda i: path[i][1].held_out)
    return path[best][0], [step for _, step in path[: best + 1]]


# -- command ----------------------------------------------------------------------------------------------------------


def cmd_refine(args, profile: Profile, policy: Policy) -> Policy:
    """Raises ProfileError if the profile is of another model."""
    profile.check_model(args.refine)
    depth = args.ctx_size or default_depth(profile)
    return refine_policy(policy, args.refine, args.text or [], depth, args.minutes or DEFAULT_MINUTES, args.threads)


def default_depth(profile: Profile) -> int:
    """The profile's longest context, less what is measured behind it."""
    return max(profile.contexts) - N_TOKENS


def refine_policy(policy: Policy, model_path: str, text_paths: list[str], depth: int, minutes: float, n_threads: int | None = None,
                  progress: bool = True) -> Policy:
    """The refined policy, its gain in the tool line. depth: cached tokens before the measured ones; below min_context it counts too."""
    with Model(model_path) as model:
        texts = texts_for(model, text_paths, depth + N_TOKENS)
        with tqdm(total=depth * len(texts), unit="tok", desc="refine", disable=None if progress else True) as bar:
            judge = Judge(model, texts, depth, N_TOKENS, policy, n_threads or cpu_count(), bar.update)
        with judge:
            found, path = refine(policy, lambda one: judge.compare(replace(one, min_context=0)), depth, 60 * minutes, print_step)
    gain = f", refined at {depth} tokens: KLD {path[0].held_out:.4f} to {path[-1].held_out:.4f} on tokens it did not see"
    return replace(found, tool=found.tool + gain, summary=summary_of(found))


def summary_of(policy: Policy) -> str:
    ks = dict(enumerate(policy.layer_top_k or (policy.top_k,) * policy.layer_count))
    ks = {layer: ks[layer] for layer, mode in enumerate(policy.layer_mode) if mode == SELECT}
    return summary(list(policy.layer_source), evidence(policy), ks, policy.top_k, policy.similarity)


def texts_for(model: Model, paths: list[str], n_tokens: int) -> list[list[int]]:
    """The user's texts, or the last two stretches of what ships with Python: the profile reads it from the start."""
    if paths:
        return [model.tokenize(text)[:n_tokens] for text in read_texts(paths)]
    tokens = model.tokenize(lookup_text(ALL_CHARS)[0])
    return [tokens[-2 * n_tokens : -n_tokens], tokens[-n_tokens:]]


def print_step(step: Step) -> None:
    print(f"{step.seconds:6.0f} s  {step.tried:4} tried  KLD {step.kld:.5f} +- {step.stderr:.5f}  held out {step.held_out:.5f}  "
          f"reads {step.reads:.3f}  {step.change}", file=sys.stderr)
