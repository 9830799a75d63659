"""The header splice on odd but legal files and on broken ones."""

from __future__ import annotations

import hashlib
import os
import struct

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from hypothesis import HealthCheck, given, settings
from test_policy import MEASURED, policies

from hylra_gguf.errors import HylraError, ModelFileError, PolicyError
from hylra_gguf.gguf_header import data_sha256, model_shape, read_header, strip, write_policy
from hylra_gguf.policy import Policy, read_policy

POLICY = Policy((1, 2, 2, 1), (0, 0, 0, 3), 2, theta=0.95, summary="short", measured=MEASURED)
LONGER = Policy((0, 1, 2, 2), (-1, 1, 1, 1), 2, calibration="x" * 5000, overlap=(0.5,) * 16)


def write_model(path, alignment=None, tensors=True, name="tiny", tail=b""):
    writer = GGUFWriter(path, "llama")
    if alignment:
        writer.add_custom_alignment(alignment)
    writer.add_name(name)
    writer.add_block_count(4)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_uint32("hylra_like.key", 7)
    writer.add_bool("other.flag", True)
    writer.add_token_list(["a", "bc", "", "ü"])
    writer.add_array("other.numbers", [1, 2, 3])
    if tensors:
        writer.add_tensor("first", np.arange(35, dtype=np.float32).reshape(5, 7))
        writer.add_tensor("second", np.arange(68, dtype=np.uint8).reshape(2, 34), raw_dtype=GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with open(path, "ab") as file:
        file.write(tail)
    return path


def patched(path, *edits):
    data = bytearray(path.read_bytes())
    for offset, new in edits:
        data[offset:offset + len(new)] = new
    path.write_bytes(data)
    return path


def without_padding(path):
    for length in range(1, 65):
        header = read_header(write_model(path, name="n" * length))
        if not header.padding:
            return path
    raise AssertionError("no name length gives an empty padding")


def with_strange_padding(path, alignment=None):
    header = read_header(write_model(path, alignment))
    assert len(header.padding) > 2
    return patched(path, (header.infos[1], bytes(1 + at % 255 for at in range(len(header.padding)))))


def with_unknown_type(path):
    header = read_header(write_model(path))
    return patched(path, (header.infos[1] - 12, struct.pack("<I", 4242)))


ODD_FILES = {
    "plain": write_model,
    "alignment 64": lambda path: write_model(path, 64),
    "alignment 8192": lambda path: write_model(path, 8192),
    "alignment 1": lambda path: write_model(path, 1),
    "no padding": without_padding,
    "padding not zero": with_strange_padding,
    "8 KB of padding not zero": lambda path: with_strange_padding(path, 8192),
    "no tensors": lambda path: write_model(path, tensors=False),
    "no tensors, but a tail": lambda path: write_model(path, tensors=False, tail=b"tail of 15 bytes"),
    "tail": lambda path: write_model(path, tail=os.urandom(70001)),
    "GGUF 2": lambda path: patched(write_model(path), (4, b"\2")),
    "unknown tensor type": with_unknown_type,
}


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def model(tmp_path):
    return write_model(tmp_path / "model.gguf")


@pytest.mark.parametrize("build", ODD_FILES.values(), ids=ODD_FILES)
def test_strip_restores_every_byte(build, tmp_path):
    path = build(tmp_path / "model.gguf")
    before, size, data = sha256(path), path.stat().st_size, data_sha256(path)
    for policy in (POLICY, LONGER, POLICY):
        write_policy(path, policy)
        header = read_header(path)
        assert read_policy(path) == policy and data_sha256(path) == data
        assert (path.stat().st_size - size) % 4096 == 0 and path.stat().st_size >= size
        assert header.data_start % header.alignment == 0 or not header.tensor_count
    removed = strip(path)
    assert removed == len(POLICY.to_gguf()) + 1 and sha256(path) == before
    assert strip(path) == 0 and sha256(path) == before
    assert os.listdir(tmp_path) == ["model.gguf"]


@pytest.mark.parametrize("name", [name for name in ODD_FILES if name != "unknown tensor type"])
def test_the_common_reader_sees_the_same_model(name, tmp_path):
    path, copy = ODD_FILES[name](tmp_path / "model.gguf"), tmp_path / "copy.gguf"
    write_policy(path, POLICY, copy)
    old, new = GGUFReader(path), GGUFReader(copy)
    ours = {key for key in new.fields if key.startswith("hylra.")}
    assert ours == set(POLICY.to_gguf()) | {"hylra.pad"}
    assert {key: old.fields[key].contents() for key in old.fields if key != "GGUF.kv_count"} == \
        {key: new.fields[key].contents() for key in new.fields if key not in ours and key != "GGUF.kv_count"}
    for key, (_, value) in POLICY.to_gguf().items():
        assert new.fields[key].contents() == (pytest.approx(value) if isinstance(value, float) else value)
    assert [(t.name, t.tensor_type, t.data.tobytes()) for t in old.tensors] == \
        [(t.name, t.tensor_type, t.data.tobytes()) for t in new.tensors]


def test_keys_of_ours_are_replaced_wherever_they_stand(tmp_path):
    path = tmp_path / "model.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_uint32("hylra.top_k", 7)
    writer.add_block_count(4)
    writer.add_array("hylra.strange", ["a", "b"])
    writer.add_head_count(2)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_ti_data_to_file, writer.close):
        write()
    with pytest.raises(PolicyError, match="model.gguf: hylra.strange|model.gguf: key|model.gguf: .*strange"):
        read_policy(path)
    write_policy(path, POLICY)
    assert read_policy(path) == POLICY
    strip(path)
    assert list(read_header(path).fields) == ["general.architecture", "llama.block_count", "llama.attention.head_count"]


