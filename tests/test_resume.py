"""A profile that was interrupted, by Ctrl-C or by SIGKILL, ends with what an uninterrupted one gives; progress that is of something
else or damaged is refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from test_profile import SMALL, TEXTS, tiny  # noqa: F401

from hylra_gguf import profile, resume
from hylra_gguf.errors import ProfileError
from hylra_gguf.forward import Forward
from hylra_gguf.profile import Options, profile_model


def interrupted_at(monkeypatch, tokens_read):
    """decode fails with Ctrl-C after that many tokens"""
    decode, left = Forward.decode, [tokens_read]

    def once(self, tokens, start, outputs):
        if left[0] <= 0:
            raise KeyboardInterrupt
        left[0] -= len(tokens)
        return decode(self, tokens, start, outputs)

    monkeypatch.setattr(Forward, "decode", once)


def count_tokens(monkeypatch):
    decode, read = Forward.decode, []

    def counted(self, tokens, start, outputs):
        read.append(len(tokens))
        return decode(self, tokens, start, outputs)

    monkeypatch.setattr(Forward, "decode", counted)
    return read


@pytest.mark.parametrize("interval_s, read_before, read_after", [(1e9, 1536, 1024), (0.0, 1536, 512)])
def test_an_interrupted_profile_goes_on_where_it_was(tiny, tmp_path, monkeypatch, interval_s, read_before, read_after):
    whole, output = profile_model(tiny, TEXTS, SMALL), str(tmp_path / "p.json")
    monkeypatch.setattr(resume, "KV_INTERVAL_S", interval_s)
    monkeypatch.setattr(resume, "KV_SHARE", np.inf)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupted_at(patch, read_before)
        profile_model(tiny, TEXTS, SMALL, output)
    read = count_tokens(monkeypatch)
    found = profile_model(tiny, TEXTS, SMALL, output)
    assert sum(read) == read_after
    for key, array in whole.arrays.items():
        np.testing.assert_array_equal(found.arrays[key], array)


KILLED = """
import os, signal, sys
from support import random_tokens
from hylra_gguf import resume
from hylra_gguf.forward import Forward
from hylra_gguf.profile import Options, profile_model
decode, left = Forward.decode, [1536]
def once(self, tokens, start, outputs):
    if left[0] <= 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= len(tokens)
    return decode(self, tokens, start, outputs)
Forward.decode, Forward.tokenize = once, lambda self, text: random_tokens(2048, seed=ord(text[0]))
resume.KV_INTERVAL_S, resume.KV_SHARE = 0.0, float("inf")
profile_model(sys.argv[1], [("one", "a"), ("two", "b")], Options(contexts=[1024], top_k=[300], samples=4, n_threads=1, progress=False), sys.argv[2])
"""


def test_a_killed_profile_goes_on_where_it_was(tiny, tmp_path, monkeypatch):
    whole, output = profile_model(tiny, TEXTS, SMALL), str(tmp_path / "p.json")
    killed = subprocess.run([sys.executable, "-c", KILLED, tiny, output], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert killed.returncode == -signal.SIGKILL
    read = count_tokens(monkeypatch)
    found = profile_model(tiny, TEXTS, SMALL, output)
    assert sum(read) == 512
    for key, array in whole.arrays.items():
        np.testing.assert_array_equal(found.arrays[key], array)


def test_a_slow_disk_is_written_less_often(tmp_path, monkeypatch):
    """Seconds of a clock: writes at 20, each lasts 3, so the next is due 60 after its end."""
    clock, written = [0.0], []
    monkeypatch.setattr(resume.time, "monotonic", lambda: clock[0])

    def save_cache(path, _n_tokens):
        written.append(clock[0])
        clock[0] += 3
        (tmp_path / path).write_bytes(b"cells")
        return True

    partial = resume.Partial(str(tmp_path / "p.json"), {})
    for second in range(1, 200):
        clock[0] = max(clock[0], float(second))
        partial.save_kv(SimpleNamespace(save_cache=save_cache), resume.Place(0, second), {})
    assert written == [20, 83, 146]


def test_a_lost_cache_only_costs_the_text(tiny, tmp_path, monkeypatch):
    output = str(tmp_path / "p.json")
    monkeypatch.setattr(resume, "KV_INTERVAL_S", 0.0)
    monkeypatch.setattr(resume, "KV_SHARE", np.inf)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupted_at(patch, 1536)
        profile_model(tiny, TEXTS, SMALL, output)
    (tmp_path / "p.json.part.kv").write_bytes(b"damaged")
    read = count_tokens(monkeypatch)
    assert profile_model(tiny, TEXTS, SMALL, output).eligible == [True] * 4 and sum(read) == 1024


@pytest.mark.parametrize("texts_now, change, words", [
    (TEXTS, {"top_k": [400]}, "begun with another top_k; run with the settings of that time, or remove it"),
    (TEXTS, {"type_kv": "q8_0"}, "another type_kv"), (TEXTS[::-1], {}, "another text"),
    (TEXTS, {"contexts": [1100]}, "another text contexts")])
def test_progress_of_other_settings_is_refused(tiny, tmp_path, texts_now, change, words):
    output = str(tmp_path / "p.json")
    profile_model(tiny, TEXTS, SMALL, output)
    with pytest.raises(ProfileError, match=f"p.json.part: begun with .*{words.split('begun with ')[-1]}"):
        profile_model(tiny, texts_now, Options(**{**vars(SMALL), **change}), output)


def test_progress_of_another_version_is_refused(tiny, tmp_path, monkeypatch):
    output = str(tmp_path / "p.json")
    with monkeypatch.context() as patch:
        patch.setattr(profile, "PROFILE_VERSION", 1)
        profile_model(tiny, TEXTS, SMALL, output)
    with pytest.raises(ProfileError, match="p.json.part: begun with another version"):
        profile_model(tiny, TEXTS, SMALL, output)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"[]"])
def test_damaged_progress_is_one_line(tiny, tmp_path, content):
    (tmp_path / "p.json.part").write_bytes(content)
    with pytest.raises(ProfileError, match="p.json.part: the progress of an earlier run cannot be read; remove it"):
        profile_model(tiny, TEXTS, SMALL, str(tmp_path / "p.json"))
