"""Builds the engine with a sanitizer of GCC and runs the tests that drive C++ on it; prints JSON.

    python tools/sanitize.py address > docs/trust-address.json        address and undefined-behaviour sanitizer
    python tools/sanitize.py thread > docs/trust-thread.json          thread sanitizer

The whole library is built so, llama.cpp included, into build/sanitize-NAME (some ten minutes the first time). A report that names a source
of ours is a failure: exit code 1. Reports about llama.cpp alone are counted and shown. Left out are the tests of bit-identity, whose other
arm is a build without sanitizer with other floating-point code, and cases that only do more of the same.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from hylra_gguf.bench import commit, cpu_info

ROOT = Path(__file__).resolve().parents[1]
# name -> (compiler flags, runtimes to load before Python, options)
SANITIZERS = {
    "address": ("-fsanitize=address,undefined", ("libasan.so", "libubsan.so"), "detect_leaks=0"),  # Python leaks by design
    "thread": ("-fsanitize=thread", ("libtsan.so",), "ignore_noninstrumented_modules=1"),
}
# a fault that the sanitizer must report, or it is not at work: a value behind the end of an array, two threads that write one number
CONTROL = """
#include <thread>
#include <cstdlib>
static int shared;
extern "C" int control(int at) {
    int * values = (int *) malloc(16*sizeof(int));
    std::thread other([&] { for (int i = 0; i < 1000; ++i) { shared += 1; } });
    for (int i = 0; i < 1000; ++i) { shared += 1; }
    other.join();
    return values[at] + shared;
}
"""
TESTS = tuple(f"tests/test_{name}.py" for name in ("kernels", "choose", "engine", "contexts", "layer_states", "masks", "graphs", "architectures", "life_cycle"))
# arms of another build; arms of the same nodes as a real selection has, and models of many layers alike: they only take long
LEFT_OUT = ("not bit_identical and not smollm2 and not stock and not r1_with_all and not covers_everything_gives and not DeepSeek and not QwQ "
            "and not profile_finds")
THREADS = {"address": "1", "thread": "2"}  # of every context that a test does not give a number
OURS = re.compile(r"ggml_patch/src|hylra[-_]|llama_hylra|llm_graph_input_hylra")
REPORT = re.compile(r"runtime error: .*|ERROR: AddressSanitizer: .*|WARNING: ThreadSanitizer: .*")


def build(name: str) -> Path:
    """The folder with the sanitized libllama and hylra.h."""
    tree, flags = ROOT / "build" / f"sanitize-{name}", f"{SANITIZERS[name][0]} -O1 -g1 -fno-omit-frame-pointer"
    options = [f"-DCMAKE_{language}_FLAGS{kind}={value}" for language in ("C", "CXX") for kind, value in (("", flags), ("_RELEASE", "-DNDEBUG"))]
    subprocess.run(["cmake", "-G", "Ninja", "-S", ROOT, "-B", tree, *options], check=True, stdout=sys.stderr)
    subprocess.run(["cmake", "--build", tree, "--target", "hylra", "-j2"], check=True, stdout=sys.stderr)
    shutil.copy(ROOT / "ggml_patch/src/hylra.h", tree / "lib")
    return tree / "lib"


def environment(name: str, library: Path, log: Path) -> dict[str, str]:
    _, runtimes, options = SANITIZERS[name]
    found = [subprocess.run(["gcc", f"-print-file-name={runtime}"], capture_output=True, text=True).stdout.strip() for runtime in runtimes]
    options = f"{options}:log_path={log}:halt_on_error=0"
    return {**os.environ, "LLAMA_CPP_LIB_PATH": str(library), "LD_PRELOAD": ":".join(found), "ASAN_OPTIONS": options, "TSAN_OPTIONS": options,
            "UBSAN_OPTIONS": f"log_path={log}:print_stacktrace=1", "OPENBLAS_NUM_THREADS": "1", "HYLRA_TEST_THREADS": THREADS[name]}


def reports(folder: Path) -> list[str]:
    """Every report of every process as one text; a report ends where the next begins."""
    text = "\n".join(path.read_text(errors="replace") for path in sorted(folder.iterdir()))
    starts = [match.start() for match in REPORT.finditer(text)]
    lines = [text.rfind("\n", 0, start) + 1 for start in starts]
    return [text[start:end] for start, end in zip(lines, [*lines[1:], len(text)])]


def control_reports(name: str, library: Path, folder: Path) -> int:
    """Reports of a fault made on purpose, in a library loaded as the engine is."""
    (folder / "control.cpp").write_text(CONTROL)
    (folder / "logs").mkdir()
    flags = SANITIZERS[name][0]
    subprocess.run(["g++", "-g", "-O0", "-fPIC", "-shared", flags, folder / "control.cpp", "-o", folder / "control.so"], check=True)
    script = f"import ctypes; ctypes.CDLL('{folder / 'control.so'}').control(16)"
    subprocess.run(["setarch", "-R", sys.executable, "-c", script], env=environment(name, library, folder / "logs" / "log"))
    return len(reports(folder / "logs"))


def run_tests(name: str, library: Path, tests: list[str], folder: Path) -> tuple[str, list[str]]:
    """(pytest's last line, reports)"""
    # the same addresses each time: the thread sanitizer of GCC 12 does not cope with every random layout
    command = ["setarch", "-R", sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", LEFT_OUT, *tests]
    done = subprocess.run(command, cwd=ROOT, env=environment(name, library, folder / "log"), stdout=subprocess.PIPE, text=True)
    print(done.stdout, file=sys.stderr)
    return (done.stdout.strip().splitlines() or ["no output"])[-1], reports(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sanitizer", choices=SANITIZERS)
    parser.add_argument("tests", nargs="*", default=TESTS, metavar="TEST", help=f"default: {' '.join(TESTS)}")
    args = parser.parse_args()
    library, start = build(args.sanitizer), time.monotonic()
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as other:
        control = control_reports(args.sanitizer, library, Path(other))
        last_line, found = run_tests(args.sanitizer, library, list(args.tests), Path(folder))
    ours = [text for text in found if OURS.search(text)]
    for text in found:
        print(text[:3000], file=sys.stderr)
    print(json.dumps({"command": f"python tools/sanitize.py {args.sanitizer}", "tests": list(args.tests), "left_out": LEFT_OUT, "threads": int(THREADS[args.sanitizer]), "pytest": last_line,
                      "passed": int((re.findall(r"(\d+) passed", last_line) or [0])[0]), "reports_about_a_fault_made_on_purpose": control,
                      "reports_about_our_sources": len(ours), "reports_about_llama_cpp": len(found) - len(ours),
                      "flags": SANITIZERS[args.sanitizer][0], "seconds": round(time.monotonic() - start), "machine": cpu_info(),
                      "commit": commit(), "test_time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}, indent=1))
    sys.exit(bool(ours) or not control or "failed" in last_line or "passed" not in last_line)


if __name__ == "__main__":
    main()
