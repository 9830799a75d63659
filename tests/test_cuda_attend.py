"""The CUDA kernels of attention and pooling on F16 and Q8_0 rows, their threads run as threads of this machine, beside double precision.

On a GPU check-cuda runs many more shapes; here a kernel of a cluster of blocks is seen to end and to be right before one is at hand.
"""

from __future__ import annotations

import shutil
import subprocess

import pytest
from test_cuda_cluster import NO_THREADS, THREADS
from test_cuda_plan import SOURCES, ggml_headers

BLOCKS = 16
ERRORS = ("select", "its scores", "scores without V", "reuse in two launches", "reuse in one launch")
TOLERANCE = 1e-3  # halves for queries and weights

# head size, query heads, KV heads, cells, tokens, streams, listed cells, lists, sinks, share of visible cells
CASES = {
    "group of one": (128, 2, 2, 64, 1, 1, 30, 2, 0, 0.8),
    "group of five": (128, 10, 2, 256, 1, 1, 100, 2, 0, 0.8),
    "group of eight, one list": (128, 16, 2, 320, 1, 1, 200, 1, 0, 0.9),
    "two groups of columns, sinks": (128, 18, 2, 192, 1, 1, 100, 2, 1, 0.8),
    "two blocks of columns": (128, 20, 1, 64, 1, 1, 40, 1, 0, 1.0),
    "tokens and streams": (128, 10, 2, 128, 2, 2, 60, 2, 1, 0.7),
    "head size 80": (80, 8, 2, 100, 1, 1, 40, 2, 0, 0.8),
    "all hidden": (128, 4, 1, 64, 1, 1, 20, 1, 0, 0.0),
    "all hidden, sinks": (128, 4, 1, 64, 1, 1, 20, 1, 1, 0.0),
    "few visible": (128, 4, 1, 256, 1, 1, 20, 1, 0, 0.03),
    "several tiles per warp": (128, 4, 1, 2048, 1, 1, 1200, 1, 0, 1.0),
}

# the same on Q8_0 rows, which pass through shared memory
Q8_0_CASES = {
    "quantised, group of five": ("q8_0", 128, 10, 2, 320, 1, 1, 130, 2, 0, 0.8),
    "quantised, two groups of columns, sinks": ("q8_0", 128, 18, 3, 192, 1, 1, 100, 3, 1, 0.5),
    "quantised, rows aligned to two bytes": ("q8_0", 96, 5, 1, 256, 2, 1, 60, 1, 0, 0.7),
}

# the same after a kernel of hylra-cuda-mla.cuh; it has no reuse in one launch
MLA_CASES = {
    "one block of 32 columns": ("mla32", 576, 32, 1, 260, 1, 1, 100, 1, 0, 0.8),
    "padded columns, sinks": ("mla32", 576, 20, 1, 192, 1, 1, 150, 1, 1, 0.8),
    "several tokens and streams": ("mla32", 576, 12, 1, 132, 2, 2, 70, 1, 0, 0.5),
    "V apart from K": ("apart", 576, 16, 1, 200, 1, 1, 80, 1, 0, 0.8),
    "two blocks of 64 columns, one stage": ("mla64", 576, 128, 1, 196, 1, 2, 130, 1, 0, 0.9),
    "16 columns of small cards": ("mla16", 576, 20, 1, 196, 1, 1, 100, 1, 0, 0.8),
    "tiles without a visible cell": ("mla32", 576, 8, 1, 640, 1, 1, 20, 1, 0, 0.01),
    "all hidden, MLA": ("mla32", 576, 4, 1, 64, 1, 1, 20, 1, 0, 0.0),
}

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not shutil.which("g++"), reason="no g++")]


@pytest.fixture(scope="module")
def attend(tmp_path_factory):
    """The command: a program and one copy of the block's library for each block of a cluster"""
    folder = tmp_path_factory.mktemp("attend")
    for source in [*SOURCES.glob("hylra*.h"), *SOURCES.glob("hylra-cuda*.cuh"), SOURCES / "hylra-cuda-select.cu", THREADS / "hylra-cuda-mma.cuh"]:
        shutil.copy(source, folder)  # the last takes the place of the instructions that this machine does not have
    compiler = ["g++", "-std=c++17", "-O2", "-fno-strict-aliasing", "-w", "-pthread", *(f"-I{path}" for path in (folder, THREADS, ggml_headers()))]
    library = ["-shared", "-fPIC", "-fno-gnu-unique", "-Wl,-Bsymbolic"]
    subprocess.run([*compiler, *library, THREADS / "attend_block.cpp", "-o", folder / "block0.so"], check=True)
    for i in range(1, BLOCKS):
        shutil.copy(folder / "block0.so", folder / f"block{i}.so")
    subprocess.run([*compiler, THREADS / "attend.cpp", "-ldl", "-o", folder / "attend"], check=True)
    return [str(folder / "attend"), *(str(folder / f"block{i}.so") for i in range(BLOCKS))]


def errors_of(attend, case):
    """name -> the largest error, relative to the largest value"""
    done = subprocess.run(attend, input=" ".join(map(str, case)), capture_output=True, text=True, timeout=300)  # 1 to 20 s; a lost barrier never ends
    if done.returncode == NO_THREADS:
        pytest.skip("this machine does not give a process the threads of a cluster (2048) or of a block (128 to 512)")
    assert done.returncode == 0, done.stderr
    return dict(zip(ERRORS, map(float, done.stdout.split()[1:])))


@pytest.mark.parametrize("name", [*CASES, *Q8_0_CASES, *MLA_CASES])
def test_kernels_attend_as_defined(attend, name):
    errors = errors_of(attend, ("plain", *CASES[name]) if name in CASES else {**Q8_0_CASES, **MLA_CASES}[name])
    assert len(errors) == (4 if name in MLA_CASES else 5) and all(error < TOLERANCE for error in errors.values()), errors


def test_weights_that_are_no_numbers_count_as_nothing(attend):
    """What comes out is NaN, but the lists are to stay lists: kernels that choose compare the bits of scores, so that a NaN would stand above all."""
    errors = errors_of(attend, ("nan", 128, 10, 2, 256, 1, 1, 100, 2, 0, 0.8))
    assert errors["its scores"] == errors["scores without V"] == 0, errors
