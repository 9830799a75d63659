"""Text to profile on: files of the user, or prose and code that ship with Python; refuses what is missing, empty or not UTF-8.

What ships with Python can have entries planted in it that are stated once and repeated later, so that some rows of a profile have to
look something up: a plan made on ordinary text alone kept 97 % of the attention mass and lost a third of all needles.
"""

from __future__ import annotations

import platform
import random
import sysconfig
from itertools import cycle, product
from pathlib import Path

from .errors import ProfileError

PROSE_CHARS = 6000  # one turn of prose, then one of code: a context of 4K tokens already sees both
CODE_CHARS = 3000
MODULES = ("argparse", "ast", "calendar", "configparser", "csv", "difflib", "fractions", "heapq", "inspect", "json/decoder",
           "random", "statistics", "tarfile", "textwrap", "threading", "tokenize", "zipfile")


def calibration_text(min_chars: int) -> tuple[str, str]:
    """At least min_chars characters (or all there is) and one line on what they are; the same in every run of one Python."""
    prose, code = pieces(prose_text(), PROSE_CHARS), pieces(code_text(), CODE_CHARS)
    parts: list[str] = []
    size_chars = 0
    for source in cycle((prose, code)):
        if size_chars >= min_chars or not (prose or code):
            break
        if source:
            parts.append(source.pop(0))
            size_chars += len(parts[-1])
    return "\n\n".join(parts), f"documentation and standard-library source of Python {platform.python_version()}"


ENTRY_CHARS = 500  # of text for each new entry
REPEATED_ENTRIES = 2  # beside each new one
ENTRY_REACH = 36  # entries further back than this, some 6000 tokens, are not repeated: a short context would not hold them
SYLLABLES = "ba de fi go ku la me ni po ru sa te vi zo".split()


def lookup_text(min_chars: int) -> tuple[str, str]:
    """calibration_text with entries: new ones, and earlier ones repeated word for word in another order."""
    text, name = calibration_text(min_chars)
    rng, entries, parts = random.Random(0), [], []
    keys = ["".join(key) for key in product(SYLLABLES, repeat=3)]
    rng.shuffle(keys)
    for key, piece in zip(cycle(keys), pieces(text, ENTRY_CHARS)):
        repeated = rng.sample(entries[-ENTRY_REACH:], min(REPEATED_ENTRIES, len(entries)))
        entries.append(entry(rng, key))
        parts += [piece, *repeated, entries[-1]]
    return "\n".join(parts), f"{name}, with entries to look up"


def entry(rng: random.Random, key: str) -> str:
    return f"The entry for {key} reads {rng.choice((rng.randint(1000, 99999), rng.choice(SYLLABLES) + rng.choice(SYLLABLES)))}."


def pieces(text: str, size_chars: int) -> list[str]:
    return [text[start:start + size_chars] for start in range(0, len(text), size_chars)]


def prose_text() -> str:
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def code_text() -> str:
    """Python source; empty where the standard library is not on disk as text."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = [folder / f"{module}.py" for module in MODULES]
    return "\n\n".join(file.read_text(encoding="utf-8") for file in files if file.is_file())


def read_texts(paths: list[str]) -> list[str]:
    return [read_text(path) for path in paths]


def read_text(path: str) -> str:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ProfileError(f"{path}: byte {error.start} is not UTF-8; convert the text to UTF-8") from None
    except OSError as error:
        raise ProfileError(f"{path}: cannot read the text: {error.strerror or error}") from None
    if not text.strip():
        raise ProfileError(f"{path}: the text is empty; name a text longer than the context to profile")
    return text
