"""Which query rows a profile samples: of each text and context length the later half, split into two halves that do not mix; every
second one where the text repeats what it said long before, if it does: such rows have to look something up.

Refuses contexts in which the largest top_k would leave too few cells out: every layer would then look perfect.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from .errors import ProfileError

TOP_K = (512, 1024, 2048)
REPEAT_TOKENS = 8  # as many equal tokens in a row count as a repeat; more than the fixed words of texts.entry have
MIN_DEPTH = 1.25  # a sample sees at least this many times top_k cells


@dataclass(frozen=True)
class Sample:
    text: int
    position: int
    heldout: bool


def first_depth(top_k: int) -> int:
    return math.ceil(MIN_DEPTH * top_k)


def choose_top_ks(n_ctx: int, asked: list[int] | None, forced: int) -> list[int]:
    """The budgets to measure; without a wish those of TOP_K that the shortest context can tell apart from dense."""
    top_k = sorted(set(asked)) if asked else [k for k in TOP_K if first_depth(k) < n_ctx]
    if not top_k:
        raise ProfileError(f"context {n_ctx} is too short for top_k {TOP_K[0]}: samples must see more than "
                           f"{first_depth(TOP_K[0])} tokens; raise -c or lower --top-k")
    if top_k[0] < max(forced, 1):
        raise ProfileError(f"top_k {top_k[0]} is below the {forced} sink and recent tokens; raise --top-k")
    if first_depth(top_k[-1]) >= n_ctx:
        raise ProfileError(f"context {n_ctx} is too short for top_k {top_k[-1]}: samples must see more than "
                           f"{first_depth(top_k[-1])} tokens; raise -c or lower --top-k")
    return top_k


def sample_positions(n_tokens: int, samples: int, top_k: int) -> list[int]:
    """Spread over the later half of a context, beyond the depth where top_k leaves cells out."""
    first = max(first_depth(top_k), n_tokens // 2)
    if samples > n_tokens - first:
        raise ProfileError(f"--samples {samples}: only {n_tokens - first} positions to sample; raise -c or lower --samples")
    return np.linspace(n_tokens - 1, first, samples).round().astype(int)[::-1].tolist()


def is_heldout(index: int, count: int, unit: int) -> bool:
    """Four blocks along a context in turn fit, held out, held out, fit, so that both halves are as deep on average; the next
    (text, context) has them swapped."""
    return ((index * 4 // count) in (1, 2)) ^ bool(unit % 2)


def plan_samples(n_texts: int, contexts: list[int], samples: int, top_k: int) -> list[Sample]:
    """In the order of texts and positions; earlier (text, context) pairs take what does not divide evenly."""
    if samples < 1:
        raise ProfileError(f"--samples {samples}: expected 1 or more")
    units = [(text, n_tokens) for text in range(n_texts) for n_tokens in contexts]
    if samples < len(units):
        raise ProfileError(f"--samples {samples}: expected at least one for each of {n_texts} texts at {len(contexts)} lengths; "
                           f"give --samples {len(units)} or more")
    found: dict[tuple[int, int], Sample] = {}
    for unit, (text, n_tokens) in enumerate(units):
        count = samples // len(units) + (unit < samples % len(units))
        for index, position in enumerate(sample_positions(n_tokens, count, top_k)):
            while (text, position) in found:  # a longer context may ask for the row of a shorter one
                position -= 1
            found[text, position] = Sample(text, position, is_heldout(index, count, unit))
    return [found[key] for key in sorted(found)]


# -- rows that look something up --------------------------------------------------------------------------------------


def repeats(tokens: list[int], min_distance: int) -> list[int]:
    """Positions whose last REPEAT_TOKENS tokens stand earlier too, at least min_distance before and with the same token behind them,
    while the last two alone have been followed by others: the row has to find that place to know how it goes on."""
    found, ends, followers = [], {}, {}
    for at in range(REPEAT_TOKENS - 1, len(tokens) - 1):
        before = ends.setdefault(tuple(tokens[at - REPEAT_TOKENS + 1 : at + 1]), at)
        follow = followers.setdefault((tokens[at - 1], tokens[at]), set())
        if at - before >= min_distance and tokens[before + 1] == tokens[at + 1] and len(follow) > 1:
            found.append(at)
        follow.add(tokens[at + 1])
    return found


def at_repeats(samples: list[Sample], token_lists: list[list[int]], min_distance: int) -> list[Sample]:
    """Every second sample of a text moves on to the next repeat before the sample after it, if there is one."""
    out = []
    for text, tokens in enumerate(token_lists):
        own, found = [sample for sample in samples if sample.text == text], repeats(tokens, min_distance)
        ends = [sample.position for sample in own[1:]] + [len(tokens)]
        for number, (sample, end) in enumerate(zip(own, ends)):
            next_repeat = next((at for at in found if sample.position <= at < end), sample.position)
            out.append(replace(sample, position=next_repeat) if number % 2 == 0 else sample)
    return out
