"""Reads the metadata of a GGUF file and rewrites its `hylra.*` keys, all else byte for byte; refuses big-endian files."""

from __future__ import annotations

import hashlib
import math
import os
import reprlib
import stat
import struct
from dataclasses import dataclass
from typing import Any, BinaryIO, Callable, Dict, NamedTuple, Optional, Tuple, Union

from gguf import GGML_QUANT_SIZES

from . import files
from .errors import ModelFileError, PolicyError, plain_os_errors

PREFIX, PAD_KEY = "hylra.", "hylra.pad"
Progress = Callable[[int, int], None]  # (bytes_done, bytes_total)
Path = Union[str, "os.PathLike[str]"]
Typed = Dict[str, Tuple[str, Any]]  # key -> (type name such as "u32", "f32[]", "string"; value)

_STRING, _ARRAY = 8, 9
_SCALARS = {0: ("u8", "B"), 1: ("i8", "b"), 2: ("u16", "H"), 3: ("i16", "h"), 4: ("u32", "I"), 5: ("i32", "i"),
            6: ("f32", "f"), 7: ("bool", "?"), 10: ("u64", "Q"), 11: ("i64", "q"), 12: ("f64", "d")}
_FORMATS = dict(_SCALARS.values())
_TYPE_IDS = {name: type_id for type_id, (name, _) in _SCALARS.items()}
_TYPE_SIZES = {int(kind): sizes for kind, sizes in GGML_QUANT_SIZES.items()}  # ggml type -> (block elements, block bytes)

_KEPT_BYTES = 64 << 10        # values up to this size stay in memory: everything but the tokenizer's arrays
_KEPT_HYLRA_BYTES = 64 << 20
_MAX_ALIGNMENT_BYTES = 1 << 20


class Field(NamedTuple):
    key: str
    type: str               # "u32", "string", "f32[]", ...
    start: int              # span of the whole key-value pair in the file
    end: int
    raw: Optional[bytes]    # the value's bytes, None for large ones


@dataclass(frozen=True)
class Header:
    """What stands before the tensor data: `infos` is the span of the tensor-info block, `padding` what follows up to the data."""

    path: str
    version: int
    tensor_count: int
    fields: dict[str, Field]
    alignment: int
    infos: tuple[int, int]
    padding: bytes
    data_start: int
    size_bytes: int
    stamp: tuple[int, ...]

    def get(self, key: str, default: Any = None) -> Any:
        return _decode(self.fields[key]) if key in self.fields else default

    def typed(self, prefix: str) -> Typed:
        """All keys below `prefix` as (type, value); the value is None where it is too large or a list of strings."""
        return {key: (field.type, _decode(field)) for key, field in self.fields.items() if key.startswith(prefix)}


# ---- reading

class _Cursor:
    """Reads forward and knows the size of the file, so that a wild count is found before anything is allocated."""

    def __init__(self, file: BinaryIO, path: str, size_bytes: int):
        self.file, self.path, self.size_bytes = file, path, size_bytes
        self.tell = file.tell

    def need(self, count: int, what: str) -> None:
        if count > self.size_bytes - self.tell():
            raise ModelFileError(f"{self.path}: {what} needs {count} bytes at byte {self.tell()}, but the file has only "
                                 f"{self.size_bytes}; it is truncated or damaged, fetch it again")

    def take(self, count: int, what: str) -> bytes:
        self.need(count, what)
        data = self.file.read(count)
        if len(data) < count:
            raise ModelFileError(f"{self.path}: the file became shorter while it was read; try again")
        return data

    def skip(self, count: int, what: str) -> None:
        self.need(count, what)
        self.file.seek(count, os.SEEK_CUR)

    def skip_strings(self, count: int, what: str) -> None:
        """Written out, because vocabularies have hundreds of thousands of strings."""
        self.need(count * 8, what)
        read = self.file.read
        for _ in range(count):
            head = read(8)
            if len(head) < 8:
                self.need(8, what)
            size = int.from_bytes(head, "little")
            if size > 4096 or len(read(size)) < size:
                self.skip(size, what)

    def u32(self, what: str) -> int:
        return int.from_bytes(self.take(4, what), "little")

    def u64(self, what: str) -> int:
        return int.from_bytes(self.take(8, what), "little")

    def name(self, what: str) -> str:
        count = self.u64(what)
        if not 0 < count <= 65535:
            raise ModelFileError(f"{self.path}: {what} is {count} bytes long, expected 1 to 65535; the file is damaged, fetch it again")
        text = self.take(count, what).decode(errors="replace")
        if not text.isprintable() or "\N{REPLACEMENT CHARACTER}" in text:
            raise ModelFileError(f"{self.path}: {what} is no readable text; the file is damaged, fetch it again")
        return text


