"""The patch layer: hooks fit once or stop with a line that names them; nothing but insertion; bad input in one line."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PATCH_DIR = ROOT / "ggml_patch"


def load_apply():
    spec = importlib.util.spec_from_file_location("hylra_apply", PATCH_DIR / "apply.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


apply = load_apply()

TREE = {
    "CMakeLists.txt": "project(fake)\n",
    "LICENSE": "MIT\n",
    "src/a.h": "first\nmember\nlast\n",
    "src/b.cpp": "open\n  x();\n  y();\nclose\n",
    "ggml/g.c": "ggml\n",
    "models/huge.gguf": "not wanted\n",
}
HOOKS = """
[[hook]]
name = "after-line"
file = "src/a.h"
anchor = 'member'
where = "after"
insert = 'ours'
why = "w"
relies_on = []

[[hook]]
name = "wrap-open"
file = "src/b.cpp"
anchor = '  x();'
where = "before"
insert = '''
  if (!mine()) {
'''
why = "w"
relies_on = []

[[hook]]
name = "wrap-close"
file = "src/b.cpp"
anchor = '''
  x();
  y();
'''
where = "after"
insert = '''
  }

'''
why = "w"
relies_on = []
"""
PATCHED = {
    **TREE,
    "src/a.h": "first\nmember\nours\nlast\n",
    "src/b.cpp": "open\n  if (!mine()) {\n  x();\n  y();\n  }\n\nclose\n",
}


class Fake:
    """A small sdist with its pin and hooks in a folder of its own."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.patch_dir = folder / "patch"
        self.patch_dir.mkdir()
        self.sdist = folder / "fake-1.0.tar.gz"
        self.dest = folder / "build" / "llama.cpp"
        self.pack(TREE)
        self.write_hooks(HOOKS)

    def pack(self, tree: dict[str, str], prefix: str = "fake-1.0/vendor/llama.cpp/") -> None:
        with tarfile.open(self.sdist, "w:gz") as archive:
            for name, text in tree.items():
                info = tarfile.TarInfo(prefix + name)
                info.size = len(text)
                archive.addfile(info, io.BytesIO(text.encode()))
        self.write_pin()

    def write_pin(self, sha256: str | None = None) -> None:
        sha256 = sha256 or hashlib.sha256(self.sdist.read_bytes()).hexdigest()
        (self.patch_dir / "pin.toml").write_text(
            f'package = "fake"\nversion = "1.0"\nsdist = "fake-1.0.tar.gz"\nsha256 = "{sha256}"\n'
            'subdir = "vendor/llama.cpp"\nllama_cpp_commit = "0"\n'
        )

    def write_hooks(self, text: str) -> None:
        (self.patch_dir / "hooks.toml").write_text(text)

    def run(self, *arguments: str) -> int:
        arguments = arguments or ("--dest", str(self.dest), "--sdist", str(self.sdist))
        return apply.main([*arguments, "--cache", str(self.folder / "cache")], self.patch_dir)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    monkeypatch.delenv(apply.SDIST_VARIABLE, raising=False)
    return Fake(tmp_path)


@pytest.fixture(scope="module")
def real():
    """(pin, path, pristine tree, hooks) of the real sdist, if the user named it or a build has kept it."""
    pin = apply.load_pin(PATCH_DIR)
    named = os.environ.get(apply.SDIST_VARIABLE)
    path = Path(named) if named else apply.CACHE_DIR / pin.sdist
    if not path.is_file():
        (pytest.fail if named else pytest.skip)(f"no {path}: set {apply.SDIST_VARIABLE} to {pin.sdist} or build once")
    apply.verify(path, pin)
    return pin, path, apply.read_tree(path, pin), apply.load_hooks(PATCH_DIR)


