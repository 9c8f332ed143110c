"""Matrices as small integers in groups, packed as torch's CPU kernel reads them: half bytes, a scale and an offset.

A value is `scale * code + zero`. The codes have 4 or 8 bits, and neighbouring columns of a row, `group` of them, share
scale and zero. The grids of GGUF's types, and of most others that are published, are of this kind, so their codes are
kept as they are.

The kernel computes `scale * (code - 8) + offset` for codes of 4 bits, with scale and offset in bfloat16. Codes of
8 bits lie in two planes of half bytes, `code = 16 * high + low`, which share scales and offsets: the product is 16
times that of the high plane plus that of the low plane. Rounding scale and offset to bfloat16 is all that is lost of a
grid: a value moves by at most `2**-8 * (|scale * (code - middle)| + |scale * middle + zero|)`, where `middle` is 8 or
136. So it is best if the value in the middle of the codes is near 0, and narrower codes belong into the middle of wider
ones.

The order of half bytes within the kernel's blocks differs from CPU to CPU. It is found out by packing a small matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, Protocol

import torch

from peerd.compute.quantized.formats import Storage

#: The sizes of groups that the kernel takes.
GROUPS = (32, 64, 128, 256)
#: Rows are stored in multiples of this many; what is missing is filled with zeros. All known kernels' blocks divide it.
ROWS_STEP = 64
#: Multiplies bfloat16 `[n, columns]` by one plane: (x, plane, group, scales and offsets) to bfloat16 `[n, rows]`. None
#: in a release of torch without it.
KERNEL: Callable[[torch.Tensor, torch.Tensor, int, torch.Tensor], torch.Tensor] | None = getattr(
    torch, "_weight_int4pack_mm_for_cpu", None
)
# What stands for 0 in a half byte.
_MIDDLE = 8


@dataclass(frozen=True, slots=True)
class Grid:
    """The kind of integers in which a parameter is stored, or onto which it is rounded.

    exact: whether the publisher's values lie on the grid. stored_as: the publisher's name of the type, for people.
    transposed: whether the groups lie along the first dimension of the parameter as the model sees it.
    """

    bits: int
    group: int
    exact: bool
    stored_as: str
    transposed: bool = False


@dataclass(frozen=True, slots=True)
class Codes:
    """Some rows of a matrix: codes uint8 `[rows, columns]`, and fp32 scales and zeros `[rows, columns / group]`."""

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor


def widened(own: Codes, bits: int, wider: int) -> Codes:
    """The same values with codes of `wider` bits instead of `bits`, around the middle of our format."""
    if bits == wider:
        return own
    shift = _middle(wider) - (1 << bits >> 1)
    return Codes(own.codes + shift, own.scales, own.zeros - shift * own.scales)


class CodeRows(Protocol):
    """A matrix `[rows, columns]` in a file, whose rows are read when they are asked for."""

    @property
    def shape(self) -> tuple[int, int]: ...

    def read(self, start: int, end: int) -> Codes:
        """Rows `start` to `end - 1`. Raises CheckpointError."""
        ...


@dataclass(frozen=True, slots=True)
class Order:
    """How half bytes lie: in blocks of `lanes` rows, column by column, two rows a byte, the first in the low half.

    split: whether these are the rows `i` and `i + lanes / 2`, rather than `2 * i` and `2 * i + 1`.
    """

    lanes: int
    split: bool

    def halves(self, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows in the low halves and those in the high halves of bytes: views of `[..., lanes]` as `[..., lanes /
        2]`.
        """
        if self.split:
            return blocks[..., : self.lanes // 2], blocks[..., self.lanes // 2 :]
        return blocks[..., ::2], blocks[..., 1::2]


_ORDERS = tuple(Order(lanes, split) for lanes in (64, 32, 16) for split in (True, False))


class GroupForm(Storage):
    """One format of this kind. The columns of a matrix must be a multiple of `group`."""

    values_dtype = torch.uint8
    scales_dtype = torch.bfloat16
    name: ClassVar[str] = "groups"

    def __init__(self, bits: int, group: int) -> None:
        self.bits = bits
        self.group = group
        self.planes = bits // 4
        #: What is subtracted from codes before the scale: the middle of all planes.
        self.middle = float(_middle(bits))
        # The offset is added once for each unit of the planes' weights.
        self._offsets = 1.0 if self.planes == 1 else 17.0

    def __repr__(self) -> str:
        return f"int{self.bits} in groups of {self.group}"

    def ends(self, rows: int, columns: int) -> tuple[int, int]:
        padded = padded_rows(rows)
        return self.planes * padded * columns // 2, 2 * padded * columns // self.group

    def fits(self, columns: int) -> bool:
        """Whether a matrix of this width can be stored."""
        return columns % self.group == 0

    def split(self, values: torch.Tensor, scales: torch.Tensor, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The planes `[planes, rows, columns / 2]` and the scales and offsets `[groups, rows, 2]`, as views."""
        return values.view(self.planes, -1, columns // 2), scales.view(columns // self.group, -1, 2)

    def write(self, planes: torch.Tensor, scales: torch.Tensor, start: int, own: Codes) -> None:
        """Store rows from `start` on, a multiple of ROWS_STEP, into what `split` returned."""
        rows, columns = own.codes.shape
        end = start + padded_rows(rows)
        order = order_of_halves()
        codes = own.codes.new_full((end - start, columns), _MIDDLE)
        codes[:rows] = own.codes
        for number, plane in enumerate(planes):
            halves = (codes >> 4 * number) & 15
            blocks = halves.view(-1, order.lanes, columns).transpose(1, 2)
            low, high = order.halves(blocks)
            plane[start:end].view(-1, columns, order.lanes // 2).copy_(low | (high << 4))
        both = scales[:, start:end]
        both.zero_()
        both[:, :rows, 0] = own.scales.t()
        both[:, :rows, 1] = ((own.zeros + self.middle * own.scales) / self._offsets).t()

    def read(
        self, planes: torch.Tensor, scales: torch.Tensor, start: int, end: int, dtype: torch.dtype
    ) -> torch.Tensor:
        """Dequantize rows `start` to `end - 1`, multiples of ROWS_STEP, as `[columns, rows]`, the order of products."""
        order = order_of_halves()
        columns, rows = 2 * planes.shape[2], end - start
        codes = torch.empty(columns, rows // order.lanes, order.lanes, dtype=torch.float32, device=planes.device)
        low, high = order.halves(codes)
        for number, plane in enumerate(planes):
            # The order of bytes within a block is that of columns.
            own = plane[start:end].view(-1, columns, order.lanes // 2).transpose(0, 1)
            if number == 0:
                low.copy_(own & 15)
                high.copy_(own >> 4)
            else:
                low.add_(own & 15, alpha=16)
                high.add_(own >> 4, alpha=16)
        own_scales = scales[:, start:end, :1].float().transpose(1, 2)
        offsets = scales[:, start:end, 1:].float().transpose(1, 2) * self._offsets - self.middle * own_scales
        grouped = codes.view(len(scales), self.group, rows)
        return grouped.mul_(own_scales).add_(offsets).view(columns, rows).to(dtype)

    def nearest(self, run: torch.Tensor) -> Codes:
        """Round fp32 `[rows, columns]` to the grid of which the groups' least and largest values are the ends."""
        rows, columns = run.shape
        grouped = run.view(rows, columns // self.group, self.group)
        least, largest = grouped.amin(2), grouped.amax(2)
        # As they will be stored, so that codes are nearest to what is stored.
        scales = ((largest - least) / ((1 << self.bits) - 1)).bfloat16().float()
        offsets = ((least + self.middle * scales) / self._offsets).bfloat16().float()
        zeros = offsets * self._offsets - self.middle * scales
        steps = (grouped - zeros[..., None]) / scales.clamp(min=torch.finfo(torch.float32).tiny)[..., None]
        codes = steps.round_().clamp_(0, (1 << self.bits) - 1).to(torch.uint8)
        return Codes(codes.view(rows, columns), scales, zeros)


def _middle(bits: int) -> int:
    return _MIDDLE if bits == 4 else 17 * _MIDDLE


@cache
def group_form(bits: int, group: int) -> GroupForm:
    """The format for codes of so many bits in groups of this size."""
    if bits not in (4, 8) or group not in GROUPS:
        raise ValueError(f"there is no format for integers of {bits} bits in groups of {group}")
    return GroupForm(bits, group)


def padded_rows(rows: int) -> int:
    """The rows that are stored for a matrix of this many."""
    return -(-rows // ROWS_STEP) * ROWS_STEP


@cache
def order_of_halves() -> Order:
    """The order in which this CPU's kernel reads half bytes; if it is none that we know, one of ours."""
    return _kernels_order() or _ORDERS[0]


@cache
def has_kernel(group: int) -> bool:
    """Whether torch's product works here for groups of this size. It is compared with the dequantized matrix once."""
    if _kernels_order() is None or KERNEL is None:
        return False
    form, columns = group_form(4, group), 2 * group
    random = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (ROWS_STEP, columns), generator=random, dtype=torch.uint8)
    scales = torch.rand(ROWS_STEP, 2, generator=random)
    own = Codes(codes, scales, torch.rand(ROWS_STEP, 2, generator=random) - 8 * scales)
    values, packed_scales = form.empty((ROWS_STEP, columns), torch.device("cpu"))
    planes, both = form.split(values[0], packed_scales[0], columns)
    form.write(planes, both, 0, own)
    x = torch.randn(2, columns, generator=random).bfloat16()
    try:
        got = KERNEL(x, planes[0], group, both).float()
    except RuntimeError:
        return False
    wanted = x.float() @ form.read(planes, both, 0, ROWS_STEP, torch.float32)
    return bool((got - wanted).norm() <= 0.02 * wanted.norm())


@cache
def _kernels_order() -> Order | None:
    """The order in which torch packs half bytes for its kernel on this CPU; None if there is no such kernel."""
    pack = getattr(torch, "_convert_weight_to_int4pack_for_cpu", None)
    if pack is None:
        return None
    columns = GROUPS[0]
    codes = torch.randint(0, 16, (2 * ROWS_STEP, columns), generator=torch.Generator().manual_seed(0))
    try:
        packed = pack(codes.to(torch.int32), 1).view(torch.uint8).flatten()
    except RuntimeError:
        return None
    for order in _ORDERS:
        low, high = order.halves(codes.to(torch.uint8).view(-1, order.lanes, columns).transpose(1, 2))
        if torch.equal((low | (high << 4)).flatten(), packed):
            return order
    return None
