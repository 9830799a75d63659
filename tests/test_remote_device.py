"""Layers whose KV cache lies on a device without kernels of ours stay llama.cpp's, and the others are served.

The device is llama.cpp's RPC backend on this machine's CPU, linked with the objects of the build tree that `make test` leaves: it takes
whatever node it is given, so one of ours would be sent to it as a pointer.
"""

from __future__ import annotations

import json
import socket
import subprocess
import time
from pathlib import Path

import fuzz
import pytest
from support import policy, write_tiny_model

from hylra_gguf.gguf_header import write_policy

SOURCE = Path(__file__).resolve().with_name("remote_device.cpp")
DEVICE = "its KV cache lies on a device without HyLRA kernels"


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    tree, out = fuzz.build_tree(), tmp_path_factory.mktemp("remote") / "remote_device"
    llama = tree / "llama.cpp"
    objects = [path for path in tree.glob("CMakeFiles/hylra*.dir/ggml_patch/src/*.o")]
    includes = [f"-I{folder}" for folder in (fuzz.ROOT / "ggml_patch/src", llama / "include", llama / "ggml/include", llama / "ggml/src")]
    archives = [tree / f"llama.cpp-build/{name}.a" for name in ("src/libllama", "ggml/src/libggml", "ggml/src/libggml-cpu", "ggml/src/libggml-base")]
    command = ["g++", "-std=c++17", "-O1", *includes, SOURCE, *(llama / f"ggml/src/ggml-rpc/{name}.cpp" for name in ("ggml-rpc", "transport")), *objects,
               "-Wl,--start-group", *archives, "-Wl,--end-group", "-lpthread", "-ldl", "-o", out]
    subprocess.run(list(map(str, command)), check=True)
    return out


@pytest.fixture
def port(program):
    """Of a server that takes connections"""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number = free.getsockname()[1]
    server = subprocess.Popen([program, "serve", str(number)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(200):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", number)) == 0:
                break
        time.sleep(0.05)
    yield number
    server.kill()
    server.wait()


@pytest.mark.parametrize("gpu_layers, served", [(99, 0), (2, 3)], ids=["all layers there", "the last layer there"])
def test_layers_on_a_device_without_our_kernels_are_left_and_named(program, port, tmp_path, gpu_layers, served):
    model = write_tiny_model(tmp_path / "m.gguf")
    write_policy(model, policy("SRFR"))
    done = subprocess.run([program, "decode", str(port), model, str(gpu_layers)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout)
    assert result["complete"] and result["states"] == ["served"] * served + [DEVICE] * (4 - served)
    assert result["sparse_steps"] == (3 if served else 0) and result["on"] == (served > 0)
    assert result["equal"] == (served == 0) and result["reason"] == ("" if served else f"no layer can be served: {DEVICE}")
