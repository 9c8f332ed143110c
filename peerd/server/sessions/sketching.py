"""Tells a session's client sketches of what its hop receives and, in a hop that checks another one, of what it
computes (spec/sessions/audits.md).

Every position is sketched, but several are sent together: a message a token would cost the client more than the answer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch

from peerd.compute.audits.sketches import Sketcher
from peerd.protocol.encoding.tensors import encode_tensor
from peerd.protocol.messages.audits import MAX_SEEDS, Sketch
from peerd.protocol.messages.session import MAX_ROWS, MAX_STEP_POSITIONS, OpenSession, Step
from peerd.protocol.rows import RowSlice

# A decoding client gets one message for so many tokens.
POSITIONS_A_MESSAGE = 16

Tell = Callable[[Sketch, list[memoryview]], None]


class Sketching:
    """The sketches of one session, for the seeds in its `open`. `tell` sends one; it never blocks."""

    def __init__(self, opening: OpenSession, width: int, dtype: torch.dtype, tell: Tell) -> None:
        seeds = opening.sketch
        checks = len(seeds) == MAX_SEEDS
        # A hop that checks another one is asked for a given number of positions, and nothing comes after them.
        least = 1 if checks else POSITIONS_A_MESSAGE
        self._inputs = _Unsent("input", Sketcher(seeds, width), tell, least)
        # What a hop computes is rounded as it would be for the next hop, so that the two can be compared.
        self._dtype = dtype
        self._outputs = _Unsent("output", Sketcher(seeds[-1:], width), tell, least) if checks else None

    def __repr__(self) -> str:
        return f"<Sketching {'inputs and outputs' if self._outputs is not None else 'inputs'}>"

    def received(self, step: Step, hidden: torch.Tensor) -> None:
        """Note what a step brought, `[positions, width]`."""
        self._inputs.add(step, hidden)

    def computed(self, step: Step, hidden: torch.Tensor) -> None:
        """Note a step's result, `[positions, width]`."""
        if self._outputs is not None:
            self._outputs.add(step, hidden.to(self._dtype))


class _Unsent:
    """Sketches that wait until there are enough of them to be sent, or until a row is cut: then earlier ones are out of
    date.
    """

    def __init__(self, of: Literal["input", "output"], sketcher: Sketcher, tell: Tell, least: int) -> None:
        self._of: Literal["input", "output"] = of
        self._sketcher = sketcher
        self._tell = tell
        self._least = least
        self._ends: dict[int, int] = {}
        self._rows: list[RowSlice] = []
        self._sketches: list[torch.Tensor] = []

    def add(self, step: Step, hidden: torch.Tensor) -> None:
        if not step.rows:
            return
        positions = sum(map(len, self._sketches))
        # The limits of what one message may hold.
        if len(self._rows) + len(step.rows) > MAX_ROWS or positions + len(hidden) > MAX_STEP_POSITIONS:
            self._send()
        self._rows += step.rows
        self._sketches.append(self._sketcher.sketch(hidden))
        is_cut = any(piece.start < self._ends.get(piece.row, 0) for piece in step.rows)
        self._ends.update((piece.row, piece.end) for piece in step.rows)
        if is_cut or sum(map(len, self._sketches)) >= self._least:
            self._send()

    def _send(self) -> None:
        if not self._sketches:
            return
        header, body = encode_tensor(torch.cat(self._sketches))
        self._tell(Sketch(of=self._of, rows=tuple(self._rows), tensor=header.to_fields()), body)
        self._rows, self._sketches = [], []
