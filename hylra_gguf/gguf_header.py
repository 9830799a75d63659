"""Rewrites the `hylra.*` keys of a GGUF file, all else byte for byte; refuses files and places that must not be written.

What reads them is in gguf_reader.py; its names are here too.
"""

from __future__ import annotations

import os
import stat
import struct
from typing import Any, BinaryIO, Optional, Union

from . import files
from .errors import ModelFileError, PolicyError, plain_os_errors
from .gguf_reader import (ARRAY, FORMATS, PAD_KEY, PREFIX, SCALARS, STRING, Field, Header, Path, Progress, Typed, align, data_sha256, model_shape,
                          open_regular, read_header, stamp_of)

__all__ = ["PAD_KEY", "PREFIX", "Field", "Header", "Path", "Progress", "Typed", "check_fits", "check_target", "data_sha256", "model_shape",
           "read_header", "strip", "write_policy"]

_TYPE_IDS = {name: type_id for type_id, (name, _) in SCALARS.items()}


def write_policy(path: Path, policy: Any, out: Optional[Path] = None, progress: Optional[Progress] = None,
                 force: bool = False) -> None:
    """Puts `policy` into the model file, or into the copy `out`; an older policy in it is replaced.

    A symbolic link is followed and its target replaced. Of a file with several hard links only this name gets the new
    content; the other names keep the old one.
    """
    header = check_target(path, out, force)
    check_fits(header, policy)
    _splice(header, policy.to_gguf(), out, progress)


def check_fits(header: Header, policy: Any) -> None:
    """Raises a PolicyError that names the model, where its layers or KV heads are not those of the policy."""
    _, layer_count, head_kv_count = model_shape(header)
    try:
        policy.validate(layer_count, head_kv_count)
    except PolicyError as error:
        raise PolicyError(f"{header.path}: {error}") from error


def strip(path: Path, out: Optional[Path] = None, progress: Optional[Progress] = None, force: bool = False) -> int:
    """Removes every `hylra.*` key and returns how many there were; the file is again the one before `write_policy`."""
    header = check_target(path, out, force)
    count = len(header.typed(PREFIX))
    if count or _target(path, out) != _target(path):
        _splice(header, {}, out, progress)
    else:
        files.remove_leftover(_target(path))
    return count


def check_target(path: Path, out: Optional[Path] = None, force: bool = False) -> Header:
    """The header of `path`, if the model may be edited and the result may be written; changes nothing."""
    header, target = read_header(path), _target(path, out)
    shard = header.get("split.no", 0)
    if shard:
        raise ModelFileError(f"{path}: this is shard {shard} of a split model, whose metadata are in shard 0; "
                             "use the first shard (-00001-of-)")
    if target != _target(path) and os.path.lexists(target):
        if not os.path.isfile(target):
            raise ModelFileError(f"{out}: this exists and is not a regular file; choose another output")
        if not force:
            raise ModelFileError(f"{out}: this file exists; choose another output or overwrite it with --force")
    folder = os.path.dirname(target)
    if not os.path.isdir(folder):
        raise ModelFileError(f"{folder}: no such directory; create it first")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ModelFileError(f"{folder}: this directory is not writable, so no file in it can be replaced; "
                             "write a copy elsewhere with -o")
    return header


def _target(path: Path, out: Optional[Path] = None) -> str:
    return os.path.realpath(path if out is None else out)


def _splice(header: Header, kv: Typed, out: Optional[Path], progress: Optional[Progress]) -> None:
    foreign = [key for key in kv if not key.startswith(PREFIX)]
    if foreign:
        raise ModelFileError(f"{header.path}: refused to write {foreign[0]}; only {PREFIX}* keys are ours")
    parts, target = _layout(header, kv), _target(header.path, out)
    with plain_os_errors(os.fspath(out or header.path)):
        mode = stat.S_IMODE(os.stat(header.path).st_mode)
        # opened under the lock: before it, another writer may put a new file in the place of this one
        with files.replacing(target, mode) as fd, open_regular(header.path) as source:
            _check_unchanged(source, header)
            _write_parts(source.fileno(), fd, parts, progress)
            _check_unchanged(source, header)


def _check_unchanged(source: BinaryIO, header: Header) -> None:
    if stamp_of(os.fstat(source.fileno())) != header.stamp:
        raise ModelFileError(f"{header.path}: the file changed after its header was read; nothing was written, try again")


def _layout(header: Header, kv: Typed) -> list[Union[bytes, tuple[int, int]]]:
    """The new file as a list of new bytes and spans of the old file."""
    kept = [field for field in header.fields.values() if not field.key.startswith(PREFIX)]
    added = b"".join(_encode(key, *value) for key, value in kv.items())
    fixed = struct.pack("<4sIQQ", b"GGUF", header.version, header.tensor_count, len(kept) + len(kv) + bool(kv))
    kept_end = len(fixed) + sum(field.end - field.start for field in kept) + header.infos[1] - header.infos[0]
    kept_data = align(kept_end, header.alignment) if header.tensor_count else kept_end
    padding = _first_padding(header, kept_data - kept_end)
    if kv:
        added += _pad_field(kept_end + len(added), kept_data, max(files.BLOCK_BYTES, header.alignment), padding)
        padding = b""
    spans = [(field.start, field.end) for field in kept]
    return [fixed, *spans, added, header.infos, padding, (header.data_start, header.size_bytes)]


def _first_padding(header: Header, count: int) -> bytes:
    """The bytes that stood before the tensor data when the file had no `hylra.*` key yet."""
    if not header.typed(PREFIX):
        return header.padding
    try:
        stored = bytes.fromhex(header.get(PAD_KEY) or "")
    except (ValueError, TypeError):
        stored = b""  # not written here: another tool has padded with zeros
    return stored if len(stored) == count else bytes(count)


def _pad_field(end: int, kept_data: int, unit_bytes: int, padding: bytes) -> bytes:
    """Spaces that make the header grow by a multiple of `unit_bytes`; padding that was not zero is kept in front of them as hex."""
    text = padding.hex() if any(padding) else ""
    end += len(_encode(PAD_KEY, "string", text))
    return _encode(PAD_KEY, "string", text + " " * ((kept_data - end) % unit_bytes))


def _encode(key: str, type_name: str, value: Any) -> bytes:
    head, (kind, is_array, _) = _bytes(key), type_name.partition("[]")
    if kind == "string":
        return head + struct.pack("<I", STRING) + _bytes(value)
    type_id, letter = _TYPE_IDS[kind], FORMATS[kind]
    if is_array:
        return head + struct.pack(f"<IIQ{len(value)}{letter}", ARRAY, type_id, len(value), *value)
    return head + struct.pack(f"<I{letter}", type_id, value)


def _bytes(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _write_parts(source: int, target: int, parts: list[Union[bytes, tuple[int, int]]], progress: Optional[Progress]) -> None:
    total = sum(len(part) if isinstance(part, bytes) else part[1] - part[0] for part in parts)
    done = 0
    for part in parts:
        for count in files.write(target, part) if isinstance(part, bytes) else files.copy(source, target, *part):
            done += count
            if progress:
                progress(done, total)
