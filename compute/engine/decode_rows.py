"""The inputs of a decode as tensors of fixed shape: each row's position, and its pages.

A decode adds few positions to each of many rows. Here every such position becomes a row of its own, with a page
table and a length. So rollbacks, forks and other neighbours only change numbers in the same tensors. Unused rows are
padding: such a row sees nothing and writes into a page that no session owns. All numbers lie in one buffer, so that
one copy brings them to the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, chain
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from peerd.compute.attention.paged_rows import PagedRows
from peerd.compute.families.layer_kinds import LayerKind
from peerd.compute.kv.pool import KVPool
from peerd.compute.steps import RowPages, Segment

#: With more positions of one row at once, it is faster to read its keys once for all of them.
MOST_POSITIONS_A_ROW = 8
# Triton assumes this alignment of a pointer, if it can: 16 bytes, which are 4 numbers.
_ALIGNMENT = 4

Numbers = npt.NDArray[np.int32]


class DecodeRows:
    """Numbers for `rows` rows whose page tables have up to `width` pages, on the host and on the pool's device."""

    def __init__(self, pool: KVPool, rows: int, width: int) -> None:
        self.rows = rows
        self.width = width
        self._pool = pool
        groups = pool.layout.groups
        sizes = [rows] * (3 + 3 * groups) + [rows * width] * groups
        starts = list(accumulate((-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes), initial=0))
        #: `fill` writes to `host`, which the caller copies to `device`.
        total = max(starts[-1], _ALIGNMENT)
        self.host = torch.zeros(total, dtype=torch.int32, pin_memory=pool.device.type == "cuda")
        self.device = torch.zeros(total, dtype=torch.int32, device=pool.device)
        self._filled = _Parts(self.host.numpy(), starts, sizes, groups)
        self._parts = _Parts(self.device, starts, sizes, groups)

    def fill(self, segments: Sequence[Segment]) -> None:
        """Write the segments' numbers into `host`; the caller then copies it to `device`."""
        filled = self._filled
        count = sum(segment.count for segment in segments)
        filled.positions[:count] = list(chain.from_iterable(range(each.start, each.end) for each in segments))
        filled.rope_lengths[:count] = list(chain.from_iterable(each.rope_lengths for each in segments))
        filled.positions[count:] = 0
        filled.rope_lengths[count:] = 1
        for group in range(self._pool.layout.groups):
            table = filled.tables[group].reshape(self.rows, self.width)
            begin = 0
            for segment in segments:
                end = begin + segment.count
                row_pages = segment.groups[group]
                pages = np.asarray(row_pages.pages, dtype=np.int32)
                table[begin:end, : len(pages)] = pages
                filled.starts[group][begin:end] = row_pages.first
                filled.slots[group][begin:end] = slots_of(row_pages, pages, segment, self._pool.page_tokens)
                begin = end
            filled.lengths[group][:count] = filled.positions[:count] + 1 - filled.starts[group][:count]
            filled.lengths[group][count:] = 0
            filled.starts[group][count:] = 0
            filled.slots[group][count:] = self._pool.scratch_slot

    @property
    def positions(self) -> torch.Tensor:
        """Each row's absolute position: a new int64 tensor `[1, rows]`."""
        positions: torch.Tensor = self._parts.positions
        return positions.long()[None]

    @property
    def rope_lengths(self) -> torch.Tensor:
        """The length by which ropes turn each row: a new int64 tensor `[1, rows]`."""
        lengths: torch.Tensor = self._parts.rope_lengths
        return lengths.long()[None]

    def slots(self, group: int) -> torch.Tensor:
        """The slot of each row's new position: a new int64 tensor `[rows]`."""
        slots: torch.Tensor = self._parts.slots[group]
        return slots.long()

    def paged(self, group: int, kind: LayerKind) -> PagedRows:
        """What each row sees in the blocks of a group that are of this kind; computed if it does not see everything."""
        parts = self._parts
        first = parts.zeros
        if kind.window is not None:
            first = (parts.positions - (kind.window - 1) - parts.starts[group]).clamp_(min=0)
        elif kind.chunk is not None:
            first = (parts.positions // kind.chunk * kind.chunk - parts.starts[group]).clamp_(min=0)
        table = parts.tables[group].view(self.rows, self.width)
        return PagedRows(table, parts.lengths[group], first, self._pool.page_tokens)


class _Parts:
    """The parts of one buffer of numbers (an array or a tensor) by name. `starts`: the positions at which tables
    begin.
    """

    def __init__(self, buffer: Any, offsets: Sequence[int], sizes: Sequence[int], groups: int) -> None:
        parts = iter([buffer[offset : offset + size] for offset, size in zip(offsets, sizes, strict=False)])
        self.positions, self.rope_lengths, self.zeros = next(parts), next(parts), next(parts)
        self.slots = [next(parts) for _ in range(groups)]
        self.lengths = [next(parts) for _ in range(groups)]
        self.starts = [next(parts) for _ in range(groups)]
        self.tables = [next(parts) for _ in range(groups)]


def slots_of(row_pages: RowPages, pages: Numbers, segment: Segment, page_tokens: int) -> Numbers:
    """The slots of a segment's new positions in one group."""
    own = np.arange(segment.start - row_pages.first, segment.end - row_pages.first, dtype=np.int32)
    slots: Numbers = pages[own // page_tokens] * page_tokens + own % page_tokens
    return slots


def is_short(segment: Segment) -> bool:
    """Whether the segment's positions may be rows of a decode."""
    return segment.count <= MOST_POSITIONS_A_ROW
