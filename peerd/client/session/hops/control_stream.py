"""A client's control stream to one hop: opens it, and reads the hop's messages.

`hop_messages.py` decides what the messages mean for the session.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import trio

from peerd.exchange.sketch_log import SketchLog
from peerd.net.connections import Connections, Stream
from peerd.protocol.connection.frames import Priority
from peerd.protocol.encoding.schema import Message, parse
from peerd.protocol.errors import ConnectionLost, PeerFault, StreamReset, Unresponsive
from peerd.protocol.messages.drawing import HEAD
from peerd.protocol.messages.session import CONTROL_FROM_HOP, INFER_PROTOCOL, Failure, Opened, OpenSession
from peerd.routing.chains.chain import Hop

OnMessage = Callable[["ControlStream", Message, memoryview], None]


class ControlStream:
    """One hop of an open chain. `number` is its name in tickets; `opened` is its answer to the `open` of `epoch`.
    `draws`: whether it answers with tokens.
    """

    def __init__(
        self,
        hop: Hop,
        number: int,
        epoch: int,
        stream: Stream,
        opened: Opened,
        seeds: tuple[bytes, ...] = (),
        *,
        draws: bool = False,
    ) -> None:
        self.hop = hop
        self.number = number
        self.epoch = epoch
        self.stream = stream
        self.opened = opened
        self.draws = draws
        #: How many positions it has computed in answered steps, and how many of them we acknowledged.
        self.served = 0
        self.acknowledged = 0
        #: What the hop said of the positions that came to it.
        self.sketches = SketchLog(seeds)
        self._is_closing = False

    def __repr__(self) -> str:
        return f"<ControlStream hop={self.hop.index} {self.hop.span} {self.stream}>"

    def send_nowait(self, message: Message, body: tuple[()] | list[memoryview] = (), *, priority: Priority) -> None:
        self.stream.send_nowait(message.to_header(), body, priority=priority)

    async def read(self, on_message: OnMessage, max_body: int) -> None:
        """Give every message to `on_message` until the stream ends; then always raise a PeerFault."""
        try:
            while True:
                raw = await self.stream.receive(max_body=max_body)
                on_message(self, parse(raw.header, CONTROL_FROM_HOP), raw.body)
        except trio.EndOfChannel:
            raise ConnectionLost(f"{self.hop.peer_id} ended the session") from None

    @property
    def is_idle(self) -> bool:
        """Whether nothing that we sent to it is still on its way to the line."""
        return not self.stream.unsent_messages

    def close_after(self, last: Message) -> None:
        """End the session on this hop once it has been sent a last message."""
        with suppress(PeerFault, trio.ClosedResourceError):
            self.send_nowait(last, priority=Priority.DECODE)
            self._is_closing = True
            self.stream.close()

    def close(self) -> None:
        """End the session on this hop at once, unless it is about to end after a last message."""
        if not self._is_closing:
            self.stream.reset("closed")


async def open_control(connections: Connections, hop: Hop, opening: OpenSession, margin_s: float) -> ControlStream:
    """Ask a hop to open its part of a session. Raises the error with which the hop refuses, or a PeerFault.

    margin_s: the time for dialling, the handshake and a slow link, in addition to the time that the hop may keep us
        waiting.
    """
    with _deadline(hop, opening.timeout_ms / 1000 + margin_s):
        stream = await connections.open_stream(
            hop.peer_id, INFER_PROTOCOL, addresses=hop.offer.addresses, priority=Priority.DECODE
        )
        try:
            await stream.send(opening.to_header())
            reply = parse((await stream.receive()).header, (Opened, Failure))
            if isinstance(reply, Failure):
                raise reply.error
            assert isinstance(reply, Opened)
        except trio.EndOfChannel:
            raise ConnectionLost(f"{hop.peer_id} ended the stream") from None
        except StreamReset as reset:
            raise reset.refusal from None
        except BaseException:
            stream.reset("cancelled")
            raise
    draws = HEAD in opening.needs
    return ControlStream(hop, opening.hop, opening.epoch, stream, reply, opening.sketch, draws=draws)


@contextmanager
def _deadline(hop: Hop, seconds: float) -> Iterator[None]:
    try:
        with trio.fail_after(seconds):
            yield
    except trio.TooSlowError:
        raise Unresponsive(f"{hop.peer_id} did not open the session within {seconds:g} s") from None