def test_strip_survives_a_pad_of_another_tool(model):
    before = sha256(model)
    write_policy(model, POLICY)
    span = read_header(model).fields["hylra.pad"]
    patched(model, (span.end - 5, b"~~~~~"))
    strip(model)
    assert sha256(model) == before


def test_metadata(model):
    header = read_header(model)
    assert model_shape(header) == ("llama", 4, 2)
    assert header.get("general.name") == "tiny" and header.get("other.numbers") == (1, 2, 3) and header.get("other.flag") is True
    assert header.get("no.key", 5) == 5 and header.get("tokenizer.ggml.tokens") is None
    assert header.typed("other.") == {"other.flag": ("bool", True), "other.numbers": ("i32[]", (1, 2, 3))}
    assert data_sha256(model) == hashlib.sha256(model.read_bytes()[header.data_start:]).hexdigest()


@pytest.mark.parametrize("heads, expected", [(("head_count", 6), 6), (("head_count_kv", [0, 3, 8, 0]), 8)])
def test_kv_heads_of_the_widest_layer(heads, expected, tmp_path):
    path, writer = tmp_path / "model.gguf", GGUFWriter(tmp_path / "model.gguf", "qwen4")
    writer.add_block_count(4)
    getattr(writer, f"add_{heads[0]}")(heads[1])
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_ti_data_to_file, writer.close):
        write()
    assert model_shape(read_header(path)) == ("qwen4", 4, expected)


def test_layers_that_only_predict_further_tokens_do_not_count(tmp_path):
    path, writer = tmp_path / "model.gguf", GGUFWriter(tmp_path / "model.gguf", "glm4moe")
    writer.add_block_count(4)
    writer.add_head_count(2)
    writer.add_nextn_predict_layers(1)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_ti_data_to_file, writer.close):
        write()
    assert model_shape(read_header(path)) == ("glm4moe", 3, 2)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(policies())
def test_any_policy_survives_a_model_file(tmp_path, policy):
    path, copy = tmp_path / "model.gguf", tmp_path / "copy.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(policy.layer_count)
    writer.add_head_count_kv([policy.head_kv_count] * policy.layer_count)
    writer.add_tensor("only", np.ones(3, dtype=np.float32))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        write()
    write_policy(path, policy, copy, force=True)
    assert read_policy(copy) == policy and read_policy(path) is None
    strip(copy)
    assert sha256(copy) == sha256(path)


# ---- broken files

def key(name, type_id, payload):
    return struct.pack("<Q", len(name)) + name + struct.pack("<I", type_id) + payload


def raw(*keys, version=3, tensors=b"", tensor_count=0, key_count=None, magic=b"GGUF"):
    return magic + struct.pack("<IQQ", version, tensor_count, len(keys) if key_count is None else key_count) + b"".join(keys) + tensors


