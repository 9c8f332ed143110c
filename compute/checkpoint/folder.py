"""Where the files of a checkpoint lie: a folder of this machine, or a commit on the hub that is fetched as it is read.

Knows names and files, nothing of what is in them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Protocol

from peerd.compute.checkpoint.digests import file_digest
from peerd.compute.checkpoint.safetensors_file import SafetensorsFile, StoredTensor


class Folder(Protocol):
    """The files of a checkpoint by name. Whatever takes names raises CheckpointError where one cannot be had."""

    @property
    def where(self) -> Path:
        """The folder of this machine that holds what is there so far."""
        ...

    def __contains__(self, name: str) -> bool:
        """Whether the checkpoint has such a file, here or not."""
        ...

    def on_disk(self, name: str) -> bool:
        """Whether the file is on this machine, whole."""
        ...

    def download_bytes(self, name: str) -> int:
        """What the file takes of the disk once it is downloaded; 0 for one that never is."""
        ...

    def fetch(self, names: Collection[str]) -> None:
        """Have the files on this machine until the folder is closed."""
        ...

    def path(self, name: str) -> Path:
        """Where the file is, after fetching it if need be."""
        ...

    def tensors(self, name: str) -> Mapping[str, StoredTensor]:
        """What a safetensors file holds, without fetching it."""
        ...

    def sha256(self, name: str) -> bytes:
        """32 bytes, without fetching the file if somebody else knows them."""
        ...

    def close(self) -> None:
        """Let go of the files."""
        ...


class LocalFolder:
    """Implements `Folder` for what is all here."""

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
