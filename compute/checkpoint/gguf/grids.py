"""Reads the integers of GGUF's quantized types, with the scale and the zero of each group, without dequantizing.

Most types with a grid of equal steps have it for 32 neighbouring values. Their bits lie in orders that the package
`gguf` knows: it is asked to dequantize the same integers with a scale of one. Types without such a grid, or with a
scale for fewer values, are dequantized and rounded to the nearest grid of 8 bits.
"""

from __future__ import annotations

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import Q4_K, dequantize
from numpy.typing import NDArray

from peerd.compute.quantized.groups import Codes, group_form, widened

#: How many values share a scale.
GROUP = 32
_TYPE = GGMLQuantizationType
# The bits of their codes, and the value of the first code where there is no stored minimum.
_SIMPLE = {
    _TYPE.Q4_0: (4, -8),
    _TYPE.Q4_1: (4, None),
    _TYPE.Q5_0: (5, -16),
    _TYPE.Q5_1: (5, None),
    _TYPE.Q8_0: (8, -128),
}
# Blocks of 256 values, whose eight groups have scales and minima of six bits.
_NESTED = {_TYPE.Q4_K: 4, _TYPE.Q5_K: 5}
# The twelve bytes that stand for eight scales of one and eight minima of zero.
_UNIT = np.array([1] * 4 + [0] * 4 + [1] * 4, dtype=np.uint8)
_ONE = np.array([1.0], dtype=np.float16).view(np.uint8)
_PLAIN = (_TYPE.F32, _TYPE.F16, _TYPE.BF16, _TYPE.F64)
_NARROW, _WIDE = 4, 8


def bits_of(kind: GGMLQuantizationType) -> int | None:
    """The bits of the codes that keep this type; None if it is not quantized."""
    if kind in _PLAIN:
        return None
    return _NARROW if _stored_bits(kind) == _NARROW else _WIDE


def is_exact(kind: GGMLQuantizationType) -> bool:
    """Whether the type's values lie on the grid of its codes."""
    return kind in _SIMPLE or kind in _NESTED


def codes_of(data: NDArray[np.uint8], kind: GGMLQuantizationType, bits: int) -> Codes:
    """The codes, of `bits` bits, of rows, uint8 `[rows, row bytes]`.

    Raises NotImplementedError for a type that `gguf` does not read.
    """
    if is_exact(kind):
        own = _simple(data, kind) if kind in _SIMPLE else _nested(data, kind)
        return widened(own, _stored_bits(kind), bits)
    values = torch.from_numpy(np.ascontiguousarray(dequantize(data, kind), dtype=np.float32))
    return group_form(_WIDE, GROUP).nearest(values)


def _stored_bits(kind: GGMLQuantizationType) -> int:
    return _SIMPLE[kind][0] if kind in _SIMPLE else _NESTED.get(kind, _WIDE)


def _simple(data: NDArray[np.uint8], kind: GGMLQuantizationType) -> Codes:
    blocks, first = _blocks(data, kind), _SIMPLE[kind][1]
    scales = _halves(blocks[:, 0:2])
    blocks[:, 0:2] = _ONE
    if first is None:
        zeros = _halves(blocks[:, 2:4])
        blocks[:, 2:4] = 0
    else:
        zeros = scales * first
    return _codes(dequantize(blocks.reshape(data.shape), kind) - (first or 0), scales, zeros, len(data))


def _nested(data: NDArray[np.uint8], kind: GGMLQuantizationType) -> Codes:
    blocks = _blocks(data, kind)
    steps, least = Q4_K.get_scale_min(blocks[:, 4:16])
    scales = _halves(blocks[:, 0:2]) * steps.astype(np.float32)
    zeros = -_halves(blocks[:, 2:4]) * least.astype(np.float32)
    blocks[:, 0:2], blocks[:, 2:4], blocks[:, 4:16] = _ONE, 0, _UNIT
    return _codes(dequantize(blocks.reshape(data.shape), kind), scales, zeros, len(data))


def _blocks(data: NDArray[np.uint8], kind: GGMLQuantizationType) -> NDArray[np.uint8]:
    """A copy of the blocks, one a row."""
    return data.reshape(-1, GGML_QUANT_SIZES[kind][1]).copy()


def _halves(fields: NDArray[np.uint8]) -> NDArray[np.float32]:
    return np.ascontiguousarray(fields).view(np.float16).astype(np.float32)


def _codes(codes: NDArray[np.float32], scales: NDArray[np.float32], zeros: NDArray[np.float32], rows: int) -> Codes:
    return Codes(
        torch.from_numpy(codes.reshape(rows, -1)).to(torch.uint8),
        torch.from_numpy(scales.reshape(rows, -1)),
        torch.from_numpy(zeros.reshape(rows, -1)),
    )
