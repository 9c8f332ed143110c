"""Digests that tell whether two peers hold the same weights.

They protect against mistakes, not against peers that lie. A model's digest covers its configuration and every weights
file. The digest of a file is cached in the user's cache folder until the file's size, time or inode changes. A block's
digest covers its tensors as they are stored.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import platformdirs

from peerd.compute.checkpoint.weights import StoredBytes
from peerd.compute.errors import CheckpointError

# Keys that say which program wrote a configuration, where it was read from or how it is run: they don't change the
# model.
_VOLATILE = frozenset(
    {"transformers_version", "_name_or_path", "_commit_hash", "dtype", "torch_dtype", "use_cache", "architectures"}
)


def canonical_config(config: Mapping[str, Any]) -> bytes:
    """A published configuration as sorted, compact JSON without volatile keys."""
    fields = {key: value for key, value in config.items() if key not in _VOLATILE}
    return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()


def model_digest(config: Mapping[str, Any], files: Mapping[str, bytes]) -> bytes:
    """sha256 over the canonical configuration and each weights file's name and sha256, sorted by name: 32 bytes."""
    digest = hashlib.sha256(b"peerd model 1\n")
    _add(digest, canonical_config(config))
    for name, sha256 in sorted(files.items()):
        _add(digest, name.encode())
        digest.update(sha256)
    return digest.digest()


def tensors_digest(tensors: Iterable[StoredBytes]) -> bytes:
    """sha256 over tensors in the order given: each one's name, dtype, shape and stored bytes: 32 bytes."""
    digest = hashlib.sha256(b"peerd block 1\n")
    for tensor in tensors:
        _add(digest, tensor.name.encode())
        _add(digest, tensor.dtype.encode())
        _add(digest, json.dumps(tensor.shape).encode())
        _add(digest, tensor.data)
    return digest.digest()


def file_digest(path: Path) -> bytes:
    """The file's sha256, 32 bytes: from the cache if the file has not changed. Raises CheckpointError."""
    try:
        with path.open("rb") as file:
            key = _identity(path, os.fstat(file.fileno()))
            entry = _cache_folder() / hashlib.sha256(json.dumps(key).encode()).hexdigest()
            if (known := _read_entry(entry, key)) is not None:
                return known
            digest = hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    _write_entry(entry, {**key, "sha256": digest.hex()})
    return digest


def _add(digest: Any, data: bytes | memoryview) -> None:
    """Hash a part together with its length, so that no two different sequences of parts hash the same bytes."""
    digest.update(len(data).to_bytes(8, "little"))
    digest.update(data)


def _identity(path: Path, status: os.stat_result) -> dict[str, Any]:
    return {
        "path": str(path.resolve()),
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "inode": status.st_ino,
    }


def _cache_folder() -> Path:
    return Path(platformdirs.user_cache_dir("peerd")) / "digests"


def _read_entry(entry: Path, key: Mapping[str, Any]) -> bytes | None:
    """The cached digest of exactly this file, or None. A damaged cache entry counts as missing."""
    try:
        found = json.loads(entry.read_bytes())
        digest = bytes.fromhex(found.pop("sha256"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return digest if found == key and len(digest) == 32 else None


def _write_entry(entry: Path, fields: Mapping[str, Any]) -> None:
    """Write the cache entry atomically. An entry that cannot be written costs only time: the file is hashed again."""
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=entry.parent, delete=False) as file:
            json.dump(fields, file)
        os.replace(file.name, entry)
    except OSError:
        return
