"""What happens to a model file when writers are killed, meet each other, run out of space or find it on another disk."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import tempfile
import textwrap
import threading
import time

import pytest
from kill_campaign import Campaign
from test_gguf_header import LONGER, POLICY, sha256, write_model
from test_gguf_writing import raising

from hylra_gguf import files
from hylra_gguf.errors import ModelFileError
from hylra_gguf.gguf_header import strip, write_policy
from hylra_gguf.policy import read_policy

KILLS = 20


@pytest.fixture
def model(tmp_path):
    return write_model(tmp_path / "model.gguf")


def test_a_writer_that_is_killed_leaves_the_old_or_the_new_file(tmp_path):
    """Real processes of the command line and SIGKILL at random moments; the long run is tools/kill_campaign.py."""
    model = write_model(tmp_path / "model.gguf", tail=os.urandom(16 << 20))
    result = Campaign(model, POLICY).run(KILLS)
    assert result["kills"] == KILLS and result["broken_files"] == result["leftovers_after_the_next_run"] == 0
    assert result["old_file"] + result["new_file"] == KILLS


# ---- two writers

def test_a_second_writer_is_refused_in_one_line(model, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LOCK_WAIT_S", 0.1)
    before = sha256(model)

    def meet(done_bytes, total_bytes):
        if done_bytes < total_bytes:
            return
        for name in ("model.gguf", "link.gguf"):
            with pytest.raises(ModelFileError) as caught:
                write_policy(tmp_path / name, LONGER)
            assert "another process is writing this file" in str(caught.value) and "\n" not in str(caught.value)
        assert sha256(model) == before

    (tmp_path / "link.gguf").symlink_to("model.gguf")
    write_policy(model, POLICY, progress=meet)
    assert read_policy(model) == POLICY and sorted(os.listdir(tmp_path)) == ["link.gguf", "model.gguf"]


def test_writers_of_one_output_meet_too(model, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LOCK_WAIT_S", 0.1)

    def meet(done_bytes, total_bytes):
        with pytest.raises(ModelFileError, match="another process is writing this file"):
            write_policy(model, LONGER, tmp_path / "out.gguf")

    write_policy(model, POLICY, tmp_path / "out.gguf", progress=meet)
    assert read_policy(tmp_path / "out.gguf") == POLICY


def test_a_writer_that_ends_soon_is_waited_for_and_its_work_is_not_lost(model, tmp_path):
    """The second one has read the old header before the first one is done: it must notice, not put the old file back."""
    started = threading.Event()

    def first():
        write_policy(model, POLICY, progress=lambda done, total: (started.set(), time.sleep(0.3 * (done == total))))

    thread = threading.Thread(target=first)
    thread.start()
    started.wait()
    with pytest.raises(ModelFileError, match="changed after its header was read; nothing was written, try again"):
        write_policy(model, LONGER)
    thread.join()
    assert read_policy(model) == POLICY and os.listdir(tmp_path) == ["model.gguf"]


WRITER = textwrap.dedent("""
    import sys
    from hylra_gguf.errors import ModelFileError
    from hylra_gguf.gguf_header import strip, write_policy
    from hylra_gguf.policy import Policy
    for i in range(40):
        try:
            write_policy(sys.argv[1], Policy((1, 2, 2, 1), (0, 0, 0, 3), 2, top_k=2000 + i))
            strip(sys.argv[1])
        except ModelFileError as error:
            assert "another process is writing" in str(error) or "changed after" in str(error), error
