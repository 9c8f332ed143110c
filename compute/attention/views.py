"""A running batch as attention sees it; also the cache to which Transformers' modules write their keys and values.

What is the same in all blocks is computed once for each batch. Keys are read as views if pages lie side by side.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from peerd.compute.attention.prefix import BatchPrefix
from peerd.compute.attention.scores import Visible
from peerd.compute.families.layer_kinds import LayerKind
from peerd.compute.kv.pool import KVPool, KVWriter, RowSlots
from peerd.compute.steps import Segment


class BatchView:
    """One batch as attention sees it; also the KV cache to which the model writes."""

    # Transformers reads this of any cache.
    is_compileable = False
    # Our attention makes its own masks; a decoder's other uses of a cache are the same for every batch.
    needs_mask = False

    def __init__(self, pool: KVPool, segments: Sequence[Segment], prefix: BatchPrefix | None = None) -> None:
        self.pool = pool
        self._prefix = prefix
        self.segments = segments
        #: By group of blocks, then by segment.
        self.rows = [[pool.slots(segment, group) for segment in segments] for group in range(pool.layout.groups)]
        self._writers = [KVWriter(rows, segments, pool.device) for rows in self.rows]
        self._visible: dict[tuple[int | None, int | None], list[Visible]] = {}
        self._lags: torch.Tensor | None = None

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, kwargs: Mapping[str, Any] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cache a block's new keys and values, `[1, kv_heads, positions, width]`. Attention reads the pool itself."""
        if self._prefix is not None:
            keys, values = self._prefix.put(layer, keys, values)
        writer = self._writers[self.pool.layout.group_of[layer]]
        writer.write(self.pool.keys[layer], keys[0])
        writer.write(self.pool.values[layer], values[0])
        return keys, values

    def get_seq_length(self, layer: int | None = None) -> int | torch.Tensor:
        """Answers Transformers' question where positions start: 0, since ours are passed explicitly.

        An attention module that asks for its own block (Llama 4) counts on from the answer to scale its queries. So
        for each position of the batch it gets the difference between the position and its index in the batch.
        """
        if layer is None:
            return 0
        if self._lags is None:
            ends = itertools.accumulate(segment.count for segment in self.segments)
            lags = [(segment.end - end, segment.count) for segment, end in zip(self.segments, ends, strict=True)]
            values, counts = torch.tensor(lags, device=self.pool.device).unbind(1)
            self._lags = values.repeat_interleave(counts)
        return self._lags

    def get_mask_sizes(self, _length: int, _layer: int) -> tuple[int, int]:
        """Answers Transformers' question how large a mask to make: none, since attention makes its own."""
        return 0, 0

    def get_query_offset(self, _layer: int) -> int:
        """Answers Transformers' question where a mask begins."""
        return 0

    def visible(self, kind: LayerKind) -> list[Visible]:
        """The keys that each segment sees in blocks of this kind."""
        rule = (kind.window, kind.chunk)
        found = self._visible.get(rule)
        if found is None:
            found = [Visible(kind, segment.start, segment.end, self.pool.device) for segment in self.segments]
            self._visible[rule] = found
        return found


class RowView:
    """One segment of one row, as the cache of a model whose attention cannot be replaced (DiffLlama, Doge, XGLM)."""

    is_compileable = False
    is_sliding = (False,)

    def __init__(self, pool: KVPool, segment: Segment) -> None:
        self._pool = pool
        self._segment = segment
        self._row: RowSlots = pool.slots(segment, 0)
        self._writer = KVWriter([self._row], [segment], pool.device)

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, kwargs: Mapping[str, Any] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cache a block's new keys and values; returns the whole row's, `[1, kv_heads, length, width]`."""
        self._writer.write(self._pool.keys[layer], keys[0])
        self._writer.write(self._pool.values[layer], values[0])
        return self._row.read(self._pool.keys[layer], 0)[None], self._row.read(self._pool.values[layer], 0)[None]

    def get_seq_length(self, _layer: int = 0) -> int:
        """Positions cached before this segment."""
        return self._segment.start

    def get_query_offset(self, _layer: int = 0) -> int:
        """The first new position."""
        return self._segment.start

    def get_mask_sizes(self, _query_length: int, _layer: int) -> tuple[int, int]:
        """The number of keys that `update` returns, and the position of the first."""
        return self._segment.end, 0
