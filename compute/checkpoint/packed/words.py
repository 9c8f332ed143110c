"""Dequantizes formats with several integers in a 32-bit word: AWQ, GPTQ and compressed-tensors' `pack-quantized`.

Each has its own order. AWQ and GPTQ store a linear layer's matrix as `[columns, rows]`. AWQ packs neighbouring rows
into a word, in an order of its own; GPTQ packs neighbouring columns. compressed-tensors stores `[rows, columns]` and
packs columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from peerd.compute.checkpoint.packed.pieces import Pieces

#: The bits of a word.
WORD_BITS = 32
# The row that AWQ puts into each half byte of a word, beginning with the lowest.
_AWQ_BITS = 4
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def unpack_words(words: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """The unsigned integers in int32 words, lowest bits first, unpacked along `dim`."""
    per_word = WORD_BITS // bits
    shifts = torch.arange(per_word, dtype=torch.int32) * bits
    spread = (words.unsqueeze(dim + 1) >> shifts.view(-1, *[1] * (words.ndim - dim - 1))) & ((1 << bits) - 1)
    return spread.flatten(dim, dim + 1)


@dataclass(frozen=True, slots=True)
class GptqRows:
    """Implements `PlainRows` for GPTQ. `groups` gives for each column the group whose scales apply."""

    words: torch.Tensor
    zeros: torch.Tensor
    scales: torch.Tensor
    groups: torch.Tensor
    bits: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.words.shape[1], self.words.shape[0] * (WORD_BITS // self.bits)

    def rows(self, start: int, end: int) -> torch.Tensor:
        values = unpack_words(self.words[:, start:end], self.bits, 0).float()
        return ((values - self.zeros[self.groups, start:end]) * self.scales[self.groups, start:end]).t()

    def integers(self, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        values = unpack_words(self.words[:, start:end], self.bits, 0)
        return values.t(), self.scales[:, start:end].t(), self.zeros[:, start:end].t()

    def in_order(self) -> bool:
        return _in_order(self.groups, len(self.scales))


def gptq_rows(pieces: Pieces, bits: int, *, stored_one_less: bool) -> GptqRows:
    """One matrix of GPTQ. `stored_one_less`: zero points are stored minus one, as in all files but `gptq_v2`."""
    per_word = WORD_BITS // bits
    words = pieces.take("values", "int32", ndim=2)
    scales = pieces.take("scale", "numbers", ndim=2).float()
    columns, rows = words.shape[0] * per_word, words.shape[1]
    zero_words = pieces.take("zero", "int32", ndim=2)
    pieces.check_shape("scale", scales, (len(zero_words), rows))
    pieces.check_shape("zero", zero_words, (len(scales), -(-rows // per_word)))
    zeros = unpack_words(zero_words, bits, 1)[:, :rows]
    if stored_one_less:
        zeros = (zeros + 1) & ((1 << bits) - 1)
    return GptqRows(words, zeros.float(), scales, _groups(pieces, columns, len(scales)), bits)


@dataclass(frozen=True, slots=True)
class AwqRows:
    """Implements `PlainRows` for AWQ."""

    words: torch.Tensor
    zeros: torch.Tensor
    scales: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.scales.shape[1], self.words.shape[0]

    def integers(self, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        per_word = len(_AWQ_ORDER)
        first, last = start // per_word, -(-end // per_word)
        values = _awq_values(self.words[:, first:last])[:, start - first * per_word :][:, : end - start]
        return values.t(), self.scales[:, start:end].t(), self.zeros[:, start:end].t()

    def in_order(self) -> bool:
        return True

    def rows(self, start: int, end: int) -> torch.Tensor:
        values = self.integers(start, end)[0].t()
        group = self.words.shape[0] // len(self.scales)
        zeros = self.zeros[:, start:end].repeat_interleave(group, dim=0)
        scales = self.scales[:, start:end].repeat_interleave(group, dim=0)
        return ((values.float() - zeros) * scales).t()


def awq_rows(pieces: Pieces) -> AwqRows:
    """One matrix of AWQ's `gemm` layout, four bits."""
    words = pieces.take("values", "int32", ndim=2)
    scales = pieces.take("scale", "numbers", ndim=2).float()
    zero_words = pieces.take("zero", "int32", ndim=2)
    columns, rows = words.shape[0], words.shape[1] * len(_AWQ_ORDER)
    if not len(scales) or columns % len(scales):
        raise pieces.wrong(f"has {len(scales)} groups of scales for {columns} columns")
    pieces.check_shape("scale", scales, (len(scales), rows))
    pieces.check_shape("zero", zero_words, (len(scales), words.shape[1]))
    return AwqRows(words, _awq_values(zero_words).float(), scales)


