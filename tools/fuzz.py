"""Fuzzes what reads foreign bytes: `policy`, the engine's policy reader in C++ (libFuzzer), and `header`, the readers in Python (atheris).

    python tools/fuzz.py policy --runs 10000000 > docs/trust-fuzz-policy.json
    python tools/fuzz.py header --runs 1000000 > docs/trust-fuzz-header.json

Starts from tests/corpus/TARGET.tar.xz and tests/corpus/TARGET/ (inputs that once crashed, and some that must be accepted), and writes
the corpus back, minimised. Needs clang with libFuzzer or `pip install atheris`, and a build tree of the engine (`make test` leaves one).
An input that crashes ends it with code 1.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from hylra_gguf.bench import commit, cpu_info

ROOT = Path(__file__).resolve().parents[1]
CORPUS = ROOT / "tests" / "corpus"
# enum: llama.cpp reads a number of the file into one before it checks it
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-sanitize=enum")
LIBFUZZER = ("-O2", "-g", *SANITIZERS, "-fsanitize=fuzzer")
MAX_INPUT_BYTES = {"policy": 1024, "header": 2048}
INSTRUMENTED = ("import os, sys, atheris\n"
                "sys.argv[0] = os.environ['HYLRA_FUZZ_SELF']\n"  # libFuzzer starts itself again to merge
                "modules = ['gguf_header', 'gguf_reader', 'policy', 'policy_values', 'files']\n"
                "with atheris.instrument_imports(include=[f'hylra_gguf.{name}' for name in modules]):\n"
                "    import header_target\n"
                "header_target.main()\n")


# ---- building

def build_tree() -> Path:
    """The folder in which the engine was built last, but not with a sanitizer, whose objects link with their like alone."""
    trees = (path for path in ROOT.glob("build/*/compile_commands.json") if not path.parent.name.startswith("sanitize-"))
    found = sorted(trees, key=lambda path: path.stat().st_mtime)
    if not found:
        sys.exit(f"{ROOT}/build: no build tree of the engine, expected one; run make test first")
    return found[-1].parent


def build_policy_target(out: Path, compiler: str, flags: tuple[str, ...], driver: tuple[Path, ...] = ()) -> None:
    """The target with llama.cpp's own reader beside it, so that both are instrumented; the rest of ggml comes from its archive."""
    tree = build_tree()
    llama = tree / "llama.cpp"
    sources = [ROOT / "tools/fuzz/policy_target.cpp", ROOT / "ggml_patch/src/hylra-policy.cpp", llama / "src/llama-hparams.cpp",
               llama / "ggml/src/gguf.cpp", *driver]
    includes = [f"-I{folder}" for folder in (ROOT / "ggml_patch/src", llama / "src", llama / "include", llama / "ggml/include", llama / "ggml/src")]
    command = [compiler, "-std=c++17", *flags, *includes, *sources, tree / "llama.cpp-build/ggml/src/libggml-base.a",
               "-lpthread", "-o", out]
    subprocess.run([str(part) for part in command], check=True)


def clang() -> str:
    names = ("clang++", *(f"clang++-{number}" for number in range(22, 10, -1)))
    return next((path for path in map(shutil.which, names) if path), "") or sys.exit("no clang++ found; install clang with its libFuzzer")


def command_of(target: str, folder: Path) -> list[str]:
    program = folder / target
    if target == "policy":
        build_policy_target(program, clang(), LIBFUZZER)
    else:
        program.write_text(f'#!/bin/sh\nHYLRA_FUZZ_SELF="$0" exec {shlex.quote(sys.executable)} -c {shlex.quote(INSTRUMENTED)} "$@"\n')
        program.chmod(0o755)
    return [str(program)]


# ---- the corpus

def unpack(target: str, folder: Path) -> list[Path]:
    """Every committed input of a target as a file in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(CORPUS / f"{target}.tar.xz") as archive:
        for member in archive.getmembers():
            (folder / Path(member.name).name).write_bytes(archive.extractfile(member).read())
    for path in (CORPUS / target).glob("*"):
        shutil.copy(path, folder)
    return sorted(folder.iterdir())


def pack(target: str, folder: Path) -> int:
    """The same inputs give the same archive: names are their hashes, times are zero."""
    paths = sorted(folder.iterdir())
    with tarfile.open(CORPUS / f"{target}.tar.xz", "w:xz") as archive:
        for path in paths:
            info = tarfile.TarInfo(path.name)
            info.size = path.stat().st_size
            archive.addfile(info, io.BytesIO(path.read_bytes()))
    return len(paths)


# ---- the campaign

def fuzz(command: list[str], target: str, runs: int, folder: Path) -> tuple[int, str]:
    """(exit code, log) of one run; new inputs go into folder/found."""
    unpack(target, folder / "start")
    (folder / "found").mkdir()
    flags = [f"-runs={runs}", f"-max_len={MAX_INPUT_BYTES[target]}", "-print_final_stats=1", f"-artifact_prefix={folder}/", "-rss_limit_mb=4096"]
    paths = [str(folder / "found"), str(folder / "start")]
    done = subprocess.run([*command, *flags, *paths], stdout=sys.stderr, stderr=subprocess.PIPE, text=True, errors="replace", env=environment())
    return done.returncode, done.stderr


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "tools/fuzz"), os.environ.get("PYTHONPATH", "")])}


def minimise(command: list[str], target: str, folder: Path) -> int:
    (folder / "small").mkdir()
    flags = ["-merge=1", f"-max_len={MAX_INPUT_BYTES[target]}"]
    paths = [str(folder / name) for name in ("small", "found", "start")]
    subprocess.run([*command, *flags, *paths], check=True, stdout=sys.stderr, stderr=subprocess.DEVNULL, env=environment())
    return pack(target, folder / "small")


def result(target: str, log: str, seconds: float, inputs: int) -> dict:
    runs = int(re.search(r"stat::number_of_executed_units: (\d+)", log)[1])
    coverage = re.findall(r"cov: (\d+)", log)[-1]
    flags = " ".join(LIBFUZZER) if target == "policy" else "atheris"
    return {"command": f"python tools/fuzz.py {target} --runs {runs}", "executions": runs, "crashes": 0, "seconds": round(seconds),
            "executions_per_s": round(runs / seconds), "coverage_points": int(coverage), "corpus_inputs": inputs, "flags": flags,
            "machine": cpu_info(), "commit": commit(), "test_time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", choices=MAX_INPUT_BYTES)
    parser.add_argument("--runs", type=int, required=True, metavar="N")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command, start = command_of(args.target, folder), time.monotonic()
        code, log = fuzz(command, args.target, args.runs, folder)
        if code:
            (CORPUS / args.target).mkdir(exist_ok=True)
            for crash in folder.glob("*-*"):
                shutil.copy(crash, CORPUS / args.target)
            sys.exit(f"{log[-4000:]}\na crash; its input is now in {CORPUS / args.target}: fix the cause")
        seconds = time.monotonic() - start
        print(json.dumps(result(args.target, log, seconds, minimise(command, args.target, folder)), indent=1))


if __name__ == "__main__":
    main()
