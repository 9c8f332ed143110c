"""Encodes tensors as a small header of fields and a body of raw bytes, and decodes them (spec/tensors.md).

Both directions lie on the path of every token, so nothing is copied that need not be: an exact tensor becomes
memoryviews of its own memory, a body becomes a tensor over the bytes that arrived, and the check for non-finite
values is one pass that allocates nothing. A header comes from an untrusted peer, so the tensor's size is checked
before anything is allocated.
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

# The widest value of an exact tensor; and the widest that any codec writes, its scale included.
MAX_EXACT_VALUE_BYTES = 4
MAX_ENCODED_VALUE_BYTES = 5

# Deep prompts [blocks, rows, positions, width] have the most sides of all tensors that travel.
MAX_RANK = 4
_MAX_SIDE = 2**31 - 1

# One scale for a whole token ruins families with outlier channels; a scale for 64 values costs 3 % more bytes.
GROUP = 64
_STEPS = 127
# The largest quotient that still rounds to 127, with room for the rounding of the scale (2**-11) and of the division.
_MOST_STEPS = 127.25
_LEAST_SCALE = np.float32(2.0**-24)
# The largest scale that fp16 holds, and, for fp16 values, the largest whose 127-fold is finite in fp16.
_MAX_SCALE = {torch.float32: 65504.0, torch.bfloat16: 65504.0, torch.float16: 515.5}

# For each dtype, the type as which numpy reads its values (numpy has no bfloat16), and the type on the wire.
_WIRE_TYPES: dict[torch.dtype, tuple[torch.dtype, np.dtype[Any]]] = {
    torch.float32: (torch.float32, np.dtype("<f4")),
    torch.float16: (torch.float16, np.dtype("<f2")),
    torch.bfloat16: (torch.int16, np.dtype("<i2")),
}


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """Describes a body. `dtype` is a key of `DTYPES`, `codec` a key of `CODECS`, every side of `shape` is positive."""

    shape: tuple[int, ...]
    dtype: str
    codec: str

    @property
    def body_bytes(self) -> int:
        """The exact length of the body in bytes."""
        return CODECS[self.codec].body_bytes(self)

    def to_fields(self) -> dict[str, Any]:
        """The header as msgpack values."""
        return {"shape": list(self.shape), "dtype": self.dtype, "codec": self.codec}

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any], *, max_elements: int) -> TensorHeader:
        """Check the fields that a peer sent; unknown fields are ignored.

        Raises RemoteProtocolError naming the field, also if the tensor would hold more than `max_elements` values.
        """
        header = cls(**{name: _checked(fields, name, rule) for name, rule in _FIELD_RULES.items()})
        if not header.shape:
            raise RemoteProtocolError("tensor: shape has no sides")
        if math.prod(header.shape) > max_elements:
            raise RemoteProtocolError(f"tensor: shape {header.shape} holds more than {max_elements} values")
        return header


@dataclass(frozen=True, slots=True)
class Codec:
    """Turns values into bytes and back.

    `encode` takes a dense tensor of the header's dtype, `decode` a body of the right length. Both raise ValueError
    for non-finite values. `decode` may return a view of the body.
    """

    body_bytes: Callable[[TensorHeader], int]
    encode: Callable[[torch.Tensor], list[memoryview]]
    decode: Callable[[TensorHeader, Body], torch.Tensor]


def encode_tensor(
    tensor: torch.Tensor, *, codec: str = "exact", dtype: torch.dtype | None = None
) -> tuple[TensorHeader, list[memoryview]]:
    """`tensor`, first rounded to `dtype` (default: its own), as a header and the parts of its body, in order.

    A contiguous CPU tensor is not copied by `exact`: the parts show its memory, so it must not change until they are
    sent. Raises BadResult for non-finite values, because a receiver would blame the peer that computed them;
    UnsupportedFeature for values too large for the codec; LocalProtocolError for tensors that no peer could read:
    another dtype, an unknown codec, no values, more than `MAX_RANK` sides.
    """
    values = tensor.detach() if dtype is None else tensor.detach().to(dtype)
    name = DTYPE_NAMES.get(values.dtype)
    if name is None or codec not in CODECS or not values.numel() or not 1 <= values.dim() <= MAX_RANK:
        raise LocalProtocolError(f"cannot send {values.dtype} of shape {tuple(values.shape)} as {codec!r}")
    try:
        parts = CODECS[codec].encode(values)
    except ValueError as error:
        raise BadResult(f"cannot send a tensor with {error}") from None
    return TensorHeader(tuple(values.shape), name, codec), parts


def decode_tensor(header: TensorHeader, body: Body) -> torch.Tensor:
    """The tensor of `header.shape` and `header.dtype`, on the CPU.

    With `exact`, a writable and aligned body is not copied: the tensor keeps it alive and sees its changes. Raises
    RemoteProtocolError if the body's length is not `header.body_bytes` or a value is not finite.
    """
    length = memoryview(body).nbytes
    if length != header.body_bytes:
        raise RemoteProtocolError(f"a tensor body of {length} bytes instead of {header.body_bytes}")
    try:
        return CODECS[header.codec].decode(header, body)
    except ValueError as error:
        raise RemoteProtocolError(f"got a tensor with {error}") from None


# Codec exact: the values themselves.


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


# Codec int8: first the fp16 scales of all groups, then all values as multiples of their group's scale.


def _int8_bytes(header: TensorHeader) -> int:
    return math.prod(header.shape) + _scale_count(header.shape) * 2


def _scale_count(shape: tuple[int, ...]) -> int:
    return math.prod(shape[:-1]) * -(-shape[-1] // GROUP)


def _encode_int8(values: torch.Tensor) -> list[memoryview]:
    # numpy, because ten torch operations on a few hundred values cost more in dispatch than in arithmetic.
    groups = _grouped(values.float().cpu().numpy())
    peaks = np.abs(groups).max(axis=-1, keepdims=True)
    max_scale = _MAX_SCALE[values.dtype]
    peak = float(peaks.max())
    if not peak < _MOST_STEPS * max_scale:  # true for NaN too
        _check_finite(values)
        raise UnsupportedFeature(f"the codec int8 cannot hold {peak:g}: use exact")
    scales = np.minimum(peaks / _STEPS, max_scale).astype("<f2")
    # Rounding may have made a subnormal fp16 scale so small that the group's peak exceeds 127 steps. Adding 1 to the
    # scale's bits gives the next larger fp16 number.
    scales.view("<u2")[...] += scales.astype(np.float32) * _MOST_STEPS < peaks
    # A group of zeros has scale zero; dividing by the least scale instead gives zeros as well.
    steps = groups / np.maximum(scales.astype(np.float32), _LEAST_SCALE)
    return [_bytes_of(scales), _bytes_of(_ungrouped(np.rint(steps, out=steps).astype(np.int8), values.shape[-1]))]


def _decode_int8(header: TensorHeader, body: Body) -> torch.Tensor:
    steps_at = _scale_count(header.shape) * 2
    scales = np.frombuffer(body, "<f2", count=steps_at // 2)
    steps = _grouped(np.frombuffer(body, np.int8, offset=steps_at).reshape(header.shape))
    with np.errstate(invalid="ignore"):  # an infinite scale gives non-finite values, which are refused below
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
    """The inverse of `_grouped`: dense `[rows, width]`."""
    return np.ascontiguousarray(groups.reshape(len(groups), -1)[:, :width])


def _bytes_of(array: NDArray[Any]) -> memoryview:
    return array.data.cast("B")


def _check_finite(values: torch.Tensor) -> None:
    """Raise ValueError naming the first value that is NaN or infinite."""
    low, high = torch.aminmax(values)  # both are NaN if any value is; several times as fast as isfinite
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
