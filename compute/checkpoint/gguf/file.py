"""One GGUF file on this disk: reads exactly the bytes of the tensors that are asked for."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from peerd.compute.checkpoint.gguf.header import MAGIC, GgufHeader, GgufTensor
from peerd.compute.errors import CheckpointError


class GgufFile:
    """An open GGUF file. Raises CheckpointError on opening if the file is incomplete or malformed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes_read = 0
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be opened: {error.strerror}") from error
        try:
            size = os.fstat(self._fd).st_size
            if size < len(MAGIC) + 4 + 8 + 8:
                raise CheckpointError(f"{path}: truncated: {size} bytes are not a GGUF file")
            with mmap.mmap(self._fd, 0, access=mmap.ACCESS_READ) as view:
                header = GgufHeader(view, path, size)
                self.metadata = header.metadata
                self.stored_fields = header.stored_fields
                self.tensors = header.tensors
                self.bytes_read = header.length
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file. Closing twice does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def read_rows(self, tensor: GgufTensor, start: int, end: int) -> NDArray[np.uint8]:
        """The bytes of rows `start` to `end - 1`, uint8 [rows, row bytes]. Raises CheckpointError."""
        out = read_rows(self._fd, self.path, tensor, start, end)
        self.bytes_read += out.nbytes
        return out


def read_rows(fd: int, path: Path, tensor: GgufTensor, start: int, end: int, *, base: int = 0) -> NDArray[np.uint8]:
    """The bytes of a tensor's rows `start` to `end - 1`, uint8 [rows, row bytes]. Raises CheckpointError.

    base: the position in the GGUF file at which the open file `fd` begins.
    """
    width = tensor.row_bytes
    out = np.empty((end - start, width), dtype=np.uint8)
    view, done, offset = memoryview(out.reshape(-1).data), 0, tensor.offset - base + start * width
    while done < len(view):
        try:
            got = os.preadv(fd, [view[done:]], offset + done)
        except OSError as error:
            raise CheckpointError(f"{path}: tensor {tensor.name} cannot be read: {error.strerror}") from error
        if got == 0:
            raise CheckpointError(f"{path}: truncated: tensor {tensor.name} ends after {offset + done} bytes")
        done += got
    return out