def files_in(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*") if p.is_file()}


def times_in(folder: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in folder.rglob("*")}


def one_line(capsys) -> str:
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1, captured.err
    assert "Traceback" not in captured.err
    return captured.err


def test_tree_has_hooks_and_only_the_parts_we_build(fake):
    assert fake.run() == 0
    written = files_in(fake.dest)
    assert written.pop(apply.STAMP)
    assert written == {name: text for name, text in PATCHED.items() if name != "models/huge.gguf"}


def test_twice_changes_nothing_and_needs_no_sdist(fake):
    assert fake.run() == 0
    before = times_in(fake.dest.parent)
    fake.sdist.unlink()
    assert fake.run() == 0
    assert times_in(fake.dest.parent) == before


def test_changed_hook_rewrites_its_file_only(fake):
    assert fake.run() == 0
    (fake.dest / "src" / "gone.cpp").write_text("from an older pin\n")
    before = times_in(fake.dest / "src")
    fake.write_hooks(HOOKS.replace("'ours'", "'ours too'"))
    assert fake.run() == 0
    after = times_in(fake.dest / "src")
    changed = {Path(path).name for path in after if after[path] != before[path] and Path(path).is_file()}
    assert changed == {"a.h"}
    assert not (fake.dest / "src" / "gone.cpp").exists()


def test_diff_of_all_hooks(fake, capsys):
    assert fake.run("--diff", "--sdist", str(fake.sdist)) == 0
    printed = capsys.readouterr().out
    changes = [line for line in printed.splitlines() if line[:1] in "+-"]
    assert changes == [
        "--- a/src/a.h", "+++ b/src/a.h", "+ours",
        "--- a/src/b.cpp", "+++ b/src/b.cpp", "+  if (!mine()) {", "+  }", "+",
    ]  # fmt: skip
    assert fake.run() == 0
    assert fake.dest.with_name("llama.cpp.diff").read_text() == printed


def test_check_prints_each_hook_and_writes_no_tree(fake, capsys):
    assert fake.run("--check", "--sdist", str(fake.sdist)) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        ["ok", "after-line", "src/a.h:3"],
        ["ok", "wrap-open", "src/b.cpp:2"],
        ["ok", "wrap-close", "src/b.cpp:4"],
    ]
    assert not fake.dest.parent.exists()


def test_pristine_copy_is_unpatched_and_without_ggml(fake):
    stock = fake.folder / "stock"
    assert fake.run("--dest", str(fake.dest), "--pristine", str(stock), "--sdist", str(fake.sdist)) == 0
    written = files_in(stock)
    assert written.pop(apply.STAMP)
    assert written == {name: TREE[name] for name in ("LICENSE", "src/a.h", "src/b.cpp")}


@pytest.mark.parametrize(
    "file, text, expected",
    [
        ("src/a.h", "first\nlast\n", "hook 'after-line': its anchor occurs 0 times in src/a.h"),
        ("src/a.h", "member\nx\nmember\n", "hook 'after-line': its anchor occurs 2 times in src/a.h"),
        ("src/a.h", "// member\n", "hook 'after-line': its anchor occurs 0 times in src/a.h"),
        ("src/b.cpp", "  x();\n\n  y();\n", "hook 'wrap-close': its anchor occurs 0 times in src/b.cpp"),
        ("src/b.cpp", None, "hook 'wrap-open': src/b.cpp is missing"),
    ],
)
@pytest.mark.parametrize("action", ["--dest", "--check", "--diff"])
def test_misfit_names_hook_and_file(fake, capsys, action, file, text, expected):
    fake.pack({name: content for name, content in {**TREE, file: text}.items() if content is not None})
    arguments = [action, str(fake.dest)] if action == "--dest" else [action]
    assert fake.run(*arguments, "--sdist", str(fake.sdist)) == 2
    assert expected in one_line(capsys)
    assert not fake.dest.exists()


def test_hook_does_not_match_what_another_one_inserted(fake):
    fake.write_hooks(HOOKS.replace("insert = 'ours'", "insert = 'member'"))
    assert fake.run() == 0
    assert (fake.dest / "src/a.h").read_text() == "first\nmember\nmember\nlast\n"


