"""Signs receipts for the hops of a session that ask for them: now and then, and when the session ends.

Only answered steps are acknowledged, so what a hop computes again after a failover, or for steps that were given up, is
not. A hop that was dropped because it failed gets no last receipt; one that was overtaken without blame does.
"""

from __future__ import annotations

from contextlib import suppress

import trio

from peerd.client.session.hops.control_stream import ControlStream
from peerd.client.session.live_chain import LiveChain
from peerd.protocol.connection.frames import Priority
from peerd.protocol.errors import PeerFault
from peerd.protocol.identity import Identity
from peerd.protocol.messages.receipts import Acknowledge, Receipt, sign_receipt


class Acknowledging:
    """The receipts of one session over blocks of `model`, in the name of `identity`."""

    def __init__(self, identity: Identity, model: bytes) -> None:
        self._identity = identity
        self._model = model

    def __repr__(self) -> str:
        return f"<Acknowledging for {self._identity.peer_id}>"

    def answered(self, chain: LiveChain, positions: int) -> None:
        """Note that every hop has computed so many positions more, and acknowledge them where it is time."""
        for control in chain.controls:
            control.served += positions
            every = control.opened.receipt_every
            if every and control.served - control.acknowledged >= every:
                # If the stream breaks, the task that reads it reports that.
                with suppress(PeerFault, trio.ClosedResourceError):
                    control.send_nowait(self._receipt(chain, control), priority=Priority.DECODE)

    def close(self, chain: LiveChain) -> None:
        """End the session on every hop, with a last receipt where one is due."""
        for control in chain.controls:
            self.leave(chain, control)

    def leave(self, chain: LiveChain, control: ControlStream) -> None:
        """End the session on one hop, with a last receipt if one is due."""
        if control.opened.receipt_every and control.served > control.acknowledged and control.is_idle:
            control.close_after(self._receipt(chain, control))
        control.close()

    def _receipt(self, chain: LiveChain, control: ControlStream) -> Acknowledge:
        span = control.hop.span
        receipt = Receipt(
            chain.session, control.number, control.hop.peer_id, self._model, span.start, span.end, control.served
        )
        control.acknowledged = control.served
        return Acknowledge(sign_receipt(self._identity, receipt))
