"""Fixtures: the real model that the demo uses too, taken from the cache or downloaded once."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def smollm2():
    from hylra_gguf.demo import demo_model

    return demo_model()
