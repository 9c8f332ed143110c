"""The KV pool of a span: for each block one tensor of keys and one of values, addressed by slot.

Knows slots, segments and device tensors; knows neither sessions nor attention. A page is
`page_tokens` neighbouring slots, the same in every block. Slots lie along the second axis,
`[kv_heads, slots, width]`, so that a row whose pages lie side by side reads as a view with the
strides of a cache of its own: no gather, no copy. Only slots that were written are ever read: a
stale NaN of somebody else's would survive any mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from peerd.compute.layer_kinds import LayerKind
from peerd.compute.steps import PageCopy, Segment


class KVPool:
    """Keys and values of every block of a span. The device thread's."""

    def __init__(
        self, kinds: Sequence[LayerKind], tokens: int, page_tokens: int, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.page_tokens = page_tokens
        self.device = device
        # Untouched memory costs nothing on the CPU, so a pool may be larger than what is in use.
        self.keys = [torch.empty(kind.kv_heads, tokens, kind.key_dim, device=device, dtype=dtype) for kind in kinds]
        self.values = [torch.empty(kind.kv_heads, tokens, kind.value_dim, device=device, dtype=dtype) for kind in kinds]

    def copy_pages(self, copies: Sequence[PageCopy]) -> None:
        """Copy whole pages in every block, as if all at once."""
        if not copies:
            return
        sources = self._page_slots([copy.source for copy in copies])
        targets = self._page_slots([copy.target for copy in copies])
        for stored in (*self.keys, *self.values):
            stored.index_copy_(1, targets, stored.index_select(1, sources))

    def slots(self, segment: Segment) -> RowSlots:
        """Where the segment's row lies, from its first position to the segment's last."""
        if isinstance(segment.pages, range):
            first = segment.pages.start * self.page_tokens
            return RowSlots(first, None, segment.end)
        return RowSlots(None, self._page_slots(segment.pages)[: segment.end], segment.end)

    def _page_slots(self, pages: Sequence[int]) -> torch.Tensor:
        starts = torch.tensor(pages, device=self.device) * self.page_tokens
        return (starts[:, None] + torch.arange(self.page_tokens, device=self.device)).flatten()


@dataclass(frozen=True, slots=True, eq=False)
class RowSlots:
    """The slots of a row's first `length` positions: neighbours from `first` on, or the list in `index`."""

    first: int | None
    index: torch.Tensor | None
    length: int

    def read(self, stored: torch.Tensor, start: int) -> torch.Tensor:
        """The row's positions from `start` on in one block: `[kv_heads, length - start, width]`."""
        if self.index is None:
            assert self.first is not None
            return stored[:, self.first + start : self.first + self.length]
        return stored.index_select(1, self.index[start:])

    def tail(self, start: int) -> torch.Tensor | range:
        """The slots of the positions from `start` on."""
        if self.index is None:
            assert self.first is not None
            return range(self.first + start, self.first + self.length)
        return self.index[start:]


class KVWriter:
    """Where the new positions of a batch go, worked out once for all blocks."""

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
