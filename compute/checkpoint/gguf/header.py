"""The header of a GGUF file: its metadata, and where each tensor lies.

No number of the header is used before it was checked against the file's size: a count that the file could not hold is
refused before memory is allocated for it. Long arrays, such as a vocabulary, are skipped, because making a Python list
of one takes more time than everything else in the file.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from peerd.compute.errors import CheckpointError, UnsupportedModelError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
# GGML_MAX_DIMS of ggml.
MAX_DIMENSIONS = 4
# Of longer arrays only the length is kept: they are vocabularies, which the tokenizer reads itself.
MAX_KEPT_VALUES = 1024
DEFAULT_ALIGNMENT = 32

# The least bytes that an entry takes: for a field an empty key, its type and one byte; for a tensor an empty name, no
# dimensions, a type and an offset.
_MIN_FIELD_BYTES = 8 + 4 + 1
_MIN_TENSOR_BYTES = 8 + 4 + 4 + 8
# The value types of the GGUF specification that have a fixed width.
_SCALARS: Mapping[int, struct.Struct] = {
    kind: struct.Struct(f"<{code}")
    for kind, code in zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True)
}
_STRING, _ARRAY = 8, 9
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class LongArray:
    """An array of the metadata of which only the length was kept."""

    count: int

    def __len__(self) -> int:
        return self.count


Value: TypeAlias = int | float | bool | str | tuple[int | float | bool | str, ...] | LongArray


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor: `shape` is in torch's order, slowest dimension first; `offset` counts from the file's start."""

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    n_bytes: int

    @property
    def row_bytes(self) -> int:
        """The bytes of one row, which is a run of the fastest dimension."""
        return self.n_bytes // math.prod(self.shape[:-1])


class HeaderGoesOn(Exception):
    """The header needs bytes of the file, up to `end` at least, that the view does not have."""

    def __init__(self, end: int) -> None:
        super().__init__(f"the header goes on to byte {end}")
        self.end = end


