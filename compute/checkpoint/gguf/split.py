"""A GGUF model in one file, or in the numbered parts into which llama.cpp splits large models.

The first part holds the metadata; each part holds its own tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from peerd.compute.checkpoint.digests import file_digest
from peerd.compute.checkpoint.gguf.file import GgufFile
from peerd.compute.checkpoint.gguf.header import GgufTensor, Value
from peerd.compute.checkpoint.gguf.on_hub import HubGguf
from peerd.compute.errors import CheckpointError

if TYPE_CHECKING:
    from peerd.compute.checkpoint.hub_folder import HubFolder

# llama.cpp's names of parts, such as model-00001-of-00003.gguf.
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


def first_part(name: str) -> str:
    """The name of the first part of the model that the file `name` belongs to; `name` if it has one part."""
    match = _PART.fullmatch(name)
    return f"{match['stem']}-00001-of-{match['count']}.gguf" if match else name


class GgufFiles:
    """All parts of a model, read as one: files of this machine, or of a hub's `folder`, which are fetched piece by
    piece.

    Raises CheckpointError on opening if a part is missing, incomplete or malformed.
    """

    def __init__(self, path: Path, folder: HubFolder | None = None) -> None:
        self.path = path
        self._folder = folder
        self._parts: list[GgufFile | HubGguf] = [self._open(path)]
        try:
            self.metadata: Mapping[str, Value] = self._parts[0].metadata
            #: The metadata as they are stored, without long arrays (`GgufHeader`).
            self.stored_fields: Mapping[str, bytes] = self._parts[0].stored_fields
            self._parts += [self._open(part) for part in self._others()]
            self._part_of = self._by_tensor()
        except BaseException:
            self.close()
            raise
        self.tensors: Mapping[str, GgufTensor] = {
            name: part.tensors[name] for name, part in sorted(self._part_of.items())
        }

    @property
    def name(self) -> str:
        """The file's name without its ending and without the part's number."""
        match = _PART.fullmatch(self.path.name)
        return match["stem"] if match else self.path.stem

    @property
    def paths(self) -> tuple[Path, ...]:
        """Every part's path, in order."""
        return tuple(part.path for part in self._parts)

    @property
    def bytes_read(self) -> int:
        """How many bytes were read so far, headers included."""
        return sum(part.bytes_read for part in self._parts)

    def read_rows(self, tensor: GgufTensor, start: int, end: int) -> NDArray[np.uint8]:
        """The bytes of rows `start` to `end - 1`, uint8 [rows, row bytes]. Raises CheckpointError."""
        return self._part_of[tensor.name].read_rows(tensor, start, end)

    def digests(self) -> dict[str, bytes]:
        """The sha256 of every part, by file name; the hub's own for files on the hub."""
        if (folder := self._folder) is not None:
            return {path.name: folder.sha256(self._hub_name(path)) for path in self.paths}
        return {path.name: file_digest(path) for path in self.paths}

    def fetch(self, tensors: Iterable[str]) -> None:
        """Download the pieces that hold these tensors, and keep them until the files are closed."""
        if self._folder is not None:
            self._folder.fetch(self._pieces(tensors))

    def download_bytes(self, tensors: Iterable[str]) -> int:
        """The disk space of these tensors once they are downloaded, in bytes; 0 for files of this machine."""
        folder = self._folder
        return 0 if folder is None else sum(map(folder.download_bytes, self._pieces(tensors)))

    def on_disk(self, tensors: Iterable[str]) -> bool:
        """Whether these tensors can be read without a download."""
        return self._folder is None or all(map(self._folder.on_disk, self._pieces(tensors)))

    def metadata_alone(self) -> bytes | None:
        """A GGUF file of the same metadata, without tensors; None if the first part is a file of this machine."""
        first = self._parts[0]
        return first.metadata_alone() if isinstance(first, HubGguf) else None

    def close(self) -> None:
        """Close all parts. Closing twice does nothing."""
        for part in self._parts:
            part.close()
        if self._folder is not None:
            self._folder.close()

    def _open(self, path: Path) -> GgufFile | HubGguf:
        if (folder := self._folder) is None:
            return GgufFile(path)
        name = self._hub_name(path)
        if not folder.on_disk(name):
            return HubGguf(folder, name)
        # Another program, or an earlier release, fetched all of it.
        folder.fetch([name])
        return GgufFile(path)

    def _hub_name(self, path: Path) -> str:
        assert self._folder is not None
        return str(path.relative_to(self._folder.where))

    def _pieces(self, tensors: Iterable[str]) -> set[str]:
        by_part: dict[GgufFile | HubGguf, list[str]] = {}
        for name in tensors:
            if (part := self._part_of.get(name)) is not None:
                by_part.setdefault(part, []).append(name)
        found = [part.pieces(names) for part, names in by_part.items() if isinstance(part, HubGguf)]
        return set().union(*found)

    def _others(self) -> list[Path]:
        """The other parts' paths, in order."""
        count = self.metadata.get("split.count", 1)
        if count in (0, 1):
            return []
        if not isinstance(count, int):
            raise CheckpointError(f"{self.path}: split.count is {count!r}")
        match = _PART.fullmatch(self.path.name)
        if match is None or count != int(match["count"]):
            raise CheckpointError(
                f"{self.path}: is one of {count} parts, which are found by names like model-00001-of-00003.gguf"
            )
        paths = [self.path.with_name(f"{match['stem']}-{i:05d}-of-{match['count']}.gguf") for i in range(1, count + 1)]
        if self.path != paths[0]:
            raise CheckpointError(f"{self.path}: is not the first of {count} parts; open {paths[0].name}")
        return paths[1:]

    def _by_tensor(self) -> dict[str, GgufFile | HubGguf]:
        found: dict[str, GgufFile | HubGguf] = {}
        for part in self._parts:
            if twice := found.keys() & part.tensors.keys():
                raise CheckpointError(f"{part.path}: tensor {min(twice)} is in {found[min(twice)].path.name} too")
            found |= dict.fromkeys(part.tensors, part)
        total = self.metadata.get("split.tensors.count", len(found))
        if total != len(found):
            raise CheckpointError(f"{self.path}: its parts should hold {total} tensors, they hold {len(found)}")
        return found