""")


def test_many_writers_at_once_never_break_the_file(model, tmp_path):
    before = sha256(model)
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(model)], stderr=subprocess.PIPE, text=True) for _ in range(4)]
    for writer in writers:
        assert writer.communicate()[1] == ""
    strip(model)
    assert sha256(model) == before and os.listdir(tmp_path) == ["model.gguf"]


def test_a_new_copy_that_another_writer_takes_for_a_leftover_is_left_to_it(model, tmp_path, monkeypatch):
    """Between the moment it is made and its lock another writer may lock it, to remove it: then its name is no longer ours to rename."""
    temporary, real, other = tmp_path / ".model.gguf.hylra.tmp", fcntl.flock, []

    def flock(fd, how):
        if not other:
            other.append(os.open(temporary, os.O_RDONLY))
            real(other[0], how)
        elif temporary.exists() and os.path.samestat(os.fstat(other[0]), temporary.stat()):
            temporary.unlink()
            real(other[0], fcntl.LOCK_UN)
        real(fd, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    write_policy(model, POLICY)
    assert read_policy(model) == POLICY and os.listdir(tmp_path) == ["model.gguf"]
    assert not os.path.samestat(os.fstat(other[0]), model.stat())
    os.close(other[0])


def test_without_locks_the_second_writer_is_refused_and_told_about_the_leftover(model, tmp_path, monkeypatch):
    """Some network file systems: no lock can say whether the writer of a temporary file still lives."""
    monkeypatch.setattr(files, "LOCK_WAIT_S", 0.1)
    monkeypatch.setattr(fcntl, "flock", raising(OSError(errno.ENOLCK, "No locks available")))
    write_policy(model, POLICY)
    assert read_policy(model) == POLICY
    leftover = tmp_path / ".model.gguf.hylra.tmp"
    leftover.write_bytes(b"half a model")
    with pytest.raises(ModelFileError, match=f"remove {leftover} if none does"):
        write_policy(model, LONGER)
    assert read_policy(model) == POLICY


@pytest.mark.parametrize("make", [os.mkdir, lambda path: os.symlink("model.gguf", path)], ids=["a directory", "a link to the model"])
def test_a_temporary_name_that_is_taken_is_one_line(make, model, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LOCK_WAIT_S", 0.1)
    before = sha256(model)
    make(tmp_path / ".model.gguf.hylra.tmp")
    with pytest.raises(ModelFileError, match="another process is writing this file"):
        write_policy(model, POLICY)
    assert sha256(model) == before


# ---- other disks, other processes

ON_A_SMALL_DISK = """
mount -t tmpfs -o size=200k tmpfs "$1" && cp model.gguf "$1" && cd "$1" || exit 9
head -c 80000 /dev/zero > other
"$2" -m hylra_gguf embed-policy model.gguf --policy "$3/policy.json"
echo $? $(ls -A) $(sha256sum < model.gguf)
rm other
"$2" -m hylra_gguf embed-policy model.gguf --policy "$3/policy.json" > /dev/null 2>&1
echo $? $(ls -A)
"""


def test_a_disk_that_is_really_full_is_one_line_and_stays_as_it_is(tmp_path):
    """A tmpfs in a name space of its own; when there is room again, the same command works."""
    if subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a disk in a name space of their own")
    model = write_model(tmp_path / "model.gguf", tail=os.urandom(80000))
    POLICY.save(tmp_path / "policy.json")
    (tmp_path / "disk").mkdir()
    done = subprocess.run(["unshare", "-rm", "sh", "-c", ON_A_SMALL_DISK, "sh", tmp_path / "disk", sys.executable, tmp_path],
                          cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.splitlines() == [f"2 model.gguf other {sha256(model)} -", "0 model.gguf"], done.stderr
    assert done.stderr == "hylra-gguf: error: model.gguf: No space left on device; nothing was changed, free some space or write to another disk with -o\n"


def test_a_link_to_another_disk_is_followed(model, tmp_path):
    """The copy is made beside the real file, so that the rename stays on its disk."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as other:
        assert os.stat(other).st_dev != os.stat(tmp_path).st_dev
        real = write_model(os.path.join(other, "real.gguf"))
        (tmp_path / "link.gguf").symlink_to(real)
        write_policy(tmp_path / "link.gguf", POLICY)
        assert read_policy(real) == POLICY and os.listdir(other) == ["real.gguf"]
        write_policy(model, LONGER, os.path.join(other, "out.gguf"))
        assert read_policy(os.path.join(other, "out.gguf")) == LONGER
    assert sorted(os.listdir(tmp_path)) == ["link.gguf", "model.gguf"]


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EBUSY], ids=["across devices", "a mount point"])
def test_a_rename_that_is_refused_changes_nothing(code, model, tmp_path, monkeypatch):
    before = sha256(model)
    monkeypatch.setattr(os, "replace", raising(OSError(code, os.strerror(code))))
    with pytest.raises(ModelFileError, match=f"model.gguf: {os.strerror(code)}"):
        write_policy(model, POLICY)
    assert sha256(model) == before and os.listdir(tmp_path) == ["model.gguf"]


READER = textwrap.dedent("""
    import hashlib, mmap, sys
    with open(sys.argv[1], "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        print("open", flush=True)
        sys.stdin.readline()
        print(hashlib.sha256(mapped).hexdigest(), hashlib.sha256(file.read()).hexdigest())
""")


def test_a_process_that_has_the_model_open_keeps_the_old_one(tmp_path):
    model = write_model(tmp_path / "model.gguf", tail=os.urandom(1 << 20))
    before = sha256(model)
    with subprocess.Popen([sys.executable, "-c", READER, str(model)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as reader:
        assert reader.stdout.readline() == "open\n"
        write_policy(model, POLICY)
        strip(model)
        write_policy(model, LONGER)
        assert reader.communicate("now\n")[0].split() == [before, before]
    assert read_policy(model) == LONGER


def test_a_private_model_is_private_while_it_is_written(model, tmp_path):
    model.chmod(0o600)

    def look(done_bytes, total_bytes):
        assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}

    write_policy(model, POLICY, progress=look)
    assert model.stat().st_mode & 0o777 == 0o600
