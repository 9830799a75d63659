"""The flags of `plan`, as data where rules hang on them, and the kinds of values that flags take; a wrong value is one line."""

from __future__ import annotations

import argparse
import math
from typing import Any, Callable, Dict, Iterable

from .errors import HylraError, PolicyError

# what each way of choosing layers takes beyond the flags that all take; any other of these flags is refused beside it
STRATEGIES: Dict[str, tuple[str, ...]] = {
    "hylra": ("theta", "weights", "budgets"),
    "count": ("count", "weights"),
    "bottleneck": ("count", "weights"),
    "jump3": (),
    "every-n": ("n",),
    "tidal": ("layers",),
    "random": ("count", "seed"),
    "explicit": ("layers", "sources"),
    "kascade": ("anchors", "head_map"),
    "ucm": ("ucm",),
    "pattern": ("pattern",),
}
COMMON = ("top_k", "top_k_fraction", "lists", "sink", "recent", "min_context", "block_size", "similarity", "statistic",
          "max_sensitivity", "select", "for_context")
OWN = tuple(dict.fromkeys(flag for flags in STRATEGIES.values() for flag in flags))
PLAN_FLAGS = ("strategy", *OWN, *COMMON)
CHOOSING = ("target_speedup", "max_loss")
SWEEP_FLAGS = ("sweep", *CHOOSING, "n_depth", "cost", "model", "format")
REFINE_FLAGS = ("refine", "text", "ctx_size", "minutes")


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def check_strategy_flags(strategy: str, given: Iterable[str]) -> None:
    """given: names of flags with a value. Raises PolicyError for the first that the strategy does not use."""
    if strategy not in STRATEGIES:
        raise PolicyError(f"--strategy {strategy}: expected one of {' '.join(STRATEGIES)}")
    for name in given:
        if name in OWN and name not in STRATEGIES[strategy]:
            owners = " or ".join(owner for owner, flags in STRATEGIES.items() if name in flags)
            raise PolicyError(f"{flag(name)} has no effect on --strategy {strategy}; leave it out or take --strategy {owners}")


def add_plan_flags(parser: argparse.ArgumentParser) -> None:
    """No defaults here: what is not given is decided where the policy is planned."""
    layers, text = list_of(count(0)), {"metavar": "LIST"}
    group = parser.add_argument_group("choosing layers")
    group.add_argument("--strategy", choices=tuple(STRATEGIES), help=f"{' '.join(STRATEGIES)} (default hylra)")
    group.add_argument("--theta", type=number(0, 1, above=True), metavar="T", help="hylra: smallest similarity of a reuse layer")
    group.add_argument("--count", type=count(1), metavar="N", help="count, bottleneck, random: full and select layers together")
    group.add_argument("--weights", choices=("importance",), help="hylra, count, bottleneck: how lost similarity counts")
    group.add_argument("--n", type=count(1), metavar="N", help="every-n: select every N-th layer")
    group.add_argument("--layers", type=layers, **text, help="explicit, tidal: the select layers, such as 2,13")
    group.add_argument("--sources", type=list_of(count(-1)), **text,
                       help="explicit: each layer's source, its own number to select, -1 for full")
    group.add_argument("--seed", type=count(0), metavar="S", help="random: seed of the choice (default 0)")
    group.add_argument("--anchors", type=layers, **text, help="kascade: the anchor layers, such as 0,2,8,13,14")
    group.add_argument("--head-map", metavar="FILE", help="kascade: its .npy of [layers, KV heads]")
    group.add_argument("--ucm", metavar="FILE", help="ucm: JSON of a GSA on-device configuration")
    group.add_argument("--pattern", metavar="TEXT", help="pattern: a letter per layer, F full (selects), S shared (reuses)")
    add_policy_flags(parser.add_argument_group("policy"))


