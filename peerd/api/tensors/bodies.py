"""Tensors in the messages of a program. A malformed one is the program's mistake: all functions raise
InvalidRequest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from peerd.local.messages import MAX_BODY_BYTES
from peerd.protocol.encoding.tensors import TensorHeader, decode_tensor
from peerd.protocol.errors import InvalidRequest, RemoteProtocolError

if TYPE_CHECKING:
    import torch


def tensor_of(fields: Mapping[str, Any] | None, body: memoryview, width: int) -> torch.Tensor:
    """The body's tensor, `[n, width]`."""
    if fields is None:
        raise InvalidRequest("a tensor is missing")
    header = header_of(fields)
    if len(header.shape) != 2 or header.shape[1] != width:
        raise InvalidRequest(f"a tensor of shape {list(header.shape)}, not [n, {width}]")
    return decoded(header, body)


def header_of(fields: Mapping[str, Any]) -> TensorHeader:
    """A tensor's header."""
    try:
        return TensorHeader.from_fields(fields, max_elements=MAX_BODY_BYTES)
    except RemoteProtocolError as error:
        raise InvalidRequest(str(error)) from None


def decoded(header: TensorHeader, body: memoryview) -> torch.Tensor:
    """The tensor in a body."""
    try:
        return decode_tensor(header, body)
    except RemoteProtocolError as error:
        raise InvalidRequest(str(error)) from None
