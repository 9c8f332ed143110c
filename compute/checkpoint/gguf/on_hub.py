"""A GGUF file on the hub, of which only the pieces that are needed are fetched.

Its header comes first, in pieces of fixed size. Then each block is a piece, or several if it is large, and each tensor
outside the blocks is one. So a server fetches its own blocks alone, and other spans of the same model share what is
here. Pieces are files of the hub's folder like any other: the same ledger counts, locks and deletes them.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from peerd.compute.checkpoint.gguf.file import read_rows
from peerd.compute.checkpoint.gguf.header import GgufHeader, GgufTensor, HeaderGoesOn
from peerd.compute.errors import CheckpointError

if TYPE_CHECKING:
    from peerd.compute.checkpoint.hub_folder import HubFolder

# The header of a model with 150 000 tokens takes about 6 MiB.
HEADER_PIECE_BYTES = 4 << 20
# A header that claims to be longer is refused, before it is fetched.
_MOST_HEADER_BYTES = 256 << 20
# A piece that a killed process left incomplete is fetched again from its start. Tensors are not divided.
MOST_PIECE_BYTES = 512 << 20
_BLOCK = re.compile(r"blk\.(\d+)\.")


class HubGguf:
    """Reads one GGUF file of a commit, as `GgufFile` reads one on this disk. Raises CheckpointError."""

    def __init__(self, folder: HubFolder, name: str) -> None:
        self.path = folder.where / name
        self._folder = folder
        self._name = name
        self._size = folder.download_bytes(name)
        header, self._start = self._read_header()
        self.metadata = header.metadata
        self.stored_fields = header.stored_fields
        self.tensors = header.tensors
        self.metadata_end = header.metadata_end
        self.bytes_read = header.length
        self._pieces = {
            tensor.name: (folder.cut(name, start, end), start)
            for start, end, tensors in _pieces(self.tensors)
            for tensor in tensors
        }

    def close(self) -> None:
        """Do nothing: the folder holds the pieces."""

    def pieces(self, tensors: Iterable[str]) -> set[str]:
        """The folder's names of the pieces that hold these tensors."""
        return {self._pieces[name][0] for name in tensors if name in self._pieces}

    def read_rows(self, tensor: GgufTensor, start: int, end: int) -> NDArray[np.uint8]:
        """The bytes of rows `start` to `end - 1`, uint8 [rows, row bytes]. Its piece is fetched if it is missing."""
        piece, base = self._pieces[tensor.name]
        path = self._folder.path(piece)
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            out = read_rows(fd, path, tensor, start, end, base=base)
        finally:
            os.close(fd)
        self.bytes_read += out.nbytes
        return out

    def metadata_alone(self) -> bytes:
        """A GGUF file of the same metadata, without tensors."""
        return self._start[:8] + struct.pack("<Q", 0) + self._start[16 : self.metadata_end]

    def _read_header(self) -> tuple[GgufHeader, bytes]:
        """The header, and the bytes in which it was found."""
        data, wanted = b"", HEADER_PIECE_BYTES
        while True:
            while len(data) < min(wanted, self._size):
                end = min(len(data) + HEADER_PIECE_BYTES, self._size)
                data += self._folder.path(self._folder.cut(self._name, len(data), end)).read_bytes()
            try:
                return GgufHeader(data, self.path, self._size), data
            except HeaderGoesOn as more:
                wanted = more.end
                if wanted > _MOST_HEADER_BYTES:
                    raise CheckpointError(f"{self.path}: its header has {wanted} bytes or more") from None


def _pieces(tensors: Mapping[str, GgufTensor]) -> Iterator[tuple[int, int, list[GgufTensor]]]:
    """Cut the file: the start and end of each piece, and the tensors in it."""
    ordered = sorted(tensors.values(), key=lambda tensor: tensor.offset)
    for _, of_one in groupby(ordered, key=lambda tensor: match[1] if (match := _BLOCK.match(tensor.name)) else tensor):
        piece: list[GgufTensor] = []
        for tensor in of_one:
            if piece and tensor.offset + tensor.n_bytes - piece[0].offset > MOST_PIECE_BYTES:
                yield piece[0].offset, piece[-1].offset + piece[-1].n_bytes, piece
                piece = []
            piece.append(tensor)
        yield piece[0].offset, piece[-1].offset + piece[-1].n_bytes, piece
