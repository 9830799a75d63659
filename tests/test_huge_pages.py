"""A KV cache asks for huge pages exactly when its model file has a policy in force; see hylra-memory.h for why."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import Session, write_tiny_model

from hylra_gguf import engine
from hylra_gguf.gguf_header import write_policy
from hylra_gguf.policy import Policy

engine.activate()
N_CTX, LAYERS, ROW_BYTES = 16384, 4, 2 * 64 * 2  # F16, two KV heads of 64
CACHE_BYTES = 2 * LAYERS * N_CTX * ROW_BYTES
SYSTEM_HAS_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage").exists()


def advised_bytes() -> int:
    """Bytes of this process in mappings that asked for huge pages (flag hg of /proc/self/smaps)."""
    total = size = 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if line.startswith("Size:"):
            size = int(line.split()[1]) * 1024
        elif line.startswith("VmFlags:") and "hg" in line.split():
            total += size
    return total


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = write_tiny_model(tmp_path_factory.mktemp("huge") / "tiny.gguf", context=N_CTX)
    write_policy(path, Policy(layer_mode=(0, 1, 2, 2), layer_source=(-1, 1, 1, 1), head_kv_count=2, top_k=64, sink_tokens=4,
                              recent_tokens=16, min_context=256))
    return path


@pytest.mark.parametrize("environment, overrides, asks", [
    ("1", {}, True),
    ("0", {}, False),
    ("1", {"hylra.enabled": False}, False),
])
def test_cache_asks_for_huge_pages_only_with_a_policy(model, monkeypatch, environment, overrides, asks):
    monkeypatch.setenv("HYLRA", environment)
    before = advised_bytes()
    with Session(model, n_ctx=N_CTX, overrides=overrides):
        found = advised_bytes() - before
    assert (found >= CACHE_BYTES - 4096) == (asks and SYSTEM_HAS_HUGE_PAGES)
    assert found == 0 or asks
