"""How far a session is with its steps, and since when it waits. The supervisor writes it, the pace watch reads it.

A step's time begins when the chain can work on it: when it was sent, when the step before it was answered, or when the
chain was repaired, whichever is last.
"""

from __future__ import annotations

import trio

from peerd.client.session.live_chain import LiveChain
from peerd.client.session.step_log import StepLog
from peerd.routing.failures.pace import StepPace


class StepProgress:
    """The progress of the steps in `log` along `chain`.

    `changed` is unparked when steps were answered or given up, and when the chain was replaced.
    """

    def __init__(self, log: StepLog, chain: LiveChain) -> None:
        self.chain = chain
        # Whether the chain is whole and its first hop has all submitted steps.
        self.is_ready = False
        self.pace = StepPace()
        self.changed = trio.lowlevel.ParkingLot()
        # Whether there was a complete chain before, so that a hole is a loss.
        self.has_stood = False
        # How often hops were replaced in a chain that had been complete.
        self.failovers = 0
        # Since when the chain works on the oldest step.
        self.working_since = trio.current_time()
        # Positions that new hops must compute again before they reach the oldest step.
        self.replaying = 0
        # Positions that hops say that they sent again to their next hops.
        self.replayed_by_hops = 0
        self._log = log

    def __repr__(self) -> str:
        return f"<StepProgress {self.chain} ready={self.is_ready}>"

    @property
    def is_working(self) -> bool:
        """Whether the chain is whole and owes us answers."""
        return self.is_ready and bool(self._log.pending)

    @property
    def oldest_seq(self) -> int | None:
        """The step that the client waits for; None if none is pending."""
        return next(iter(self._log.pending), None)

    @property
    def oldest_positions(self) -> int:
        """The positions that the chain must compute before it answers the oldest pending step."""
        return next(iter(self._log.pending.values())).step.positions + self.replaying

    @property
    def expected_s(self) -> float | None:
        """How long the oldest step should take; None before any step was timed."""
        return self.pace.expected_s(self.oldest_positions)

    @property
    def late_after_s(self) -> float:
        """How long the oldest step may take before it is late."""
        return self.pace.late_after_s(self.oldest_positions)

    def started(self) -> None:
        """Note that the chain can work on the oldest step from now on."""
        self.working_since = trio.current_time()
        self.changed.unpark_all()

    def answered(self, positions: int) -> None:
        """Note that the oldest step, of `positions` positions, was answered."""
        if positions and not self.replaying:
            self.pace.took(positions, trio.current_time() - self.working_since)
        self.replaying = 0
        self.started()
