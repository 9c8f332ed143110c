"""The file with a private swarm's key, in the format of libp2p's `swarm.key` (spec/connection/noise.md)."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from peerd.protocol.connection.noise import SWARM_KEY_BYTES
from peerd.protocol.errors import InvalidRequest

_HEADER = ("/key/swarm/psk/1.0.0/", "/base16/")
_MAX_FILE_BYTES = 1024
# The permissions that others must not have: all of them.
_OTHERS = 0o077


def create_swarm_key(path: Path) -> None:
    """Write a new key, mode 0600. Raises InvalidRequest if the file exists, or cannot be written."""
    text = "\n".join((*_HEADER, secrets.token_hex(SWARM_KEY_BYTES), ""))
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise InvalidRequest(
            f"{path} exists already, and a swarm's key is never overwritten: choose another file"
        ) from None
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be written: {error.strerror}") from None
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
            file.flush()
            # Members of the swarm may get copies at once, so the key must survive a power cut.
            os.fsync(file.fileno())
    except OSError as error:
        # An incomplete key file would be refused on every use, and never overwritten.
        path.unlink()
        raise InvalidRequest(f"{path} cannot be written: {error.strerror}") from None


def read_swarm_key(path: Path) -> bytes:
    """The key in a file. Raises InvalidRequest, also if others could read the file."""
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_mode & _OTHERS:
                raise InvalidRequest(f"{path} can be read by others: chmod 600 {path}")
            data = file.read(_MAX_FILE_BYTES)
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read: {error.strerror}") from None
    lines = data.decode("ascii", "replace").split()
    try:
        *header, digits = lines
        key = bytes.fromhex(digits)
    except ValueError:
        header, key = [], b""
    if tuple(header) != _HEADER or len(key) != SWARM_KEY_BYTES:
        raise InvalidRequest(f"{path} is not a swarm key: make one with peerd keys new-swarm FILE")
    return key
