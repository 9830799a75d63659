"""Fills the caches of a context to a depth: by reading text, or with shifted copies of a few hundred tokens, which takes seconds.

A decode step's time depends on how many cells there are and hardly on what they hold, but which cells a layer selects does: every
result names its fill. Copies need a cache whose positions can be shifted; where llama.cpp has none, or the model has recurrent layers,
text is read.
"""

from __future__ import annotations

import ctypes
import random
from typing import Iterable

from .errors import HylraError
from .session import ALL_SEQUENCES, Context, Model
from .texts import calibration_text

TEXT, RANDOM, SYNTHETIC = "text", "random", "synthetic"
SEED_TOKENS = 256  # tokens that are really read for a synthetic fill
CHARS_PER_TOKEN = 8  # more than any tokenizer makes of prose and code on average


def make_tokens(model: Model, count: int) -> tuple[list[int], str]:
    """(that many tokens, TEXT); a text that is too short repeats. A model without tokenizer gets (random tokens, RANDOM)."""
    if not model.has_tokenizer:
        rng = random.Random(0)
        return [rng.randrange(model.n_vocab) for _ in range(count)], RANDOM
    tokens = model.tokenize(calibration_text(count * CHARS_PER_TOKEN)[0])
    return (tokens * (count // len(tokens) + 1))[:count], TEXT


def fill(context: Context, tokens: list[int], depth: int, synthetic: bool, rewinds: Iterable[int] = ()) -> bool:
    """Puts `depth` tokens into every sequence, the same into each; returns whether they are copies.

    rewinds: smaller depths that the context will be rewound to.

    The policy of the context must be off. Raises HylraError for copies in a context without scratch sequence.
    """
    if synthetic and not context.scratch:
        raise HylraError(f"a synthetic fill is for one sequence, not {context.n_seq}; fill with text")
    made = synthetic and depth > SEED_TOKENS and fill_with_copies(context, tokens[:SEED_TOKENS], depth)
    if not made:
        read(context, tokens, sorted({*rewinds, depth}))
    for seq in range(1, context.n_seq):
        context.copy_first(seq)
    return made


def read(context: Context, tokens: list[int], depths: list[int]) -> None:
    for start, depth in zip([0, *depths], depths):
        context.prefill(tokens[start:depth], start)
        context.keep(depth)


def fill_with_copies(context: Context, seed: list[int], depth: int) -> bool:
    """False, with an empty cache, where llama.cpp cannot shift positions or restore a sequence."""
    api, memory, scratch = context.api, context.memory, context.n_seq
    if context.is_recurrent or not api.llama_memory_can_shift(memory):
        return False
    context.prefill(seed)
    state = sequence_state(context)
    for start in range(len(seed), depth, len(seed)):
        if not api.llama_state_seq_set_data(context.ctx, state, len(state), scratch):
            context.rewind(0, ALL_SEQUENCES)
            return False
        api.llama_memory_seq_add(memory, scratch, -1, -1, start)
        api.llama_memory_seq_cp(memory, scratch, 0, -1, -1)
        api.llama_memory_seq_rm(memory, scratch, -1, -1)
    context.rewind(depth)
    return True


def sequence_state(context: Context):
    """Bytes of sequence 0: cells, positions, K and V of all layers"""
    size_bytes = context.api.llama_state_seq_get_size(context.ctx, 0)
    state = (ctypes.c_uint8 * size_bytes)()
    context.api.llama_state_seq_get_data(context.ctx, state, size_bytes, 0)
    return state
