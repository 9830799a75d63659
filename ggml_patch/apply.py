"""Turn the pinned sdist of llama-cpp-python into a llama.cpp source tree with our hooks in it.

Inserts lines only. Refuses a wrong sha256 and a hook whose anchor does not occur exactly once.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import importlib.util
import os
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

PATCH_DIR = Path(__file__).resolve().parent
CACHE_DIR = PATCH_DIR.parent / "build" / "sdist"
SDIST_VARIABLE = "HYLRA_LLAMA_CPP_SDIST"
STAMP = ".hylra-stamp"
# What CMake needs of llama.cpp for the bare library; the rest of it (tools, models, docs) is 100 MB.
BUILD_PARTS = ("CMakeLists.txt", "LICENSE", "cmake", "ggml", "include", "src", "vendor")
# The stock twin shares the ggml of the patched tree.
STOCK_PARTS = ("LICENSE", "include", "src")


class PatchError(Exception):
    """One line for people: what was found, what was expected, what to do."""


@dataclass(frozen=True)
class Pin:
    package: str
    version: str
    sdist: str
    sha256: str
    subdir: str
    llama_cpp_commit: str


@dataclass(frozen=True)
class Hook:
    name: str
    file: str
    anchor: str
    where: str
    insert: str
    why: str
    relies_on: list[str]


def read_toml(path: Path) -> dict:
    try:
        import tomllib
    except ModuleNotFoundError:
        try:
            import tomli as tomllib
        except ModuleNotFoundError:
            raise PatchError("Python older than 3.11 has no TOML reader; do: python -m pip install tomli") from None
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PatchError(f"{path}: {error}") from None


def record(kind, fields: dict, origin: Path):
    try:
        return kind(**fields)
    except TypeError as error:
        label = fields.get("name", "")
        raise PatchError(f"{origin}: {kind.__name__.lower()} {label!r}: {error}") from None


def load_pin(patch_dir: Path) -> Pin:
    path = patch_dir / "pin.toml"
    return record(Pin, read_toml(path), path)


def load_hooks(patch_dir: Path) -> list[Hook]:
    path = patch_dir / "hooks.toml"
    hooks = [record(Hook, fields, path) for fields in read_toml(path).get("hook", [])]
    for hook in hooks:
        if hook.where not in ("before", "after"):
            raise PatchError(f"{path}: hook {hook.name!r}: where is {hook.where!r}, expected 'before' or 'after'")
    names = [hook.name for hook in hooks]
    for name in names:
        if names.count(name) > 1:
            raise PatchError(f"{path}: hook name {name!r} occurs {names.count(name)} times, expected once")
    return hooks


def locate_sdist(pin: Pin, given: str | None, cache_dir: Path) -> Path:
    """Path of an sdist with the right hash: the one named by the user, the cached one, or a fresh download."""
    given = given or os.environ.get(SDIST_VARIABLE)
    if given:
        path = Path(given).expanduser()
        if not path.is_file():
            raise PatchError(f"{path}: no such file; --sdist and {SDIST_VARIABLE} expect the path of {pin.sdist}")
        verify(path, pin)
        return path
    cached = cache_dir / pin.sdist
    if cached.is_file() and sha256_of(cached) == pin.sha256:
        return cached
    return download(pin, cache_dir)


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def verify(path: Path, pin: Pin) -> None:
    found = sha256_of(path)
    if found != pin.sha256:
        raise PatchError(f"{path}: sha256 is {found}, expected {pin.sha256} ({pin.sdist}); fetch the file again")


def download(pin: Pin, cache_dir: Path) -> Path:
    """Fetch by the ordinary index client, so mirrors, proxies and caches of the user keep working."""
    cache_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_dir) as scratch:
        result = subprocess.run(download_command(pin, scratch), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        path = Path(scratch) / pin.sdist
        if result.returncode != 0 or not path.is_file():
            reasons = [line for line in result.stdout.splitlines() if line.strip() and not line.startswith("[notice]")]
            reason = reasons[-1].strip() if reasons else f"exit code {result.returncode}"
            raise PatchError(
                f"cannot download {pin.package}=={pin.version} with pip ({reason}); "
                f"check the package index or set {SDIST_VARIABLE}=/path/to/{pin.sdist}"
            )
        verify(path, pin)
        return path.replace(cache_dir / pin.sdist)


def download_command(pin: Pin, folder: str) -> list[str]:
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps", "--dest", folder]
    # pip asks a downloaded sdist for its metadata; an environment of its own for that would take longer than the download.
    if importlib.util.find_spec("scikit_build_core"):
        command.append("--no-build-isolation")
    return [*command, "--no-binary", pin.package, f"{pin.package}=={pin.version}"]


def read_tree(sdist: Path, pin: Pin) -> dict[str, bytes]:
    """The parts of llama.cpp that we build, by path relative to its root. Nothing is unpacked to disk here."""
    root = PurePosixPath(pin.sdist[: -len(".tar.gz")]) / pin.subdir
    tree = {}
    try:
        with tarfile.open(sdist) as archive:
            for member in archive:
                path = PurePosixPath(member.name)
                if path.is_absolute() or ".." in path.parts:
                    raise PatchError(f"{sdist}: member {member.name!r} leaves the archive; refused")
                if root in path.parents and member.isfile():
                    inner = path.relative_to(root)
                    if inner.parts[0] in BUILD_PARTS:
                        tree[str(inner)] = archive.extractfile(member).read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise PatchError(f"{sdist}: not a readable sdist ({error})") from None
    if not tree:
        raise PatchError(f"{sdist}: holds no {root}/; expected {pin.sdist}")
    return tree


def lines_of(text: str) -> list[str]:
    return text.strip("\n").split("\n")


def find_anchor(hook: Hook, lines: list[str]) -> int:
    """Index of the first line of the anchor."""
    anchor = lines_of(hook.anchor)
    found = [i for i in range(len(lines)) if lines[i : i + len(anchor)] == anchor]
    if len(found) != 1:
        raise PatchError(
            f"hook {hook.name!r}: its anchor occurs {len(found)} times in {hook.file}, expected once; "
            "the pinned source has changed, see ggml_patch/README.md"
        )
    return found[0]


def insert_at(hook: Hook, lines: list[str]) -> int:
    first = find_anchor(hook, lines)
    return first if hook.where == "before" else first + len(lines_of(hook.anchor))


def inserted_lines(hook: Hook) -> list[str]:
    # TOML drops the newline after ''' and keeps the one before the closing '''; an empty last line is meant.
    return (hook.insert[:-1] if hook.insert.endswith("\n") else hook.insert).split("\n")


def patch_file(text: str, hooks: list[Hook]) -> str:
    """All anchors are looked up in the pristine text, so no hook can match what another one inserted."""
    lines = text.split("\n")
    places = [(insert_at(hook, lines), hook) for hook in hooks]
    for place, hook in reversed(sorted(places, key=lambda item: item[0])):
        lines[place:place] = inserted_lines(hook)
    return "\n".join(lines)


def patch_tree(tree: dict[str, bytes], hooks: list[Hook]) -> dict[str, bytes]:
    patched = dict(tree)
    for file in sorted({hook.file for hook in hooks}):
        mine = [hook for hook in hooks if hook.file == file]
        if file not in tree:
            raise PatchError(f"hook {mine[0].name!r}: {file} is missing in the pinned source, see ggml_patch/README.md")
        patched[file] = patch_file(tree[file].decode("utf-8"), mine).encode("utf-8")
    return patched


def unified_diff(tree: dict[str, bytes], patched: dict[str, bytes]) -> str:
    out = []
    for file in sorted(patched):
        if patched[file] != tree[file]:
            before, after = (t[file].decode("utf-8").splitlines(keepends=True) for t in (tree, patched))
            out.extend(difflib.unified_diff(before, after, f"a/{file}", f"b/{file}"))
    return "".join(out)


def stamp_of(patch_dir: Path, parts: tuple[str, ...]) -> str:
    digest = hashlib.sha256(repr(parts).encode())
    for path in (patch_dir / "pin.toml", patch_dir / "hooks.toml", Path(__file__)):
        digest.update(path.read_bytes())
    return digest.hexdigest() + "\n"


def is_current(dest: Path, stamp: str) -> bool:
    path = dest / STAMP
    return path.is_file() and path.read_text() == stamp


def write_tree(dest: Path, tree: dict[str, bytes], stamp: str) -> None:
    """Rewrite only what differs, so that a changed hook recompiles its own file and no other."""
    (dest / STAMP).unlink(missing_ok=True)
    for path in [path for path in dest.rglob("*") if path.is_file()]:
        if path.relative_to(dest).as_posix() not in tree:
            path.unlink()
    for file, content in tree.items():
        path = dest / file
        if not path.is_file() or path.read_bytes() != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    (dest / STAMP).write_text(stamp)


def some_parts(tree: dict[str, bytes], parts: tuple[str, ...]) -> dict[str, bytes]:
    return {file: content for file, content in tree.items() if PurePosixPath(file).parts[0] in parts}


def prepare(args, patch_dir: Path) -> None:
    """Bring --dest (patched) and --pristine (stock twin) up to date; DEST.diff says what was inserted."""
    patched_stamp, stock_stamp = stamp_of(patch_dir, BUILD_PARTS), stamp_of(patch_dir, STOCK_PARTS)
    want_dest = args.dest and not is_current(args.dest, patched_stamp)
    want_pristine = args.pristine and not is_current(args.pristine, stock_stamp)
    if not want_dest and not want_pristine:
        return
    pin = load_pin(patch_dir)
    tree = read_tree(locate_sdist(pin, args.sdist, args.cache), pin)
    if want_dest:
        patched = patch_tree(tree, load_hooks(patch_dir))
        args.dest.mkdir(parents=True, exist_ok=True)
        args.dest.with_name(args.dest.name + ".diff").write_text(unified_diff(tree, patched), encoding="utf-8")
        write_tree(args.dest, patched, patched_stamp)
    if want_pristine:
        args.pristine.mkdir(parents=True, exist_ok=True)
        write_tree(args.pristine, some_parts(tree, STOCK_PARTS), stock_stamp)


def check(tree: dict[str, bytes], hooks: list[Hook]) -> None:
    patch_tree(tree, hooks)
    for hook in hooks:
        line = insert_at(hook, tree[hook.file].decode("utf-8").split("\n")) + 1
        print(f"ok  {hook.name:16} {hook.file}:{line}")


def hook_table(hooks: list[Hook]) -> str:
    """The table of README.md."""
    rows = ["| hook | file | why | relies on |", "| --- | --- | --- | --- |"]
    for hook in hooks:
        rows.append(f"| {hook.name} | {hook.file} | {hook.why} | {', '.join(hook.relies_on) or '-'} |")
    return "\n".join(rows) + "\n"


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="apply.py", description="Prepare the pinned llama.cpp source with our hooks.")
    parser.add_argument("--dest", type=Path, metavar="DIR", help="write the patched tree here (what CMake calls)")
    parser.add_argument("--pristine", type=Path, metavar="DIR", help="write an unpatched copy for the stock twin here")
    parser.add_argument("--check", action="store_true", help="try every hook on the pinned source, write no tree")
    parser.add_argument("--diff", action="store_true", help="print all hooks as one unified diff, write no tree")
    parser.add_argument("--table", action="store_true", help="print the table of hooks that README.md shows")
    parser.add_argument("--sdist", metavar="FILE", help=f"use this sdist, do not download (also: {SDIST_VARIABLE})")
    parser.add_argument("--cache", type=Path, default=CACHE_DIR, metavar="DIR", help="where a downloaded sdist is kept")
    args = parser.parse_args(argv)
    if not (args.dest or args.pristine or args.check or args.diff or args.table):
        parser.error("nothing to do; give --dest, --pristine, --check, --diff or --table")
    return args


def run(args: argparse.Namespace, patch_dir: Path) -> None:
    hooks = load_hooks(patch_dir)
    if args.table:
        print(hook_table(hooks), end="")
    if args.check or args.diff:
        pin = load_pin(patch_dir)
        tree = read_tree(locate_sdist(pin, args.sdist, args.cache), pin)
        if args.check:
            check(tree, hooks)
        if args.diff:
            print(unified_diff(tree, patch_tree(tree, hooks)), end="")
    prepare(args, patch_dir)


def main(argv: list[str] | None = None, patch_dir: Path = PATCH_DIR) -> int:
    args = parse_arguments(argv)
    try:
        run(args, patch_dir)
    except (PatchError, OSError) as error:
        print(f"ggml_patch/apply.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
