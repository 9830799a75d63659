"""How long a decode step takes, from a short measurement of this machine with this model: to compare policies, not a benchmark.

Step time = t0 + dense * (full and select layers x cells) + select * (select layers x cells) + sparse * (sparse select layers x cells)
+ reuse * (cells gathered, all layers); dense and select do not count sparse select layers. Stock likewise, per arm. One sequence, one list of cells per layer, F16 KV. A file for another model is refused.
"""

from __future__ import annotations

import contextlib
import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Dict, Sequence

import numpy as np

from . import engine
from .bench import STOCK, Arm, cpu_info, timed_ns
from .errors import HylraError, plain_os_errors
from .files import replacing
from .fill import fill, make_tokens
from .forward import cpu_count
from .policy import FULL, REUSE, SELECT, Policy
from .profile_data import Profile
from .session import Context, Model

DEPTHS_TOKENS = (2048, 8192)  # apart enough for a slope, deep enough that the cache does not fit into the processor's
TOP_K = 768  # select layers that may be sparse are so at both depths
ROUNDS, STEPS = 6, 3
DEEPEST_TOKENS = 1 << 20  # what does not pay up to here does not pay


@dataclass(frozen=True)
class CostModel:
    """dense_s, select_s and sparse_s are per layer and cell, reuse_s per layer and gathered cell, stock is {arm: (t0_s, per layer and cell)}"""

    identity: str  # of the model's weights, as in its profile
    layer_count: int  # layers whose attention spans the whole cache
    t0_s: float
    dense_s: float
    select_s: float
    sparse_s: float
    reuse_s: float
    stock: Dict[str, tuple[float, float]]
    note: str = ""  # machine, threads, error of the fit

    def stock_s(self, depth: float) -> float:
        """The faster stock arm at this depth"""
        return min(t0_s + cell_s * self.layer_count * depth for t0_s, cell_s in self.stock.values())

    def policy_s(self, policy: Policy, eligible: Sequence[bool], depth: float) -> float:
        """A sparse step, min_context left aside. Layers that are not eligible do not depend on the depth: they are in t0."""
        return float(np.dot(work_of(policy, eligible, depth), [self.t0_s, self.dense_s, self.select_s, self.sparse_s, self.reuse_s]))

    def break_even(self, policy: Policy, eligible: Sequence[bool]) -> float | None:
        """Depth from which on the policy is faster than stock; None if it is not by DEEPEST_TOKENS.

        Both step times are linear between kinks, so the last crossing lies exactly on one straight piece.
        """
        def gain_s(depth: float) -> float:
            return self.stock_s(depth) - self.policy_s(policy, eligible, depth)

        kinks = sorted({0.0, *self.stock_kinks(), *policy_kinks(policy), float(DEEPEST_TOKENS)})
        gains = [gain_s(depth) for depth in kinks]
        if gains[-1] <= 0:
            return None
        losing = [at for at, gain in enumerate(gains) if gain <= 0]
        if not losing:
            return 0.0
        at = losing[-1]
        return kinks[at] + (kinks[at + 1] - kinks[at]) * -gains[at] / (gains[at + 1] - gains[at])

    def stock_kinks(self) -> list[float]:
        """Where the faster stock arm changes"""
        arms = list(self.stock.values())
        crossings = [(b[0] - a[0]) / ((a[1] - b[1]) * self.layer_count) for a in arms for b in arms if a[1] > b[1]]
        return [depth for depth in crossings if 0 < depth < DEEPEST_TOKENS]

    def save(self, path: str) -> None:
        with plain_os_errors(path), replacing(path) as fd, open(fd, "w", encoding="utf-8", closefd=False) as file:
            file.write(json.dumps(asdict(self), indent=2) + "\n")


def policy_kinks(policy: Policy) -> list[float]:
    """Where the cells of reuse layers stop to grow with the depth, and where a share of the cells takes over from top_k"""
    kinks = [float(cells) for cells in policy.reuse_cells(0)]
    kinks += [at for cells in kinks for at in (2 * cells, math.nextafter(2 * cells, math.inf))]  # a step: select layers turn sparse
    if policy.top_k_fraction:
        kinks.append(policy.top_k / policy.top_k_fraction)
    return [depth for depth in kinks if depth < DEEPEST_TOKENS]


