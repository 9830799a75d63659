"""Bad input of every kind ends in one line, through the command line, through `Llama` and in the engine: no crash, no wait, no partial write."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import Session, random_tokens, write_tiny_model
from test_cli_files import AS_ORDINARY_USER, process
from test_engine import policy
from test_gguf_header import BROKEN, POLICY, raw, write_model
from test_policy import policies

from hylra_gguf import Llama, cli, engine, gguf_header
from hylra_gguf.errors import HylraError, PolicyError
from hylra_gguf.gguf_header import read_header, write_policy
from hylra_gguf.policy import Policy

COMMANDS = ("show", "verify", "strip", "embed-policy --policy policy.json", "embed-policy", "run -p x", "bench -d 0")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working directory but for policy.json; one parser for all calls, because building it takes longer than they do."""
    monkeypatch.chdir(tmp_path)
    POLICY.save("policy.json")
    parser = cli.build_parser()
    monkeypatch.setattr(cli, "build_parser", lambda: parser)
    return tmp_path


def assert_cli_refuses(command, name, capsys):
    words = command.split()
    code = cli.main([words[0], name, *words[1:]])
    out, err = capsys.readouterr()
    assert (code, out) == (2, "") and err.startswith("hylra-gguf: error: ") and err.count("\n") == 1, (command, code, out, err)
    assert name in err


def assert_llama_refuses(name):
    with pytest.raises(ValueError) as caught:
        Llama(name, verbose=False)
    assert "\n" not in str(caught.value) and name in str(caught.value)


# ---- model files

@pytest.mark.parametrize("content", [content for content, _ in BROKEN.values()], ids=BROKEN)
def test_a_broken_model_is_one_line_everywhere(content, folder, capsys):
    (folder / "model.gguf").write_bytes(content)
    for command in COMMANDS:
        assert_cli_refuses(command, "model.gguf", capsys)
    assert_llama_refuses("model.gguf")
    assert (folder / "model.gguf").read_bytes() == content and sorted(os.listdir(folder)) == ["model.gguf", "policy.json"]


def test_a_file_cut_at_any_byte_of_its_header_is_one_line_everywhere(folder, capsys):
    write_policy(write_model("whole.gguf"), POLICY)
    whole = (folder / "whole.gguf").read_bytes()
    for length in range(read_header("whole.gguf").data_start):
        (folder / "cut.gguf").write_bytes(whole[:length])
        for command in ("show", "verify", "strip", "embed-policy --policy policy.json"):
            assert_cli_refuses(command, "cut.gguf", capsys)
        assert_llama_refuses("cut.gguf")
        assert (folder / "cut.gguf").read_bytes() == whole[:length]
    assert sorted(os.listdir(folder)) == ["cut.gguf", "policy.json", "whole.gguf"]


