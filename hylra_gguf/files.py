"""Replaces a file as a whole or not at all, and copies spans of one; after a failed or killed write nothing has changed.

The copy lives in the same folder until it is complete, so it needs as much free space as the file.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import stat
import time
from typing import Iterator, Optional

BLOCK_BYTES = 4096  # file systems share blocks of this size between copies
READ_BYTES = 4 << 20
LOCK_WAIT_S = 1.0
_CHUNK_BYTES = 64 << 20
_SYNC_FILE_RANGE_WRITE = 2
_sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None)
_NO_KERNEL_COPY = {errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF, errno.ETXTBSY}


@contextlib.contextmanager
def replacing(target: str, mode: Optional[int] = None) -> Iterator[int]:
    """A descriptor whose content takes the place of `target` when the block ends well; if not, nothing changes or is left.

    One process at a time: another one waits for LOCK_WAIT_S and is then refused.
    """
    target = os.path.realpath(target)
    temporary = _temporary(target)
    fd = _open_temporary(temporary)
    try:
        _keep_owner(fd, target, mode)
        yield fd
        os.fsync(fd)
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            if _is_at(fd, temporary):
                os.unlink(temporary)
        raise
    finally:
        os.close(fd)
    with contextlib.suppress(OSError):  # the file is in place already
        _sync(os.path.dirname(target))


def remove_leftover(target: str) -> None:
    """Removes what a killed run has left beside `target`; a run that still writes holds the lock and keeps its file."""
    _remove_unlocked(_temporary(os.path.realpath(target)))


def _temporary(target: str) -> str:
    folder, name = os.path.split(target)
    return os.path.join(folder, f".{name}.hylra.tmp")  # always the same name: it is also the lock, and the next run finds it


def _open_temporary(path: str) -> int:
    end_s = time.monotonic() + LOCK_WAIT_S
    while True:
        _remove_unlocked(path)
        with contextlib.suppress(FileExistsError):
            fd = _create_locked(path)
            if fd is not None:
                return fd
        if time.monotonic() > end_s:
            raise OSError(errno.EBUSY, f"another process is writing this file; wait until it is done, or remove {path} if none does")
        time.sleep(0.02)


def _create_locked(path: str) -> Optional[int]:
    """None if another process took the new file for a leftover, before it was locked."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    if _lock(fd):
        with contextlib.suppress(FileNotFoundError):
            if _is_at(fd, path):
                return fd
    os.close(fd)
    return None


def _lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # some network file systems have no locks: there a leftover stays and is told
    return True


def _remove_unlocked(path: str) -> None:
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(fd, path):
                os.unlink(path)
        finally:
            os.close(fd)


def _is_at(fd: int, path: str) -> bool:
    return os.path.samestat(os.fstat(fd), os.lstat(path))


def _keep_owner(fd: int, target: str, mode: Optional[int]) -> None:
    """Owner and mode of the file that is replaced; a new file gets `mode`, or what the umask says."""
    with contextlib.suppress(FileNotFoundError):
        old = os.stat(target)
        mode = stat.S_IMODE(old.st_mode)
        with contextlib.suppress(PermissionError):
            os.fchown(fd, old.st_uid, old.st_gid)
    if mode is not None:
        os.fchmod(fd, mode)


def _sync(folder: str) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# ---- spans

def write(target: int, data: bytes) -> Iterator[int]:
    while data:
        count = os.write(target, data)
        data = data[count:]
        yield count


def copy(source: int, target: int, start: int, end: int) -> Iterator[int]:
    while start < end:
        # only a copy that starts at a block boundary can share blocks
        count = _copy_some(source, target, start, min(end - start, -start % BLOCK_BYTES or _CHUNK_BYTES))
        if not count:
            raise OSError(errno.EIO, "the file ended early while it was copied; nothing was written, try again")
        _send_to_disk(target, count)
        start += count
        yield count


def _send_to_disk(fd: int, count: int) -> None:
    """Starts to write back the last `count` bytes while the copy goes on, so that fsync finds little left; where Linux has the call for it."""
    if _sync_file_range:  # a hint: whether it fails is of no interest
        start = os.lseek(fd, 0, os.SEEK_CUR) - count
        _sync_file_range(fd, ctypes.c_int64(start), ctypes.c_int64(count), _SYNC_FILE_RANGE_WRITE)


def _copy_some(source: int, target: int, start: int, count: int) -> int:
    if hasattr(os, "copy_file_range"):
        try:
            done = os.copy_file_range(source, target, count, offset_src=start)
        except OSError as error:
            if error.errno not in _NO_KERNEL_COPY:
                raise
            done = 0
        if done:
            return done
    return sum(write(target, os.pread(source, min(count, READ_BYTES), start)))
