"""The commands that touch files: what they print, and that every failure is one line on stderr, exit code 2 and no change on disk."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import types

import pytest
from test_gguf_header import LONGER, POLICY, sha256, write_model

from hylra_gguf import cli
from hylra_gguf.errors import EngineError
from hylra_gguf.gguf_header import data_sha256, read_header, write_policy
from hylra_gguf.policy import Policy, read_policy


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """model.gguf dense, policy.json for it, hylra.gguf with the policy, and files that do not fit."""
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "model.gguf")
    POLICY.save("policy.json")
    write_policy("model.gguf", POLICY, "hylra.gguf")
    Policy((1, 2), (0, 0), 2).save("short.json")
    source_is_full = {**POLICY.to_dict(), "layer_mode": [0, 2, 2, 1], "layer_source": [-1, 0, 0, 3]}
    for name, values in (("source", source_is_full), ("nan", {**POLICY.to_dict(), "theta": float("nan")}),
                         ("unknown", {**POLICY.to_dict(), "colour": 1}), ("newer", {**POLICY.to_dict(), "version": 2})):
        (tmp_path / f"{name}.json").write_text(json.dumps(values))
    content = (tmp_path / "hylra.gguf").read_bytes()
    (tmp_path / "truncated.gguf").write_bytes(content[:-40])
    (tmp_path / "header.gguf").write_bytes(content[:200])
    (tmp_path / "empty.gguf").write_bytes(b"")
    (tmp_path / "bad.gguf").write_bytes(content.replace(b"hylra.top_k", b"hylra.top_q"))
    (tmp_path / "directory").mkdir()
    os.mkfifo("pipe")
    return tmp_path


def run(capsys, *args):
    code = cli.main(list(args))
    return code, *capsys.readouterr()


def contents(folder):
    return {path.name: sha256(path) for path in folder.iterdir() if path.is_file()}


# ---- results

def test_show_prints_the_policy(folder, capsys):
    code, out, err = run(capsys, "show", "hylra.gguf", "-o", "json")
    assert (code, err) == (0, "") and json.loads(out) == POLICY.to_dict()
    code, out, err = run(capsys, "show", "hylra.gguf")
    assert (code, err) == (0, "") and "SRRS" in out and "on from 4096 cached tokens" in out and out == POLICY.describe() + "\n"
    assert run(capsys, "show", "policy.json")[1] == out


def test_embed_policy_writes_into_the_file(folder, capsys):
    code, out, err = run(capsys, "embed-policy", "model.gguf", "--policy", "policy.json")
    assert code == 0 and read_policy("model.gguf") == POLICY
    assert out == POLICY.describe() + "\n" and err == "model.gguf: policy written\n"


def test_embed_policy_writes_a_copy(folder, capsys):
    before = contents(folder)
    code, out, err = run(capsys, "embed-policy", "model.gguf", "--policy", "hylra.gguf", "-o", "copy.gguf")
    assert code == 0 and err == "copy.gguf: policy written\n" and read_policy("copy.gguf") == POLICY
    assert {name: value for name, value in contents(folder).items() if name != "copy.gguf"} == before


def test_dry_run_writes_nothing(folder, capsys):
    before = contents(folder)
    code, out, err = run(capsys, "embed-policy", "model.gguf", "--policy", "policy.json", "--dry-run")
    assert (code, out) == (0, POLICY.describe() + "\n") and "nothing written" in err and contents(folder) == before


def test_force_replaces_the_output(folder, capsys):
    LONGER.save("longer.json")
    assert run(capsys, "embed-policy", "model.gguf", "--policy", "longer.json", "-o", "hylra.gguf", "--force")[0] == 0
    assert read_policy("hylra.gguf") == LONGER


def test_strip_restores_the_file(folder, capsys):
    code, out, err = run(capsys, "strip", "hylra.gguf")
    assert (code, err) == (0, "") and out == f"hylra.gguf: {len(POLICY.to_gguf()) + 1} hylra.* keys removed\n"
    assert sha256(folder / "hylra.gguf") == sha256(folder / "model.gguf")
    assert run(capsys, "strip", "hylra.gguf")[:2] == (0, "hylra.gguf: no hylra.* keys in it\n")


def test_verify_says_what_it_has_checked(folder, capsys):
    measured = Policy(POLICY.layer_mode, POLICY.layer_source, 2, measured={"model_sha256": data_sha256("model.gguf"), "kld": 0.01})
    write_policy("model.gguf", measured)
    code, out, err = run(capsys, "verify", "model.gguf")
    assert (code, err) == (0, "") and [line.split()[:2] for line in out.splitlines()] == [["ok", what] for what in ("file", "model", "policy", "data")]
    assert f"sha256 {data_sha256('model.gguf')}, as measured" in out
    write_policy("model.gguf", Policy(POLICY.layer_mode, POLICY.layer_source, 2))
    assert "no sha256 to compare" in run(capsys, "verify", "model.gguf")[1]


def test_verify_finds_a_policy_of_another_shape(folder, capsys):
    at = read_header("hylra.gguf").fields["llama.block_count"].end
    data = bytearray((folder / "hylra.gguf").read_bytes())
    data[at - 4] = 5
    (folder / "hylra.gguf").write_bytes(data)
    code, out, err = run(capsys, "verify", "hylra.gguf")
    assert (code, out) == (2, "") and err == ("hylra-gguf: error: hylra.gguf: the policy is for 4 layers, but the model has 5; "
                                              "make the policy from this model's own profile\n")


# ---- failures

ERRORS = [
    ("", "required"),
    ("dance", "invalid choice: 'dance'"),
    ("show", "MODEL"),
    ("show model.gguf", "model.gguf: no policy in this model; add one with hylra-gguf embed-policy"),
    ("show none.gguf", "none.gguf: No such file or directory"),
    ("show directory", "directory: Is a directory"),
    ("show truncated.gguf", "truncated.gguf: tensor 'second' ends at byte"),
    ("show header.gguf", "header.gguf: "),
    ("show empty.gguf", "empty.gguf: not a policy in JSON"),
    ("show bad.gguf", "bad.gguf: key 'top_q' is not known in version 1"),
    ("show hylra.gguf -o csv", "invalid choice: 'csv'"),
    ("show hylra.gguf --jsn", "unrecognized arguments: --jsn"),
    ("verify model.gguf", "model.gguf: no policy in this model"),
    ("verify hylra.gguf", "hylra.gguf: the tensor data have sha256"),
    ("verify truncated.gguf", "truncated.gguf: tensor 'second' ends"),
    ("verify bad.gguf", "bad.gguf: key 'top_q'"),
    ("verify pipe", "pipe: this is not a regular file"),
    ("strip none.gguf", "none.gguf: No such file"),
    ("strip empty.gguf", "empty.gguf: the file is empty"),
    ("strip directory", "directory: this is a directory"),
    ("strip truncated.gguf", "truncated.gguf: tensor"),
    ("strip policy.json", "policy.json: starts with b'{\\n  ', expected b'GGUF'"),
    ("strip hylra.gguf -o model.gguf", "model.gguf: this file exists; choose another output or overwrite it with --force"),
    ("strip hylra.gguf -o directory", "directory: this exists and is not a regular file"),
    ("strip hylra.gguf -o no/where.gguf", "no: no such directory"),
    ("embed-policy none.gguf", "none.gguf: No such file"),
    ("embed-policy truncated.gguf", "truncated.gguf: tensor"),
    ("embed-policy truncated.gguf --policy policy.json", "truncated.gguf: tensor"),
    ("embed-policy header.gguf --policy policy.json", "header.gguf: "),
    ("embed-policy pipe --policy policy.json", "pipe: this is not a regular file"),
    ("embed-policy model.gguf --policy none.json", "none.json: No such file"),
    ("embed-policy model.gguf --policy short.json", "model.gguf: the policy is for 2 layers, but the model has 4"),
    ("embed-policy model.gguf --policy short.json --dry-run", "the policy is for 2 layers"),
    ("embed-policy model.gguf --policy source.json", "source.json: layer_source[1] is 0, but layer 0 is no select layer"),
    ("embed-policy model.gguf --policy nan.json", "nan.json: theta is nan"),
    ("embed-policy model.gguf --policy unknown.json", "unknown.json: key 'colour' is not known"),
    ("embed-policy model.gguf --policy newer.json", "newer.json: the policy has version 2, expected 1; use a newer hylra-gguf"),
    ("embed-policy model.gguf --policy model.gguf", "model.gguf: no policy in this model"),
    ("embed-policy model.gguf --policy policy.json --theta 0.9", "--theta has no effect beside --policy"),
    ("embed-policy model.gguf --policy policy.json --max-sensitivity 0.1", "--max-sensitivity has no effect"),
    ("embed-policy model.gguf --policy policy.json -o hylra.gguf", "hylra.gguf: this file exists"),
    ("embed-policy model.gguf -o hylra.gguf", "hylra.gguf: this file exists"),
    ("embed-policy model.gguf --theta nan", "argument --theta: 'nan' is no number above 0 to 1"),
    ("embed-policy model.gguf --theta 0", "argument --theta: '0' is no number above 0 to 1"),
    ("embed-policy model.gguf --theta 1.5", "argument --theta: '1.5' is no number"),
    ("embed-policy model.gguf --theta x", "argument --theta: 'x' is no number"),
    ("embed-policy model.gguf --top-k 0", "argument --top-k: '0' is no whole number from 1"),
    ("embed-policy model.gguf --top-k 1e3", "argument --top-k: '1e3' is no whole number"),
    ("embed-policy model.gguf --top-k 4294967296", "argument --top-k"),
    ("embed-policy model.gguf --max-sensitivity inf", "argument --max-sensitivity: 'inf' is no number"),
    ("embed-policy model.gguf --min-context -1", "argument --min-context"),
    ("plan p.json -o q.json --strategy best", "invalid choice: 'best'"),
    ("plan p.json --strategy explicit --layers a", "argument --layers: 'a' is no whole number"),
    ("plan p.json --strategy tidal --layers 2,,13", "argument --layers: '' is no whole number"),
    ("plan p.json --count 0", "argument --count: '0' is no whole number from 1"),
    ("plan p.json --top-k-fraction 1.1", "argument --top-k-fraction: '1.1' is no number"),
    ("plan p.json -o q.json --similarity cosine", "invalid choice: 'cosine'"),
    ("profile model.gguf -o p -c 0", "argument -c/--ctx-size: '0' is no whole number"),
    ("profile model.gguf -o p -ctk q3_k", "invalid choice: 'q3_k'"),
    ("profile model.gguf -o p -k 1,,2", "argument -k/--top-k: '' is no whole number"),
    ("run model.gguf", "one of the arguments -p/--prompt -f/--file is required"),
    ("run model.gguf -p x -f y", "not allowed with"),
    ("run model.gguf -p x --temp -1", "argument --temp"),
    ("bench model.gguf", "-d/--n-depth"),
    ("bench model.gguf -d 1,x", "argument -d/--n-depth: 'x' is no whole number"),
    ("bench model.gguf -d 0 --arms dense", "argument --arms: 'dense' is none of stock-fa1, stock-fa0, full, hylra"),
    ("bench model.gguf -d 0 -o xml", "invalid choice: 'xml'"),
    ("bench model.gguf -d 0 -np 0", "argument -np/--n-seq: '0' is no whole number from 1"),
    ("bench model.gguf -d 0 --fill zeros", "argument --fill: invalid choice: 'zeros'"),
]


@pytest.mark.parametrize("line, words", ERRORS, ids=[line or "nothing" for line, _ in ERRORS])
def test_a_failure_is_one_line_and_changes_nothing(line, words, folder, capsys):
    before, names = contents(folder), sorted(os.listdir(folder))
    code, out, err = run(capsys, *line.split())
    assert (code, out) == (2, "") and err.startswith("hylra-gguf: error: ") and err.count("\n") == 1 and words in err, err
    assert contents(folder) == before and sorted(os.listdir(folder)) == names


def test_a_traceback_appears_only_with_v(folder, capsys):
    for args in (["-v", "show", "none.gguf"], ["show", "none.gguf", "-v"]):
        code, out, err = run(capsys, *args)
        assert (code, out) == (2, "") and "Traceback" in err
        assert err.endswith("hylra-gguf: error: none.gguf: No such file or directory\n")


def test_help_and_version(capsys):
    code, out, err = run(capsys, "--version")
    assert (code, err) == (0, "") and out.startswith("hylra-gguf ")
    code, out, err = run(capsys, "--help")
    assert code == 0 and all(name in out for name in "profile plan embed-policy show strip verify run bench env".split())
    for name in "profile plan embed-policy show strip verify run bench env".split():
        assert run(capsys, name, "--help")[0] == 0


@pytest.mark.parametrize("line, module, function, expected", [
    ("profile m.gguf -f a b -c 4096 -ctk q8_0 -ctv bf16 -t 2 --samples 9 -k 512,1024 -o p.json", "profile", "cmd_profile",
     dict(model="m.gguf", file=["a", "b"], ctx_size=[4096], cache_type_k="q8_0", cache_type_v="bf16", threads=2, samples=9,
          top_k=[512, 1024], output="p.json", no_progress=False)),
    ("plan p.json --theta 0.9 --top-k 1024 --strategy explicit --layers 2,13 --n 3 --sink 4 --recent 128 --min-context 0 "
     "--block-size 32 --similarity overlap --max-sensitivity 0.2 --lists head -o q.json", "plan", "cmd_plan",
     dict(profile="p.json", theta=0.9, top_k=1024, strategy="explicit", layers=[2, 13], n=3, sink=4, recent=128, min_context=0,
          block_size=32, similarity="overlap", max_sensitivity=0.2, lists="head", output="q.json")),
    ("plan p.json", "plan", "cmd_plan", dict(theta=None, top_k=None, strategy=None, lists=None, similarity=None, output=None)),
    ("run m.gguf -p hi -n 5 -c 64 -t 1 --policy p.json --no-hylra --temp 0.5 --seed 3 --chat", "generate", "cmd_run",
     dict(model="m.gguf", prompt="hi", file=None, n_predict=5, ctx_size=64, threads=1, policy="p.json", no_hylra=True, temp=0.5,
          seed=3, chat=True)),
    ("bench m.gguf -d 0,4096 -n 8 -r 2 -t 2 -ctk q8_0 -ctv f16 --policy p.json --arms full,hylra -np 4 --fill text "
     "--policy q.json --png s.png -o csv", "bench", "cmd_bench",
     dict(model="m.gguf", n_depth=[0, 4096], n_gen=8, repetitions=2, threads=2, cache_type_k="q8_0", cache_type_v="f16",
          policy=["p.json", "q.json"], arms=["full", "hylra"], n_seq=4, fill="text", png="s.png", format="csv")),
    ("env", "engine", "cmd_env", {}),
])
def test_flags_reach_the_other_commands(line, module, function, expected, folder, capsys, monkeypatch):
    seen = []
    fake = types.SimpleNamespace(**{function: lambda args: seen.append(vars(args)) or 7})
    monkeypatch.setitem(sys.modules, f"hylra_gguf.{module}", fake)
    assert run(capsys, *line.split()) == (7, "", "")
    assert {name: seen[0][name] for name in expected} == expected


def test_embed_policy_writes_what_was_planned(folder, capsys, monkeypatch):
    seen = []
    monkeypatch.setitem(sys.modules, "hylra_gguf.embed",
                        types.SimpleNamespace(plan_for_model=lambda args: seen.append(vars(args)) or POLICY))
    code, out, err = run(capsys, "embed-policy", "model.gguf", "-f", "a", "-c", "64", "--top-k", "7")
    assert (code, err) == (0, "model.gguf: policy written\n") and out == POLICY.describe() + "\n"
    assert {name: seen[0][name] for name in ("file", "ctx_size", "top_k", "policy")} == dict(file=["a"], ctx_size=[64], top_k=7, policy=None)
    assert read_policy(folder / "model.gguf") == POLICY


@pytest.mark.parametrize("error, code, line", [
    (EngineError("no engine"), 2, "no engine"),
    (OSError(28, "No space left on device", "x.json"), 2, "x.json: No space left on device"),
    (OSError("odd"), 2, "odd"),
    (KeyboardInterrupt(), 130, "interrupted"),
])
def test_what_a_command_raises_is_one_line(error, code, line, capsys, monkeypatch):
    def fail(args):
        raise error

    monkeypatch.setitem(sys.modules, "hylra_gguf.engine", types.SimpleNamespace(cmd_env=fail))
    assert run(capsys, "env") == (code, "", f"hylra-gguf: error: {line}\n")


# ---- real processes: what the system refuses

# root may write everywhere; without these two capabilities permission bits count for root as well
AS_ORDINARY_USER = textwrap.dedent("""
    import ctypes, os, sys
    if os.geteuid() == 0:
        libc, header, data = ctypes.CDLL(None, use_errno=True), (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        assert libc.capget(header, data) == 0
        for effective_or_permitted in (0, 1):
            data[effective_or_permitted] &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        assert libc.capset(header, data) == 0, os.strerror(ctypes.get_errno())
""")
SMALL_FILES = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))\n"
SHOW = [sys.executable, "-m", "hylra_gguf", "show", "hylra.gguf"]
MAIN = "import sys; from hylra_gguf.cli import main; sys.exit(main(sys.argv[1:]))\n"


def process(before, args, **options):
    return subprocess.run([sys.executable, "-B", "-c", before + MAIN, *args.split()], capture_output=True, text=True, **options)


@pytest.mark.parametrize("before, mode, name, words", [
    (AS_ORDINARY_USER, 0o555, None, "this directory is not writable"),
    (AS_ORDINARY_USER, 0o000, "model.gguf", "model.gguf: Permission denied"),
    (AS_ORDINARY_USER, 0o000, "policy.json", "policy.json: Permission denied"),
    (SMALL_FILES, 0o755, None, "File too large; nothing was changed, free some space"),
])
def test_what_the_system_refuses_is_one_line(before, mode, name, words, folder):
    contents_before, names = contents(folder), sorted(os.listdir(folder))
    target = folder / (name or ".")
    old_mode = target.stat().st_mode
    target.chmod(mode)
    done = process(before, "embed-policy model.gguf --policy policy.json")
    target.chmod(old_mode)
    assert done.returncode == 2 and done.stdout == "" and words in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert contents(folder) == contents_before and sorted(os.listdir(folder)) == names


def test_a_read_only_model_in_a_writable_folder_keeps_its_mode(folder):
    (folder / "model.gguf").chmod(0o444)
    done = process(AS_ORDINARY_USER, "embed-policy model.gguf --policy policy.json")
    assert done.returncode == 0, done.stderr
    assert read_policy("model.gguf") == POLICY and (folder / "model.gguf").stat().st_mode & 0o777 == 0o444


def test_a_full_stdout_is_one_line(folder):
    with open("/dev/full", "w") as full:
        done = subprocess.run(SHOW, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and done.stderr == "hylra-gguf: error: No space left on device\n"


def test_a_closed_pipe_is_silent(folder):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(SHOW, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.returncode == 141 and done.stderr == ""


def test_an_interrupt_leaves_nothing(folder):
    before = contents(folder)
    hook = textwrap.dedent(f"""
        import os, signal
        from hylra_gguf import files
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts with it ignored
        files._copy_some = lambda *_: os.kill(os.getpid(), {int(signal.SIGINT)}) or 0
    """)
    done = process(hook, "embed-policy model.gguf --policy policy.json")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "hylra-gguf: error: interrupted\n")
    assert contents(folder) == before


def test_a_name_that_is_no_text_can_be_printed(folder):
    name = os.fsdecode(b"m\xff.gguf")
    os.rename("hylra.gguf", name)
    done = subprocess.run([sys.executable, "-m", "hylra_gguf", "strip", name], capture_output=True)
    assert done.returncode == 0 and b"keys removed" in done.stdout, done.stderr
