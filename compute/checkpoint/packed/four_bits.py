"""Dequantizes formats whose half bytes are indices into a table: mxfp4, nvfp4, and bitsandbytes' nf4 and fp4.

mxfp4 (gpt-oss) has an exponent of two for every 32 values; nvfp4 has an fp8 scale for every 16 values and one scale for
all. bitsandbytes treats a matrix as one flat run of values, and may quantize its scales again.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch

from peerd.compute.checkpoint.packed.pieces import Pieces, nibbles, value_count

# E2M1: one bit of sign, two of exponent, one of mantissa (OCP Microscaling Formats 1.0, 5.3.3).
_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
_FP4 = torch.cat((_E2M1, -_E2M1))
_MX_EXPONENT_BIAS = 127
_NV_GROUP = 16
# Enough for a JSON object of two dozen short fields.
_MAX_STATE_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Fp4Rows:
    """Implements `PlainRows`: `packed` `[rows, columns / 2]`, the lower half byte first, and one scale for each
    group.
    """

    packed: torch.Tensor
    scales: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.packed.shape[0], 2 * self.packed.shape[1]

    def rows(self, start: int, end: int) -> torch.Tensor:
        count, columns = end - start, self.shape[1]
        own = self.packed[start:end].reshape(-1)
        values = _FP4[nibbles(own, 0, 2 * len(own), high_first=False)].view(count, columns)
        return values * self.scales[start:end].repeat_interleave(columns // self.scales.shape[1], dim=1)


def mxfp4_rows(pieces: Pieces) -> Fp4Rows:
    """One expert of gpt-oss: `values` `[rows, groups, bytes a group]`, `scale` `[rows, groups]` as exponents."""
    blocks = pieces.take("values", "bytes", ndim=3)
    exponents = pieces.take("scale", "bytes", ndim=2)
    pieces.check_shape("scale", exponents, blocks.shape[:2])
    return Fp4Rows(blocks.flatten(1), (exponents.float() - _MX_EXPONENT_BIAS).exp2())


def nvfp4_rows(pieces: Pieces) -> Fp4Rows:
    """One matrix of compressed-tensors' `nvfp4-pack-quantized`."""
    packed = pieces.take("values", "bytes", ndim=2)
    scales = pieces.scale()
    pieces.check_shape("scale", scales, (len(packed), 2 * packed.shape[1] // _NV_GROUP))
    if not packed.shape[1] or 2 * packed.shape[1] % _NV_GROUP:
        raise pieces.wrong(f"has {2 * packed.shape[1]} columns, which are no groups of {_NV_GROUP}")
    whole = pieces.take("global_scale", "numbers").float()
    if whole.numel() != 1:
        raise pieces.wrong(f"has {whole.numel()} global scales")
    return Fp4Rows(packed, scales / whole.reshape(()))


@dataclass(frozen=True, slots=True)
class FlatRows:
    """Implements `PlainRows` for bitsandbytes: flat half bytes, the higher first, and one scale for each `group`
    values.
    """

    shape: tuple[int, int]
    packed: torch.Tensor
    table: torch.Tensor
    scales: torch.Tensor
    group: int

    def rows(self, start: int, end: int) -> torch.Tensor:
        columns = self.shape[1]
        first, last = start * columns, end * columns
        values = self.table[nibbles(self.packed, first, last, high_first=True)]
        scales = self.scales[torch.arange(first, last) // self.group]
        return (values * scales).view(end - start, columns)


def bnb_four_bit_rows(pieces: Pieces) -> FlatRows:
    """One matrix of bitsandbytes' nf4 or fp4, as Transformers saves it."""
    state = _state(pieces)
    shape: Any = state.get("shape")
    group = state.get("blocksize")
    sizes = isinstance(shape, list) and len(shape) == 2 and all(type(size) is int and size > 0 for size in shape)
    if not sizes or type(group) is not int or group < 1:
        raise pieces.wrong(f"has a state with shape {shape!r} and block size {group!r}")
    packed = pieces.take("values", "bytes").reshape(-1)
    table = pieces.take("table", "numbers", ndim=1).float()
    count = value_count(shape)
    pieces.check_shape("values", packed, (-(-count // 2),))
    pieces.check_shape("table", table, (16,))
    scales = _bnb_scales(pieces, state)
    pieces.check_shape("scale", scales, (-(-count // group),))
    return FlatRows((shape[0], shape[1]), packed, table, scales, group)


def _state(pieces: Pieces) -> dict[str, object]:
    """bitsandbytes' description of a matrix: a JSON object, stored as bytes."""
    stored = pieces.take("state", "bytes", ndim=1)
    if len(stored) > _MAX_STATE_BYTES:
        raise pieces.wrong(f"has a state of {len(stored)} bytes")
    try:
        state = json.loads(bytes(stored.tolist()))
    except (ValueError, RecursionError) as error:
        raise pieces.wrong("has a state that is no JSON") from error
    if not isinstance(state, dict):
        raise pieces.wrong("has a state that is no JSON object")
    return state


def _bnb_scales(pieces: Pieces, state: dict[str, object]) -> torch.Tensor:
    """The scales. A `nested` file stores them as bytes, with scales of their own and one number to add."""
    if "nested_scale" not in pieces:
        return pieces.take("scale", "numbers", ndim=1).float()
    own = pieces.take("scale", "bytes", ndim=1)
    table = pieces.take("nested_table", "numbers", ndim=1).float()
    nested = pieces.take("nested_scale", "numbers", ndim=1).float()
    group, offset = state.get("nested_blocksize"), state.get("nested_offset")
    if type(group) is not int or group < 1 or not isinstance(offset, int | float):
        raise pieces.wrong(f"has a state with nested block size {group!r} and offset {offset!r}")
    pieces.check_shape("nested_table", table, (256,))
    pieces.check_shape("nested_scale", nested, (-(-len(own) // group),))
    return table[own.long()] * nested[torch.arange(len(own)) // group] + float(offset)
