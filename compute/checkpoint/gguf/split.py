"""A GGUF model in one file, or in the numbered parts into which llama.cpp splits large models.

The first part holds the metadata; each part holds its own tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from peerd.compute.checkpoint.gguf.file import GgufFile, GgufTensor, Value
from peerd.compute.errors import CheckpointError

# llama.cpp's names of parts, such as model-00001-of-00003.gguf.
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


class GgufFiles:
    """All parts of a model, read as one. Raises CheckpointError on opening if a part is missing, incomplete or
    malformed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._parts = [GgufFile(path)]
        try:
            self.metadata: Mapping[str, Value] = self._parts[0].metadata
            self._parts += [GgufFile(part) for part in self._others()]
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

    def close(self) -> None:
        """Close all parts. Closing twice does nothing."""
        for part in self._parts:
            part.close()

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

    def _by_tensor(self) -> dict[str, GgufFile]:
        found: dict[str, GgufFile] = {}
        for part in self._parts:
            if twice := found.keys() & part.tensors.keys():
                raise CheckpointError(f"{part.path}: tensor {min(twice)} is in {found[min(twice)].path.name} too")
            found |= dict.fromkeys(part.tensors, part)
        total = self.metadata.get("split.tensors.count", len(found))
        if total != len(found):
            raise CheckpointError(f"{self.path}: its parts should hold {total} tensors, they hold {len(found)}")
        return found
