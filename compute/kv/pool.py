"""The KV pool of a span: tensors of keys and of values, addressed by slot.

A page is `page_tokens` neighbouring slots in each of `blocks_per_page` tensors. The blocks of all groups
(`kv/layout.py`) use the same tensors, each group with its own pages. Slots lie along the second axis, `[kv_heads,
slots, width]`, so that a row whose pages lie side by side is a view with the strides of a cache of its own: no gather,
no copy. Only slots that were written are ever read, because a stale NaN of another session would survive any mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from peerd.compute.device.staging import upload
from peerd.compute.families.layer_kinds import LayerKind
from peerd.compute.kv.layout import KVLayout, pool_shapes
from peerd.compute.steps import PageCopy, RowPages, Segment


class KVPool:
    """The keys and values of every block of a span. Only the device thread uses it.

    `keys[layer]` and `values[layer]` are `[kv_heads, slots, width]`; blocks are numbered from 0 within the span. Blocks
    at the same place in different groups have the same tensor.
    """

    def __init__(
        self,
        kinds: Sequence[LayerKind],
        layout: KVLayout,
        pages: int,
        page_tokens: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.page_tokens = page_tokens
        self.device = device
        self.dtype = dtype
        self.layout = layout
        #: The slot into which a decode's padding writes: the first of a page beyond all that rows own.
        self.scratch_slot = pages * page_tokens
        #: The slots of all pages together, that one included.
        self.slots_in_all = slots = (pages + 1) * page_tokens
        first = pool_shapes(kinds, layout)
        # On the CPU untouched memory costs nothing, so a pool may be larger than what is in use.
        self._keys = [torch.empty(kind.kv_heads, slots, kind.key_dim, device=device, dtype=dtype) for kind in first]
        self._values = [torch.empty(kind.kv_heads, slots, kind.value_dim, device=device, dtype=dtype) for kind in first]
        self.keys = [self._keys[page_index] for page_index in layout.page_index_of]
        self.values = [self._values[page_index] for page_index in layout.page_index_of]

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All tensors of the pool, each once: those of keys, then those of values."""
        return [*self._keys, *self._values]

    def copy_pages(self, copies: Sequence[PageCopy]) -> None:
        """Copy whole pages. All sources are read before any target is written."""
        if not copies:
            return
        sources = self._page_slots([copy.source for copy in copies])
        targets = self._page_slots([copy.target for copy in copies])
        for stored in self.tensors:
            stored.index_copy_(1, targets, stored.index_select(1, sources))

    def slots(self, segment: Segment, group: int) -> RowSlots:
        """The slots of the segment's row in a group, from the first position kept there to the segment's last."""
        row: RowPages = segment.groups[group]
        if isinstance(row.pages, range):
            return RowSlots(row.first, segment.end, row.pages.start * self.page_tokens, None)
        return RowSlots(row.first, segment.end, None, self._page_slots(row.pages)[: segment.end - row.first])

    def _page_slots(self, pages: Sequence[int]) -> torch.Tensor:
        starts = upload(pages, self.device) * self.page_tokens
        return (starts[:, None] + torch.arange(self.page_tokens, device=self.device)).flatten()


@dataclass(frozen=True, slots=True, eq=False)
class RowSlots:
    """The slots of a row's positions from `first` to `length - 1`: neighbours that begin at `slot`, or those in
    `index`.
    """

    first: int
    length: int
    slot: int | None
    index: torch.Tensor | None

    def read(self, stored: torch.Tensor, start: int) -> torch.Tensor:
        """The row's positions from `start` on in one block: `[kv_heads, length - start, width]`."""
        assert start >= self.first
        if self.index is None:
            assert self.slot is not None
            return stored[:, self.slot + start - self.first : self.slot + self.length - self.first]
        return stored.index_select(1, self.index[start - self.first :])

    def tail(self, start: int) -> torch.Tensor | range:
        """The slots of the positions from `start` on."""
        if self.index is None:
            assert self.slot is not None
            return range(self.slot + start - self.first, self.slot + self.length - self.first)
        return self.index[start - self.first :]


class KVWriter:
    """Writes the new positions of a batch; their slots are computed once for all blocks."""

    def __init__(self, rows: Sequence[RowSlots], segments: Sequence[Segment], device: torch.device) -> None:
        tails = [row.tail(segment.start) for row, segment in zip(rows, segments, strict=True)]
        self._run = tails[0] if len(tails) == 1 and isinstance(tails[0], range) else None
        self._index: torch.Tensor | None = None
        if self._run is None:
            self._index = torch.cat([_as_index(tail, device) for tail in tails])

    def write(self, stored: torch.Tensor, new: torch.Tensor) -> None:
        """Put `new`, `[kv_heads, positions, width]`, into one block's keys or values."""
        if self._run is not None:
            stored[:, self._run.start : self._run.stop] = new
        else:
            assert self._index is not None
            stored.index_copy_(1, self._index, new)


def _as_index(slots: torch.Tensor | range, device: torch.device) -> torch.Tensor:
    return torch.arange(slots.start, slots.stop, device=device) if isinstance(slots, range) else slots
