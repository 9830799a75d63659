"""The errors that people see: each message is one line that says what was found, what was expected and what to do."""

from __future__ import annotations

import contextlib
import errno
from typing import Iterator


class HylraError(Exception):
    """The command line prints it as one line and exits with 2; a traceback appears only with -v.

    Messages quote files and flags of any content: what cannot be printed stands there escaped, so that a line stays one.
    """

    def __init__(self, message: object = ""):
        super().__init__("".join(char if char.isprintable() else ascii(char)[1:-1] for char in str(message)))


class PolicyError(HylraError):
    """A policy is malformed or does not fit the model."""


class ModelFileError(HylraError, ValueError):
    """A GGUF file cannot be read or written. A ValueError too, as llama_cpp.Llama raises for a file that it cannot load."""


class ProfileError(HylraError):
    """A profile is malformed, or a model cannot be profiled."""


class EngineError(HylraError):
    """The engine library is missing, does not match, or cannot run the model."""


@contextlib.contextmanager
def plain_os_errors(path: str) -> Iterator[None]:
    """What the system says about `path` becomes a ModelFileError; writers here leave nothing behind, so the hint may say so."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        hint = "; nothing was changed, free some space or write to another disk with -o" if full else ""
        raise ModelFileError(f"{path}: {error.strerror or error}{hint}") from error
