"""Sends the session's steps to the first hop: towards it the client has the role of an upstream hop.

When the first hop is new, it needs everything that was answered, and then each later step exactly once, although the
caller submits more steps meanwhile.
"""

from __future__ import annotations

from contextlib import suppress

import trio

from peerd.client.session.hops.control_stream import ControlStream
from peerd.client.session.opener import Terms
from peerd.client.session.step_log import Pending, StepLog
from peerd.exchange.step_tensors import encoded, priority_of
from peerd.meters import Meters
from peerd.protocol.encoding.tensors import DTYPES
from peerd.protocol.errors import PeerFault
from peerd.protocol.messages.session import REPLAY_SEQ


class FirstHop:
    """Sends the steps of `log`."""

    def __init__(self, log: StepLog, terms: Terms, meters: Meters) -> None:
        # How many positions were sent again.
        self.replayed_positions = 0
        self._log = log
        self._meters = meters
        self._codec = terms.codec
        self._dtype = DTYPES[terms.dtype]
        # The hop that has all answered steps, and all steps up to number `_sent`.
        self._hop: ControlStream | None = None
        self._sent = 0

    def __repr__(self) -> str:
        return f"<FirstHop {self._hop} sent={self._sent}>"

    def send(self, pending: Pending) -> None:
        """Send a step to the first hop, which has all steps before it. If the hop is gone, the task that reads it
        reports that.
        """
        assert self._hop is not None
        self._sent = pending.step.seq
        header, body = encoded(pending.step, pending.hidden, self._codec, self._dtype)
        self._meters.sent(self._codec, body)
        with suppress(PeerFault, trio.ClosedResourceError):
            self._hop.stream.send_nowait(header, body, priority=priority_of(pending.step.positions))

    def send_unsent(self) -> None:
        """Send the steps that were submitted while there was no hop to send them to."""
        for pending in list(self._log.pending.values()):
            if pending.step.seq > self._sent:
                self.send(pending)

    async def bring_up(self, hop: ControlStream, epoch: int) -> None:
        """Send `hop` everything that was submitted until now. Raises PeerFault or trio.ClosedResourceError."""
        if hop is self._hop:
            return
        sent = self._log.answered
        with self._log.kept.pinned():
            for step, hidden in self._log.kept.since(0, epoch):
                header, body = encoded(step, hidden, self._codec, self._dtype)
                self._meters.sent(self._codec, body)
                await hop.stream.send(header, body, priority=priority_of(step.positions))
                if step.seq == REPLAY_SEQ:
                    self.replayed_positions += step.positions
                sent = max(sent, step.seq)
        self._hop, self._sent = hop, sent
