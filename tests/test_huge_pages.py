"""A KV cache asks for huge pages exactly when its model file has a policy in force; see hylra-memory.h for why."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import write_tiny_model

from hylra_gguf.gguf_header import write_policy
from hylra_gguf.policy import Policy

N_CTX, LAYERS, ROW_BYTES = 16384, 4, 2 * 64 * 2  # F16, two KV heads of 64
CACHE_BYTES = 2 * LAYERS * N_CTX * ROW_BYTES
SYSTEM_HAS_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage").exists()


# In a process of its own: malloc hands memory that an earlier cache had advised to whatever comes next, so that the sum of a process that has
# held other models changes by itself. Prints the bytes in mappings that asked for huge pages (flag hg of /proc/self/smaps).
SCRIPT = """
import sys
from pathlib import Path
from hylra_gguf import engine
engine.activate()
from support import Session

def advised_bytes():
    total = size = 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if line.startswith("Size:"):
            size = int(line.split()[1]) * 1024
        elif line.startswith("VmFlags:") and "hg" in line.split():
            total += size
    return total

with Session(sys.argv[1], n_ctx=int(sys.argv[2]), overrides=eval(sys.argv[3])):
    print(advised_bytes())
"""


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
def test_cache_asks_for_huge_pages_only_with_a_policy(model, environment, overrides, asks):
    env = {**os.environ, "HYLRA": environment, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    run = subprocess.run([sys.executable, "-c", SCRIPT, str(model), str(N_CTX), repr(overrides)], env=env, check=True, capture_output=True, text=True)
    found = int(run.stdout)
    assert (found >= CACHE_BYTES - 4096) == (asks and SYSTEM_HAS_HUGE_PAGES)
    assert found == 0 or asks