class GgufHeader:
    """Parses the header from the front of `view`, the first bytes of a file of `size` bytes.

    Raises CheckpointError if the header does not fit into the file, and HeaderGoesOn if it does not fit into the view.
    """

    def __init__(self, view: mmap.mmap | bytes, path: Path, size: int) -> None:
        self._view = view
        self._path = path
        self._size = size
        self._at = 0
        #: Each field of the metadata as the file stores it (key, type and value), but for long arrays.
        self.stored_fields: dict[str, bytes] = {}
        self.metadata, tensor_count = self._read_metadata()
        #: Where the metadata end and the list of tensors begins.
        self.metadata_end = self._at
        entries = [self._read_tensor_entry() for _ in range(tensor_count)]
        self.length = self._at
        self.tensors = self._place(entries)

    def _read_metadata(self) -> tuple[dict[str, Value], int]:
        self._need(len(MAGIC), "magic")
        magic, self._at = self._view[: len(MAGIC)], len(MAGIC)
        if magic != MAGIC:
            raise CheckpointError(f"{self._path}: is not a GGUF file")
        version = self._unpack(_U32, "version")
        if version not in VERSIONS:
            raise UnsupportedModelError(f"{self._path}: is GGUF version {version}; versions 2 and 3 are read")
        tensor_count, field_count = self._unpack(_U64, "tensor count"), self._unpack(_U64, "field count")
        self._check_count(tensor_count, _MIN_TENSOR_BYTES, "tensors")
        self._check_count(field_count, _MIN_FIELD_BYTES, "metadata fields")
        metadata: dict[str, Value] = {}
        for _ in range(field_count):
            start = self._at
            key = self._string("a metadata key")
            if key in metadata:
                raise CheckpointError(f"{self._path}: metadata field {key} occurs twice")
            metadata[key] = self._value(self._unpack(_U32, key), key)
            if not isinstance(metadata[key], LongArray):
                self.stored_fields[key] = self._view[start : self._at]
        return metadata, tensor_count

    def _value(self, kind: int, key: str) -> Value:
        if kind == _ARRAY:
            return self._array(key)
        if kind == _STRING:
            return self._string(key)
        return self._scalar(kind, key)

    def _scalar(self, kind: int, key: str) -> int | float | bool:
        layout = _SCALARS.get(kind)
        if layout is None:
            raise CheckpointError(f"{self._path}: metadata field {key} has the unknown type {kind}")
        value: int | float | bool = self._unpack(layout, key)
        return value

    def _array(self, key: str) -> Value:
        kind, count = self._unpack(_U32, key), self._unpack(_U64, key)
        layout = _SCALARS.get(kind)
        if layout is None and kind != _STRING:
            raise CheckpointError(f"{self._path}: metadata field {key} is an array of the unknown type {kind}")
        self._check_count(count, layout.size if layout else _U64.size, f"values in {key}")
        if count <= MAX_KEPT_VALUES:
            return tuple(self._string(key) if layout is None else self._scalar(kind, key) for _ in range(count))
        if layout is not None:
            # The count was checked against the file's size.
            self._at += count * layout.size
        else:
            self._skip_strings(count, key)
        return LongArray(count)

    def _skip_strings(self, count: int, key: str) -> None:
        """Step over `count` strings. This is the hot loop of opening a file: 100 000 turns for a small vocabulary."""
        view, at, end, unpack = self._view, self._at, len(self._view), _U64.unpack_from
        for _ in range(count):
            if at + 8 > end:
                # The string's length is not in the view, or not in the file.
                at += 8
                break
            at += 8 + unpack(view, at)[0]
        if end < at <= self._size:
            raise HeaderGoesOn(at)
        if at > end:
            raise CheckpointError(f"{self._path}: truncated: metadata field {key} ends after the file does")
        self._at = at

    def _read_tensor_entry(self) -> tuple[str, GGMLQuantizationType, tuple[int, ...], int]:
        name = self._string("a tensor's name")
        dimensions = self._unpack(_U32, name)
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise CheckpointError(f"{self._path}: tensor {name} has {dimensions} dimensions")
        shape = tuple(self._unpack(_U64, name) for _ in range(dimensions))[::-1]
        number = self._unpack(_U32, name)
        try:
            kind = GGMLQuantizationType(number)
        except ValueError:
            raise UnsupportedModelError(f"{self._path}: tensor {name} is stored as the unknown type {number}") from None
        return name, kind, shape, self._unpack(_U64, name)

    def _place(self, entries: list[tuple[str, GGMLQuantizationType, tuple[int, ...], int]]) -> Mapping[str, GgufTensor]:
        alignment = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or not 0 < alignment <= mmap.PAGESIZE * 16:
            raise CheckpointError(f"{self._path}: general.alignment is {alignment!r}")
        data_start = -(-self._at // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        for name, kind, shape, offset in entries:
            block_values, block_bytes = GGML_QUANT_SIZES[kind]
            if 0 in shape or shape[-1] % block_values:
                raise CheckpointError(f"{self._path}: tensor {name} of shape {list(shape)} cannot be {kind.name}")
            n_bytes = math.prod(shape) // block_values * block_bytes
            if data_start + offset + n_bytes > self._size:
                raise CheckpointError(
                    f"{self._path}: truncated: tensor {name} ends at {data_start + offset + n_bytes}"
                    f" of {self._size} bytes"
                )
            if name in tensors:
                raise CheckpointError(f"{self._path}: tensor {name} occurs twice")
            tensors[name] = GgufTensor(name, kind, shape, data_start + offset, n_bytes)
        return tensors

    def _string(self, what: str) -> str:
        length = self._unpack(_U64, what)
        self._need(length, what)
        raw = self._view[self._at : self._at + length]
        self._at += length
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise CheckpointError(f"{self._path}: {what} is not UTF-8") from None

    def _unpack(self, layout: struct.Struct, what: str) -> int:
        self._need(layout.size, what)
        (value,) = layout.unpack_from(self._view, self._at)
        self._at += layout.size
        number: int = value
        return number

    def _need(self, n_bytes: int, what: str) -> None:
        if n_bytes > self._size - self._at:
            raise CheckpointError(f"{self._path}: truncated: {what} ends after the file does")
        if n_bytes > len(self._view) - self._at:
            raise HeaderGoesOn(self._at + n_bytes)

    def _check_count(self, count: int, least_bytes: int, what: str) -> None:
        if count > (self._size - self._at) // least_bytes:
            raise CheckpointError(f"{self._path}: claims {count} {what}, more than the file could hold")
