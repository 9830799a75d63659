"""Writing a policy into a model file: where to, through links, failures in the middle of a write, leftovers of a killed one."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import textwrap
import tracemalloc

import pytest
from test_gguf_header import LONGER, POLICY, assert_refused, sha256, write_model

from hylra_gguf import files
from hylra_gguf.errors import ModelFileError
from hylra_gguf.gguf_header import check_target, data_sha256, read_header, strip, write_policy
from hylra_gguf.policy import read_policy


@pytest.fixture
def model(tmp_path):
    return write_model(tmp_path / "model.gguf")


# ---- writing: places, links, modes

def test_out_leaves_the_model_alone(model, tmp_path):
    before, out = sha256(model), tmp_path / "out.gguf"
    model.chmod(0o640)
    write_policy(model, POLICY, out)
    assert sha256(model) == before and read_policy(out) == POLICY and out.stat().st_mode & 0o777 == 0o640
    assert_refused(lambda path: write_policy(model, LONGER, path), out, "this file exists")
    assert read_policy(out) == POLICY
    write_policy(model, LONGER, out, force=True)
    assert read_policy(out) == LONGER
    strip(out, tmp_path / "stripped.gguf")
    assert sha256(tmp_path / "stripped.gguf") == before and read_policy(out) == LONGER
    strip(model, tmp_path / "same.gguf")
    assert sha256(tmp_path / "same.gguf") == before


def test_out_that_is_the_model_itself_means_in_place(model, tmp_path):
    (tmp_path / "link.gguf").symlink_to(model)
    write_policy(model, POLICY, tmp_path / "link.gguf")
    assert read_policy(model) == POLICY and (tmp_path / "link.gguf").is_symlink()


def test_links(model, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    os.link(model, other / "hard.gguf")
    (other / "soft.gguf").symlink_to("../model.gguf")
    before = sha256(model)
    model.chmod(0o604)
    write_policy(other / "soft.gguf", POLICY)
    assert (other / "soft.gguf").is_symlink() and read_policy(model) == POLICY and model.stat().st_mode & 0o777 == 0o604
    assert sha256(other / "hard.gguf") == before
    assert sorted(os.listdir(other)) == ["hard.gguf", "soft.gguf"]


@pytest.mark.parametrize("out, words", [
    ("no/such/dir/out.gguf", "no such directory"),
    (".", "not a regular file"),
    ("pipe", "not a regular file"),
    ("x" * 250, "File name too long"),
])
def test_a_bad_output_is_one_line(out, words, model, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    before = sha256(model)
    with pytest.raises(ModelFileError) as caught:
        write_policy(model, POLICY, tmp_path / out)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert sha256(model) == before and sorted(os.listdir(tmp_path)) == ["model.gguf", "pipe"]


# ---- writing: failures in the middle

def partly(error):
    def copy(source, target, start, count):
        os.write(target, b"part")
        raise error

    return copy


def raising(error):
    def call(*_, **__):
        raise error

    return call


FULL_DISK, QUOTA = OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EDQUOT, "Disk quota exceeded")
NO_SPACE = "No space left on device; nothing was changed"
FAILURES = {
    "disk full in the copy": (files, "_copy_some", partly(FULL_DISK), ModelFileError, NO_SPACE),
    "disk full in the header": (os, "write", raising(FULL_DISK), ModelFileError, NO_SPACE),
    "quota": (files, "_copy_some", partly(QUOTA), ModelFileError, "Disk quota exceeded; nothing"),
    "bad disk at fsync": (os, "fsync", raising(OSError(errno.EIO, "Input/output error")), ModelFileError, "Input/output error"),
    "rename": (os, "replace", raising(OSError(errno.EBUSY, "Device or resource busy")), ModelFileError, "resource busy"),
    "read": (files, "_copy_some", raising(OSError(errno.EIO, "Input/output error")), ModelFileError, "Input/output error"),
    "early end": (files, "_copy_some", lambda *_: 0, ModelFileError, "ended early"),
    "interrupt": (files, "_copy_some", raising(KeyboardInterrupt()), KeyboardInterrupt, ""),
}


@pytest.mark.parametrize("owner, name, fake, kind, words", FAILURES.values(), ids=FAILURES)
def test_a_failed_write_changes_nothing(owner, name, fake, kind, words, model, tmp_path, monkeypatch):
    before = sha256(model)
    monkeypatch.setattr(owner, name, fake)
    for out in (None, tmp_path / "out.gguf"):
        with pytest.raises(kind) as caught:
            write_policy(model, POLICY, out)
        if kind is ModelFileError:
            assert words in str(caught.value) and str(out or model) in str(caught.value) and "\n" not in str(caught.value)
    monkeypatch.undo()
    assert sha256(model) == before and os.listdir(tmp_path) == ["model.gguf"]


def test_a_model_that_changes_meanwhile_is_left_alone(model, tmp_path):
    def meddle(done_bytes, total_bytes):
        os.utime(model, ns=(1, 1))

    with pytest.raises(ModelFileError, match="changed after its header was read"):
        write_policy(model, POLICY, progress=meddle)
    assert read_policy(model) is None and os.listdir(tmp_path) == ["model.gguf"]


def test_a_folder_that_cannot_be_synced_is_no_failure(model, monkeypatch):
    fsync = os.fsync
    calls = []

    def only_files(fd):
        calls.append(fd)
        if os.path.isdir(f"/proc/self/fd/{fd}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(fd)

    monkeypatch.setattr(os, "fsync", only_files)
    write_policy(model, POLICY)
    assert read_policy(model) == POLICY and len(calls) == 2


def no_kernel_copy(*_, **__):
    raise OSError(errno.EXDEV, "Invalid cross-device link")


@pytest.mark.parametrize("fake", [no_kernel_copy, lambda *_, **__: 0, None], ids=["refused", "copies nothing", "absent"])
def test_the_plain_copy_writes_the_same_file(fake, tmp_path, monkeypatch):
    path = write_model(tmp_path / "model.gguf", tail=os.urandom(300001))
    write_policy(path, POLICY, tmp_path / "kernel.gguf")
    if fake:
        monkeypatch.setattr(os, "copy_file_range", fake)
    else:
        monkeypatch.delattr(os, "copy_file_range")
    monkeypatch.setattr(files, "READ_BYTES", 1000)
    write_policy(path, POLICY, tmp_path / "plain.gguf")
    assert sha256(tmp_path / "plain.gguf") == sha256(tmp_path / "kernel.gguf")


def test_the_bulk_of_the_copy_can_share_blocks(tmp_path, monkeypatch):
    """File systems share a block only if it starts at a block boundary in both files."""
    path, starts = write_model(tmp_path / "model.gguf", tail=bytes(100000)), []

    def recorded(source, target, count, offset_src):
        starts.append((offset_src % 4096, os.lseek(target, 0, os.SEEK_CUR) % 4096))
        os.sendfile(target, source, offset_src, count)
        return count

    monkeypatch.setattr(os, "copy_file_range", recorded)
    write_policy(path, POLICY)
    assert starts[-1] == (0, 0) and starts[-2][0] == starts[-2][1] == read_header(path).data_start % 4096
    assert read_policy(path) == POLICY


def test_the_copy_is_sent_to_the_disk_while_it_goes_on(tmp_path, monkeypatch):
    """All of the tensor data before fsync; a system without the call, or one that refuses it, gets the same file."""
    path, calls = write_model(tmp_path / "model.gguf", tail=os.urandom(100000)), []
    fsync = os.fsync
    monkeypatch.setattr(files, "_sync_file_range", lambda fd, start, count, how: calls.append((start.value, start.value + count.value)))
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append("fsync") or fsync(fd))
    write_policy(path, POLICY, tmp_path / "hinted.gguf")
    sent, size = calls[:calls.index("fsync")], (tmp_path / "hinted.gguf").stat().st_size
    assert sent[-1][1] == size and all(left[1] == right[0] for left, right in zip(sent[-2:], sent[-1:]))
    assert sum(end - start for start, end in sent) >= size - read_header(tmp_path / "hinted.gguf").data_start
    monkeypatch.setattr(files, "_sync_file_range", lambda *_: -1)
    write_policy(path, POLICY, tmp_path / "refused.gguf")
    monkeypatch.setattr(files, "_sync_file_range", None)
    write_policy(path, POLICY, tmp_path / "absent.gguf")
    assert len({sha256(tmp_path / f"{name}.gguf") for name in ("hinted", "refused", "absent")}) == 1


def test_progress_ends_at_the_size_of_the_new_file(tmp_path):
    path, steps = write_model(tmp_path / "model.gguf", tail=bytes(100000)), []
    write_policy(path, POLICY, progress=lambda done, total: steps.append((done, total)))
    assert steps == sorted(steps) and steps[-1] == (path.stat().st_size, path.stat().st_size)
    steps.clear()
    data_sha256(path, lambda done, total: steps.append((done, total)))
    assert steps[-1][0] == steps[-1][1] == path.stat().st_size - read_header(path).data_start


@pytest.mark.parametrize("kernel", [True, False])
def test_memory_stays_flat(kernel, tmp_path, monkeypatch):
    path = write_model(tmp_path / "model.gguf")
    os.truncate(path, 96 << 20)
    if not kernel:
        monkeypatch.setattr(os, "copy_file_range", no_kernel_copy)
    tracemalloc.start()
    write_policy(path, POLICY)
    data_sha256(path)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 16 << 20


# ---- leftovers of a killed run

@pytest.mark.parametrize("act", [lambda path: write_policy(path, POLICY), strip], ids=["embed", "strip without a policy"])
def test_leftovers_of_dead_writers_go(act, model, tmp_path):
    (tmp_path / ".model.gguf.hylra.tmp").write_bytes(b"half a model")
    (tmp_path / ".model.gguf.hylra.tmp").chmod(0o444)
    (tmp_path / ".else.gguf.hylra.tmp").write_bytes(b"of another model")
    act(model)
    assert sorted(os.listdir(tmp_path)) == [".else.gguf.hylra.tmp", "model.gguf"]


def test_a_writer_holds_the_lock(model, tmp_path):
    def look(done_bytes, total_bytes):
        temporary, = [path for path in tmp_path.iterdir() if path != model]
        with open(temporary, "rb") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    write_policy(model, POLICY, progress=look)
    assert read_policy(model) == POLICY


def test_a_killed_run_harms_nothing(model, tmp_path):
    before = sha256(model)
    script = textwrap.dedent("""
        import os, signal, sys
        from hylra_gguf.gguf_header import write_policy
        from hylra_gguf.policy import Policy

        def die(done, total):
            if done * 2 > total:
                os.kill(os.getpid(), signal.SIGKILL)

        write_policy(sys.argv[1], Policy((1, 2, 2, 2), (0, 0, 0, 0), 2), progress=die)
    """)
    done = subprocess.run([sys.executable, "-c", script, str(model)], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = [name for name in os.listdir(tmp_path) if name != "model.gguf"]
    assert left == [".model.gguf.hylra.tmp"]
    assert sha256(model) == before
    write_policy(model, POLICY)
    assert os.listdir(tmp_path) == ["model.gguf"]
    strip(model)
    assert sha256(model) == before


def test_a_check_of_the_target_changes_nothing(model, tmp_path):
    before = sha256(model)
    assert check_target(model, tmp_path / "out.gguf").tensor_count == 2
    assert sha256(model) == before and os.listdir(tmp_path) == ["model.gguf"]
