"""Writes some blocks of a GGUF file as a GGUF file of their own, which llama.cpp loads as a whole model.

The blocks are numbered from 0 there, and their bytes are copied as they are. Around them llama.cpp wants a model: so
the file has a vocabulary of one token and a last norm, neither of which is ever used. The metadata are copied as they
are stored, without the tokenizer and with the new number of blocks.

Source of the format: docs/gguf.md of ggml.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from gguf import GGMLQuantizationType

from peerd.compute.checkpoint.gguf.header import DEFAULT_ALIGNMENT, MAGIC, GgufTensor
from peerd.compute.checkpoint.gguf.split import GgufFiles
from peerd.protocol.span import Span

_VERSION = 3
# Value types of the format.
_UINT32, _STRING = 4, 8
# Bytes that are copied at once.
_RUN_BYTES = 16 << 20
#: Tensors outside the blocks that blocks use.
SHARED = ("rope_freqs.weight",)


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor of the new file: copied from `source`, or made of `data`."""

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    n_bytes: int
    source: GgufTensor | None = None
    data: bytes = b""


def block_tensors(file: GgufFiles, block: int) -> list[GgufTensor]:
    """The stored tensors of one block."""
    prefix = f"blk.{block}."
    return [tensor for name, tensor in file.tensors.items() if name.startswith(prefix)]


def write_span(file: GgufFiles, span: Span, path: Path) -> None:
    """Write the span's blocks as the file `path`. Raises CheckpointError, and OSError if the disk does not take it."""
    fields = [*_fields(file, span)]
    tensors = [*_tensors(file, span)]
    with path.open("wb") as out:
        out.write(MAGIC + struct.pack("<IQQ", _VERSION, len(tensors), len(fields)) + b"".join(fields))
        offset = 0
        for tensor in tensors:
            shape = tensor.shape[::-1]
            out.write(_string(tensor.name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape))
            out.write(struct.pack("<IQ", tensor.kind, offset))
            offset += tensor.n_bytes + _padding(tensor.n_bytes)
        out.write(bytes(_padding(out.tell())))
        for tensor in tensors:
            _copy(file, tensor, out)


def _fields(file: GgufFiles, span: Span) -> Iterator[bytes]:
    name = str(file.metadata["general.architecture"])
    blocks, vocabulary = f"{name}.block_count", f"{name}.vocab_size"
    yield file.stored_fields["general.architecture"]
    for key, stored in file.stored_fields.items():
        if key.startswith(f"{name}.") and key not in (blocks, vocabulary):
            yield stored
    yield _string(blocks) + struct.pack("<II", _UINT32, len(span))
    yield _string(vocabulary) + struct.pack("<II", _UINT32, 1)
    yield _string("tokenizer.ggml.model") + struct.pack("<I", _STRING) + _string("none")


def _tensors(file: GgufFiles, span: Span) -> Iterator[_Tensor]:
    width = int(str(file.metadata[f"{file.metadata['general.architecture']}.embedding_length"]))
    for table in ("token_embd.weight", "output.weight"):
        yield _plain(table, np.zeros((1, width), np.float32))
    yield _plain("output_norm.weight", np.ones(width, np.float32))
    if "blk.0.attn_norm.bias" in file.tensors:
        yield _plain("output_norm.bias", np.zeros(width, np.float32))
    for name in SHARED:
        if (tensor := file.tensors.get(name)) is not None:
            yield _copied(tensor, name)
    for block in range(span.start, span.end):
        for tensor in block_tensors(file, block):
            yield _copied(tensor, tensor.name.replace(f"blk.{block}.", f"blk.{block - span.start}.", 1))


def _plain(name: str, values: np.typing.NDArray[np.float32]) -> _Tensor:
    return _Tensor(name, GGMLQuantizationType.F32, values.shape, values.nbytes, data=values.tobytes())


def _copied(tensor: GgufTensor, name: str) -> _Tensor:
    return _Tensor(name, tensor.kind, tensor.shape, tensor.n_bytes, source=tensor)


def _copy(file: GgufFiles, tensor: _Tensor, out: BinaryIO) -> None:
    if (source := tensor.source) is None:
        out.write(tensor.data)
    else:
        rows, run = source.n_bytes // source.row_bytes, max(1, _RUN_BYTES // source.row_bytes)
        for start in range(0, rows, run):
            out.write(file.read_rows(source, start, min(rows, start + run)).data)
    out.write(bytes(_padding(tensor.n_bytes)))


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _padding(length: int) -> int:
    return -length % DEFAULT_ALIGNMENT