def tensor(name=b"t", dims=(4,), kind=0, offset=0):
    return struct.pack("<Q", len(name)) + name + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


U32 = struct.pack("<I", 1)
BROKEN = {
    "empty": (b"", "empty (0 bytes)"),
    "3 bytes": (b"GGU", "not a GGUF file"),
    "text": (b"PK\3\4 some zip file", "not a GGUF file"),
    "old ggml": (b"lmgg" + bytes(64), "not a GGUF file"),
    "only magic": (b"GGUF", "the GGUF version needs 4 bytes"),
    "version 1": (raw(version=1), "GGUF version 1, expected 2 or 3"),
    "version 4": (raw(version=4), "GGUF version 4, expected 2 or 3"),
    "version 0": (raw(version=0), "GGUF version 0"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "no counts": (raw()[:12], "truncated"),
    "huge key count": (raw(key_count=2**63), "a header of 9223372036854775808 keys"),
    "huge tensor count": (raw(tensor_count=2**60), "a header of 0 keys and 1152921504606846976 tensors"),
    "one key missing": (raw(key(b"a", 4, U32), key_count=2), "truncated"),
    "empty key": (raw(key(b"", 4, U32), key(b"b", 4, U32)), "key 0 is 0 bytes long"),
    "long key": (raw(key(b"x" * 65536, 4, U32)), "key 0 is 65536 bytes long"),
    "key not UTF-8": (raw(key(b"\xff\xfe", 4, U32)), "key 0 is no readable text"),
    "key of two lines": (raw(key(b"a\nb", 4, U32)), "key 0 is no readable text"),
    "key twice": (raw(key(b"a", 4, U32), key(b"a", 4, U32)), "key a stands there twice"),
    "unknown type": (raw(key(b"a", 13, U32)), "key a has value type 13"),
    "array of arrays": (raw(key(b"a", 9, struct.pack("<IQ", 9, 1) + bytes(12))), "key a has value type 9"),
    "array of unknown": (raw(key(b"a", 9, struct.pack("<IQ", 77, 1) + bytes(12))), "key a has value type 77"),
    "huge string": (raw(key(b"a", 8, struct.pack("<Q", 2**62))), "a needs 4611686018427387904 bytes"),
    "huge array": (raw(key(b"a", 9, struct.pack("<IQ", 4, 2**62))), "a needs 18446744073709551616 bytes"),
    "huge string list": (raw(key(b"a", 9, struct.pack("<IQ", 8, 2**61))), "a needs 18446744073709551616 bytes"),
    "string list ends early": (raw(key(b"a", 9, struct.pack("<IQQ", 8, 2, 5) + b"short!")), "a needs"),
    "string list ends between strings": (raw(key(b"a", 9, struct.pack("<IQQ", 8, 3, 16) + bytes(16))), "a needs 8 bytes"),
    "long string in a list": (raw(key(b"a", 9, struct.pack("<IQQ", 8, 1, 5000) + bytes(9))), "a needs 5000 bytes"),
    "alignment 0": (raw(key(b"general.alignment", 4, struct.pack("<I", 0))), "general.alignment is 0"),
    "alignment 48": (raw(key(b"general.alignment", 4, struct.pack("<I", 48))), "general.alignment is 48"),
    "alignment 2 GB": (raw(key(b"general.alignment", 4, struct.pack("<I", 2**31))), "general.alignment is 2147483648"),
    "alignment u64": (raw(key(b"general.alignment", 10, struct.pack("<Q", 32))), "general.alignment is 32 (u64)"),
    "alignment string": (raw(key(b"general.alignment", 8, struct.pack("<Q", 2) + b"32")), "general.alignment is '32' (string)"),
    "alignment array": (raw(key(b"general.alignment", 9, struct.pack("<IQI", 4, 1, 32))), "general.alignment is (32,) (u32[])"),
    "five dimensions": (raw(tensors=tensor(dims=(1,) * 5) + bytes(64), tensor_count=1), "tensor 't' has 5 dimensions"),
    "no data": (raw(tensors=tensor(), tensor_count=1), "truncated"),
    "data too short": (raw(tensors=tensor(dims=(40,)) + bytes(99), tensor_count=1), "tensor 't' ends at byte"),
    "data behind the end": (raw(tensors=tensor(offset=2**63) + bytes(99), tensor_count=1), "tensor 't' ends at byte"),
    "unknown type behind the end": (raw(tensors=tensor(kind=4242, offset=4096) + bytes(99), tensor_count=1), "tensor 't' ends at byte"),
    "wild dimensions": (raw(tensors=tensor(dims=(2**63,) * 4) + bytes(99), tensor_count=1), "tensor 't' ends at byte"),
}


@pytest.mark.parametrize("content, words", BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_one_line_and_stays_as_it_is(content, words, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    for call in (read_header, read_policy, data_sha256, strip, lambda path: write_policy(path, POLICY)):
        assert_refused(call, path, words)
    assert path.read_bytes() == content and os.listdir(tmp_path) == ["model.gguf"]


def assert_refused(call, path, words, kind=ModelFileError):
    with pytest.raises(kind) as caught:
        call(path)
    text = str(caught.value)
    assert "\n" not in text and str(path) in text and words in text, text


def test_every_truncation_is_noticed(model, tmp_path):
    write_policy(model, POLICY)
    header, content = read_header(model), model.read_bytes()
    short = tmp_path / "short.gguf"
    last_byte = header.data_start + 35 * 4 + -(35 * 4) % 32 + 68
    for length in [*range(0, header.data_start, 7), *range(header.data_start, last_byte)]:
        short.write_bytes(content[:length])
        with pytest.raises(ModelFileError):
            read_header(short)
    short.write_bytes(content[:last_byte])
    assert read_header(short).tensor_count == 2


def test_no_damaged_byte_gives_more_than_one_line(model, tmp_path):
    write_policy(model, POLICY)
    content, path, refused = model.read_bytes(), tmp_path / "damaged.gguf", 0
    used = read_header(model).fields["hylra.pad"].start
    for offset in [*range(used), *range(*read_header(model).infos)]:
        path.write_bytes(content[:offset] + bytes([content[offset] ^ (0xFF if offset % 2 else 0x81)]) + content[offset + 1:])
        try:
            read_policy(path)
            model_shape(read_header(path))
        except HylraError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > used // 2


@pytest.mark.parametrize("make, words", [
    (lambda path: None, "No such file or directory"),
    (lambda path: path.mkdir(), "this is a directory"),
    (lambda path: os.mkfifo(path), "not a regular file"),
    (lambda path: path.symlink_to(path), "Too many levels of symbolic links"),
])
def test_what_is_no_file_is_one_line(make, words, tmp_path):
    path = tmp_path / "model.gguf"
    make(path)
    for call in (read_header, read_policy, data_sha256, strip, lambda path: write_policy(path, POLICY)):
        assert_refused(call, path, words)


def test_a_later_shard_is_refused(tmp_path):
    for number, suffix in ((0, "00001"), (1, "00002")):
        path, writer = tmp_path / f"m-{suffix}-of-00002.gguf", GGUFWriter(tmp_path / f"m-{suffix}-of-00002.gguf", "llama")
        writer.add_block_count(4)
        writer.add_head_count_kv(2)
        writer.add_uint16("split.no", number)
        for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_ti_data_to_file, writer.close):
            write()
    assert_refused(lambda path: write_policy(path, POLICY), path, "use the first shard")
    assert_refused(strip, path, "use the first shard")
    first = tmp_path / "m-00001-of-00002.gguf"
    write_policy(first, POLICY)
    assert read_policy(first) == POLICY


@pytest.mark.parametrize("name", ["general.alignment", "split.no", "llama.block_count", "hylra"])
def test_only_keys_of_ours_are_written(name, model):
    class Strange(Policy):
        def to_gguf(self):
            return {**super().to_gguf(), name: ("u32", 64)}

    before = sha256(model)
    assert_refused(lambda path: write_policy(path, Strange((1, 2, 2, 2), (0, 0, 0, 0), 2)), model, f"refused to write {name}")
    assert sha256(model) == before


@pytest.mark.parametrize("policy, words", [
    (Policy((1, 2), (0, 0), 2), "2 layers, but the model has 4"),
    (Policy((1, 2, 2, 2), (0, 0, 0, 0), 8), "8 KV heads, but the model has 2"),
])
def test_a_policy_that_does_not_fit_is_refused(policy, words, model):
    before = sha256(model)
    assert_refused(lambda path: write_policy(path, policy), model, words, PolicyError)
    assert sha256(model) == before