def _awq_values(words: torch.Tensor) -> torch.Tensor:
    """Unpack `[n, rows / 8]` words to `[n, rows]`, and restore the order of the rows."""
    place_of_row = torch.tensor(_AWQ_ORDER).argsort()
    by_word = unpack_words(words, _AWQ_BITS, 1).view(len(words), -1, len(_AWQ_ORDER))
    return by_word[:, :, place_of_row].flatten(1)


@dataclass(frozen=True, slots=True)
class PackedRows:
    """Implements `PlainRows` for compressed-tensors' integers, which are stored with half of their range added."""

    words: torch.Tensor
    zeros: torch.Tensor | None
    scales: torch.Tensor
    groups: torch.Tensor
    bits: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.words.shape[0], len(self.groups)

    def rows(self, start: int, end: int) -> torch.Tensor:
        values = unpack_words(self.words[start:end], self.bits, 1)[:, : len(self.groups)].float() - _half(self.bits)
        if self.zeros is not None:
            values = values - self.zeros[start:end][:, self.groups]
        return values * self.scales[start:end][:, self.groups]

    def integers(self, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        values = unpack_words(self.words[start:end], self.bits, 1)[:, : len(self.groups)]
        scales = self.scales[start:end]
        points = torch.zeros_like(scales) if self.zeros is None else self.zeros[start:end]
        return values, scales, points + _half(self.bits)

    def in_order(self) -> bool:
        return _in_order(self.groups, self.scales.shape[1])


def packed_rows(pieces: Pieces) -> PackedRows:
    """One matrix of compressed-tensors' `pack-quantized`, of 4 or 8 bits; the shapes show which."""
    words = pieces.take("values", "int32", ndim=2)
    shape = pieces.take("shape", "int64", "int32", ndim=1).tolist()
    if len(shape) != 2 or shape[0] != len(words) or shape[1] < 1:
        raise pieces.wrong(f"is said to have the shape {shape}, for words of shape {list(words.shape)}")
    columns = shape[1]
    bits = next((bits for bits in (4, 8) if -(-columns * bits // WORD_BITS) == words.shape[1]), None)
    if bits is None:
        raise pieces.wrong(f"packs {columns} columns into {words.shape[1]} words, neither as 4 nor as 8 bits")
    scales = pieces.scale()
    scales = scales[:, None] if scales.ndim == 1 else scales
    if scales.ndim != 2 or not scales.shape[1]:
        raise pieces.wrong(f"has scales of shape {list(scales.shape)}")
    pieces.check_shape("scale", scales, (len(words), scales.shape[1]))
    zeros = None
    if "zero" in pieces:
        zero_words = pieces.take("zero", "int32", ndim=2)
        pieces.check_shape("zero", zero_words, (-(-len(words) * bits // WORD_BITS), scales.shape[1]))
        zeros = unpack_words(zero_words, bits, 0)[: len(words)].float() - _half(bits)
    return PackedRows(words, zeros, scales, _groups(pieces, columns, scales.shape[1]), bits)


def _half(bits: int) -> int:
    return 1 << (bits - 1)


def _in_order(groups: torch.Tensor, count: int) -> bool:
    """Whether the columns, whose groups these are, belong to `count` groups of equal size in their order."""
    columns = len(groups)
    return columns % count == 0 and torch.equal(groups, torch.arange(columns) // (columns // count))


def _groups(pieces: Pieces, columns: int, count: int) -> torch.Tensor:
    """The group of scales, of `count`, that applies to each column: as stored, or else consecutive groups of equal
    size.
    """
    if "groups" in pieces:
        groups = pieces.take("groups", "int32", ndim=1).long()
        pieces.check_shape("groups", groups, (columns,))
        if columns and not 0 <= int(groups.min()) <= int(groups.max()) < count:
            raise pieces.wrong(f"puts columns into groups that are not among its {count}")
        return groups
    if not count or columns % count:
        raise pieces.wrong(f"has {count} groups of scales for {columns} columns")
    return torch.arange(columns) // (columns // count)
