"""Keeps the progress of a profile in PROFILE.part, and inside a long text the KV cache in PROFILE.part.kv, until it is done.

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

KV_INTERVAL_S = 20.0  # what an interruption may cost
KV_SHARE = 0.05  # of the time at most goes into writing a cache, which may be gigabytes


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
        self.settings, self.kv_written_s, self.kv_pause_s = json.loads(json.dumps(settings)), time.monotonic(), KV_INTERVAL_S

    @property
    def kv_path(self) -> str:
        return f"{self.path}.kv"

    @property
    def kv_temporary(self) -> str:
        return f"{self.kv_path}.tmp"

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
        started_s = time.monotonic()
        if not self.path or started_s - self.kv_written_s < self.kv_pause_s:
            return
        if forward.save_cache(self.kv_temporary, place.tokens):
            os.replace(self.kv_temporary, self.kv_path)
            self.save(place, state)
        else:
            remove(self.kv_temporary)
        self.kv_written_s = time.monotonic()
        self.kv_pause_s = max(KV_INTERVAL_S, (self.kv_written_s - started_s) / KV_SHARE)

    def load_kv(self, forward, place: Place) -> Place:
        """The place to go on from: inside the text if the cache of exactly that place is there, else at its start."""
        if place.tokens and not forward.load_cache(self.kv_path, place.tokens):
            forward.clear()
            return Place(place.text, 0, place.forward_s, place.analysis_s)
        return place

    def remove(self) -> None:
        if self.path:
            for path in (self.path, self.kv_path, self.kv_temporary):
                remove(path)


def remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