PLACES = {
    "nothing": lambda path: None,
    "a directory": lambda path: path.mkdir(),
    "a FIFO without a writer": lambda path: os.mkfifo(path),
    "a link to itself": lambda path: path.symlink_to(path),
    "a link to a device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("place", PLACES)
def test_what_is_no_file_is_one_line_everywhere(place, folder, capsys):
    PLACES[place](folder / "model.gguf")
    for command in COMMANDS[1:]:  # `show` reads a policy from a pipe
        assert_cli_refuses(command, "model.gguf", capsys)
    assert_llama_refuses("model.gguf")


REFUSED_LLAMA = textwrap.dedent("""
    from hylra_gguf import Llama
    for name in ("model.gguf", "broken.gguf", "none.gguf"):
        try:
            Llama(name, verbose=False)
        except ValueError as error:
            print(error)
    raise SystemExit
""")


def test_a_refused_llama_leaves_no_other_word(folder):
    """Also not from the destructor of the object that never was, nor from llama.cpp."""
    write_model("model.gguf")
    (folder / "model.gguf").chmod(0)
    (folder / "broken.gguf").write_bytes(b"GGUF")
    done = process(AS_ORDINARY_USER + REFUSED_LLAMA, "")
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    permission, broken, missing = done.stdout.splitlines()
    assert "Permission denied" in permission and "broken.gguf: the GGUF version needs 4 bytes" in broken and "No such file" in missing


SCALARS = {"u8": 1, "i8": -1, "u16": 1, "i16": -1, "u32": 1, "i32": -1, "f32": 0.5, "bool": True, "string": "text", "u64": 2**63, "i64": -1, "f64": 0.5}
ARRAYS = {f"{kind}[]": (value, value) for kind, value in SCALARS.items() if kind != "string"}
SHAPE = {"general.architecture": ("string", "llama"), "llama.block_count": ("u32", 4), "llama.attention.head_count": ("u32", 4),
         "llama.attention.head_count_kv": ("u32", 2), "llama.nextn_predict_layers": ("u32", 0), "split.no": ("u16", 0)}


@pytest.mark.parametrize("kind", {**SCALARS, **ARRAYS})
def test_metadata_of_another_type_are_one_line(kind, folder, capsys):
    for name in SHAPE:
        fields = {**SHAPE, name: (kind, {**SCALARS, **ARRAYS}[kind])}
        data = raw(*(gguf_header._encode(key, *typed) for key, typed in fields.items()))
        for command in ("verify", "embed-policy --policy policy.json", "strip"):
            (folder / "model.gguf").write_bytes(data)
            words = command.split()
            code, (_, err) = cli.main([words[0], "model.gguf", *words[1:]]), capsys.readouterr()
            assert code in (0, 2) and err.count("\n") == 1 or (code, err) == (0, ""), (name, command, err)
        (folder / "model.gguf").write_bytes(data)
        assert_llama_refuses("model.gguf")


@pytest.mark.parametrize("arch, shown", [("ll\nama", "ll\\nama.block_count"), ("a\rb\x1b[2J", "a\\rb\\x1b[2J.block_count"), ("\u2028", "\\u2028.block_count")])
def test_an_architecture_of_two_lines_is_one_line(arch, shown, folder, capsys):
    (folder / "model.gguf").write_bytes(raw(gguf_header._encode("general.architecture", "string", arch)))
    assert cli.main(["verify", "model.gguf"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err[:-1].isprintable() and shown in err


# ---- policies

TRASH = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8), lambda x: st.lists(x, max_size=5), max_leaves=8)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(policies(), st.dictionaries(st.sampled_from(list(POLICY.to_dict()) + ["measured.x", "lists", "head_map", "extra", ""]), TRASH, max_size=3),
       st.sets(st.sampled_from(list(POLICY.to_dict())), max_size=2))
def test_any_json_is_a_policy_or_one_line(tmp_path, policy, changes, removed):
    values = {name: value for name, value in {**policy.to_dict(), **changes}.items() if name not in removed}
    path = tmp_path / "policy.json"
    path.write_text(json.dumps(values))
    try:
        read = Policy.load(path)
    except HylraError as error:
        assert "\n" not in str(error) and str(path) in str(error)
    else:
        assert Policy.from_dict(read.to_dict()) == read and Policy.from_gguf_kv(read.to_gguf()) == read and read.describe()


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.one_of(st.binary(max_size=200), st.text(max_size=100).map(str.encode), TRASH.map(lambda value: json.dumps(value).encode())))
def test_any_bytes_are_a_policy_or_one_line(tmp_path, data):
    path = tmp_path / "policy.json"
    path.write_bytes(data)
    with pytest.raises(HylraError) as caught:
        Policy.load(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def flags_of(command: str) -> list[str]:
    actions = next(action for action in cli.build_parser()._actions if action.dest == "command_name").choices[command]._actions
    return sorted(flag for action in actions for flag in action.option_strings)


NAMES = ("profile", "plan", "report", "embed-policy", "show", "strip", "verify", "run", "bench", "env")
FLAGS = {name: flags_of(name) for name in NAMES}
ODD_VALUES = ["", "-1", "0", "1", "007", "1.5", "nan", "inf", "-inf", "1e999", "9" * 40, "1,2,3", ",", "1,,2", "=", "--", "-", "\x00", "é\udcff", "a\nb", "m.gguf",
              "q8_0", "hylra", "theta=0.5:0.9:0.1", "theta=0:1:0", "json", "random", "\u0663"]


@pytest.fixture
def parse_only(monkeypatch):
    """The real parser, with commands that do nothing."""
    parser = cli.build_parser()
    parse = parser.parse_args

    def parse_args(argv):
        args = parse(argv)
        args.command = lambda args: None
        return args

    parser.parse_args = parse_args
    monkeypatch.setattr(cli, "build_parser", lambda: parser)


@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(NAMES), st.data())
def test_any_flags_are_accepted_or_one_line(parse_only, capsys, name, data):
    words = st.sampled_from(FLAGS[name]) | st.sampled_from(ODD_VALUES) | st.text(max_size=6)
    argv = [name, *data.draw(st.lists(words, max_size=8))]
    code = cli.main(argv)
    _, err = capsys.readouterr()
    assert (code, err) == (0, "") or code == 2 and err.count("\n") == 1 and err.startswith("hylra-gguf: error: "), (argv, code, err)


# ---- the engine

@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


OWN_KEYS = {name: typed for name, typed in policy("FSRR", lists=2, head_map=(0, 1) * 4, top_k_fraction=0.5,
                                                      sparse_select=(0, 1, 0, 0)).to_gguf().items()}


@pytest.mark.parametrize("name", OWN_KEYS)
def test_a_key_of_ours_with_another_type_leaves_the_model_dense(name, tiny, tmp_path):
    """Each other type in turn; the reason says what was found and what was expected."""
    for kind, value in {**SCALARS, **ARRAYS}.items():
        if kind == OWN_KEYS[name][0]:
            continue
        model = tmp_path / "odd.gguf"
        gguf_header._splice(read_header(tiny), {**OWN_KEYS, name: (kind, value)}, model, None)
        with Session(model) as s:
            status = engine.status(s.ctx)
        assert not status["on"] and status["reason"].startswith(f"policy refused: {name} h") and "expected" in status["reason"], (kind, status)
        with pytest.raises(PolicyError, match=name.split(".")[1]):
            Policy.load(model)


