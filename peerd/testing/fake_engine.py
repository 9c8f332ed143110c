"""An engine with arithmetic instead of a model, for tests of the code around an engine.

Each block adds to a position a number that depends on everything before it in its row, which is stored in pages as in a
real cache. So a position that is lost, repeated, reordered or read from a wrong page changes every later result. All
results are whole numbers below 251: they are exact in every dtype and exact codec, and do not depend on how positions
were cut into steps, batches and spans. A block with a window or chunks uses exactly the positions that it sees. An
adapter changes the numbers of the blocks for which it has weights, each pair of matrices in another way.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping

import torch

from peerd.compute.adapters.lora import DeepPrompt, Lora, LoraPair, check_fits, within
from peerd.compute.engine.engine import BaseEngine
from peerd.compute.errors import AdapterError
from peerd.compute.kv.layout import EVERYTHING, Keep, group
from peerd.compute.steps import Batch, BatchOutput, RowPages, Segment
from peerd.protocol.span import Span

# bfloat16 holds whole numbers up to 256 exactly.
_OUTPUT_MODULUS = 251
_STATE_MODULUS = 1_000_003
# The name of the only linear layer in each of its blocks.
FAKE_LAYER = "proj"


class FakeEngine(BaseEngine):
    """`Engine`'s interface; `run` is cheap and needs no thread. `keeps` names blocks that do not keep everything."""

    def __init__(
        self,
        span: Span,
        *,
        hidden_size: int = 8,
        kv_tokens: int = 4096,
        page_tokens: int = 16,
        batch_tokens: int = 256,
        keeps: Mapping[int, Keep] | None = None,
    ) -> None:
        self._keeps = keeps or {}
        layout = group([self._keeps.get(block, EVERYTHING) for block in range(span.start, span.end)])
        super().__init__(
            span, hidden_size, layout, kv_tokens=kv_tokens, page_tokens=page_tokens, batch_tokens=batch_tokens
        )
        self._page_tokens = page_tokens
        # For each adapter, the number that it adds in each block.
        self._salts: dict[str, dict[int, int]] = {}
        self._layout = layout
        # What blocks store of rows, by slot: their "KV cache". Blocks of different groups share it.
        self._stored = [[0] * (self._pool.pages * page_tokens) for _ in range(layout.blocks_per_page)]

    def run(self, batch: Batch) -> BatchOutput:
        copied = [[self._page(stored, copy.source) for stored in self._stored] for copy in batch.copies]
        for copy, pages in zip(batch.copies, copied, strict=True):
            first = copy.target * self._page_tokens
            for stored, page in zip(self._stored, pages, strict=True):
                stored[first : first + self._page_tokens] = page
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
        return torch.stack([fake_forward(sequence, blocks or self.span, keeps=self._keeps) for sequence in hidden])

    @property
    def adapters(self) -> frozenset[str]:
        return frozenset(self._salts)

    def load_adapter(self, name: str, lora: Lora) -> None:
        if name in self._salts:
            raise AdapterError(f"there is an adapter {name!r} already")
        own = within(lora, self.span)
        square = (self.hidden_size, self.hidden_size)
        layers = {(block, FAKE_LAYER): square for block in range(self.span.start, self.span.end)}
        check_fits(own, layers, self.hidden_size, dict.fromkeys(range(self.span.start, self.span.end), square))
        self._salts[name] = _salts(own)

    def unload_adapter(self, name: str) -> None:
        del self._salts[name]

    def _run_segment(self, blocks: Span, segment: Segment, hidden: torch.Tensor) -> torch.Tensor:
        for block in range(blocks.start, blocks.end):
            number = block - self.span.start
            stored = self._stored[self._layout.page_index_of[number]]
            row = segment.groups[self._layout.group_of[number]]

            def slot(position: int, row: RowPages = row) -> int:
                assert row.first <= position < segment.end, f"position {position} is not kept by {segment}"
                page, within = divmod(position - row.first, self._page_tokens)
                return row.pages[page] * self._page_tokens + within

            def recall(position: int, stored: list[int] = stored, slot: Callable[[int], int] = slot) -> int:
                return stored[slot(position)]

            keep = self._keeps.get(block, EVERYTHING)
            salt = self._salts[segment.adapter].get(block, 0) if segment.adapter else 0
            after, hidden = _run_block(block, keep, segment.start, recall, hidden, salt)
            for position, value in enumerate(after, segment.start):
                stored[slot(position)] = value
        return hidden

    def _page(self, stored: list[int], page: int) -> list[int]:
        return stored[page * self._page_tokens : (page + 1) * self._page_tokens]


def fake_forward(
    hidden: torch.Tensor, blocks: Span, lora: Lora | None = None, *, keeps: Mapping[int, Keep] | None = None
) -> torch.Tensor:
    """The output of `blocks` for one row `[positions, hidden_size]` from position 0: the reference for tests."""
    salts = _salts(lora or {})
    for block in range(blocks.start, blocks.end):
        _, hidden = _run_block(block, (keeps or {}).get(block, EVERYTHING), 0, _nothing, hidden, salts.get(block, 0))
    return hidden


def _salts(lora: Lora) -> dict[int, int]:
    """For each adapted block a number that depends on every value of its matrices, deep prompt or prefix."""
    salts: dict[int, int] = {}
    for (block, _), value in lora.items():
        salts[block] = salts.get(block, 0) + _salt(value)
    return salts


def _salt(value: LoraPair | DeepPrompt) -> int:
    if isinstance(value, DeepPrompt):
        return zlib.crc32(value.values.float().numpy().tobytes())
    both = torch.cat([value.a.flatten(), value.b.flatten()])
    return zlib.crc32(both.float().numpy().tobytes()) + round(value.scale)


def _nothing(position: int) -> int:
    raise AssertionError(f"position {position} of an empty row")


def _run_block(
    block: int, keep: Keep, start: int, recall: Callable[[int], int], hidden: torch.Tensor, salt: int
) -> tuple[list[int], torch.Tensor]:
    """Run one block on a row's positions from `start` on; `recall` returns what it stored for an earlier position.

    Returns what it stores for each new position: the state up to there or, if it sees only some positions, the number
    that the position adds.
    """
    if not hidden.isfinite().all():
        return [0] * len(hidden), hidden
    # Sixty-fourths, so that a change in the fraction of the input shows too.
    numbers = (hidden.double() * 64).round().long()
    weights = torch.arange(1, hidden.shape[-1] + 1)
    mixed = [
        number + position + block + 1 + salt
        for position, number in enumerate((numbers * weights).sum(-1).tolist(), start)
    ]
    if keep.reach is None:
        states = stored = _chained(recall(start - 1) if start else 0, mixed)
    else:
        stored = [number % _STATE_MODULUS for number in mixed]
        seen = range(keep.first_seen(start), start)
        known = {position: recall(position) for position in seen} | dict(enumerate(stored, start))
        ends = range(start, start + len(mixed))
        states = [_chained(0, [known[each] for each in range(keep.first_seen(end), end + 1)])[-1] for end in ends]
    results = (numbers + torch.tensor(states, dtype=torch.long)[:, None] * weights) % _OUTPUT_MODULUS
    return stored, results.to(hidden.dtype)


def _chained(state: int, numbers: list[int]) -> list[int]:
    """The state after each of `numbers`: it depends on all of them and on their order."""
    states = []
    for number in numbers:
        state = (state * 31 + number) % _STATE_MODULUS
        states.append(state)
    return states
