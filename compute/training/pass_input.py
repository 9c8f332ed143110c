"""What a training pass runs on, and what it may ask of a span's blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from peerd.compute.adapters.span_adapters import SpanAdapters
from peerd.compute.attention.prefix import widths_of_cache
from peerd.compute.errors import InvalidStepError
from peerd.compute.model.span_model import SpanModel
from peerd.compute.training.tunables import BlockShapes, Tunables, check_shape, linear_widths
from peerd.protocol.span import Span


@dataclass(frozen=True, slots=True, eq=False)
class PassInput:
    """Rows to run through `blocks`: `hidden` is `[sum of rows, hidden_size]` on the CPU, `rows` their lengths.

    `adapter` is one of the engine's, as frozen as its weights; `tunables` are the client's own.
    """

    blocks: Span
    rows: tuple[int, ...]
    hidden: torch.Tensor
    tunables: Tunables = field(default_factory=Tunables)
    adapter: str = ""


class PassLimits:
    """Refuses inputs and parameters that the blocks of `whole` cannot take."""

    def __init__(self, whole: SpanModel, adapters: SpanAdapters) -> None:
        self._whole = whole
        self._adapters = adapters
        self._known: dict[int, BlockShapes] = {}

    def check(self, given: PassInput) -> None:
        """Raise InvalidStepError if such a pass cannot run here."""
        span = self._whole.span
        if not (span.start <= given.blocks.start < given.blocks.end <= span.end):
            raise InvalidStepError(f"blocks {given.blocks} are not in {span}")
        if not given.rows or min(given.rows) < 1:
            raise InvalidStepError("a pass has rows of at least one position")
        if given.adapter and given.adapter not in self._adapters.names:
            raise InvalidStepError(f"there is no adapter {given.adapter!r} here")
        if tuple(given.hidden.shape) != (sum(given.rows), self._whole.hidden_size):
            raise InvalidStepError(
                f"hidden states have shape {list(given.hidden.shape)}, not {[sum(given.rows), self._whole.hidden_size]}"
            )
        shapes = {block: self._shapes(block) for block in range(given.blocks.start, given.blocks.end)}
        given.tunables.check(shapes, given.rows)

    def check_count(self, blocks: Span, parameters: int) -> None:
        """Whether these blocks can have so many prompts, prefixes and LoRA tensors. Raises InvalidStepError."""
        most = sum(self._shapes(block).most_tensors for block in self._own(blocks))
        if parameters > most:
            raise InvalidStepError(f"{parameters} parameters for blocks {blocks}, which have {most} at most")

    def check_parameter(self, blocks: Span, block: int, name: str, shape: Sequence[int]) -> None:
        """Whether one of these blocks can have such a prompt, prefix or LoRA tensor. Raises InvalidStepError."""
        if not blocks.start <= block < blocks.end or block not in self._own(blocks):
            raise InvalidStepError(f"{name} is for block {block}, which this pass does not run")
        check_shape(name, shape, self._shapes(block))

    def _own(self, blocks: Span) -> range:
        span = self._whole.span
        return range(max(span.start, blocks.start), min(span.end, blocks.end))

    def _shapes(self, block: int) -> BlockShapes:
        if block not in self._known:
            whole, index = self._whole, block - self._whole.span.start
            cache = widths_of_cache(whole.kinds[index], attention_interface=whole.family.attention_interface)
            self._known[block] = BlockShapes(linear_widths(whole.layers[index]), whole.hidden_size, cache)
        return self._known[block]