@pytest.mark.parametrize(
    "hooks, expected",
    [
        (HOOKS.replace('where = "before"', 'where = "instead"'), "hook 'wrap-open': where is 'instead'"),
        (HOOKS.replace('"wrap-open"', '"after-line"'), "hook name 'after-line' occurs 2 times"),
        (HOOKS.replace("anchor = 'member'\n", ""), "hook 'after-line': "),
        (HOOKS.replace("relies_on", "relys_on", 1), "hook 'after-line': "),
        ("[[hook", "hooks.toml: "),
    ],
)
def test_malformed_hooks(fake, capsys, hooks, expected):
    fake.write_hooks(hooks)
    assert fake.run() == 2
    assert expected in one_line(capsys)


def test_wrong_hash(fake, capsys):
    fake.write_pin(sha256="0" * 64)
    assert fake.run() == 2
    line = one_line(capsys)
    assert str(fake.sdist) in line and "0" * 64 in line and "sha256" in line
    assert not fake.dest.exists()


def test_missing_path_by_flag_and_by_variable(fake, capsys, monkeypatch):
    missing = fake.folder / "nowhere.tar.gz"
    assert fake.run("--dest", str(fake.dest), "--sdist", str(missing)) == 2
    assert f"{missing}: no such file" in one_line(capsys)
    monkeypatch.setenv(apply.SDIST_VARIABLE, str(missing))
    assert fake.run("--dest", str(fake.dest)) == 2
    assert f"{missing}: no such file" in one_line(capsys)


@pytest.mark.parametrize(
    "prefix, expected",
    [
        ("../fake-1.0/vendor/llama.cpp/", "leaves the archive"),
        ("/fake-1.0/vendor/llama.cpp/", "leaves the archive"),
        ("other-1.0/vendor/llama.cpp/", "holds no fake-1.0/vendor/llama.cpp/"),
    ],
)
def test_foreign_archives(fake, capsys, prefix, expected):
    fake.pack(TREE, prefix)
    assert fake.run() == 2
    assert expected in one_line(capsys)
    assert not fake.dest.exists()


def test_truncated_archive(fake, capsys):
    fake.sdist.write_bytes(fake.sdist.read_bytes()[:-40])
    fake.write_pin()
    assert fake.run() == 2
    assert "not a readable sdist" in one_line(capsys)


def test_unreachable_index(fake, capsys, monkeypatch):
    failure = "print('WARNING: retrying'); raise SystemExit('ERROR: No matching distribution found')"
    monkeypatch.setattr(apply, "download_command", lambda pin, folder: [sys.executable, "-c", failure])
    assert fake.run("--dest", str(fake.dest)) == 2
    line = one_line(capsys)
    assert "cannot download fake==1.0" in line and "No matching distribution" in line and apply.SDIST_VARIABLE in line
    assert files_in(fake.folder / "cache") == {}


def test_download_is_kept_and_a_broken_one_is_fetched_again(fake, monkeypatch):
    calls = []

    def command(pin, folder):
        calls.append(folder)
        return [sys.executable, "-c", f"import shutil; shutil.copy({str(fake.sdist)!r}, {folder!r})"]

    monkeypatch.setattr(apply, "download_command", command)
    assert fake.run("--check") == 0
    assert fake.run("--check") == 0
    assert len(calls) == 1
    (fake.folder / "cache" / "fake-1.0.tar.gz").write_bytes(b"half")
    assert fake.run("--check") == 0
    assert len(calls) == 2


def test_download_command_asks_for_the_sdist_of_the_pin():
    pin = apply.load_pin(PATCH_DIR)
    command = apply.download_command(pin, "folder")
    assert command[1:4] == ["-m", "pip", "download"]
    assert command[-3:] == ["--no-binary", "llama-cpp-python", f"llama-cpp-python=={pin.version}"]
    assert "--no-deps" in command


