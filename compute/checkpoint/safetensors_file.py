"""One safetensors file: finds each tensor in it, and reads exactly the tensor's bytes.

It reads with `pread` instead of a memory map. So only the bytes that were asked for are read, they can be counted, and
if another process truncates the file meanwhile, that is an error instead of a SIGBUS. No entry of the header is used
before it was checked against the file's size.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from peerd.compute.errors import CheckpointError, UnsupportedModelError

# The reference implementation's limit: no honest header is larger.
MAX_HEADER_BYTES = 100_000_000

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    # Powers of two only; torch 2.6 does not have this dtype.
    **({"F8_E8M0": torch.float8_e8m0fnu} if hasattr(torch, "float8_e8m0fnu") else {}),
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor as the file holds it: `offset` counts from the file's start."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    n_bytes: int


class SafetensorsFile:
    """An open safetensors file. Raises CheckpointError on opening if the file is incomplete or malformed.

    `tensors`: by name. `metadata`: texts that the program which wrote the file has noted.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes_read = 0
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be opened: {error.strerror}") from error
        try:
            header, size = self._read_header()
            self.metadata, self.tensors = _parse(header, size, path)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file. Closing twice does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def read(self, name: str) -> torch.Tensor:
        """The tensor in its stored dtype, in memory of its own. Raises CheckpointError."""
        return self._read(self.stored(name))

    def read_slices(self, name: str) -> Iterator[torch.Tensor]:
        """The tensor's slices along its first dimension, one after the other, each in memory of its own. Raises
        CheckpointError.
        """
        whole = self.stored(name)
        count = whole.shape[0] if whole.shape else 0
        size = whole.n_bytes // count if count else 0
        for index in range(count):
            part = replace(whole, shape=whole.shape[1:], offset=whole.offset + index * size, n_bytes=size)
            yield self._read(part)

    def read_rows(self, name: str, rows: Sequence[int]) -> torch.Tensor:
        """These rows of a matrix, `[rows, columns]`, in memory of their own. Raises CheckpointError."""
        whole = self.stored(name)
        count, columns = whole.shape
        size = whole.n_bytes // count if count else 0
        if rows and not 0 <= min(rows) <= max(rows) < count:
            raise CheckpointError(f"{self.path}: tensor {name} has {count} rows, not {max(rows) + 1}")
        parts = [
            self._read(replace(whole, shape=(1, columns), offset=whole.offset + row * size, n_bytes=size))
            for row in rows
        ]
        return torch.cat(parts) if parts else torch.empty(0, columns)

    def stored(self, name: str) -> StoredTensor:
        """Where a tensor lies. Raises CheckpointError if the file has none of that name."""
        try:
            return self.tensors[name]
        except KeyError:
            raise CheckpointError(f"{self.path}: tensor {name} is missing") from None

    def _read(self, stored: StoredTensor) -> torch.Tensor:
        dtype = DTYPES.get(stored.dtype)
        if dtype is None:
            raise UnsupportedModelError(
                f"{self.path}: tensor {stored.name} is stored as {stored.dtype}, which we do not read"
            )
        return self.read_bytes(stored).view(dtype).reshape(stored.shape)

    def read_bytes(self, stored: StoredTensor) -> torch.Tensor:
        """The tensor's bytes as they lie in the file, as uint8 [n_bytes]. Raises CheckpointError."""
        out = torch.empty(stored.n_bytes, dtype=torch.uint8)
        self._read_into(memoryview(out.numpy().data), stored.offset, stored.name)
        return out

    def _read_header(self) -> tuple[bytearray, int]:
        """The header's bytes, and the file's size."""
        size = os.fstat(self._fd).st_size
        prefix = bytearray(8)
        if size < 8:
            raise CheckpointError(f"{self.path}: truncated: {size} bytes are not a safetensors file")
        self._read_into(memoryview(prefix), 0, "header length")
        header = bytearray(header_length(prefix, size, self.path))
        self._read_into(memoryview(header), 8, "header")
        return header, size

    def _read_into(self, out: memoryview, offset: int, what: str) -> None:
        done = 0
        while done < len(out):
            try:
                got = os.preadv(self._fd, [out[done:]], offset + done)
            except OSError as error:
                raise CheckpointError(f"{self.path}: {what} cannot be read: {error.strerror}") from error
            if got == 0:
                raise CheckpointError(f"{self.path}: truncated: {what} ends after {done} of {len(out)} bytes")
            done += got
        self.bytes_read += done


def header_length(prefix: bytes | bytearray, size: int, path: Path) -> int:
    """The length of the header that follows a file's first 8 bytes, `prefix`; the file has `size` bytes. Raises
    CheckpointError.
    """
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > min(MAX_HEADER_BYTES, size - 8):
        raise CheckpointError(f"{path}: its header claims {length} bytes, the file has {size}")
    return length


def parse_header(header: bytes | bytearray, size: int, path: Path) -> dict[str, StoredTensor]:
    """The tensors in a file of `size` bytes, by name, with their offsets. Raises CheckpointError."""
    return _parse(header, size, path)[1]


def _parse(header: bytes | bytearray, size: int, path: Path) -> tuple[Mapping[str, str], dict[str, StoredTensor]]:
    """The metadata and the tensors. Metadata of other types than the format allows are left out."""
    try:
        entries = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its header is not JSON") from error
    if not isinstance(entries, dict):
        raise CheckpointError(f"{path}: its header is not a JSON object")
    noted = entries.pop("__metadata__", None)
    texts = noted.items() if isinstance(noted, dict) else ()
    metadata = {name: text for name, text in texts if isinstance(text, str)}
    data_start = 8 + len(header)
    tensors = {name: _entry(name, entry, data_start, path) for name, entry in entries.items()}
    _check_layout(tensors, data_start, size, path)
    return metadata, tensors


def _entry(name: str, entry: Any, data_start: int, path: Path) -> StoredTensor:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: tensor {name} has a malformed entry") from error
    numbers = (*shape, begin, end)
    if not isinstance(dtype, str) or not all(type(n) is int and n >= 0 for n in numbers) or begin > end:
        raise CheckpointError(f"{path}: tensor {name} has a malformed entry")
    known = DTYPES.get(dtype)
    if known is not None and math.prod(shape) * known.itemsize != end - begin:
        raise CheckpointError(f"{path}: tensor {name} of {dtype} {list(shape)} cannot take {end - begin} bytes")
    return StoredTensor(name, dtype, shape, data_start + begin, end - begin)


def _check_layout(tensors: Mapping[str, StoredTensor], data_start: int, size: int, path: Path) -> None:
    ordered = sorted(tensors.values(), key=lambda tensor: (tensor.offset, tensor.n_bytes))
    for before, after in pairwise(ordered):
        if before.offset + before.n_bytes > after.offset:
            raise CheckpointError(f"{path}: tensors {before.name} and {after.name} overlap")
    end = ordered[-1].offset + ordered[-1].n_bytes if ordered else data_start
    if end > size:
        raise CheckpointError(f"{path}: truncated: tensor {ordered[-1].name} ends at {end} of {size} bytes")
