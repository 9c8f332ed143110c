"""Where the files of a checkpoint are: a folder of this machine, or a commit on the hub, fetched file by file.

This level has names and files; what is in them is read elsewhere.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Protocol

from peerd.compute.checkpoint.digests import file_digest
from peerd.compute.checkpoint.safetensors_file import SafetensorsFile, StoredTensor


class Folder(Protocol):
    """The files of a checkpoint by name. Methods that take names raise CheckpointError if a file cannot be had."""

    @property
    def where(self) -> Path:
        """The folder of this machine that holds the files that are here so far."""
        ...

    def __contains__(self, name: str) -> bool:
        """Whether the checkpoint has a file of that name, on this machine or on the hub."""
        ...

    def on_disk(self, name: str) -> bool:
        """Whether the whole file is on this machine."""
        ...

    def download_bytes(self, name: str) -> int:
        """The disk space of the file once it is downloaded, in bytes; 0 for a local file."""
        ...

    def fetch(self, names: Collection[str]) -> None:
        """Download the files that are missing, and keep them on this machine until the folder is closed."""
        ...

    def path(self, name: str) -> Path:
        """The file's path on this machine; the file is downloaded first if it is missing."""
        ...

    def tensors(self, name: str) -> Mapping[str, StoredTensor]:
        """The tensors that a safetensors file lists in its header, without downloading the file."""
        ...

    def sha256(self, name: str) -> bytes:
        """The file's sha256, 32 bytes. The file is not downloaded if the hub lists its sha256."""
        ...

    def close(self) -> None:
        """Allow the files to be deleted again."""
        ...


class LocalFolder:
    """Implements `Folder` for a directory whose files are all on this machine."""

    def __init__(self, where: Path) -> None:
        self._where = where

    @property
    def where(self) -> Path:
        return self._where

    def __contains__(self, name: str) -> bool:
        return self.on_disk(name)

    def on_disk(self, name: str) -> bool:
        return (self._where / name).exists()

    def download_bytes(self, name: str) -> int:
        return 0

    def fetch(self, names: Collection[str]) -> None:
        pass

    def path(self, name: str) -> Path:
        return self._where / name

    def tensors(self, name: str) -> Mapping[str, StoredTensor]:
        with SafetensorsFile(self._where / name) as file:
            return file.tensors

    def sha256(self, name: str) -> bytes:
        return file_digest(self._where / name)

    def close(self) -> None:
        pass
