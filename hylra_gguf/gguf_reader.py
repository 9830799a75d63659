"""Reads the metadata of a GGUF file without its tensor data; refuses what is broken, truncated or big-endian."""

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
from .errors import ModelFileError, plain_os_errors

PREFIX, PAD_KEY = "hylra.", "hylra.pad"
Progress = Callable[[int, int], None]  # (bytes_done, bytes_total)
Path = Union[str, "os.PathLike[str]"]
Typed = Dict[str, Tuple[str, Any]]  # key -> (type name such as "u32", "f32[]", "string"; value)

STRING, ARRAY = 8, 9
SCALARS = {0: ("u8", "B"), 1: ("i8", "b"), 2: ("u16", "H"), 3: ("i16", "h"), 4: ("u32", "I"), 5: ("i32", "i"),
           6: ("f32", "f"), 7: ("bool", "?"), 10: ("u64", "Q"), 11: ("i64", "q"), 12: ("f64", "d")}
FORMATS = dict(SCALARS.values())
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
    with plain_os_errors(path), open_regular(path) as file:
        info = os.fstat(file.fileno())
        cursor = _Cursor(file, path, info.st_size)
        version, tensor_count, kv_count = _read_fixed(cursor)
        fields = _read_fields(cursor, kv_count)
        alignment = _alignment(path, fields)
        infos_start = cursor.tell()
        last_name, data_bytes = _read_tensor_infos(cursor, tensor_count)
        infos_end = cursor.tell()
        data_start = align(infos_end, alignment) if tensor_count else infos_end
        if data_start + data_bytes > info.st_size:
            raise ModelFileError(f"{path}: tensor {last_name!r} ends at byte {data_start + data_bytes}, but the file has "
                                 f"only {info.st_size}; it is truncated, fetch it again")
        padding = cursor.take(data_start - infos_end, "the padding before the tensor data")
        return Header(path, version, tensor_count, fields, alignment, (infos_start, infos_end), padding, data_start,
                      info.st_size, stamp_of(info))


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
    with plain_os_errors(header.path), open_regular(header.path) as file:
        file.seek(header.data_start)
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            done += count
            if progress:
                progress(done, total)
    return digest.hexdigest()


def open_regular(path: str) -> BinaryIO:
    # checked before open, which would wait for a writer on a FIFO
    if not stat.S_ISREG(os.stat(path).st_mode):
        kind = "a directory" if os.path.isdir(path) else "not a regular file"
        raise ModelFileError(f"{path}: this is {kind}, expected a GGUF file")
    return open(path, "rb")


def stamp_of(info: os.stat_result) -> tuple[int, ...]:
    return info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns


def align(offset: int, alignment: int) -> int:
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
    if type_id == STRING:
        cursor.skip(cursor.u64(key), key)
        return "string"
    item_id, count, suffix = type_id, 1, ""
    if type_id == ARRAY:
        item_id, count, suffix = cursor.u32(key), cursor.u64(key), "[]"
    if item_id == STRING:
        cursor.skip_strings(count, key)
        return "string[]"
    if item_id not in SCALARS:
        raise ModelFileError(f"{cursor.path}: key {key} has value type {item_id}, expected 0 to 8 or 10 to 12; "
                             "the file is damaged or of a newer format")
    name, letter = SCALARS[item_id]
    cursor.skip(count * struct.calcsize(letter), key)
    return name + suffix


def _decode(field: Field) -> Any:
    if field.raw is None:
        return None
    if field.type == "string":
        return field.raw[8:].decode(errors="replace")
    if field.type.endswith("[]"):
        letter = FORMATS[field.type[:-2]]
        return struct.unpack_from(f"<{int.from_bytes(field.raw[4:12], 'little')}{letter}", field.raw, 12)
    return struct.unpack("<" + FORMATS[field.type], field.raw)[0]


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