def test_nothing_to_do_is_a_usage_error(fake):
    with pytest.raises(SystemExit) as stop:
        apply.main([], fake.patch_dir)
    assert stop.value.code == 2


# ---- what this repository says about itself


def test_readme_shows_the_hooks_as_they_are():
    shown = (PATCH_DIR / "README.md").read_text().split("<!-- hooks -->\n")[1].split("<!-- /hooks -->")[0]
    assert shown == apply.hook_table(apply.load_hooks(PATCH_DIR))


def test_every_hook_says_why():
    hooks = apply.load_hooks(PATCH_DIR)
    assert len(hooks) >= 11
    assert all(hook.why and "|" not in hook.why for hook in hooks)


def test_dependency_is_the_pinned_version():
    project = apply.read_toml(ROOT / "pyproject.toml")["project"]
    pin = apply.load_pin(PATCH_DIR)
    assert f"{pin.package}=={pin.version}" in project["dependencies"]


# ---- the real source


def test_real_hooks_fit_and_only_insert(real):
    _, _, tree, hooks = real
    patched = apply.patch_tree(tree, hooks)
    assert patched.keys() == tree.keys()
    assert {file for file in tree if patched[file] != tree[file]} == {hook.file for hook in hooks}
    for file in {hook.file for hook in hooks}:
        before, after = (t[file].decode().split("\n") for t in (tree, patched))
        inserted = sum(len(apply.inserted_lines(hook)) for hook in hooks if hook.file == file)
        assert len(after) == len(before) + inserted
        rest = iter(after)
        assert all(line in rest for line in before), f"{file}: not the pristine lines in their order"


def test_real_exports_hold_what_the_bindings_look_up(real):
    pin, path, _, _ = real
    with tarfile.open(path) as archive:
        name = f"llama_cpp_python-{pin.version}/llama_cpp/llama_cpp_ext.py"
        wanted = set(re.findall(r'"(_Z\w+)"', archive.extractfile(name).read().decode()))
    assert wanted
    assert wanted <= set(re.findall(r"\b(_Z\w+);", (PATCH_DIR / "exports.map").read_text()))


# ---- the AMX probe: its outcome can be forced, so every branch runs on any machine

AMX_OFF = "-mno-amx-tile;-mno-amx-int8;-mno-amx-bf16"


@pytest.mark.skipif(not shutil.which("cmake"), reason="no cmake")
@pytest.mark.parametrize(
    "definitions, said, flags",
    [
        (["HYLRA_AMX_RUN=0"], "AMX: works", ""),
        (["HYLRA_AMX_RUN=77"], "AMX: not on this machine", ""),
        (["HYLRA_AMX_RUN=78"], "AMX: not granted", ""),
        (["HYLRA_AMX_RUN=1"], "AMX: switched off", AMX_OFF),
        (["HYLRA_AMX_RUN=FAILED_TO_RUN"], "AMX: switched off", AMX_OFF),
        (["HYLRA_AMX_RUN=1", "GGML_NATIVE=OFF"], "AMX: not probed", ""),
        (["HYLRA_AMX_RUN=1", "CMAKE_SYSTEM_PROCESSOR=aarch64"], "AMX: not probed", ""),
        (["HYLRA_AMX_RUN=1", "CMAKE_CXX_COMPILER_ID=MSVC"], "AMX: not probed", ""),
    ],
)
def test_amx_outcomes(tmp_path, definitions, said, flags):
    script = tmp_path / "script.cmake"
    script.write_text(f'include("{ROOT}/cmake/amx.cmake")\nhylra_probe_amx()\nmessage(STATUS "flags=${{HYLRA_AMX_FLAGS}}.")\n')
    defaults = ["CMAKE_SYSTEM_PROCESSOR=x86_64", "CMAKE_CXX_COMPILER_ID=GNU"]
    command = ["cmake", *(f"-D{definition}" for definition in [*defaults, *definitions]), "-P", str(script)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said in printed
    assert f"flags={flags}." in printed
