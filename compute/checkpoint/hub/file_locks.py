"""Locks on the files that are used. The system drops a lock when the process that holds it ends.

The locks are advisory, and only peerd's processes take and respect them. Some file systems have no locks: there files
are still read and written, but never deleted.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from contextlib import suppress
from pathlib import Path

log = logging.getLogger(__name__)


def hold(path: Path) -> int:
    """Open a file and lock it for reading, so that no peerd process deletes it. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    # If this fails, another program holds a lock, or the file is on a network file system that cannot lock.
    with suppress(OSError):
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    return fd


def lock_to_write(path: Path) -> int | None:
    """Open a file as its only writer, and create it if it is missing; None if it has another writer. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            # Two processes that fetch at once write the same bytes to the same places: that costs only traffic.
            log.warning("%s: its file system has no locks; two peers may fetch the same file", path.parent)
            return fd
        os.close(fd)
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return None
        raise
    return fd


def lock_if_unused(path: Path) -> int | None:
    """Open a file and lock it against all others, to delete it; None if another process uses it or that is unknown."""
    try:
        # Network file systems lock a file against others only if it is open for writing.
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        log.warning("%s cannot be deleted: %s", path, error.strerror)
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        log.debug("%s is not deleted: %s", path, error.strerror)
        os.close(fd)
        return None
    return fd


def share(fd: int) -> None:
    """Turn our lock for writing into one for reading: other processes may then read the file, but not delete it."""
    with suppress(OSError):
        fcntl.flock(fd, fcntl.LOCK_SH)
