"""Sends a session's answers and messages to its client, on the control stream that the client has at the moment.

The client may be away, and come back on another control stream. It may also be there and read nothing: then the session
ends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import trio

from peerd.exchange.step_tensors import priority_of, wanted_part, wanted_rows
from peerd.meters import Meters
from peerd.net.connections import Stream
from peerd.protocol.connection.frames import Priority
from peerd.protocol.encoding.schema import Message
from peerd.protocol.encoding.tensors import DTYPES, encode_tensor
from peerd.protocol.errors import PeerFault, RemoteProtocolError
from peerd.protocol.messages.audits import Sketch
from peerd.protocol.messages.drawing import DRAWN, TokenPairs, pack_drawn
from peerd.protocol.messages.session import Opened, OpenSession, Output, Step

# A client that leaves this many answers unread is considered gone: it is several times what it may ask for at once.
MAX_UNREAD_ANSWERS = 64


class Answering:
    """The way back to the client of one session. `give_up` is called if the client leaves its answers unread."""

    def __init__(self, opening: OpenSession, give_up: Callable[[], None], meters: Meters) -> None:
        #: The stream on which the client listens; None while it is away.
        self.control: Stream | None = None
        #: How often the client has attached: this tells its absences apart.
        self.visits = 0
        self._codec = opening.codec
        self._dtype = DTYPES[opening.dtype]
        self._give_up = give_up
        self._meters = meters
        # A message about the route for a client that was away.
        self._missed: Message | None = None

    def __repr__(self) -> str:
        return f"<Answering on {self.control or 'no stream'} unsent={self.unsent}>"

    def attach(self, control: Stream, opened: Opened) -> None:
        """Answer on this control stream from now on: first `opened`, then what the client missed about its route."""
        self.control = control
        self.visits += 1
        self.tell(opened)
        if self._missed is not None:
            self.tell(self._missed)
            self._missed = None

    def detach(self) -> None:
        """Note that the client is away."""
        self.control = None

    @property
    def unsent(self) -> int:
        """How many answers and messages are not yet on the wire."""
        return self.control.unsent_messages if self.control is not None else 0

    async def wait_unsent_at_most(self, count: int) -> None:
        """Wait until at most `count` messages are unsent. Returns early if the stream ends or the client is away."""
        if self.control is None:
            return
        try:
            await self.control.wait_unsent_below(count + 1)
        except (PeerFault, trio.ClosedResourceError):
            return

    def tell(self, message: Message) -> None:
        """Queue a message for the client. A client that is away gets nothing, and asks when it comes back."""
        self._send(message, (), Priority.CONTROL)

    def tell_sketch(self, sketch: Sketch, body: list[memoryview]) -> None:
        """Queue a sketch for the client. A client that is away never gets it."""
        self._send(sketch, body, priority_of(sketch.positions))

    def report(self, message: Message) -> None:
        """Tell the client about its route; if it is away, as soon as it is back."""
        if self.control is None:
            self._missed = message
        else:
            self.tell(message)

    def answer(self, step: Step, hidden: torch.Tensor) -> None:
        """Queue the part of a step's result, `[positions, width]`, that the client wants back. Raises BadResult."""
        rows = wanted_rows(step)
        if not rows:
            self._send(Output(epoch=step.epoch, seq=step.seq), (), priority_of(0))
            return
        wanted = wanted_part(step, hidden)
        header, body = encode_tensor(wanted, codec=self._codec, dtype=self._dtype)
        self._meters.sent(self._codec, body)
        output = Output(epoch=step.epoch, seq=step.seq, rows=rows, tensor=header.to_fields())
        self._send(output, body, priority_of(len(wanted)))

    def answer_drawn(self, step: Step, drawn: Sequence[TokenPairs]) -> None:
        """Queue the tokens that were drawn from a step's result. Raises BadResult."""
        body = [memoryview(pack_drawn(drawn))]
        self._meters.sent(DRAWN, body)
        output = Output(epoch=step.epoch, seq=step.seq, rows=wanted_rows(step), drawn=True)
        self._send(output, body, priority_of(len(drawn)))

    def _send(self, message: Message, body: tuple[()] | list[memoryview], priority: Priority) -> None:
        if self.control is None:
            return
        if self.control.unsent_messages >= MAX_UNREAD_ANSWERS:
            self._give_up()
            self.control.reset(RemoteProtocolError.code)
            return
        try:
            self.control.send_nowait(message.to_header(), body, priority=priority)
        except (PeerFault, trio.ClosedResourceError):
            # The control stream's own handler notices its end and decides.
            return
