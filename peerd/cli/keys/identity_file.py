"""The file with a peer's private key: made on first use, locked while in use.

It has the format of `openssl genpkey -algorithm ed25519`: PKCS #8 in PEM, unencrypted. Two daemons must
never use one key: both would announce themselves under one name, and each would take over the other's connections. So
the key is read, and even made, only under an exclusive lock on the file itself, which the system drops however the
process ends.
"""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from peerd.protocol.errors import CallerError
from peerd.protocol.identity import Identity, PeerId

_MAX_FILE_BYTES = 4096


class KeyFileError(CallerError):
    """The key file cannot be used as it is. The message names it and says what to do."""


@contextmanager
def load_or_create_identity(path: Path) -> Iterator[Identity]:
    """The identity in `path`, locked until the block ends; a new one if the file is missing or empty.

    The file gets mode 0600, and a directory that must be made gets 0700. Raises KeyFileError if another process uses
    the file, if others could read it, if it holds no Ed25519 key, or if it cannot be read or written.
    """
    try:
        file = _open(path)
    except OSError as error:
        raise KeyFileError(f"cannot use the key file {path}: {error.strerror}") from error
    with file:
        _refuse_readable_by_others(path, file)
        _lock(path, file)
        try:
            if os.fstat(file.fileno()).st_size == 0:
                _write_new_key(file)
            file.seek(0)
            data = file.read(_MAX_FILE_BYTES)
        except OSError as error:
            raise KeyFileError(f"cannot use the key file {path}: {error.strerror}") from error
        yield Identity(_parse(path, data))


def peer_id_in(path: Path, data: bytes) -> PeerId:
    """Whose key a key file with this content holds. Raises KeyFileError, which names `path`."""
    return Identity(_parse(path, data)).peer_id


def _open(path: Path) -> BinaryIO:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b", buffering=0)
    except OSError:
        # A key in a read-only file can be used too.
        if not os.access(path, os.R_OK):
            raise
        return open(path, "rb", buffering=0)


def _refuse_readable_by_others(path: Path, file: BinaryIO) -> None:
    mode = os.fstat(file.fileno()).st_mode
    if not stat.S_ISREG(mode):
        raise KeyFileError(f"the key file {path} is not a regular file")
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise KeyFileError(
            f"others may read the key file {path} (mode {stat.S_IMODE(mode):04o}), and could pose as this"
            f" peer: run 'chmod 600 {path}', or delete it if others may have read it"
        )


def _lock(path: Path, file: BinaryIO) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise KeyFileError(
            f"the key file {path} is in use by another peerd; give this one a key of its own: --identity FILE"
        ) from None
    except OSError as error:
        raise KeyFileError(f"cannot lock the key file {path}: {error.strerror}") from error


def _write_new_key(file: BinaryIO) -> None:
    pem = Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    try:
        file.write(pem)
        # A name that was announced and then lost in a power cut would stay in other peers' records.
        os.fsync(file.fileno())
    except OSError:
        file.truncate(0)
        raise


def _parse(path: Path, data: bytes) -> Ed25519PrivateKey:
    try:
        key = serialization.load_pem_private_key(data, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):  # TypeError: it is encrypted
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise KeyFileError(f"the key file {path} holds no unencrypted Ed25519 key in PEM (PKCS #8)")
    return key
