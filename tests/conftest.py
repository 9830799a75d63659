"""Fixtures: the real model that the demo uses too, taken from the cache or downloaded once."""

from __future__ import annotations

import os

import pytest

# Before the first import of numpy: threads that spin beside those of llama.cpp make the references four times slower.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def smollm2():
    from hylra_gguf.demo import demo_model

    return demo_model()
