"""The fuzz targets on every committed input, and for some seconds on random changes of them. The long campaigns are `tools/fuzz.py`."""

from __future__ import annotations

import json
import random
import subprocess
from pathlib import Path

import fuzz
import header_target
import pytest

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 5


def flags_here(folder: Path) -> tuple[str, ...]:
    """The sanitizers, where this machine's compiler has their runtime."""
    probe = subprocess.run(["g++", *fuzz.SANITIZERS, "-x", "c++", "-", "-o", str(folder / "probe")], input=b"int main() {}", capture_output=True)
    return fuzz.SANITIZERS if probe.returncode == 0 else ()


@pytest.fixture(scope="module")
def replay(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    fuzz.build_policy_target(folder / "replay", "g++", flags_here(folder), (ROOT / "tools/fuzz/replay.cpp",))
    return folder / "replay"


def run_replay(program, inputs, seconds=0, seed=0):
    """(executions, policies accepted from GGUF bytes, from keys and overrides, from the struct of the C interface)"""
    done = subprocess.run([str(program), str(seconds), str(seed), *map(str, inputs)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return tuple(map(int, done.stdout.split()))


def test_policy_reader_in_c(replay, tmp_path):
    inputs = fuzz.unpack("policy", tmp_path / "corpus")
    executions, *accepted = run_replay(replay, inputs)
    assert executions == len(inputs) >= 500 and min(accepted) >= 5, accepted
    assert run_replay(replay, inputs, SECONDS, random.randrange(2**31))[0] > 10000


def test_header_splice_and_readers_in_python(tmp_path):
    inputs = [path.read_bytes() for path in fuzz.unpack("header", tmp_path / "corpus")]
    for data in inputs:
        header_target.check(data)
    rng = random.Random()
    for _ in range(3000):
        header_target.check(changed(rng, bytearray(rng.choice(inputs))))


def changed(rng, data: bytearray) -> bytes:
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(data)) if data else 0
        span = rng.choice((b"", bytes([rng.randrange(256)]), b"\0" * 8, b"\xff" * 8, b"\x00\x00\x00\x80"))
        data[at:at + rng.choice((0, len(span), rng.randint(1, 9)))] = span
    return bytes(data)


@pytest.mark.parametrize("target, executions", [("policy", 10_000_000), ("header", 1_000_000)])
def test_the_committed_campaigns_were_long_and_clean(target, executions):
    result = json.loads((ROOT / f"docs/trust-fuzz-{target}.json").read_text())
    assert result["executions"] >= executions and result["crashes"] == 0
