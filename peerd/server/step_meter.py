"""Measures the steps of one engine: how long each waits for a batch, and what the batches are like."""

from __future__ import annotations

from collections.abc import Hashable

import trio

from peerd.compute.steps import Batch, StepResult
from peerd.meters import Meters


class StepMeter:
    """Follows steps from the moment in which they are queued. What it measured goes into `meters`."""

    def __init__(self, meters: Meters) -> None:
        self.meters = meters
        # When each step that no batch has taken yet was queued, by its session.
        self._queued: dict[Hashable, dict[int, float]] = {}

    def __repr__(self) -> str:
        return f"<StepMeter waiting={sum(map(len, self._queued.values()))}>"

    def queued(self, session: Hashable, seq: int) -> None:
        """Note that a step waits from now on."""
        self._queued.setdefault(session, {})[seq] = trio.current_time()

    def ran(self, batch: Batch, began: float, ended: float) -> None:
        """Note a batch, and the steps that it was the first to take."""
        meters, positions = self.meters, 0
        for piece in batch.pieces:
            positions += piece.count
            waiting = self._queued.get(piece.step.session)
            if waiting is not None and (since := waiting.pop(piece.step.seq, None)) is not None:
                meters.queued_s.observe(began - since)
        meters.batch_sessions.observe(len(batch.pieces))
        meters.batch_positions.observe(positions)
        meters.batch_s.observe(ended - began)

    def ended(self, result: StepResult) -> None:
        """Note how a step ended; one that failed may never have been in a batch."""
        self.meters.steps["computed" if result.error is None else "failed"] += 1
        if result.error is not None and (waiting := self._queued.get(result.session)) is not None:
            waiting.pop(result.seq, None)

    def left(self, session: Hashable) -> None:
        """Forget the steps of a session that has ended."""
        self._queued.pop(session, None)