def add_policy_flags(group: Any) -> None:
    group.add_argument("--top-k", type=count(1), metavar="K", help="cells kept, sink and recent included")
    group.add_argument("--top-k-fraction", type=number(0, 1, above=True), metavar="X", help="keep this share of the cells, if more")
    group.add_argument("--budgets", choices=("auto",), help="hylra: smallest measured top_k per select layer that keeps theta")
    group.add_argument("--lists", choices=("layer", "head"), help="one list of cells per layer or per KV head")
    group.add_argument("--for-context", type=count(1), metavar="N",
                       help="tokens for which reuse must hold: similarity is taken at the share that top_k is of N (default: what the model was trained for)")
    group.add_argument("--sink", type=count(0), metavar="N", help="first tokens, always kept")
    group.add_argument("--recent", type=count(0), metavar="N", help="latest tokens, always kept")
    group.add_argument("--min-context", type=count(0), metavar="N", help="cached tokens below which the model runs as stock")
    group.add_argument("--block-size", type=count(1), metavar="N", help="1 for single cells, or 16 to 128")
    group.add_argument("--similarity", choices=("recall", "overlap"), help="what theta is compared with")
    group.add_argument("--statistic", choices=("mean", "low"), help="the similarity's mean over samples, or a low quantile")
    group.add_argument("--max-sensitivity", type=number(0, math.inf), metavar="X", help="layers above it never reuse, and attend densely when they select")
    group.add_argument("--select", choices=("sparse", "dense"),
                       help="what dense layers attend to: their own selection unless they are sensitive (default of hylra, count, bottleneck), or all cells")


def add_sweep_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("frontier")
    group.add_argument("--sweep", metavar="theta=A:B:STEP", help="print one row per theta instead of a policy")
    group.add_argument("--target-speedup", type=number(0, math.inf, above=True), metavar="X",
                       help="choose the row that loses least recall among those this much faster than stock at the deepest -d")
    group.add_argument("--max-loss", type=number(0, 1), metavar="Y",
                       help="choose the row with fewest dense layers among those with this mean lost recall or less")
    group.add_argument("-d", "--n-depth", type=list_of(count(1)), metavar="LIST",
                       help="cached tokens to predict tokens/s for, such as 4096,8192")
    group.add_argument("--cost", metavar="FILE", help="cost model of this machine: read, or written when --model is given too")
    group.add_argument("--model", metavar="MODEL", help="GGUF file to measure the cost model with, some ten seconds")
    group.add_argument("--format", choices=("md", "csv", "json"), help="of the rows (default md)")


def add_refine_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("refinement")
    group.add_argument("--refine", metavar="MODEL", help="change the plan while the KL divergence measured on this GGUF file falls")
    group.add_argument("--text", nargs="+", action="extend", metavar="TEXT", help="texts to measure on (default: text that ships with Python)")
    group.add_argument("-c", "--ctx-size", type=count(1), metavar="CTX", help="cached tokens to measure at (default: the profile's)")
    group.add_argument("--minutes", type=number(0, math.inf, above=True), metavar="M", help="time for the search (default 5)")
    group.add_argument("-t", "--threads", type=count(1), metavar="N", help="processor threads, here and for --model")


# ---- values of flags

def count(lowest: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            found = int(text)
        except ValueError:
            found = lowest - 1
        if not lowest <= found < 2**31:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {lowest} to {2**31 - 1}")
        return found

    return parse


def number(lowest: float, highest: float, above: bool = False) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            found = float(text)
        except ValueError:
            found = math.nan
        if not lowest <= found <= highest or math.isinf(found) or (above and found == lowest):
            limits = f"{'above' if above else 'from'} {lowest:g}" + (f" to {highest:g}" if highest < math.inf else "")
            raise argparse.ArgumentTypeError(f"{text!r} is no number {limits}")
        return found

    return parse


def one_of(names: tuple[str, ...]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(names)}")
        return text

    return parse


def list_of(item: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    return lambda text: [item(part) for part in text.split(",")]


def parse_sweep(text: str) -> list[float]:
    """"theta=0.5:0.95:0.05" -> [0.5, 0.55, ..., 0.95]"""
    name, _, span = text.partition("=")
    try:
        low, high, step = map(float, span.split(":"))
    except ValueError:
        low = high = step = math.nan
    if name != "theta" or not (0 < low <= high <= 1 and 0.001 <= step):
        raise HylraError(f"--sweep {text}: expected theta=LOW:HIGH:STEP with 0 < LOW <= HIGH <= 1 and a STEP of 0.001 or more, "
                         "for example theta=0.5:0.95:0.05")
    return [round(low + i * step, 6) for i in range(int((high - low) / step + 1e-9) + 1)]
