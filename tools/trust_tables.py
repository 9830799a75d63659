"""Fills in and checks the counts of docs/trust.md: `python tools/trust_tables.py` writes them, `--check` tells where they are wrong.

A row of its tables is `| promise | shown by | count |`. The middle cell names tests as `tests/file.py::name`, of which every collected
case counts (a name stands for all that begin with it and go on with [), and results as `docs/file.json#key.key`, whose number counts.
Between the marks `architectures` stands a table made from tests/architectures.py.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "trust.md"
ROW = re.compile(r"^\| (?P<promise>[^|]+) \| (?P<shown>[^|]*`[^|]+) \| (?P<count>[^|]*) \|$")
REFERENCE = re.compile(r"`(tests/[\w/]+\.py(?:::\w+)?|docs/[\w./-]+\.json#[\w.-]+)`")
MARKED = re.compile(r"(<!-- architectures -->\n).*?(<!-- /architectures -->)", re.DOTALL)
WHY = {"w": "sliding window", "r": "recurrent"}


def collected() -> Counter:
    """Cases per `tests/file.py::name` and per `tests/file.py`."""
    done = subprocess.run([sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"pytest --collect-only failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    ids = [line for line in done.stdout.splitlines() if "::" in line]
    return Counter(line.split("[")[0] for line in ids) + Counter(line.split("::")[0] for line in ids)


def number_in(reference: str) -> float:
    """As it stands there, but a size or a count without its fraction."""
    path, keys = reference.split("#")
    value = json.loads((ROOT / path).read_text())
    for key in keys.split("."):
        value = value[key]
    return value if value < 10 else int(value)


def count_of(shown: str, cases: Counter) -> float:
    """Raises KeyError for what is not there."""
    total = 0
    for reference in REFERENCE.findall(shown):
        found = number_in(reference) if "#" in reference else cases[reference]
        if not found:
            raise KeyError(reference)
        total += found
    return total


def architectures() -> str:
    sys.path.insert(0, str(ROOT / "tests"))
    from architectures import ARCHITECTURES, LARGE

    lines = ["| model | general.architecture | layers | served | left to llama.cpp |", "| --- | --- | --- | --- | --- |"]
    for name, a in {**ARCHITECTURES, **LARGE}.items():
        left = ", ".join(f"{a.layers.count(kind)} {why}" for kind, why in WHY.items() if kind in a.layers)
        lines.append(f"| {name} | {a.arch} | {len(a.layers)} | {a.layers.count('a')} | {left or '-'} |")
    return "\n".join(lines) + "\n"


def filled(text: str) -> str:
    """The document with every count and the table of architectures as they are now."""
    cases = collected()
    text = MARKED.sub(lambda found: found[1] + architectures() + found[2], text)

    def line_of(line: str) -> str:
        row = ROW.match(line)
        return f"| {row['promise']} | {row['shown']} | {count_of(row['shown'], cases)} |" if row else line

    return "\n".join(map(line_of, text.splitlines())) + "\n"


def main() -> None:
    text = DOCUMENT.read_text()
    wanted = filled(text)
    if "--check" not in sys.argv[1:]:
        DOCUMENT.write_text(wanted)
        return
    wrong = [f"docs/trust.md:{at}: {new}" for at, (old, new) in enumerate(zip(text.splitlines(), wanted.splitlines()), 1) if old != new]
    if text != wanted:
        sys.exit("\n".join([*wrong, "docs/trust.md is not what the tests are; run: python tools/trust_tables.py"]))


if __name__ == "__main__":
    main()
