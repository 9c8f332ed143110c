"""Runs batches through a span's blocks. This is the device thread's side of an engine; the scheduler decides.

A batch becomes one ragged forward `[1, positions, hidden_size]`. A model whose attention cannot be replaced
(DiffLlama) runs its segments one after the other over the same pool.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import torch

from peerd.compute.adapters.span_adapters import SpanAdapters
from peerd.compute.attention.attention import SpanAttention
from peerd.compute.attention.views import BatchView, RowView
from peerd.compute.device.staging import Staging, upload
from peerd.compute.engine.decode_graph import DecodeGraphs, on_device
from peerd.compute.engine.paged_views import MixedView, can_page
from peerd.compute.kv.layout import KVLayout
from peerd.compute.kv.pool import KVPool
from peerd.compute.model.linear_choice import pack_linears
from peerd.compute.model.span_model import SpanModel, part_of
from peerd.compute.quantized.product_choice import choose_products
from peerd.compute.state.mixers import SpanMixers
from peerd.compute.state.store import StateStore
from peerd.compute.steps import Batch, BatchOutput, Segment
from peerd.protocol.span import Span

# No model fills a key or a value with it, and bfloat16 and float16 hold it exactly.
_UNWRITTEN = -12352.0


class SpanRunner:
    """A span's model with the KV of all its sessions."""

    def __init__(
        self, model: SpanModel, layout: KVLayout, pages: int, page_tokens: int, *, paged: bool | None = None
    ) -> None:
        """`paged`: whether attention handles all rows at once, and decodes use fixed buffers; None: on a GPU only."""
        pack_linears(model)
        choose_products(model)
        self._models = {model.span: model}
        self._whole = model
        self._pool = KVPool(model.kinds, layout, pages, page_tokens, device=model.device, dtype=model.dtype)
        self._attention = SpanAttention(model.layers, model.kinds)
        #: Changed on the device thread only, between batches.
        self.adapters = SpanAdapters(model)
        self._mixers: SpanMixers | None = None
        if layout.states is not None:
            store = StateStore(self._pool, layout.states, model.kinds)
            self._mixers = SpanMixers(model.layers, model.kinds, store, self.adapters)
        self._staging = Staging(model.hidden_size, device=model.device, dtype=model.dtype)
        self._paged = can_page(model) and (model.device.type == "cuda" if paged is None else paged)
        self._graphs = DecodeGraphs(self._model, model, self._pool, self._attention, self._staging)

    def warm_up(self) -> None:
        """Record the graphs that decodes need, if the device can. Device thread, before the first batch."""
        if self._paged:
            with on_device(self._whole.device), torch.inference_mode():
                self._graphs.warm_up()

    def run(self, batch: Batch) -> BatchOutput:
        """Run a batch. The results are on the CPU, in the model's dtype."""
        with on_device(self._whole.device), torch.inference_mode():
            self._pool.copy_pages(batch.copies)
            if self._mixers is not None:
                self._mixers.store.copy([copy for piece in batch.pieces for copy in piece.state_copies])
            output, finite = self._staging.fetch(self._run_blocks(batch))
        counts = [piece.count for piece in batch.pieces]
        # Cloned outside of inference mode, so that the caller may write to the tensors and none is larger than its
        # piece.
        return BatchOutput(
            tuple(part.clone() for part in torch.split(output, counts)),
            tuple(bool(part.all()) for part in torch.split(finite, counts)),
            replayed=() if self._mixers is None else tuple(map(self._mixers.replayed_for, batch.pieces)),
        )

    def forward(self, hidden: torch.Tensor, blocks: Span) -> torch.Tensor:
        """Run whole sequences `[batch, positions, hidden_size]` without a cache. The result is on the CPU."""
        with torch.inference_mode():
            output = self._model(blocks).forward_no_cache(hidden.to(self._whole.device, self._whole.dtype))
        return output.cpu().clone()

    def part(self, blocks: Span) -> SpanModel:
        """The model of some of the span's blocks, sharing its weights. Device thread."""
        return self._model(blocks)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the blocks compute."""
        return self._whole.dtype

    def mark_unwritten(self, batch: Batch) -> None:
        """Mark the slots of a batch's new positions in the KV cache as unwritten, before it runs."""
        for block in range(batch.blocks.start, batch.blocks.end):
            for stored, slots in self._new_slots(batch, block):
                stored[:, slots] = _UNWRITTEN

    def unwritten(self, batch: Batch) -> list[int]:
        """The blocks that left some of these slots as they were, once the batch has run, or did not keep a state."""
        return [block for block in range(batch.blocks.start, batch.blocks.end) if not self._has_written(batch, block)]

    def _has_written(self, batch: Batch, block: int) -> bool:
        layer = block - self._whole.span.start
        if self._mixers is not None and self._whole.kinds[layer].state is not None:
            segments = [segment for piece in batch.pieces for segment in piece.segments]
            if not self._mixers.has_run(layer, segments):
                return False
        return not any(
            bool((stored[:, slots] == _UNWRITTEN).all(2).any()) for stored, slots in self._new_slots(batch, block)
        )

    def _new_slots(self, batch: Batch, block: int) -> Iterator[tuple[torch.Tensor, torch.Tensor | slice]]:
        """Where one block keeps the keys and values of a batch's new positions."""
        layer = block - self._whole.span.start
        group = self._pool.layout.group_of[layer]
        if not self._whole.kinds[layer].kv_heads:
            return
        for segment in (segment for piece in batch.pieces for segment in piece.segments):
            tail = self._pool.slots(segment, group).tail(segment.start)
            slots = slice(tail.start, tail.stop) if isinstance(tail, range) else tail
            yield self._pool.keys[layer], slots
            yield self._pool.values[layer], slots

    def forget_part(self, blocks: Span) -> None:
        """Drop what was made to run these blocks of the span alone."""
        self._models.pop(blocks, None)
        self._graphs.forget(blocks)

    def _run_blocks(self, batch: Batch) -> torch.Tensor:
        parts = [piece.step.hidden[piece.offset : piece.offset + piece.count] for piece in batch.pieces]
        segments = [segment for piece in batch.pieces for segment in piece.segments]
        if self._paged and self._graphs.takes(batch.blocks, segments):
            output = self._graphs.run(batch.blocks, segments, parts)
            if output is not None:
                return output
        hidden = self._staging.send(self._staging.gather(parts))
        if not segments:
            return hidden
        model = self._model(batch.blocks)
        if model.family.attention_interface:
            return self._run_ragged(model, hidden, segments)
        rows = torch.split(hidden, [segment.count for segment in segments])
        return torch.cat(
            [
                self._forward(model, row, [segment], RowView(self._pool, segment))
                for row, segment in zip(rows, segments, strict=True)
            ]
        )

    def _run_ragged(self, model: SpanModel, hidden: torch.Tensor, segments: Sequence[Segment]) -> torch.Tensor:
        kind = MixedView if self._paged else BatchView
        view = kind(self._pool, segments, self.adapters.prefix_of(segments))
        self._attention.view = view
        try:
            with nullcontext() if self._mixers is None else self._mixers.running(segments):
                return self._forward(model, hidden, segments, view)
        finally:
            self._attention.view = None

    def _forward(
        self,
        model: SpanModel,
        hidden: torch.Tensor,
        segments: Sequence[Segment],
        cache: BatchView | MixedView | RowView,
    ) -> torch.Tensor:
        positions = _positions(segments, hidden.device)
        with self.adapters.applied(segments):
            output = model.forward(hidden[None], positions, cache, rope_lengths=_rope_lengths(model, segments))
        return output.squeeze(0)

    def _model(self, blocks: Span) -> SpanModel:
        model = self._models.get(blocks)
        if model is None:
            model = self._models[blocks] = part_of(self._whole, blocks)
        return model


def _positions(segments: Sequence[Segment], device: torch.device) -> torch.Tensor:
    """The absolute position of each new one: `[1, positions]`."""
    positions = [position for segment in segments for position in range(segment.start, segment.end)]
    return upload(positions, device)[None]


def _rope_lengths(model: SpanModel, segments: Sequence[Segment]) -> torch.Tensor | None:
    """For each new position the length by which ropes turn it, `[1, positions]`; None if the model does not use it."""
    if not model.follows_length:
        return None
    lengths = [length for segment in segments for length in segment.rope_lengths]
    return upload(lengths, model.device)[None]
