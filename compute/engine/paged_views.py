"""How blocks see a batch on a GPU: the cache to which they write, and attention without a loop over rows.

`DecodeView` is a decode in buffers of fixed shape. `MixedView` is any batch: its short segments are rows of one
paged attention, and only the rest, chunks of prefills, is computed one by one. On other devices `BatchView` takes
their place. Nothing here asks the device for a number: the host computes all numbers and sends them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from peerd.compute.attention.paged import paged_decode
from peerd.compute.attention.paged_rows import PagedRows
from peerd.compute.attention.prefix import BatchPrefix
from peerd.compute.attention.scores import Scores, Visible, attend
from peerd.compute.device.staging import upload
from peerd.compute.engine.decode_rows import DecodeRows, is_short, slots_of
from peerd.compute.families.layer_kinds import LayerKind
from peerd.compute.kv.pool import KVPool, RowSlots
from peerd.compute.model.span_model import SpanModel
from peerd.compute.steps import Segment


class _View:
    """The KV cache to which the model writes. `slots`: for each group, the slots of new positions, int64."""

    # Transformers asks this of any cache.
    is_compileable = False

    def __init__(
        self,
        pool: KVPool,
        slots: Sequence[torch.Tensor],
        rows: DecodeRows,
        positions: torch.Tensor,
        prefix: BatchPrefix | None = None,
    ) -> None:
        self.pool = pool
        self._prefix = prefix
        #: The absolute position of each new one, `[1, positions]`.
        self.positions = positions
        self._slots = slots
        self._rows = rows
        self._paged: dict[tuple[int, int | None, int | None], PagedRows] = {}

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, kwargs: Mapping[str, Any] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cache a block's new keys and values, `[1, kv_heads, positions, width]`. Attention reads the pool itself."""
        if self._prefix is not None:
            keys, values = self._prefix.put(layer, keys, values)
        slots = self._slots[self.pool.layout.group_of[layer]]
        self.pool.keys[layer].index_copy_(1, slots, keys[0])
        self.pool.values[layer].index_copy_(1, slots, values[0])
        return keys, values

    def get_seq_length(self, layer: int | None = None) -> int | torch.Tensor:
        """Answers Transformers' question where positions start, like `BatchView.get_seq_length`."""
        if layer is None:
            return 0
        return self.positions[0] - torch.arange(self.positions.shape[1], device=self.positions.device)

    def get_mask_sizes(self, _length: int, _layer: int) -> tuple[int, int]:
        """Answers Transformers' question how large a mask to make: none."""
        return 0, 0

    def get_query_offset(self, _layer: int) -> int:
        """Answers Transformers' question where a mask begins."""
        return 0

    def attend_rows(self, layer: int, kind: LayerKind, query: torch.Tensor, scores: Scores) -> torch.Tensor:
        """Attention of `query` `[1, heads, rows, width]`, one position for each row, over one block's cache.

        Returns `[1, rows, heads, value_dim]`.
        """
        rule = (self.pool.layout.group_of[layer], kind.window, kind.chunk)
        paged = self._paged.get(rule)
        if paged is None:
            paged = self._paged[rule] = self._rows.paged(rule[0], kind)
        return paged_decode(
            query[0].transpose(0, 1),
            self.pool.keys[layer],
            self.pool.values[layer],
            paged,
            scale=query.shape[-1] ** -0.5 if scores.scaling is None else scores.scaling,
            softcap=scores.softcap,
            sinks=scores.sinks,
            slopes=None if scores.bias is None else scores.bias.slopes,
        )[None]


class DecodeView(_View):
    """A decode whose numbers lie in `rows` on the device, and may change there between two runs of a graph."""

    def __init__(self, pool: KVPool, rows: DecodeRows) -> None:
        slots = [rows.slots(group) for group in range(pool.layout.groups)]
        super().__init__(pool, slots, rows, rows.positions)

    attend = _View.attend_rows


class MixedView(_View):
    """A batch of short and long segments."""

    def __init__(self, pool: KVPool, segments: Sequence[Segment], prefix: BatchPrefix | None = None) -> None:
        short = [segment for segment in segments if is_short(segment)]
        pages = max((len(row_pages.pages) for segment in short for row_pages in segment.groups), default=0)
        rows = DecodeRows(pool, sum(segment.count for segment in short), pages)
        rows.fill(short)
        rows.device.copy_(rows.host, non_blocking=True)
        slots = [_slots(pool, segments, group) for group in range(pool.layout.groups)]
        positions = [position for segment in segments for position in range(segment.start, segment.end)]
        super().__init__(pool, slots, rows, upload(positions, pool.device)[None], prefix)
        self._long: list[tuple[int, Segment, list[RowSlots]]] = []
        short_rows: list[int] = []
        offset = 0
        for segment in segments:
            if is_short(segment):
                short_rows += range(offset, offset + segment.count)
            else:
                lies = [pool.slots(segment, group) for group in range(pool.layout.groups)]
                self._long.append((offset, segment, lies))
            offset += segment.count
        self._short_rows = upload(short_rows, pool.device)
        self._visible: dict[tuple[int | None, int | None], list[Visible]] = {}

    def attend(self, layer: int, kind: LayerKind, query: torch.Tensor, scores: Scores) -> torch.Tensor:
        """Attention of `query` `[1, heads, positions, width]` over one block's cache: `[1, positions, heads,
        value_dim]`.
        """
        if not self._long:
            return self.attend_rows(layer, kind, query, scores)
        keys, values = self.pool.keys[layer], self.pool.values[layer]
        output = torch.empty(
            1, query.shape[2], query.shape[1], values.shape[2], device=values.device, dtype=values.dtype
        )
        if self._rows.rows:
            output[:, self._short_rows] = self.attend_rows(layer, kind, query[:, :, self._short_rows], scores)
        group = self.pool.layout.group_of[layer]
        for (offset, segment, slots), visible in zip(self._long, self._seen_by_long(kind), strict=True):
            end = offset + segment.count
            row_keys, row_values = (slots[group].read(stored, visible.start)[None] for stored in (keys, values))
            output[:, offset:end] = attend(query[:, :, offset:end], row_keys, row_values, visible, scores)
        return output

    def _seen_by_long(self, kind: LayerKind) -> list[Visible]:
        rule = (kind.window, kind.chunk)
        found = self._visible.get(rule)
        if found is None:
            device = self.pool.device
            found = [Visible(kind, segment.start, segment.end, device) for _, segment, _ in self._long]
            self._visible[rule] = found
        return found


def can_page(model: SpanModel) -> bool:
    """Whether these views work for all of a span's blocks: their attention calls our function, with plain keys."""
    return model.family.attention_interface and not any(kind.latent or kind.state for kind in model.kinds)


def _slots(pool: KVPool, segments: Sequence[Segment], group: int) -> torch.Tensor:
    """The slots in which a group's blocks keep each new position of a batch."""
    parts = [
        slots_of(row_pages, np.asarray(row_pages.pages, dtype=np.int32), segment, pool.page_tokens)
        for segment in segments
        for row_pages in (segment.groups[group],)
    ]
    return upload(torch.from_numpy(np.concatenate(parts)), pool.device)
