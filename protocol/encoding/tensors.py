"""Tensors as they travel: a small header of fields, and a body of raw bytes (spec/tensors.md).

Knows shapes, dtypes and codecs; knows no message, no stream and no model. The difficulty is that both ways
lie on the path of every token: so exact tensors become memoryviews of their own memory, bodies become
tensors over the very bytes that arrived, and the check for non-finite values is one pass that allocates
nothing. A header comes from a stranger, so its size is known and bounded before anything is allocated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from peerd.protocol.encoding.schema import Rule, choice, integer, many
from peerd.protocol.errors import BadResult, LocalProtocolError, RemoteProtocolError, UnsupportedFeature

Body = bytes | bytearray | memoryview

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

# Deep prompts [blocks, rows, positions, width] are the deepest that travels.
MAX_RANK = 4
_MAX_SIDE = 2**31 - 1

# One scale a token is known to wreck the families with outlier channels; 64 costs 3 % for the scales.
GROUP = 64
_STEPS = 127
# What still rounds to 127, with room for the rounding of the scale (2**-11) and of the division.
_MOST_STEPS = 127.25
_LEAST_SCALE = np.float32(2.0**-24)
# The largest scale that fp16 holds, and, for fp16 values, the largest whose 127-fold is finite in fp16.
_MAX_SCALE = {torch.float32: 65504.0, torch.bfloat16: 65504.0, torch.float16: 515.5}

# What numpy is shown a dtype's values as (it has no bfloat16), and how that is written on the wire.
_WIRE_TYPES: dict[torch.dtype, tuple[torch.dtype, np.dtype[Any]]] = {
    torch.float32: (torch.float32, np.dtype("<f4")),
    torch.float16: (torch.float16, np.dtype("<f2")),
    torch.bfloat16: (torch.int16, np.dtype("<i2")),
}


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """What a body holds: `dtype` is a key of `DTYPES`, `codec` one of `CODECS`, every side of `shape` is positive."""

    shape: tuple[int, ...]
    dtype: str
    codec: str

    @property
    def body_bytes(self) -> int:
        """The exact length of the body."""
        return CODECS[self.codec].body_bytes(self)

    def to_fields(self) -> dict[str, Any]:
        """The header as msgpack values."""
        return {"shape": list(self.shape), "dtype": self.dtype, "codec": self.codec}

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any], *, max_elements: int) -> TensorHeader:
        """Check what a peer sent; unknown fields are ignored.

        Raises RemoteProtocolError naming the field, also where the tensor would hold more than `max_elements`.
        """
        header = cls(**{name: _checked(fields, name, rule) for name, rule in _FIELD_RULES.items()})
        if not header.shape:
            raise RemoteProtocolError("tensor: shape has no sides")
        if math.prod(header.shape) > max_elements:
            raise RemoteProtocolError(f"tensor: shape {header.shape} holds more than {max_elements} values")
        return header


@dataclass(frozen=True, slots=True)
class Codec:
    """How values become bytes. `encode` is given a dense tensor of the header's dtype, `decode` a body of the right
    length. Both raise ValueError for non-finite values, and `decode` may return a view of the body."""

    body_bytes: Callable[[TensorHeader], int]
    encode: Callable[[torch.Tensor], list[memoryview]]
    decode: Callable[[TensorHeader, Body], torch.Tensor]


def encode_tensor(
    tensor: torch.Tensor, *, codec: str = "exact", dtype: torch.dtype | None = None
) -> tuple[TensorHeader, list[memoryview]]:
    """`tensor`, first rounded to `dtype` (default: its own), as a header and the parts of its body, in order.

    A contiguous CPU tensor under `exact` is not copied: the parts show its memory, so it must not change until
    they are sent. Raises BadResult for non-finite values, which are then told as the fault of the peer that
    computed them; UnsupportedFeature for values too large for the codec; LocalProtocolError for what no peer
    could read: another dtype, an unknown codec, no values, more than `MAX_RANK` sides.
    """
    values = tensor.detach() if dtype is None else tensor.detach().to(dtype)
    name = DTYPE_NAMES.get(values.dtype)
    if name is None or codec not in CODECS or not values.numel() or not 1 <= values.dim() <= MAX_RANK:
        raise LocalProtocolError(f"no {values.dtype} of shape {tuple(values.shape)} travels as {codec!r}")
    try:
        parts = CODECS[codec].encode(values)
    except ValueError as error:
        raise BadResult(f"cannot send a tensor with {error}") from None
    return TensorHeader(tuple(values.shape), name, codec), parts


def decode_tensor(header: TensorHeader, body: Body) -> torch.Tensor:
    """The tensor of `header.shape` and `header.dtype`, on the CPU.

    Under `exact`, a writable and aligned body is not copied: the tensor keeps it alive and sees its changes.
    Raises RemoteProtocolError if the body's length is not `header.body_bytes` or a value is not finite.
    """
    length = memoryview(body).nbytes
    if length != header.body_bytes:
        raise RemoteProtocolError(f"a tensor body of {length} bytes instead of {header.body_bytes}")
    try:
        return CODECS[header.codec].decode(header, body)
    except ValueError as error:
        raise RemoteProtocolError(f"got a tensor with {error}") from None


# exact: the values themselves.


def _exact_bytes(header: TensorHeader) -> int:
    return math.prod(header.shape) * DTYPES[header.dtype].itemsize


def _encode_exact(values: torch.Tensor) -> list[memoryview]:
    _check_finite(values)
    carrier, wire_type = _WIRE_TYPES[values.dtype]
    array: NDArray[Any] = values.cpu().contiguous().view(carrier).numpy()
    return [_bytes_of(array.astype(wire_type, copy=False))]


def _decode_exact(header: TensorHeader, body: Body) -> torch.Tensor:
    dtype = DTYPES[header.dtype]
    _, wire_type = _WIRE_TYPES[dtype]
    array = np.frombuffer(body, wire_type)
    if not array.flags.writeable or not array.flags.aligned:
        array = array.copy()
    values = torch.from_numpy(array.astype(wire_type.newbyteorder("="), copy=False)).view(dtype).view(header.shape)
    _check_finite(values)
    return values


# int8: all groups' fp16 scales, then all values as multiples of their group's scale.


def _int8_bytes(header: TensorHeader) -> int:
    return math.prod(header.shape) + _scale_count(header.shape) * 2


def _scale_count(shape: tuple[int, ...]) -> int:
    return math.prod(shape[:-1]) * -(-shape[-1] // GROUP)


def _encode_int8(values: torch.Tensor) -> list[memoryview]:
    # numpy: between ten operations on a few hundred values, torch's dispatch costs more than the arithmetic.
    groups = _grouped(values.float().cpu().numpy())
    peaks = np.abs(groups).max(axis=-1, keepdims=True)
    max_scale = _MAX_SCALE[values.dtype]
    peak = float(peaks.max())
    if not peak < _MOST_STEPS * max_scale:  # also where it is NaN
        _check_finite(values)
        raise UnsupportedFeature(f"the codec int8 cannot hold {peak:g}: use exact")
    scales = np.minimum(peaks / _STEPS, max_scale).astype("<f2")
    # Among fp16's smallest numbers a scale may have been rounded so far down that the peak would not fit: the next
    # larger number is the next integer's bits.
    scales.view("<u2")[...] += scales.astype(np.float32) * _MOST_STEPS < peaks
    # A group of zeros has the scale zero: any divisor will do.
    steps = groups / np.maximum(scales.astype(np.float32), _LEAST_SCALE)
    return [_bytes_of(scales), _bytes_of(_ungrouped(np.rint(steps, out=steps).astype(np.int8), values.shape[-1]))]


def _decode_int8(header: TensorHeader, body: Body) -> torch.Tensor:
    steps_at = _scale_count(header.shape) * 2
    scales = np.frombuffer(body, "<f2", count=steps_at // 2)
    steps = _grouped(np.frombuffer(body, np.int8, offset=steps_at).reshape(header.shape))
    with np.errstate(invalid="ignore"):  # what comes of an infinite scale is refused below
        groups = np.multiply(steps, scales.astype(np.float32).reshape(len(steps), -1, 1), dtype=np.float32)
    values = torch.from_numpy(_ungrouped(groups, header.shape[-1])).to(DTYPES[header.dtype])
    _check_finite(values)
    return values.view(header.shape)


def _grouped(values: NDArray[Any]) -> NDArray[Any]:
    """`[..., width]` as `[rows, groups, GROUP]`, the last group of each row filled up with zeros."""
    width = values.shape[-1]
    if width % GROUP:
        values = np.pad(values.reshape(-1, width), ((0, 0), (0, -width % GROUP)))
    return values.reshape(-1, -(-width // GROUP), GROUP)


def _ungrouped(groups: NDArray[Any], width: int) -> NDArray[Any]:
    """The opposite of `_grouped`, dense: `[rows, width]`."""
    return np.ascontiguousarray(groups.reshape(len(groups), -1)[:, :width])


def _bytes_of(array: NDArray[Any]) -> memoryview:
    return array.data.cast("B")


def _check_finite(values: torch.Tensor) -> None:
    """Raises ValueError naming the first value that is NaN or infinite."""
    low, high = torch.aminmax(values)  # NaN wins both; several times as fast as isfinite
    if math.isfinite(low.item()) and math.isfinite(high.item()):
        return
    flat = values.flatten()
    index = int(flat.isfinite().logical_not_().nonzero()[0])
    raise ValueError(f"{flat[index].item()} at index {index} of {flat.numel()}")


def _checked(fields: Mapping[str, Any], name: str, rule: Rule) -> Any:
    if name not in fields:
        raise RemoteProtocolError(f"tensor: {name} is missing")
    try:
        return rule(fields[name])
    except ValueError as error:
        raise RemoteProtocolError(f"tensor: {name} must be {error}") from None


CODECS: dict[str, Codec] = {
    "exact": Codec(_exact_bytes, _encode_exact, _decode_exact),
    "int8": Codec(_int8_bytes, _encode_int8, _decode_int8),
}
_FIELD_RULES = {
    "shape": many(integer(1, _MAX_SIDE), MAX_RANK),
    "dtype": choice(*DTYPES),
    "codec": choice(*CODECS),
}