def read_header(path: Path) -> Header:
    """The metadata of a GGUF file, checked to be complete; never reads tensor data."""
    path = os.fspath(path)
    with plain_os_errors(path), _open_regular(path) as file:
        info = os.fstat(file.fileno())
        cursor = _Cursor(file, path, info.st_size)
        version, tensor_count, kv_count = _read_fixed(cursor)
        fields = _read_fields(cursor, kv_count)
        alignment = _alignment(path, fields)
        infos_start = cursor.tell()
        last_name, data_bytes = _read_tensor_infos(cursor, tensor_count)
        infos_end = cursor.tell()
        data_start = _align(infos_end, alignment) if tensor_count else infos_end
        if data_start + data_bytes > info.st_size:
            raise ModelFileError(f"{path}: tensor {last_name!r} ends at byte {data_start + data_bytes}, but the file has "
                                 f"only {info.st_size}; it is truncated, fetch it again")
        padding = cursor.take(data_start - infos_end, "the padding before the tensor data")
        return Header(path, version, tensor_count, fields, alignment, (infos_start, infos_end), padding, data_start,
                      info.st_size, _stamp(info))


def model_shape(header: Header) -> tuple[str, int, int]:
    """(architecture, layers, KV heads of the widest layer) as the model's own metadata has them."""
    arch = header.get("general.architecture")
    layers = header.get(f"{arch}.block_count")
    heads = header.get(f"{arch}.attention.head_count_kv", header.get(f"{arch}.attention.head_count"))
    heads = max(heads, default=0) if isinstance(heads, tuple) else heads
    extra = header.get(f"{arch}.nextn_predict_layers", 0)
    for key, found, least in (("block_count", layers, 1), ("attention.head_count_kv", heads, 1), ("nextn_predict_layers", extra, 0)):
        if type(found) is not int or found < least:
            raise ModelFileError(f"{header.path}: {arch}.{key} is {reprlib.repr(found)}, expected a whole number from {least}; "
                                 "this is not a language model's file")
    return arch, layers - extra, heads  # llama_hparams::n_layer


def data_sha256(path: Path, progress: Optional[Progress] = None) -> str:
    """sha256 of everything from the start of the tensor data to the end of the file: the same before and after embed and strip."""
    header = read_header(path)
    digest, done, total = hashlib.sha256(), 0, header.size_bytes - header.data_start
    buffer = memoryview(bytearray(files.READ_BYTES))
    with plain_os_errors(header.path), _open_regular(header.path) as file:
        file.seek(header.data_start)
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            done += count
            if progress:
                progress(done, total)
    return digest.hexdigest()


def _open_regular(path: str) -> BinaryIO:
    # checked before open, which would wait for a writer on a FIFO
    if not stat.S_ISREG(os.stat(path).st_mode):
        kind = "a directory" if os.path.isdir(path) else "not a regular file"
        raise ModelFileError(f"{path}: this is {kind}, expected a GGUF file")
    return open(path, "rb")


def _stamp(info: os.stat_result) -> tuple[int, ...]:
    return info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns


def _align(offset: int, alignment: int) -> int:
    return offset + -offset % alignment


def _read_fixed(cursor: _Cursor) -> tuple[int, int, int]:
    path = cursor.path
    if not cursor.size_bytes:
        raise ModelFileError(f"{path}: the file is empty (0 bytes), expected a GGUF file")
    magic = cursor.file.read(4)
    if magic != b"GGUF":
        raise ModelFileError(f"{path}: starts with {magic!r}, expected b'GGUF'; this is not a GGUF file")
    version = cursor.u32("the GGUF version")
    if version and version & 0xFFFF == 0:
        raise ModelFileError(f"{path}: this GGUF file is big-endian, expected little-endian; convert it with gguf-convert-endian")
    if version not in (2, 3):
        raise ModelFileError(f"{path}: GGUF version {version}, expected 2 or 3; convert the model again with a current llama.cpp")
    tensor_count, kv_count = cursor.u64("the tensor count"), cursor.u64("the key count")
    cursor.need(tensor_count * 25 + kv_count * 14, f"a header of {kv_count} keys and {tensor_count} tensors")
    return version, tensor_count, kv_count


