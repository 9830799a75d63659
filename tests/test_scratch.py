"""What a policy adds to llama.cpp's compute buffers, in the shape that the limit speaks of: 32 heads, 8 KV heads, 131072 cells."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import write_tiny_model

from hylra_gguf.gguf_header import write_policy
from hylra_gguf.policy import Policy

N_CTX, LIMIT_MIB = 131072, 64.0

# The sizes are told by the log alone, while a context is made. Batches of one token: a batch of more needs as much for each, and a
# prefill would hide it. Q4_0 keeps the cache itself small.
SCRIPT = """
import sys
from hylra_gguf import engine
engine.activate()
import llama_cpp as api
lines = []
log = api.llama_log_callback(lambda level, text, data: lines.append(text.decode()))
api.llama_log_set(log, None)
model = api.llama_model_load_from_file(sys.argv[1].encode(), api.llama_model_default_params())
c = api.llama_context_default_params()
c.n_ctx, c.n_batch, c.n_ubatch, c.flash_attn_type, c.type_k, c.type_v = int(sys.argv[2]), 1, 1, 1, 2, 2
assert api.llama_init_from_model(model, c)
print("".join(lines))
"""


def compute_buffer_mib(path: Path, **environment: str) -> float:
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(path), str(N_CTX)], env={**os.environ, **environment},
                          stdout=subprocess.PIPE, text=True, check=True)
    sizes = re.findall(r"compute buffer size = +([\d.]+) MiB", done.stdout)
    assert sizes, done.stdout
    return sum(map(float, sizes))


@pytest.mark.parametrize("lists", [1, 8])
def test_scratch_of_one_sequence_stays_below_the_limit(tmp_path, lists):
    path = write_tiny_model(tmp_path / "tiny.gguf", n_layer=2, n_head=32, n_head_kv=8, n_embd_head=128, context=N_CTX)
    write_policy(path, Policy(layer_mode=(1, 2), layer_source=(0, 0), head_kv_count=8, lists=lists, top_k=1024, sink_tokens=4,
                              recent_tokens=16, min_context=256))
    added_mib = compute_buffer_mib(path) - compute_buffer_mib(path, HYLRA="0")
    assert 0 < added_mib <= LIMIT_MIB
