"""Engines over all blocks of a tiny model, one after the other, and the reference to compare them with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from peerd.compute.attention.attention import register_attention
from peerd.compute.checkpoint.checkpoint import Checkpoint
from peerd.compute.engine.engine import Engine, EngineStep
from peerd.compute.families.layer_kinds import layer_kinds
from peerd.compute.model.span_model import load_span
from peerd.protocol.rows import Op, RowSlice, SessionSize
from peerd.protocol.span import Span

CUT = (Span(0, 3), Span(3, 7), Span(7, 8))
# Longer than the tiny models' windows, and than what their scaled ropes leave unscaled.
LENGTH = 40
# Outputs are of size 1 to 20.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
# Linear attention solves equations over the positions that run together. Transformers itself, given half of a text,
# differs by 1.5e-4 at the same positions.
TOLERANCE_LINEAR = {"rtol": 1e-3, "atol": 1e-3}


@dataclass
class Reference:
    """A tiny whole model: what enters its first block and what leaves its last, `[rows, length, width]`."""

    checkpoint: Checkpoint
    inputs: torch.Tensor
    outputs: torch.Tensor


@dataclass(frozen=True)
class Part:
    """New positions of one row of a session, of the reference's row `text`."""

    session: str
    row: int
    text: int
    start: int
    count: int


class Chain:
    """Engines over the model's blocks, one after the other."""

    def __init__(
        self, whole: Reference, spans: Sequence[Span] = CUT, *, quantize: str = "none", **settings: int
    ) -> None:
        self.whole = whole
        # Running states take as much of such small pages as hundreds of positions.
        states = [kind.state for kind in layer_kinds(whole.checkpoint.config) if kind.state is not None]
        tokens = 16384 if states else 512
        self._tolerance = TOLERANCE_LINEAR if any(state.recurrent for state in states) else TOLERANCE
        small = {"kv_tokens": tokens, "page_tokens": 4, "batch_tokens": 64} | settings
        self.spans = [
            load_span(whole.checkpoint, span, dtype=torch.float32, attention=register_attention(), quantize=quantize)
            for span in spans
        ]
        self.engines = [Engine(span, **small) for span in self.spans]

    def open(
        self,
        name: str,
        *,
        max_rows: int = 1,
        max_length: int = LENGTH,
        max_rollback: int | None = None,
        prompt_length: int = LENGTH,
    ) -> None:
        back = max_length if max_rollback is None else max_rollback
        for engine in self.engines:
            engine.open(name, SessionSize(max_length, max_rows, back, prompt_length))

    def run(self, *parts: Part, ops: Sequence[Op] = ()) -> list[torch.Tensor]:
        """Run parts, one step each, through the chain, all in the same batches; their results."""
        hidden = [self.whole.inputs[part.text, part.start : part.start + part.count] for part in parts]
        for engine in self.engines:
            for seq, (part, new) in enumerate(zip(parts, hidden, strict=True)):
                rows = (RowSlice(part.row, part.start, part.count),)
                engine.submit(EngineStep(part.session, seq, tuple(ops), rows, new))
            results = {}
            while batch := engine.plan():
                for result in engine.collect(batch, engine.run(batch)):
                    assert result.hidden is not None
                    results[result.seq] = result.hidden
            hidden = [results[seq] for seq in range(len(parts))]
        return hidden

    def check(self, *parts: Part, ops: Sequence[Op] = ()) -> None:
        """Run parts and compare with the whole model."""
        for part, result in zip(parts, self.run(*parts, ops=ops), strict=True):
            expected = self.whole.outputs[part.text, part.start : part.start + part.count]
            torch.testing.assert_close(result, expected, **self._tolerance)
