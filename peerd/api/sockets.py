"""The sockets of the local API: a unix socket that only its owner can use, or a TCP port.

The path of a unix socket needs care: a socket that a dead daemon left is replaced, one on which a living daemon answers
is not, and another user must not be able to prepare the folder in which it lies.
"""

from __future__ import annotations

import fcntl
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from peerd.local.socket_path import own_folder
from peerd.protocol.errors import InvalidRequest

_BACKLOG = 128
# The longest path in Linux's socket addresses, without the zero at the end.
_LONGEST_PATH = 107


@contextmanager
def listen_unix(path: Path) -> Iterator[socket.socket]:
    """A listening socket at `path` with mode 0600, removed at the end. Raises InvalidRequest if that is impossible."""
    if len(os.fsencode(path)) > _LONGEST_PATH:
        raise InvalidRequest(
            f"{path} is longer than the {_LONGEST_PATH} bytes of a socket's path: choose another --socket"
        )
    if path.parent == own_folder():
        _make_own_folder(path.parent)
    if not path.parent.is_dir():
        raise InvalidRequest(f"{path.parent} is not a directory: create it, or choose another --socket")
    with _locked(path):
        _remove_stale(path)
        with _bound(path) as listener:
            try:
                yield listener
            finally:
                path.unlink(missing_ok=True)


@contextmanager
def listen_tcp(host: str, port: int) -> Iterator[socket.socket]:
    """A listening socket at a TCP port; port 0 takes any free one. Raises InvalidRequest if that is impossible."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.create_server(address[:2], family=family, backlog=_BACKLOG)
    except OSError as error:
        raise InvalidRequest(
            f"cannot listen on {host}:{port}: {error.strerror or error}; choose another --http"
        ) from None
    with listener:
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield listener


def _make_own_folder(folder: Path) -> None:
    """Every user may write to /tmp, so a folder there with our name is ours only if others have no access to it."""
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise InvalidRequest(f"{folder} is not a directory of yours with mode 0700: remove it, or set XDG_RUNTIME_DIR")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of a socket's path: the process with the lock is the only daemon there, whatever lies at the
    path.
    """
    lock = path.with_name(f"{path.name}.lock")
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        handle = os.open(lock, flags, 0o600)
    except OSError as error:
        raise InvalidRequest(f"{lock} cannot be written: {error.strerror}; choose another --socket") from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InvalidRequest(f"another peerd listens on {path}: stop it, or choose another --socket") from None
        yield
    finally:
        os.close(handle)


def _remove_stale(path: Path) -> None:
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise InvalidRequest(f"{path} exists and is not a socket: remove it, or choose another --socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            path.unlink(missing_ok=True)
            return
        except OSError as error:
            raise InvalidRequest(f"{path} is in use: {error.strerror}; choose another --socket") from None
    raise InvalidRequest(f"another program listens on {path}: stop it, or choose another --socket")


@contextmanager
def _bound(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        # The socket does not listen yet, so nobody can connect before the mode is changed.
        listener.bind(str(path))
        path.chmod(0o600)
        listener.listen(_BACKLOG)
        yield listener
