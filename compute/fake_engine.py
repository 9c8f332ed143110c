"""An engine with arithmetic in place of a model: for tests of whatever stands around an engine.

Each block adds to a position a number that depends on everything before it in its row, through pages
like a real cache, so a position lost, repeated, reordered or read from another's page shows in every
later result. All results are whole numbers below 251: exact in every dtype and exact codec, and the
same however positions were cut into steps, batches and spans. An adapter changes the numbers of the blocks that
it has weights for, each pair of matrices in another way.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import torch

from peerd.compute.engine import BaseEngine
from peerd.compute.errors import AdapterError
from peerd.compute.lora import BlockModule, Lora, check_fits, within
from peerd.compute.steps import Batch, BatchOutput, Segment
from peerd.protocol.span import Span

# bfloat16 holds whole numbers up to 256.
_OUTPUT_MODULUS = 251
_STATE_MODULUS = 1_000_003
# The one linear layer of each of its blocks.
FAKE_LAYER = "proj"


class FakeEngine(BaseEngine):
    """`Engine`'s interface; `run` is cheap and needs no thread."""

    def __init__(
        self,
        span: Span,
        *,
        hidden_size: int = 8,
        kv_tokens: int = 4096,
        page_tokens: int = 16,
        batch_tokens: int = 256,
    ) -> None:
        super().__init__(span, hidden_size, kv_tokens=kv_tokens, page_tokens=page_tokens, batch_tokens=batch_tokens)
        self._page_tokens = page_tokens
        # For each adapter what it adds in which block.
        self._salts: dict[str, dict[int, int]] = {}
        # What each block remembers of the row up to a position, by slot: its "KV cache".
        self._states = {block: [0] * self.total_tokens for block in range(span.start, span.end)}

    def run(self, batch: Batch) -> BatchOutput:
        for copy in batch.copies:
            self._copy_page(copy.source, copy.target)
        hidden = []
        for piece in batch.pieces:
            part = piece.step.hidden[piece.offset : piece.offset + piece.count]
            counts = [segment.count for segment in piece.segments]
            rows = [
                self._run_segment(batch.blocks, segment, rows)
                for segment, rows in zip(piece.segments, torch.split(part, counts), strict=True)
            ]
            hidden.append(torch.cat(rows) if rows else part.clone())
        return BatchOutput(tuple(hidden), tuple(bool(part.isfinite().all()) for part in hidden))

    def forward(self, hidden: torch.Tensor, blocks: Span | None = None) -> torch.Tensor:
        return torch.stack([fake_forward(sequence, blocks or self.span) for sequence in hidden])

    @property
    def adapters(self) -> frozenset[str]:
        return frozenset(self._salts)

    def load_adapter(self, name: str, lora: Lora) -> None:
        if name in self._salts:
            raise AdapterError(f"there is an adapter {name!r} already")
        own = within(lora, self.span)
        square = (self.hidden_size, self.hidden_size)
        check_fits(own, {(block, FAKE_LAYER): square for block in range(self.span.start, self.span.end)})
        self._salts[name] = _salts(own)

    def unload_adapter(self, name: str) -> None:
        del self._salts[name]

    def _run_segment(self, blocks: Span, segment: Segment, hidden: torch.Tensor) -> torch.Tensor:
        slots = [self._slot(segment, position) for position in range(max(segment.start - 1, 0), segment.end)]
        for block in range(blocks.start, blocks.end):
            states = self._states[block]
            before = states[slots[0]] if segment.start else 0
            salt = self._salts[segment.adapter].get(block, 0) if segment.adapter else 0
            after, hidden = _run_block(block, segment.start, before, hidden, salt)
            for slot, state in zip(slots[-segment.count :], after, strict=True):
                states[slot] = state
        return hidden

    def _slot(self, segment: Segment, position: int) -> int:
        page, within = divmod(position, self._page_tokens)
        return segment.pages[page] * self._page_tokens + within

    def _copy_page(self, source: int, target: int) -> None:
        size = self._page_tokens
        for states in self._states.values():
            states[target * size : (target + 1) * size] = states[source * size : (source + 1) * size]


def fake_forward(hidden: torch.Tensor, blocks: Span, lora: Lora | None = None) -> torch.Tensor:
    """What `blocks` make of one row `[positions, hidden_size]` from position 0: the reference for tests."""
    salts = _salts(lora or {})
    for block in range(blocks.start, blocks.end):
        _, hidden = _run_block(block, 0, 0, hidden, salts.get(block, 0))
    return hidden


def _salts(lora: Lora) -> dict[int, int]:
    """For each adapted block a number that depends on every value of its matrices."""
    salts: Mapping[BlockModule, int] = {
        key: zlib.crc32(torch.cat([pair.a.flatten(), pair.b.flatten()]).float().numpy().tobytes()) + round(pair.scale)
        for key, pair in lora.items()
    }
    return {block: salt for (block, _), salt in salts.items()}


def _run_block(block: int, start: int, state: int, hidden: torch.Tensor, salt: int) -> tuple[list[int], torch.Tensor]:
    """One block on a row's positions from `start` on, where `state` is what it remembers of those before."""
    if not hidden.isfinite().all():
        return [state] * len(hidden), hidden
    # Sixty-fourths, so that a change in the input's fraction shows too.
    numbers = (hidden.double() * 64).round().long()
    weights = torch.arange(1, hidden.shape[-1] + 1)
    states = []
    for position, mixed in enumerate((numbers * weights).sum(-1).tolist(), start):
        state = (state * 31 + mixed + position + block + 1 + salt) % _STATE_MODULUS
        states.append(state)
    results = (numbers + torch.tensor(states)[:, None] * weights) % _OUTPUT_MODULUS
    return states, results.to(hidden.dtype)