def _read_fields(cursor: _Cursor, count: int) -> dict[str, Field]:
    fields: dict[str, Field] = {}
    for index in range(count):
        start = cursor.tell()
        key = cursor.name(f"the name of key {index}")
        if key in fields:
            raise ModelFileError(f"{cursor.path}: key {key} stands there twice, which no loader accepts; convert the model again")
        type_id = cursor.u32(key)
        value_start = cursor.tell()
        type_name = _skip_value(cursor, key, type_id)
        value_bytes = cursor.tell() - value_start
        raw = None
        if type_name != "string[]" and value_bytes <= (_KEPT_HYLRA_BYTES if key.startswith(PREFIX) else _KEPT_BYTES):
            cursor.file.seek(value_start)
            raw = cursor.take(value_bytes, key)
        fields[key] = Field(key, type_name, start, cursor.tell(), raw)
    return fields


def _skip_value(cursor: _Cursor, key: str, type_id: int) -> str:
    if type_id == _STRING:
        cursor.skip(cursor.u64(key), key)
        return "string"
    item_id, count, suffix = type_id, 1, ""
    if type_id == _ARRAY:
        item_id, count, suffix = cursor.u32(key), cursor.u64(key), "[]"
    if item_id == _STRING:
        cursor.skip_strings(count, key)
        return "string[]"
    if item_id not in _SCALARS:
        raise ModelFileError(f"{cursor.path}: key {key} has value type {item_id}, expected 0 to 8 or 10 to 12; "
                             "the file is damaged or of a newer format")
    name, letter = _SCALARS[item_id]
    cursor.skip(count * struct.calcsize(letter), key)
    return name + suffix


def _decode(field: Field) -> Any:
    if field.raw is None:
        return None
    if field.type == "string":
        return field.raw[8:].decode(errors="replace")
    if field.type.endswith("[]"):
        letter = _FORMATS[field.type[:-2]]
        return struct.unpack_from(f"<{int.from_bytes(field.raw[4:12], 'little')}{letter}", field.raw, 12)
    return struct.unpack("<" + _FORMATS[field.type], field.raw)[0]


def _alignment(path: str, fields: dict[str, Field]) -> int:
    field = fields.get("general.alignment")
    if field is None:
        return 32
    value = _decode(field)
    if field.type != "u32" or value & (value - 1) or not 0 < value <= _MAX_ALIGNMENT_BYTES:
        raise ModelFileError(f"{path}: general.alignment is {value!r} ({field.type}), expected a power of two (u32) up to "
                             f"{_MAX_ALIGNMENT_BYTES}; the file is damaged")
    return value


def _read_tensor_infos(cursor: _Cursor, count: int) -> tuple[str, int]:
    """(name, end) of the tensor that ends last, counted from the data start; a type that is not known counts as empty."""
    last_name, last_end = "", 0
    for index in range(count):
        name = cursor.name(f"the name of tensor {index}")
        dims_count = cursor.u32(name)
        if dims_count > 4:
            raise ModelFileError(f"{cursor.path}: tensor {name!r} has {dims_count} dimensions, expected at most 4; the file is damaged")
        elements = math.prod(cursor.u64(name) for _ in range(dims_count))
        block_elements, block_bytes = _TYPE_SIZES.get(cursor.u32(name), (1, 0))
        end = cursor.u64(name) + elements // block_elements * block_bytes
        if end > last_end:
            last_name, last_end = name, end
    return last_name, last_end


# ---- writing

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
        with files.replacing(target, mode) as fd, _open_regular(header.path) as source:
            _check_unchanged(source, header)
            _write_parts(source.fileno(), fd, parts, progress)
            _check_unchanged(source, header)


def _check_unchanged(source: BinaryIO, header: Header) -> None:
    if _stamp(os.fstat(source.fileno())) != header.stamp:
        raise ModelFileError(f"{header.path}: the file changed after its header was read; nothing was written, try again")


def _layout(header: Header, kv: Typed) -> list[Union[bytes, tuple[int, int]]]:
    """The new file as a list of new bytes and spans of the old file."""
    kept = [field for field in header.fields.values() if not field.key.startswith(PREFIX)]
    added = b"".join(_encode(key, *value) for key, value in kv.items())
    fixed = struct.pack("<4sIQQ", b"GGUF", header.version, header.tensor_count, len(kept) + len(kv) + bool(kv))
    kept_end = len(fixed) + sum(field.end - field.start for field in kept) + header.infos[1] - header.infos[0]
    kept_data = _align(kept_end, header.alignment) if header.tensor_count else kept_end
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
        return head + struct.pack("<I", _STRING) + _bytes(value)
    type_id, letter = _TYPE_IDS[kind], _FORMATS[kind]
    if is_array:
        return head + struct.pack(f"<IIQ{len(value)}{letter}", _ARRAY, type_id, len(value), *value)
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
