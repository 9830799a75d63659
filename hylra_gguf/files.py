"""Replaces a file as a whole or not at all, and copies spans of one; after a failed or killed write nothing has changed.

The copy lives in the same folder until it is complete, so it needs as much free space as the file.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import stat
from typing import Iterator, Optional

BLOCK_BYTES = 4096  # file systems share blocks of this size between copies
READ_BYTES = 4 << 20
_CHUNK_BYTES = 64 << 20
_NO_KERNEL_COPY = {errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF, errno.ETXTBSY}


@contextlib.contextmanager
def replacing(target: str, mode: Optional[int] = None) -> Iterator[int]:
    """A descriptor whose content takes the place of `target` when the block ends well; if not, nothing changes or is left."""
    folder, name = os.path.split(os.path.realpath(target))
    _remove_leftovers(folder, name)
    temporary = os.path.join(folder, f".{name}.hylra-{secrets.token_hex(4)}.tmp")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with contextlib.suppress(OSError):  # some network file systems cannot
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield fd
        _keep_owner(fd, os.path.join(folder, name), mode)
        os.fsync(fd)
        os.replace(temporary, os.path.join(folder, name))
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    finally:
        os.close(fd)
    with contextlib.suppress(OSError):  # the file is in place already
        _sync(folder)


def _remove_leftovers(folder: str, name: str) -> None:
    """Removes what a killed run has left; a run that still writes holds a lock."""
    start = f".{name}.hylra-"
    with contextlib.suppress(OSError):
        for entry in os.listdir(folder):
            if entry.startswith(start) and entry.endswith(".tmp"):
                _remove_unlocked(os.path.join(folder, entry))


def _remove_unlocked(path: str) -> None:
    with contextlib.suppress(OSError), open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(path)


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
        start += count
        yield count


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
