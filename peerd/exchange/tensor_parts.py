"""Sends tensors of any size over a stream, as consecutive rows in messages of bounded size (spec/training/training.md).

The receiver is told the shape in advance, and accepts no more rows and no other width. So a stranger's messages cannot
make it allocate more.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from peerd.net.connections import Stream
from peerd.protocol.connection.frames import Priority
from peerd.protocol.encoding.schema import parse
from peerd.protocol.encoding.tensors import DTYPES, MAX_ENCODED_VALUE_BYTES, TensorHeader, decode_tensor, encode_tensor
from peerd.protocol.errors import RemoteProtocolError
from peerd.protocol.messages.training import PART_BYTES, Part, PassFailure


async def send_parts(stream: Stream, tensor: torch.Tensor, *, codec: str, dtype: torch.dtype) -> None:
    """Send `[..., width]` in parts. The tensor must not change until this returns. Raises the errors of `Stream.send`,
    and BadResult.
    """
    rows = tensor.reshape(-1, tensor.shape[-1])
    for first, last in _cuts(len(rows), rows.shape[1]):
        header, body = encode_tensor(rows[first:last], codec=codec, dtype=dtype)
        await stream.send(Part(header.to_fields()).to_header(), body, priority=Priority.BULK)


async def receive_parts(stream: Stream, shape: tuple[int, ...]) -> torch.Tensor:
    """Receive a tensor of exactly this shape, in the dtype in which it travels.

    The caller must have checked that it wants this shape. Raises RemoteProtocolError, and the error that the peer
    sends.
    """
    width = shape[-1]
    count = 1
    for side in shape[:-1]:
        count *= side
    parts: list[torch.Tensor] = []
    while count:
        raw = await stream.receive(max_body=max(PART_BYTES, width * MAX_ENCODED_VALUE_BYTES) + 64)
        message = parse(raw.header, (Part, PassFailure))
        if isinstance(message, PassFailure):
            raise message.error
        assert isinstance(message, Part)
        header = TensorHeader.from_fields(message.tensor, max_elements=count * width)
        if len(header.shape) != 2 or header.shape[1] != width or header.shape[0] > count:
            raise RemoteProtocolError(f"a part of shape {header.shape} where [{count} or fewer, {width}] was expected")
        if parts and parts[0].dtype != DTYPES[header.dtype]:
            raise RemoteProtocolError("parts of one tensor have different dtypes")
        parts.append(decode_tensor(header, raw.body))
        count -= header.shape[0]
    whole = parts[0] if len(parts) == 1 else torch.cat(parts)
    return whole.view(shape)


def _cuts(count: int, width: int) -> Iterator[tuple[int, int]]:
    each = max(1, PART_BYTES // (width * MAX_ENCODED_VALUE_BYTES))
    for first in range(0, count, each):
        yield first, min(count, first + each)
