"""The kernel that chooses cells in a cluster of blocks (hylra-cuda-cluster.cu), its CUDA threads run as threads of this machine.

On a GPU check-cuda holds it against the serial code; here the rows are those that random attention hardly gives: equal scores, scores that share
their first digits, fewer visible cells than there is room.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from test_cuda_plan import SOURCES, ggml_headers

THREADS = Path(__file__).resolve().parent / "cuda_threads"
NO_THREADS = 3  # what cluster.cpp ends with
HIDDEN, FORCED = -1.0, 2.0  # hylra-attn.h

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="no g++")


def gpp(*arguments) -> None:
    includes = [f"-I{folder}" for folder in (THREADS, SOURCES, ggml_headers())]
    subprocess.run(["g++", "-std=c++17", "-O1", "-w", "-pthread", *includes, *map(str, arguments)], check=True)


@pytest.fixture(scope="module", params=[4, 8])
def cluster(request, tmp_path_factory):
    """The command that chooses: a program and one copy of the block's library for each block, since a block's shared memory is static in it"""
    folder = tmp_path_factory.mktemp("cluster")
    kernel = (SOURCES / "hylra-cuda-cluster.cu").read_text()
    dynamic = "extern __shared__ uint32_t chosen[];"
    assert dynamic in kernel
    (folder / "kernel.inc").write_text(kernel.replace(dynamic, "__shared__ uint32_t chosen[1 << 12];"))
    library = ("-shared", "-fPIC", "-fno-gnu-unique", "-Wl,-Bsymbolic", f"-DN_BLOCK={request.param}")
    gpp(*library, f'-DCLUSTER_SOURCE="{folder / "kernel.inc"}"', THREADS / "block.cpp", "-o", folder / "block0.so")
    for i in range(1, request.param):
        shutil.copy(folder / "block0.so", folder / f"block{i}.so")
    gpp(THREADS / "cluster.cpp", SOURCES / "hylra-radix.cpp", "-ldl", "-o", folder / "cluster")
    return [str(folder / "cluster"), *(str(folder / f"block{i}.so") for i in range(request.param))]


def rows():
    """name -> (top_k, scores [n_kv], which are shares of a row's attention)"""
    rng = np.random.default_rng(3)
    lognormal = np.exp(rng.normal(0, 1.5, 8192))
    lognormal /= lognormal.sum()
    some_hidden = np.where(rng.random(4096) < 0.7, HIDDEN, rng.random(4096) / 4096)
    some_forced = lognormal[:4096].copy()
    some_forced[[0, 1, 2, 3, 4000, 4095]] += FORCED
    few_values = rng.choice(np.linspace(0.5, 1.0, 7), 8192) / 8192
    same_digit = (1 + rng.random(8192) / 200) / 2**14  # within a step of the first digit, 1.1 % wide
    long = np.exp(rng.normal(0, 1.5, 73732))  # more than 32 cells for a thread of four blocks, a part of the last
    return {
        "random": (2048, lognormal), "some hidden": (1000, some_hidden), "all hidden": (64, np.full(1024, HIDDEN)),
        "forced": (100, some_forced), "equal": (1000, np.full(8192, 2.0**-13)), "zero": (500, np.zeros(4096)),
        "few values": (3000, few_values), "one first digit": (1234, same_digit), "room for all": (4096, lognormal[:4096]),
        "short": (5, np.array([0.1, 0.2, HIDDEN, 0.15, 0.2, 0.0, 0.15, 0.2])), "room for one": (1, lognormal[:512]), "two words of bits per thread": (2048, long / long.sum()),
    }


@pytest.mark.slow
def test_a_cluster_of_blocks_chooses_what_the_serial_code_chooses(cluster):
    lines = [f"{len(scores)} {top_k} " + " ".join(float(np.float32(x)).hex() for x in scores) for top_k, scores in rows().values()]
    done = subprocess.run(cluster, input="\n".join(lines) + "\n", capture_output=True, text=True, timeout=900)  # 30 s; a lost barrier would never end
    if done.returncode == NO_THREADS:
        pytest.skip("this machine does not give a process 2048 or 4096 threads")
    assert done.returncode == 0, done.stderr
    found = dict(zip(rows(), (line.split() for line in done.stdout.splitlines())))
    assert len(found) == len(rows())
    for name, (same, n, mass, expected, counted) in found.items():
        assert (same, counted) == ("same", "1"), name
        assert float(mass) == pytest.approx(float(expected), rel=1e-5, abs=1e-9), name
