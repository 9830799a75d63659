"""The documents of `eval`: long text with planted facts in the model's chat format, and the text that goes on behind them.

Without texts of the user: help topics and source code that ship with Python, other parts of them than the profile calibrates on.
"""

from __future__ import annotations

import ctypes
import random
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterator

from . import eval_tasks, texts
from .eval_tasks import COMMON, COPY, FREQUENT, Question
from .session import Model

PROSE, CODE, NOISE, WORDS = "prose", "code", "noise", "words"
HAYSTACKS = (PROSE, CODE, NOISE)
NOISE_TEXT = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "  # as in RULER
MARK = "<<<document>>>"
PIECE_CHARS = 20_000  # tokenized at a time
CALIBRATION_CHARS = 60_000  # of the help topics, which the profile reads from the start
CHARS_PER_WORD = 3  # fewer than in any word list: the list is cut to the tokens that are wanted


@dataclass(frozen=True)
class Document:
    """tokens: chat head and text, what is prefilled; following: how the text goes on, empty where that says nothing"""

    haystack: str
    tokens: list[int]
    following: list[int]
    questions: list[Question]


@dataclass(frozen=True)
class Chat:
    """Tokens before a document, and around a question that follows it"""

    head: list[int]
    before: list[int]
    after: list[int]

    def ask(self, tokenize: Callable[[str], list[int]], question: str) -> list[int]:
        return self.before + tokenize(question) + self.after


def chat_of(model: Model) -> Chat:
    """The model's own chat template, if llama.cpp knows it; else plain text."""
    text = templated(model, MARK) or f"{MARK}\nAnswer:"
    head, after = text.split(MARK)
    gap = model.tokenize("\n", start=False)
    return Chat(model.tokenize(head, special=True), gap + gap, model.tokenize(after, start=False, special=True))


def templated(model: Model, content: str) -> str:
    """One message of the user and the start of the answer; empty without a template that llama.cpp knows."""
    api, template = model.api, model.api.llama_model_chat_template(model.handle, None)
    if not template:
        return ""
    message = api.llama_chat_message(b"user", content.encode())
    room = ctypes.create_string_buffer(4096)
    n = api.llama_chat_apply_template(template, ctypes.pointer(message), 1, True, room, len(room))
    return room.raw[:n].decode() if 0 < n <= len(room) else ""


# -- text -------------------------------------------------------------------------------------------------------------


class Hay:
    """Tokens of a text in order; after its end it starts again."""

    def __init__(self, text: str, tokenize: Callable[[str], list[int]]):
        self.text, self.tokenize, self.at, self.rest = text, tokenize, 0, []

    def take(self, count: int) -> list[int]:
        while len(self.rest) < count:
            self.rest += self.tokenize(self.text[self.at : self.at + PIECE_CHARS])
            self.at = (self.at + PIECE_CHARS) % max(PIECE_CHARS, len(self.text) // PIECE_CHARS * PIECE_CHARS)
        taken, self.rest = self.rest[:count], self.rest[count:]
        return taken


def haystacks(model: Model, names: list[str] | None, paths: list[str]) -> dict[str, Hay]:
    """names: those of HAYSTACKS that are wanted; without a wish all, or all but code where the user gives texts, which become the prose."""
    names = names or [name for name in HAYSTACKS if not (paths and name == CODE)]
    sources = {PROSE: lambda: "\n\n".join(texts.read_texts(paths)) if paths else texts.prose_text()[CALIBRATION_CHARS:],
               CODE: other_code, NOISE: lambda: NOISE_TEXT * 300}
    return {name: Hay(sources[name](), plain(model)) for name in names}


def other_code() -> str:
    """Standard-library modules that the profile does not read."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = [file for file in sorted(folder.glob("*.py")) if file.stem not in texts.MODULES]
    return "\n\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files)


def plain(model: Model) -> Callable[[str], list[int]]:
    return lambda text: model.tokenize(text, start=False)


# -- documents --------------------------------------------------------------------------------------------------------


def documents(model: Model, hays: dict[str, Hay], *, depth: int, count: int, questions: int, kinds: tuple[str, ...], following: int,
              seed: int) -> Iterator[Document]:
    """count documents of `depth` tokens with about questions/count each, the haystacks in turn; lists of words are documents of
    their own, with one question each."""
    chat, names = chat_of(model), list(hays)
    facts = [kind for kind in kinds if kind not in (COMMON, FREQUENT)]
    for i in range(count if facts else 0):
        rng = random.Random(f"{seed} {depth} {i}")
        own = questions * (i + 1) // count - questions * i // count
        yield with_facts(model, rng, chat, names[i % len(names)], hays, depth, own, kinds, following, turn=i)
    for kind in (kind for kind in (COMMON, FREQUENT) if kind in kinds):
        for i in range(count):
            yield of_words(model, random.Random(f"{seed} {depth} {kind} {i}"), chat, depth, kind)


def with_facts(model: Model, rng: random.Random, chat: Chat, name: str, hays: dict[str, Hay], depth: int, questions: int,
               kinds: tuple[str, ...], following: int, turn: int) -> Document:
    n_copies = 0 if COPY not in kinds or name == NOISE else questions if set(kinds) <= {COPY} else max(1, questions // 12)
    facts = eval_tasks.make_facts(rng, kinds, questions - n_copies, turn)
    n_tokens = depth - len(chat.head)
    tokens, rest, asked = eval_tasks.plant(rng, hays[name].take(n_tokens + following), facts, plain(model), n_tokens)
    asked += [eval_tasks.copy_question(rng, tokens, model.detokenize) for _ in range(n_copies)]
    return Document(name, chat.head + tokens, [] if name == NOISE else rest[:following], asked)


def of_words(model: Model, rng: random.Random, chat: Chat, depth: int, kind: str) -> Document:
    n_tokens = depth - len(chat.head)
    listed, question = eval_tasks.word_list(rng, n_tokens // CHARS_PER_WORD, kind)
    return Document(WORDS, chat.head + plain(model)(listed)[:n_tokens], [], [question])
