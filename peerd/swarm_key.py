"""The file that makes a swarm private: a key that all its peers share, in the format of libp2p's private networks.

Knows files and text. Who has the key is in; who has not learns neither who a peer is nor what it serves
(spec/noise.md).
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from peerd.protocol.errors import InvalidRequest

KEY_BYTES = 32
_HEADER = ("/key/swarm/psk/1.0.0/", "/base16/")
_MAX_FILE_BYTES = 1024
# What others may do with the file: nothing.
_OTHERS = 0o077


def create_swarm_key(path: Path) -> None:
    """Write a new key, mode 0600. Raises InvalidRequest where the file is there already, or cannot be written."""
    text = "\n".join((*_HEADER, secrets.token_hex(KEY_BYTES), ""))
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise InvalidRequest(f"{path} is there already: a swarm's key is never written over") from None
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be written: {error.strerror}") from None
    with os.fdopen(handle, "w") as file:
        file.write(text)


def read_swarm_key(path: Path) -> bytes:
    """The key in a file. Raises InvalidRequest, also where others could read it."""
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
    if tuple(header) != _HEADER or len(key) != KEY_BYTES:
        raise InvalidRequest(f"{path} is no swarm key: peerd keys new-swarm FILE makes one")
    return key
