"""Dequantizes formats with one number for each value and separate scales: fp8, and int8 by row or by group.

DeepSeek's fp8 has a scale for each block of 128 by 128 values; others have one for a matrix, a row or a group of
columns. bitsandbytes' int8 has one scale a row, and compressed-tensors' int8 may have zero points too. These formats'
own kernels also round activations. We do not: blocks compute what Transformers computes after dequantizing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from peerd.compute.checkpoint.packed.pieces import Pieces

# bitsandbytes stores the largest magnitude of each row; it stands for the value 127.
_BNB_LARGEST = 127.0
# What makes int8 unsigned.
_INT8_HALF = 128


@dataclass(frozen=True, slots=True)
class ScaledRows:
    """Implements `PlainRows`: `values` `[rows, columns]`; `scale` (and `zero`) has one entry for each `block` of
    values.
    """

    values: torch.Tensor
    scale: torch.Tensor
    block: tuple[int, int]
    zero: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]

    def rows(self, start: int, end: int) -> torch.Tensor:
        own = self.values[start:end].float()
        if self.zero is not None:
            own = own - self._spread(self.zero.float(), start, end)
        return own * self._spread(self.scale, start, end)

    def integers(self, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """For int8 with scales by row or by group: unsigned integers, scales and zero points (`IntegerRows`)."""
        scales = self.scale[start:end]
        points = torch.zeros_like(scales) if self.zero is None else self.zero[start:end].float()
        return self.values[start:end].short() + _INT8_HALF, scales, points + _INT8_HALF

    def in_order(self) -> bool:
        return self.block[0] == 1 and self.values.shape[1] % self.block[1] == 0

    def _spread(self, by_block: torch.Tensor, start: int, end: int) -> torch.Tensor:
        """The entries of `by_block` that apply to each value of rows `start` to `end`."""
        rows = torch.arange(start, end) // self.block[0]
        return by_block[rows].repeat_interleave(self.block[1], dim=1)[:, : self.values.shape[1]]


def scaled_rows(pieces: Pieces, *kinds: str, block: tuple[int, int] | None = None) -> ScaledRows:
    """One matrix of `fp8` or `int8`. `block` comes from the configuration; if it is None, the shapes determine it."""
    if "groups" in pieces:
        raise pieces.wrong("says which columns share a scale (weight_g_idx), which is not read in this format")
    values = pieces.take("values", *kinds, ndim=2)
    scale = pieces.scale()
    if scale.numel() == 1:
        return ScaledRows(values, scale.reshape(1, 1), (max(1, values.shape[0]), max(1, values.shape[1])))
    scale = scale[:, None] if scale.ndim == 1 else scale
    if scale.ndim != 2:
        raise pieces.wrong(f"has scales of shape {list(scale.shape)}")
    by_row = scale.shape[1] == 1 and scale.shape[0] == values.shape[0]
    if block is None or by_row:
        block = _block_of(pieces, values, scale)
    expected = [-(-size // side) for size, side in zip(values.shape, block, strict=True)]
    pieces.check_shape("scale", scale, expected)
    zero = pieces.take("zero", "int8") if "zero" in pieces else None
    if zero is not None:
        zero = zero[:, None] if zero.ndim == 1 else zero
        pieces.check_shape("zero", zero, expected)
    return ScaledRows(values, scale, block, zero)


def bnb_int8_rows(pieces: Pieces) -> ScaledRows:
    """One matrix of bitsandbytes' LLM.int8, in the form in which Transformers saves it."""
    values = pieces.take("values", "int8", ndim=2)
    scale = pieces.take("scale", "numbers").float()
    pieces.check_shape("scale", scale, values.shape[:1])
    return ScaledRows(values, scale[:, None] / _BNB_LARGEST, (1, max(1, values.shape[1])))


def _block_of(pieces: Pieces, values: torch.Tensor, scale: torch.Tensor) -> tuple[int, int]:
    """How many rows and columns share a scale. Raises CheckpointError if that does not divide the matrix evenly."""
    sides = []
    for size, count in zip(values.shape, scale.shape, strict=True):
        if not count or size % count:
            raise pieces.wrong(f"has scales of shape {list(scale.shape)} for values of shape {list(values.shape)}")
        sides.append(size // count)
    return sides[0], sides[1]
