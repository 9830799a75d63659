"""What tools that run bench-kernels share: SOURCE is the program, whose rows are measured and printed as JSON, or such JSON, printed as a table."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Callable


def rows_of(command: list[str]) -> list[dict]:
    """What bench-kernels prints: a row per number of cells"""
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def table_or_rows(source: str, table: Callable[[dict], str], measure: Callable[[], dict]) -> int:
    """The exit status; what bench-kernels refuses it has said itself."""
    if source.endswith(".json"):
        print(table(json.loads(Path(source).read_text())))
        return 0
    try:
        print(json.dumps(measure(), indent=1))
    except subprocess.CalledProcessError as error:
        return error.returncode
    except OSError as error:
        print(f"{Path(sys.argv[0]).stem}: {source}: {error.strerror}; name bench-kernels or a result that this printed", file=sys.stderr)
        return 2
    return 0
