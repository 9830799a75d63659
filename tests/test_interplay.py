"""Beside others: llama-cpp-python's own tests and server, another ggml and stock llama.cpp in the process, fork, threads, callbacks, exit.

What could take the process down runs in one of its own; its script prints what the test then checks.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from stand_ins import STAND_INS, sdist, unpack, write_stand_in
from support import policy, write_tiny_model

from hylra_gguf.gguf_header import write_policy

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def upstream(tmp_path_factory):
    """(folder of llama-cpp-python's tests, folder of the stand-ins)"""
    folder = tmp_path_factory.mktemp("upstream")
    root = unpack(sdist(), folder)
    for name in STAND_INS:
        write_stand_in(folder / f"{name}.gguf", name, root / "vendor/llama.cpp/models")
    write_policy(folder / "transformer.gguf", policy("FSRR"), folder / "hylra.gguf")
    return root, folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    write_policy(write_tiny_model(folder / "dense.gguf"), policy("FSRR"), folder / "tiny.gguf")
    return folder / "tiny.gguf"


def environment(**more) -> dict[str, str]:
    path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, **{key: str(value) for key, value in more.items()}}


def run(script: str, *args, **more) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", script, *map(str, args)], env=environment(**more), capture_output=True, text=True, timeout=500)


def printed(script: str, *args, **more) -> dict:
    """What a script prints as its last line; it must end well and say nothing on stderr."""
    done = run(script, *args, **more)
    assert (done.returncode, done.stderr) == (0, ""), (done.returncode, done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


# ---- llama-cpp-python

UPSTREAM_TESTS = 26


def test_the_tests_of_llama_cpp_python_pass_on_our_library(upstream):
    """All of them; none is left out. Models that they would download are stand_ins.py's."""
    root, models = upstream
    command = [sys.executable, "-m", "pytest", "-q", "-p", "upstream_plugin", "-p", "no:cacheprovider", "--rootdir", ".", "tests"]
    done = subprocess.run(command, cwd=root, env=environment(STAND_INS=models), capture_output=True, text=True)
    assert re.search(rf"^{UPSTREAM_TESTS} passed(, \d+ warnings?)? in", done.stdout, re.MULTILINE), done.stdout[-3000:]


SERVER = """
import json, socket, sys, threading, time, urllib.request
import hylra_gguf
import uvicorn
from llama_cpp.server import app
from llama_cpp.server.settings import ModelSettings, ServerSettings
from hylra_gguf import engine

listener = socket.socket()
listener.bind(("127.0.0.1", 0))
model = ModelSettings(model=sys.argv[1], n_ctx=1024, n_threads=1, n_threads_batch=1, flash_attn=True, chat_format="chatml", verbose=False)
application = app.create_app(server_settings=ServerSettings(), model_settings=[model])
server = uvicorn.Server(uvicorn.Config(application, log_level="error"))
thread = threading.Thread(target=server.run, args=([listener],))
thread.start()
while not server.started:
    time.sleep(0.05)
body = {"messages": [{"role": "user", "content": "word " * 600}], "max_tokens": 8, "temperature": 0}
request = urllib.request.Request(f"http://127.0.0.1:{listener.getsockname()[1]}/v1/chat/completions", json.dumps(body).encode(),
                                 {"Content-Type": "application/json"})
with urllib.request.urlopen(request) as answer:
    reply, code = json.load(answer), answer.status
engine.activate()
status = engine.status(app._llama_proxy().ctx if hasattr(app._llama_proxy(), "ctx") else app._llama_proxy()._ctx.ctx)
server.should_exit = True
thread.join()
print(json.dumps({"code": code, "reply": reply, "on": status["on"], "sparse_steps": status["sparse_steps"]}))
"""


def test_the_server_answers_a_chat_request_with_hylra_on(upstream):
    _, models = upstream
    result = printed(SERVER, models / "hylra.gguf")
    choice, usage = result["reply"]["choices"][0], result["reply"]["usage"]
    assert result["code"] == 200 and choice["message"]["role"] == "assistant" and choice["message"]["content"]
    assert usage["prompt_tokens"] > 512 and usage["completion_tokens"] == 8
    assert result["on"] and result["sparse_steps"] >= 7


# ---- others in the process

STOCK_BESIDE = """
import ctypes, json, os, sys
import numpy as np
import support
from support import Session, random_tokens

kept = []  # a log callback of each of the two libraries

def decode(session, n):
    return session.steps(random_tokens(n, 9), 700)

def open_on(api):
    sys.modules["llama_cpp"] = api
    kept.append(support._log_callbacks)
    support._log_callbacks = []
    session = Session(sys.argv[1])
    session.prefill(random_tokens(700))
    return session

# the binding of stock llama.cpp, loaded twice over: by name for all to see, and as a module
os.environ["LLAMA_CPP_LIB_PATH"] = os.environ["HYLRA_STOCK_LIB"]
ctypes.CDLL(os.path.join(os.environ["HYLRA_STOCK_LIB"], "libllama.so"), mode=ctypes.RTLD_GLOBAL)
import llama_cpp as stock
assert not hasattr(stock.llama_cpp._lib, "hylra_version")
for name in [name for name in sys.modules if name.startswith("llama_cpp")]:
    del sys.modules[name]
del os.environ["LLAMA_CPP_LIB_PATH"]
from hylra_gguf import engine
ours = engine.activate()

a, b = open_on(stock), open_on(ours)
engine.set_policy(b.ctx, None)
dense = decode(b, 6)
b.rewind(700)
engine.use_model_policy(b.ctx)
sparse = decode(b, 6)
b.rewind(700)
# now in turns, one step each
rows = []
for i, token in enumerate(random_tokens(6, 9)):
    rows.append((a.decode([(token, 700 + i, 0)]), b.decode([(token, 700 + i, 0)])))
print(json.dumps({"stock_is_our_dense": bool((np.concatenate([row for row, _ in rows]) == dense).all()),
                  "ours_is_undisturbed": bool((np.concatenate([row for _, row in rows]) == sparse).all()),
                  "sparse_differs": bool((sparse != dense).any()), "sparse_steps": engine.status(b.ctx)["sparse_steps"]}))
"""


def test_stock_llama_cpp_in_the_same_process(tiny):
    """Loaded first and with RTLD_GLOBAL, which offers its llama_* and ggml_* to every later library."""
    result = printed(STOCK_BESIDE, tiny)
    assert result == {"stock_is_our_dense": True, "ours_is_undisturbed": True, "sparse_differs": True, "sparse_steps": 12}


GGML_BESIDE = """
import ctypes, glob, importlib.metadata, json, os, sys
import numpy as np
from support import Session, random_tokens

class Params(ctypes.Structure):
    _fields_ = [("bytes", ctypes.c_size_t), ("buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]

def other_ggml():
    # ones [64, 8] times ones [64, 8] on the ggml that pywhispercpp brings
    import _pywhispercpp
    assert "WHISPER" in str(_pywhispercpp.whisper_print_system_info())
    folder = os.path.join(os.path.dirname(_pywhispercpp.__file__), "pywhispercpp.libs")
    base, cpu = (ctypes.CDLL(glob.glob(os.path.join(folder, f"libggml-{part}-*.so*"))[0], mode=ctypes.RTLD_GLOBAL) for part in ("base", "cpu"))
    for name in ("ggml_init", "ggml_new_tensor_2d", "ggml_mul_mat", "ggml_new_graph", "ggml_get_data_f32"):
        getattr(base, name).restype = ctypes.c_void_p
    p, i64 = ctypes.c_void_p, ctypes.c_int64
    ctx = p(base.ggml_init(Params(1 << 24, None, False)))
    a, b = (p(base.ggml_new_tensor_2d(ctx, 0, i64(64), i64(8))) for _ in range(2))
    ones = np.ones(512, np.float32)
    for tensor in (a, b):
        ctypes.memmove(base.ggml_get_data_f32(tensor), ones.ctypes.data, ones.nbytes)
    c, graph = p(base.ggml_mul_mat(ctx, a, b)), p(base.ggml_new_graph(ctx))
    base.ggml_build_forward_expand(graph, c)
    assert cpu.ggml_graph_compute_with_ctx(ctx, graph, 2) == 0
    return np.ctypeslib.as_array((ctypes.c_float * 64).from_address(base.ggml_get_data_f32(c))).tolist()

def ours():
    from hylra_gguf import engine
    engine.activate()
    with Session(sys.argv[1]) as s:
        s.prefill(random_tokens(700))
        rows = s.steps(random_tokens(6, 9), 700)
        return rows.tolist(), engine.status(s.ctx)["sparse_steps"]

if sys.argv[2] == "alone":
    print(json.dumps(ours()))
else:
    first = other_ggml() if sys.argv[2] == "first" else None
    mine = ours()
    assert other_ggml() == [64.0] * 64 and first in (None, [64.0] * 64)
    assert ours() == mine
    print(json.dumps(mine))
"""


@pytest.mark.parametrize("order", ["first", "second"])
def test_another_ggml_in_the_same_process(order, tiny):
    """pywhispercpp brings one of another version; both compute, neither disturbs the other, whichever came first."""
    alone, together = printed(GGML_BESIDE, tiny, "alone"), printed(GGML_BESIDE, tiny, order)
    assert together == alone and alone[1] == 6


FORK = """
import json, os, pickle, sys
import numpy as np
from hylra_gguf import engine
engine.activate()
from support import Session, random_tokens

def steps(session):
    rows = session.steps(random_tokens(6, 9), 700)
    session.rewind(700)
    return rows

def in_child(work):
    reader, writer = os.pipe()
    if os.fork() == 0:
        with open(writer, "wb") as file:
            file.write(pickle.dumps(work()))
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as file:
        data = file.read()
    os.wait()
    return pickle.loads(data)

def fresh():
    with Session(sys.argv[1], n_threads=2) as s:
        s.prefill(random_tokens(700))
        return steps(s), engine.status(s.ctx)["sparse_steps"]

with Session(sys.argv[1], n_threads=2) as s:
    s.prefill(random_tokens(700))
    before = steps(s)
    inherited, sparse = in_child(lambda: (steps(s), engine.status(s.ctx)["sparse_steps"]))
    new, new_sparse = in_child(fresh)
    after = steps(s)
print(json.dumps({"inherited": bool((inherited == before).all()), "new": bool((new == before).all()), "after": bool((after == before).all()),
                  "sparse": [sparse, new_sparse]}))
"""


def test_fork(tiny):
    """A child goes on with the context it inherits or opens one of its own; the parent does not notice."""
    assert printed(FORK, tiny) == {"inherited": True, "new": True, "after": True, "sparse": [12, 6]}


THREADS = """
import json, sys, threading
import numpy as np
from hylra_gguf import engine
engine.activate()
from support import Session, policy, random_tokens

POLICIES = [policy("FSRR", top_k=64), policy("SSRS", top_k=200, lists=2), policy("FFFF"), None]

def work(i, out):
    with Session(sys.argv[1]) as s:
        engine.set_policy(s.ctx, POLICIES[i])
        s.prefill(random_tokens(500 + 40 * i, i))
        out[i] = s.steps(random_tokens(40, 9 + i), 500 + 40 * i)
        out[i, "steps"] = engine.status(s.ctx)["sparse_steps"]

alone, together = {}, {}
for i in range(4):
    work(i, alone)
threads = [threading.Thread(target=work, args=(i, together)) for i in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(json.dumps({"equal": [bool((alone[i] == together[i]).all()) for i in range(4)], "sparse": [together[i, "steps"] for i in range(4)]}))
"""


def test_threads_that_decode_in_contexts_of_their_own(tiny):
    assert printed(THREADS, tiny) == {"equal": [True] * 4, "sparse": [40, 40, 40, 0]}


# ---- exceptions and the end

CALLBACKS = """
import json, sys
from hylra_gguf import Llama
from llama_cpp import LogitsProcessorList, StoppingCriteriaList

llama = Llama(sys.argv[1], n_ctx=1024, n_threads=1, n_threads_batch=1, verbose=False)
prompt = "word " * 600
text = lambda **kw: llama(prompt, max_tokens=6, temperature=0, **kw)["choices"][0]["text"]
class Odd(Exception): pass
def fail(*args): raise Odd("from the callback")
want, caught = text(), False
try:
    text(stopping_criteria=StoppingCriteriaList([fail]))
except Odd:
    caught = True
assert text() == want
text(logits_processor=LogitsProcessorList([fail]))
assert text() == want
stream = llama(prompt, max_tokens=6, temperature=0, stream=True)
next(stream)
stream.close()
assert text() == want
print(json.dumps({"caught": caught, "sparse_steps": llama.hylra["sparse_steps"] > 20}))
"""


def test_exceptions_in_callbacks_leave_a_model_that_works(upstream):
    """llama-cpp-python lets one of a stopping criterion through; one of a logits processor ctypes prints, and goes on without it."""
    done = run(CALLBACKS, upstream[1] / "hylra.gguf")
    assert done.returncode == 0 and json.loads(done.stdout) == {"caught": True, "sparse_steps": True}, done.stderr[-2000:]
    assert done.stderr.count("Odd: from the callback") == 6  # one for each token


EVAL_CALLBACK = """
import json, sys
from hylra_gguf import engine
engine.activate()
from support import Session, random_tokens

active = False
def on_node(node, ask, data):
    if active: raise RuntimeError("from the callback")
    return False
with Session(sys.argv[1], eval_callback=on_node) as s:
    s.prefill(random_tokens(700))
    want = s.steps(random_tokens(3, 9), 700)
    s.rewind(700)
    active = True
    try: s.decode([(1, 700, 0)])
    except AssertionError as error: print(error)
    active = False
    s.rewind(700)
    print(json.dumps({"equal": bool((s.steps(random_tokens(3, 9), 700) == want).all())}))
"""


def test_an_exception_in_a_graph_callback_does_not_crash(tiny):
    """ctypes prints it and goes on with false."""
    done = run(EVAL_CALLBACK, tiny)
    assert done.returncode == 0 and json.loads(done.stdout.splitlines()[-1]) == {"equal": True}, done.stderr[-2000:]
    assert "from the callback" in done.stderr


OPEN = """
import sys
from hylra_gguf import Llama
llama = Llama(sys.argv[1], n_ctx=1024, n_threads=2, n_threads_batch=2, verbose=False)
prompt = "word " * 600
"""
ENDS = {
    "a model left open": OPEN + "llama(prompt, max_tokens=3)",
    "half a stream": OPEN + "stream = llama(prompt, max_tokens=9, stream=True); next(stream)",
    "a cycle": OPEN + "llama(prompt, max_tokens=3); me = [llama]; me.append(me); llama.me = me",
    "closed twice": OPEN + "llama(prompt, max_tokens=3); llama.close(); llama.close()",
    "sys.exit in a callback": OPEN + "from llama_cpp import StoppingCriteriaList as L\nllama(prompt, max_tokens=3, stopping_criteria=L([lambda *_: sys.exit(0)]))",
    "a low-level session left open": "import sys; from hylra_gguf import engine; engine.activate(); from support import *; s = Session(sys.argv[2]); "
                                     "s.prefill(random_tokens(700)); s.steps(random_tokens(3), 700)",
}


@pytest.mark.parametrize("end", ENDS)
def test_the_interpreter_ends_quietly(end, upstream, tiny):
    done = run(ENDS[end], upstream[1] / "hylra.gguf", tiny)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr[-2000:]
