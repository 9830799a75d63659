"""Fixtures: the real model that the demo uses too, taken from the cache or downloaded once, and the larger one that must be there already."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Before the first import of numpy: threads that spin beside those of llama.cpp make the references four times slower.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def smollm2():
    from hylra_gguf.demo import demo_model

    return demo_model()


@pytest.fixture(scope="session")
def needle_model() -> Path:
    """It answers questions at length and is too large to be committed."""
    from hylra_gguf.demo import cache_dir

    name = "SmolLM2-135M-Needle-32K.Q4_1.gguf"
    named = os.environ.get("HYLRA_NEEDLE_MODEL")
    path = Path(named or cache_dir() / name)
    if not path.exists():
        (pytest.fail if named else pytest.skip)(f"no {path}: put {name} there or name it in HYLRA_NEEDLE_MODEL; tools/needle_model/train.py is the recipe")
    return path
