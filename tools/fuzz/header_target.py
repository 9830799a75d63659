"""Fuzz target in Python: the header splice and the policy reader must answer any bytes with a result or one line, and lose nothing.

An input is the content of a model file, or JSON where it does not start with GGUF. Anything but a HylraError of one line that names the
file is a crash; so is a file that is not the same again after write_policy and strip.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from hylra_gguf.errors import HylraError
from hylra_gguf.gguf_header import model_shape, read_header, strip, write_policy
from hylra_gguf.policy import SELECT, Policy, read_policy

FOLDER = Path(tempfile.mkdtemp(prefix="hylra-fuzz-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
MODEL = FOLDER / "model.gguf"


def refused(call, *args) -> bool:
    """Whether `call` refuses the file, which it must do in one line that names it."""
    try:
        call(*args)
        return False
    except HylraError as error:
        text = str(error)
        assert "\n" not in text and "\r" not in text and str(FOLDER) in text, text
        return True


def check(data: bytes) -> None:
    MODEL.write_bytes(data)
    if data[:4] == b"GGUF":
        check_model()
    elif not refused(Policy.load, MODEL):
        check_policy(Policy.load(MODEL))


def check_policy(policy: Policy) -> None:
    assert Policy.from_dict(policy.to_dict()) == policy and Policy.from_gguf_kv(policy.to_gguf()) == policy
    assert policy.describe() and "\n" not in policy.one_line()


def check_model() -> None:
    refused(read_policy, MODEL)
    if refused(read_header, MODEL) or refused(lambda: model_shape(read_header(MODEL))) or refused(strip, MODEL):
        return
    dense, (_, layers, heads) = MODEL.read_bytes(), model_shape(read_header(MODEL))
    if layers <= 4096 and heads <= 4096:
        policy = Policy((SELECT,) * layers, tuple(range(layers)), heads)
        write_policy(MODEL, policy)
        assert read_policy(MODEL) == policy
        strip(MODEL)
    assert MODEL.read_bytes() == dense, "the file is another one after write_policy and strip"
    assert os.listdir(FOLDER) == [MODEL.name]


def main() -> None:
    """Run by tools/fuzz.py, which has this module imported under instrumentation; the arguments are those of libFuzzer."""
    import atheris

    atheris.Setup(sys.argv, check)
    atheris.Fuzz()