def load(path: str, profile: Profile) -> CostModel:
    """Raises HylraError for a file that is no cost model, or one of another model than the profile's."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        model = CostModel(**{**values, "stock": {str(arm): (float(a), float(b)) for arm, (a, b) in values["stock"].items()}})
        numbers = [model.t0_s, model.dense_s, model.select_s, model.sparse_s, model.reuse_s, *(x for pair in model.stock.values() for x in pair)]
        good = model.stock and all(type(number) in (int, float) and 0 <= number < math.inf for number in numbers)
    except OSError as error:
        raise HylraError(f"{path}: cannot read the cost model: {error.strerror or error}") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        good = False
    if not good:
        raise HylraError(f"{path}: not a cost model; measure one with --cost {path} --model MODEL")
    if model.identity != profile.identity or model.layer_count != sum(profile.eligible):
        raise HylraError(f"{path}: measured with another model than the profile's ({profile.model}); measure with --model MODEL")
    return model


# -- fit --------------------------------------------------------------------------------------------------------------


def fit(rows: Sequence[Sequence[float]], times_s: Sequence[float]) -> np.ndarray:
    """Coefficients of 0 or more with the least squared relative error; rows are what each coefficient is multiplied by."""
    from scipy.optimize import nnls

    matrix, times = np.array(rows, float), np.array(times_s, float)
    scale = np.maximum(np.abs(matrix).max(0), 1)  # columns from 1 to 1e5 would upset the stopping rule
    return nnls(matrix / scale / times[:, None], np.ones(len(times)))[0] / scale


def work_of(policy: Policy, eligible: Sequence[bool], depth: float) -> list[float]:
    """What t0, dense, select, sparse and reuse are multiplied by in a step"""
    sparse = policy.sparse_select_cells(depth)
    selects = policy.layer_mode.count(SELECT) - len(sparse)
    given = policy.reuse_cells(depth)
    dense = sum(eligible) - len(given) - len(sparse)  # as in Policy.reads_saved, a reuse layer that is its own source counts here
    gathered = sum(sparse) + sum(min(cells, depth) for cells in given)
    return [1, dense * depth, selects * depth, len(sparse) * depth, gathered]


def fit_model(points: list[tuple[str, Policy | None, int, float]], profile: Profile, note: str) -> CostModel:
    """points: (arm, its policy or None for stock, depth, seconds per step)"""
    layers = sum(profile.eligible)
    ours = [(work_of(policy, profile.eligible, depth), time_s) for _, policy, depth, time_s in points if policy is not None]
    coefficients = fit(*zip(*ours))
    stock = {}
    for arm in dict.fromkeys(arm for arm, policy, *_ in points if policy is None):
        mine = [([1, layers * depth], time_s) for name, _, depth, time_s in points if name == arm]
        stock[arm] = tuple(fit(*zip(*mine)).tolist())
    error = max(abs(np.dot(work, coefficients) / time_s - 1) for work, time_s in ours)
    return CostModel(profile.identity, layers, *coefficients.tolist(), stock, f"{note}; fit within {100 * error:.0f} %")


# -- measurement ------------------------------------------------------------------------------------------------------


def probes(profile: Profile) -> dict[str, Policy]:
    """Policies whose step times tell the coefficients apart: all full, one select layer, every other layer selects, densely or sparsely"""
    able = [layer for layer, can in enumerate(profile.eligible) if can]
    full = Policy((FULL,) * profile.layer_count, (-1,) * profile.layer_count, profile.head_kv_count, top_k=TOP_K, min_context=0)
    half = with_selects(full, able, able[::2])
    return {"full": full, "one select": with_selects(full, able, able[:1]), "half select": half,
            "half sparse": replace(half, sparse_select=[int(mode == SELECT) for mode in half.layer_mode])}


def with_selects(full: Policy, able: list[int], selects: list[int]) -> Policy:
    modes, sources = list(full.layer_mode), list(full.layer_source)
    for layer in able:
        modes[layer] = SELECT if layer in selects else REUSE
        sources[layer] = max(one for one in selects if one <= layer)
    return replace(full, layer_mode=modes, layer_source=sources)


def measure(model_path: str, profile: Profile, threads: int | None, report=lambda line: None) -> CostModel:
    """Some ten seconds for a small model: six arms at DEPTHS_TOKENS, on a cache that is mostly copies of a few hundred tokens;
    minutes where text must be read instead (recurrent layers).

    Raises ProfileError if the model is not the one of the profile.
    """
    profile.check_model(model_path)
    n_threads = threads or cpu_count()
    arms = [Arm(name, flash_attn, None) for name, flash_attn in STOCK.items()]
    arms += [Arm(name, True, policy) for name, policy in probes(profile).items()]
    deepest, points = max(DEPTHS_TOKENS), []
    with Model(model_path) as model, contextlib.ExitStack() as stack:
        tokens, _ = make_tokens(model, deepest)
        contexts = {on: stack.enter_context(Context(model, deepest + STEPS + 1, n_threads=n_threads, flash_attn=on, scratch=True))
                    for on in (True, False)}
        for context in contexts.values():
            engine.set_policy(context.ctx, None)
            fill(context, tokens, deepest, synthetic=True, rewinds=DEPTHS_TOKENS)
        for depth in sorted(DEPTHS_TOKENS, reverse=True):
            report(f"cost: timing {len(arms)} arms at {depth} tokens")
            points += [(arm.name, arm.policy, depth, seconds) for arm, seconds in timed(arms, contexts, tokens[:STEPS + 1], depth)]
    return fit_model(points, profile, f"{Path(model_path).name}, {cpu_info()}, {n_threads} threads")


def timed(arms: list[Arm], contexts: Dict[bool, Context], tokens: list[int], depth: int) -> list[tuple[Arm, float]]:
    """(arm, seconds per step): the arms take turns, and the fastest round counts, since other programs only slow a step down."""
    for context in contexts.values():
        context.rewind(depth)
    rounds = [[timed_ns(contexts[arm.flash_attn], arm.policy, tokens, depth) for arm in arms] for _ in range(ROUNDS)]
    return [(arm, min(times) / 1e9 / (len(tokens) - 1)) for arm, times in zip(arms, zip(*rounds))]
