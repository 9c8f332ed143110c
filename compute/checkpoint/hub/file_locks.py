"""Locks on the very files that are used, which the system drops with the process that held them.

Advisory and between peerd's processes only: other programs neither take nor heed them. Knows no ledger. The difficulty
is file systems that have no locks: there files are read and written all the same, and never deleted.
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
    """Open a file and lock it for reading, so that no peerd deletes it. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    # Locked against us it can only be by other programs; some network file systems cannot lock at all.
    with suppress(OSError):
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    return fd


def lock_to_write(path: Path) -> int | None:
    """Open a file, made if it is missing, as its only writer; None if there is another. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            # Two that fetch at once write the same bytes to the same places: it costs traffic only.
            log.warning("%s: its file system has no locks; two peers may fetch the same file", path.parent)
            return fd
        os.close(fd)
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return None
        raise
    return fd


def lock_if_unused(path: Path) -> int | None:
    """Open a file and lock it against everybody, to delete it; None if somebody uses it or that cannot be known."""
    try:
        # Network file systems lock only what is open for writing.
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
    """Let others read what was ours to write, and keep it from being deleted."""
    with suppress(OSError):
        fcntl.flock(fd, fcntl.LOCK_SH)
