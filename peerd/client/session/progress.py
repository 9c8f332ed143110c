"""Says how far a session is with its steps, and since when it waits: the supervisor writes it, the pace watch reads it.

A step's time begins when it can be worked on: when it was sent, when the step before it was answered, or when the
chain was mended.
"""

from __future__ import annotations

import trio

from peerd.client.session.live_chain import LiveChain
from peerd.client.session.step_log import StepLog
from peerd.routing.failures.pace import Pace


class StepProgress:
    """The progress of the steps in `log` along `chain`.

    `changed` is unparked whenever steps were answered or given up, or the chain is another.
    """

    def __init__(self, log: StepLog, chain: LiveChain) -> None:
        self.chain = chain
        # Whether the chain is whole and its first hop has all before the next step.
        self.is_ready = False
        self.pace = Pace()
        self.changed = trio.lowlevel.ParkingLot()
        # Since when the oldest step is being worked on.
        self.working_since = trio.current_time()
        # Positions that new hops compute again before they come to the oldest step.
        self.replaying = 0
        self._log = log

    def __repr__(self) -> str:
        return f"<StepProgress {self.chain} ready={self.is_ready}>"

    @property
    def is_working(self) -> bool:
        """Whether a chain stands and owes us answers."""
        return self.is_ready and bool(self._log.pending)

    @property
    def oldest_seq(self) -> int | None:
        """The step that the client waits for; None where none is pending."""
        return next(iter(self._log.pending), None)

    @property
    def oldest_positions(self) -> int:
        """What the chain computes before it answers the oldest pending step."""
        return next(iter(self._log.pending.values())).step.positions + self.replaying

    @property
    def expected_s(self) -> float | None:
        """What the oldest step should take; None where no step was timed yet."""
        return self.pace.expected_s(self.oldest_positions)

    @property
    def late_after_s(self) -> float:
        """The oldest step is late when it takes longer."""
        return self.pace.late_after_s(self.oldest_positions)

    def started(self) -> None:
        """The oldest step can be worked on from now."""
        self.working_since = trio.current_time()
        self.changed.unpark_all()

    def answered(self, positions: int) -> None:
        """The oldest step, of so many positions, was answered."""
        if positions and not self.replaying:
            self.pace.took(positions, trio.current_time() - self.working_since)
        self.replaying = 0
        self.started()
