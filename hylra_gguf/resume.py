"""Keeps the progress of a profile in PROFILE.part (numbers) and PROFILE.part.kv (the KV cache inside a long text) until it is done.

Refuses what was begun with other settings, and what is damaged.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import zipfile
from dataclasses import dataclass

import numpy as np

from .errors import ProfileError, plain_os_errors
from .files import replacing

KV_INTERVAL_S = 300.0  # a cache of gigabytes is not written more often


@dataclass
class Place:
    """Where a pass stands: texts done, tokens of the next one read, seconds spent so far."""

    text: int = 0
    tokens: int = 0
    forward_s: float = 0.0
    analysis_s: float = 0.0


class Partial:
    """Without an output path it keeps nothing."""

    def __init__(self, output: str | None, settings: dict) -> None:
        self.path = f"{output}.part" if output else None
        self.settings, self.kv_written_s = json.loads(json.dumps(settings)), time.monotonic()

    @property
    def kv_path(self) -> str:
        return f"{self.path}.kv"

    def load(self) -> tuple[Place, dict[str, np.ndarray]] | None:
        """None if there is nothing to go on from"""
        if not self.path or not os.path.exists(self.path):
            return None
        try:
            with np.load(self.path) as file:
                state = {name: file[name] for name in file.files}
            settings, place = json.loads(str(state.pop("settings"))), Place(**json.loads(str(state.pop("place"))))
        except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile, EOFError):
            raise ProfileError(f"{self.path}: the progress of an earlier run cannot be read; remove it and start again") from None
        odd = [name for name in self.settings if settings.get(name) != self.settings[name]]
        if odd:
            raise ProfileError(f"{self.path}: begun with another {' '.join(odd)}; run with the settings of that time, or remove it")
        return place, state

    def save(self, place: Place, state: dict[str, np.ndarray]) -> None:
        if not self.path:
            return
        with plain_os_errors(self.path), replacing(self.path) as fd, open(fd, "wb", closefd=False) as file:
            np.savez(file, settings=json.dumps(self.settings), place=json.dumps(vars(place)), **state)

    def save_kv(self, forward, place: Place, state: dict[str, np.ndarray]) -> None:
        """The cache of a text that is half read, if the last one is long ago; a full disk only costs this convenience."""
        if not self.path or time.monotonic() - self.kv_written_s < KV_INTERVAL_S:
            return
        temporary = f"{self.kv_path}.tmp"
        if forward.save_cache(temporary, place.tokens):
            os.replace(temporary, self.kv_path)
            self.save(place, state)
        else:
            remove(temporary)
        self.kv_written_s = time.monotonic()

    def load_kv(self, forward, place: Place) -> Place:
        """The place to go on from: inside the text if the cache of exactly that place is there, else at its start."""
        if place.tokens and not forward.load_cache(self.kv_path, place.tokens):
            forward.clear()
            return Place(place.text, 0, place.forward_s, place.analysis_s)
        return place

    def remove(self) -> None:
        if self.path:
            remove(self.path)
            remove(self.kv_path)


def remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