def test_a_reason_is_one_line_of_text_whatever_the_file_says(tiny, tmp_path):
    """Through llama_cpp itself, which loads names that hylra_gguf.Llama refuses."""
    write_policy(tiny, policy("FSRR"), tmp_path / "odd.gguf")
    content = (tmp_path / "odd.gguf").read_bytes()
    (tmp_path / "odd.gguf").write_bytes(content.replace(b"hylra.top_k", b"hylra.\n\xff\x1b[m"))
    with Session(tmp_path / "odd.gguf") as s:
        reason = engine.status(s.ctx)["reason"]
    assert reason == "policy refused: unknown key hylra.???[m"


@pytest.mark.parametrize("values, words", [([1] * 3, "must hold 4 values, found 3"), ([0, 2, 0, 0], "layer 1 has hylra.sparse_select 2, expected 0 or 1")])
def test_sparse_select_of_a_file_is_refused_where_it_does_not_fit(tiny, tmp_path, values, words):
    gguf_header._splice(read_header(tiny), {**OWN_KEYS, "hylra.sparse_select": ("u32[]", values)}, tmp_path / "odd.gguf", None)
    with Session(tmp_path / "odd.gguf") as s:
        status = engine.status(s.ctx)
    assert not status["on"] and words in status["reason"]


def set_struct(session, **fields):
    """(code, error) of hylra_set_policy for FSRR with some fields of the struct changed."""
    struct, alive = engine.policy_struct(policy("FSRR"))
    for name, value in fields.items():
        setattr(struct, name, value)
    error = engine.ffi.new("char[]", 512)
    return engine.lib.hylra_set_policy(engine.pointer(session.ctx), struct, error, 512), engine.ffi.string(error).decode()


EVERY_LAYER = engine.ffi.new("uint32_t[]", [1] * 4)
BAD_STRUCTS = {
    "no modes": (lambda: dict(layer_mode=engine.ffi.NULL), "layer_mode and layer_source must not be NULL"),
    "no sources": (lambda: dict(layer_source=engine.ffi.NULL), "layer_mode and layer_source must not be NULL"),
    "wild layer count": (lambda: dict(layer_count=2**32 - 1), "hylra.layer_count is 4294967295, the model has 4 layers"),
    "wild head count": (lambda: dict(head_kv_count=2**31), "hylra.head_kv_count is 2147483648, the model has 2 KV heads"),
    "sparse but no select layer": (lambda: dict(sparse_select=EVERY_LAYER), "layer 0 has hylra.sparse_select 1, expected 0 for a layer that does"),
    "newer version": (lambda: dict(version=2, layer_count=2**32 - 1), "hylra.version is 2, this engine knows version 1"),
    "fraction is no number": (lambda: dict(top_k_fraction=float("nan")), "hylra.top_k_fraction is nan, expected 0 to 1"),
    "sink and recent that overflow": (lambda: dict(sink_tokens=2**32 - 1, recent_tokens=2), "hold the 4294967297 sink and recent cells"),
}


@pytest.mark.parametrize("case", BAD_STRUCTS)
def test_a_struct_that_lies_is_refused_before_its_arrays_are_read(case, tiny):
    fields, words = BAD_STRUCTS[case]
    with Session(tiny) as s:
        code, error = set_struct(s, **fields())
        assert code == -1 and words in error and not engine.status(s.ctx)["on"]
        assert set_struct(s) == (0, "") and engine.status(s.ctx)["on"]


WILD_BUDGET = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
sys.path.insert(0, sys.argv[1])
from support import Session, random_tokens
from test_engine import engine, policy, step_logits
with Session(sys.argv[2]) as s:
    s.prefill(random_tokens(700))
    wild = step_logits(s, policy("SRRR", sink_tokens=2**30, recent_tokens=2**30 - 1, top_k=2**31 - 1))
    assert abs(wild - step_logits(s, policy("FFFF"))).max() < 1e-4
    assert engine.status(s.ctx)["on"]
"""


def test_wild_budgets_cost_no_memory(tiny):
    done = subprocess.run([sys.executable, "-c", WILD_BUDGET, os.path.dirname(__file__), str(tiny)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_policy_of_wild_numbers_is_served_or_refused(tiny):
    """Every number of the struct at its edges, and a few steps with what is accepted."""
    edges = [0, 1, 15, 16, 128, 255, 256, 2**31 - 1, 2**31, 2**32 - 1]
    with Session(tiny) as s:
        s.prefill(random_tokens(300))
        for name in ("top_k", "block_size", "sink_tokens", "recent_tokens", "min_context", "lists", "prefill", "enabled"):
            for value in edges:
                code, error = set_struct(s, **{name: value, "top_k": max(value, 64) if name.endswith("tokens") else value if name == "top_k" else 64})
                assert (code == 0) == (error == "") and "\n" not in error
                logits = s.steps(random_tokens(2, 9), 300)
                assert np.isfinite(logits).all(), (name, value)
                s.rewind(300)
