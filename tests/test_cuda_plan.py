"""What of the CUDA engine can be checked without a GPU: how work is cut and scratch laid out, and that every kernel compiles from sm_75 on."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "ggml_patch" / "src"

# Prints one line per shape: plan, layout, and whether every (row, cell) is covered once
PROGRAM = r"""
#include "hylra-cuda-plan.h"
#include <cstdio>
#include <initializer_list>
int main() {
    const int sizes[][2] = { { 64, 64 }, { 128, 128 }, { 192, 128 }, { 256, 256 }, { 576, 512 } };
    for (auto & size : sizes)
    for (int group : { 1, 4, 5, 8, 9, 16, 128 })
    for (int heads_kv : { 1, 8 })
    for (int tokens : { 1, 3, 64 })
    for (int streams : { 1, 8 })
    for (int n_kv : { 1, 256, 61440, 131072 })
    for (int listed = 0; listed < 2; ++listed)
    for (int scores_only = 0; scores_only < 2 - listed; ++scores_only) {
        hylra_attn a = {};
        a.n_embd_k = size[0], a.n_embd_v = size[1], a.n_head = group*heads_kv, a.n_head_kv = heads_kv;
        a.n_kv = n_kv, a.n_tokens = tokens, a.n_stream = streams;
        const int n = listed && n_kv > 2048 ? 2048 : n_kv;
        const hylra_cuda_plan p = hylra_cuda_plan_of(a, n, listed, scores_only);
        const hylra_cuda_layout l = hylra_cuda_layout_of(a, p, listed ? 0 : heads_kv);
        const long rows = long(a.n_head)*tokens*streams, groups = listed ? 0 : long(p.n_group)*heads_kv*streams;
        const bool columns = p.n_group*8 >= p.n_column && p.n_word*2 >= (p.n_group == 1 ? p.n_column : 8) && p.n_block_column*p.block_columns == p.n_group*8 && (p.n_block_column - 1)*p.block_columns < p.n_column;
        const bool cells   = p.n_chunk >= 1 && p.n_chunk <= HYLRA_CUDA_MAX_CHUNKS && long(p.n_chunk)*p.chunk_cells >= n && long(p.n_chunk - 1)*p.chunk_cells < n;
        const bool tiles   = p.chunk_cells % HYLRA_CUDA_STEP == 0 && p.mla == (size[0] > 256) && p.block_columns % (p.mla ? 32 : p.wide*8) == 0 && p.block_columns <= 64;
        const bool order   = l.norms >= size_t(scores_only ? 0 : rows*p.n_chunk*size[1]*4) && l.peaks - l.norms >= size_t(rows*p.n_chunk*8) &&
                             l.weights - l.peaks >= size_t(groups*((n_kv + 15)/16)*32) && l.bins - l.weights >= size_t(groups*n_kv*p.n_word*4) && l.size >= l.bins;
        const bool aligned = (l.norms | l.peaks | l.weights | l.bins) % 128 == 0;
        if (!(columns && cells && tiles && order && aligned)) {
            printf("size %d/%d group %d heads_kv %d tokens %d streams %d n_kv %d listed %d: columns %d cells %d tiles %d order %d aligned %d\n",
                   size[0], size[1], group, heads_kv, tokens, streams, n_kv, listed, columns, cells, tiles, order, aligned);
        }
    }
    return 0;
}
"""


# The rule of what gains on a GPU: sizes, KV heads, streams, cells, override in; least cells and whether skipping V pays out
RULE_PROGRAM = r"""
#include "hylra-cuda-host.h"
#include <cstdio>
#include <cstdlib>
int main(int, char ** argv) {
    hylra_attn a = {};
    a.n_embd_k = atoi(argv[1]), a.n_embd_v = atoi(argv[2]), a.n_head_kv = atoi(argv[3]), a.n_stream = atoi(argv[4]), a.n_kv = atoi(argv[5]);
    printf("%u %d", hylra_cuda_min_context(a, hylra_cuda_override()), hylra_cuda_skipping_pays(a, hylra_cuda_override()));
    return 0;
}
"""

# What the host asks ggml is answered here: sizes of Q8_0 (8) and F16 (1) rows
FITS_PROGRAM = r"""
#include "hylra-cuda-host.h"
#include <cstdio>
#include <cstdlib>
#include "ggml.h"
bool   ggml_is_quantized(ggml_type type) { return type == GGML_TYPE_Q8_0; }
size_t ggml_row_size(ggml_type type, int64_t n) { return type == GGML_TYPE_Q8_0 ? n/32*34 : 2*n; }
int main(int, char ** argv) {
    hylra_attn a = {};
    a.type_k = a.type_v = atoi(argv[1]), a.n_embd_k = a.n_embd_v = atoi(argv[2]);
    a.n_head = a.n_head_kv = 2, a.n_kv = 256, a.n_tokens = a.n_stream = 1;
    const uint64_t head = atoi(argv[3]), nb[4] = { 1, 2*head, head, 2*head*256 };
    for (int i = 0; i < 4; ++i) { a.k_nb[i] = a.v_nb[i] = nb[i]; }
    printf("%d", hylra_cuda_fits(a, 1));
    return 0;
}
"""


def compiled(tmp_path: Path, program: str, *options, arguments=(), env=None) -> str:
    source, binary = tmp_path / "program.cpp", tmp_path / "program"
    source.write_text(program)
    subprocess.run(["g++", "-std=c++17", "-Wall", "-Wextra", "-Wno-misleading-indentation", "-Werror", f"-I{SOURCES}", str(source), *options,
                    "-o", str(binary)], check=True)
    return subprocess.run([str(binary), *map(str, arguments)], check=True, capture_output=True, text=True, env=env).stdout


def ggml_headers() -> Path:
    found = next(ROOT.glob("build/*/llama.cpp/ggml/include"), None)
    assert found, "build the engine first: its sources include ggml.h"
    return found


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++")
def test_every_column_and_cell_has_its_place_in_every_shape(tmp_path):
    assert compiled(tmp_path, PROGRAM) == ""


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++")
@pytest.mark.parametrize("shape, n_kv, override, expected", [
    ((128, 128, 8, 1), 16384, None, "8192 1"),
    ((128, 128, 8, 1), 8192, None, "8192 0"),   # 8M values of V: a second attend costs more than it saves
    ((128, 128, 8, 4), 8192, None, "2048 1"),   # four streams share the cost of a launch
    ((64, 64, 2, 1), 65536, None, "65536 0"),
    ((576, 512, 1, 1), 65536, None, "7711 1"),  # MLA: 2^23 values
    ((128, 128, 8, 1), 256, "0", "0 1"),
    ((128, 128, 8, 1), 256, "300", "300 1"),
])
def test_from_which_length_on_a_layer_gains_on_a_gpu(tmp_path, shape, n_kv, override, expected):
    env = {} if override is None else {"HYLRA_DEVICE_MIN_CONTEXT": override}
    host = [str(SOURCES / "hylra-cuda-host.cpp"), f"-I{ggml_headers()}", "-ffunction-sections", "-Wl,--gc-sections"]  # without what asks ggml
    assert compiled(tmp_path, RULE_PROGRAM, *host, arguments=(*shape, n_kv), env=env) == expected


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++")
@pytest.mark.parametrize("kind, size, head_bytes, expected", [
    (8, 128, 136, "1"),
    (8, 128, 138, "0"),  # begins where the room of hylra-cuda-stage.cuh has no place for it
    (8, 64, 68, "1"),
    (8, 64, 70, "0"),
    (8, 96, 102, "1"),
    (8, 256, 272, "1"),
    (8, 256, 280, "0"),
    (1, 128, 256, "1"),
    (1, 128, 264, "0"),
])
def test_rows_that_begin_where_a_kernel_cannot_read_them_are_refused(tmp_path, kind, size, head_bytes, expected):
    host = [str(SOURCES / "hylra-cuda-host.cpp"), f"-I{ggml_headers()}", "-ffunction-sections", "-Wl,--gc-sections"]
    assert compiled(tmp_path, FITS_PROGRAM, *host, arguments=(kind, size, head_bytes)) == expected


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc")
@pytest.mark.parametrize("source", ["hylra-cuda.cu", "hylra-cuda-select.cu", "hylra-cuda-choose.cu", "hylra-cuda-cluster.cu", "hylra-cuda-f16.cu", "hylra-cuda-q8_0.cu"])
def test_kernels_compile_for_turing_and_hopper(tmp_path, source):
    """A type stands for all: the kernels of one template. Continuous integration has no nvcc and skips this."""
    for arch in ("sm_75", "sm_90"):
        subprocess.run(["nvcc", "-std=c++17", f"-arch={arch}", f"-I{SOURCES}", f"-I{ggml_headers()}", "-c", str(SOURCES / source), "-o", str(tmp_path / "k.o")],
                       check=True)


def test_collecting_the_gpu_tests_changes_nothing_for_the_others(monkeypatch):
    monkeypatch.delitem(sys.modules, "test_cuda", raising=False)
    importlib.import_module("hylra_gguf")  # points at its library by a variable, whoever imports it first
    before = dict(os.environ)
    importlib.import_module("test_cuda")
    assert dict(os.environ) == before
