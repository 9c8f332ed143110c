"""One stream to one peer, as handlers and callers use it: complete messages in both directions.

The protocol machine decides what may be sent when; here tasks wait for it. A send that is cancelled has queued nothing,
and a receive that is cancelled has lost nothing. Neither ever leaves the connection in the middle of a frame, because
only the connection's writer touches it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from ipaddress import IPv4Address, IPv6Address
from types import TracebackType
from typing import Any, Protocol

import trio

from peerd.protocol.connection import streams
from peerd.protocol.connection.connection import ConnectionMachine
from peerd.protocol.connection.frames import Priority
from peerd.protocol.encoding.wire import Buffer, RawMessage
from peerd.protocol.errors import ConnectionLost, PeerdError, StreamReset
from peerd.protocol.identity import PeerId

# `send` waits while more than this is unsent: it keeps the writer busy while the sender makes more.
HIGH_WATER_BYTES = 256 * 1024


class Carrier(Protocol):
    """The connection that carries a stream, as the stream and its handler see it. `PeerConnection` is one."""

    core: ConnectionMachine
    lost: PeerdError | None
    farewell: str

    @property
    def peer_id(self) -> PeerId: ...
    @property
    def relay(self) -> Carrier | None: ...
    @property
    def remote_ip(self) -> IPv4Address | IPv6Address | None: ...
    @property
    def accountable_ip(self) -> IPv4Address | IPv6Address | None: ...

    def open_stream(self, protocol: str, *, priority: Priority = ...) -> Stream:
        """Open one more stream beside this one."""

    def lost_error(self) -> ConnectionLost:
        """A new error with the reason why the connection ended."""

    async def wait_lost(self) -> PeerdError:
        """Wait for the end of the connection. Returns the reason."""

    def wake(self) -> None:
        """Wake the writer, which may have something to send."""


class Stream:
    """A stream to `peer`. Made by `PeerConnection.open_stream`, or given to a handler.

    After the connection was lost, methods raise ConnectionLost; after the peer reset the stream, StreamReset; after we
    closed it, trio.ClosedResourceError. As a context manager it is closed at the end, or reset if an exception ends it.
    """

    def __init__(self, connection: Carrier, core: streams.StreamMachine) -> None:
        self.connection = connection
        self._core = core
        self._closed = False
        self._readable = trio.lowlevel.ParkingLot()
        self._sent = trio.lowlevel.ParkingLot()

    def __repr__(self) -> str:
        return f"<Stream {self._core.id} {self.protocol} to {self.peer} {self._core.state.name}>"

    @property
    def peer(self) -> PeerId:
        """The PeerId of the other end, which the connection proved."""
        return self.connection.peer_id

    @property
    def protocol(self) -> str:
        """The stream's protocol, such as `/peerd/dht/1`."""
        return self._core.protocol

    @property
    def unsent_messages(self) -> int:
        """How many queued messages are not yet completely on the wire."""
        return self._core.outgoing.unsent_messages

    async def send(
        self, header: Mapping[str, Any], body: Sequence[Buffer] = (), *, priority: Priority | None = None
    ) -> None:
        """Queue one message, after waiting while more than 256 KiB of this stream are unsent.

        body: its buffers must not change until they are sent. priority: None takes the stream's own. If cancelled, it
            has queued nothing. Raises ConnectionLost, StreamReset, trio.ClosedResourceError.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        waited = False
        while self._core.outgoing.unsent_bytes > HIGH_WATER_BYTES:
            self._raise_if_ended()
            await self._sent.park()
            waited = True
        self.send_nowait(header, body, priority=priority)
        if not waited:
            await trio.lowlevel.cancel_shielded_checkpoint()

    def send_nowait(
        self, header: Mapping[str, Any], body: Sequence[Buffer] = (), *, priority: Priority | None = None
    ) -> None:
        """Queue one message, however many wait already. Raises as `send` does."""
        self._raise_if_ended()
        if self._core.outgoing.finishing:
            raise trio.ClosedResourceError("this stream was finished")
        self.connection.core.streams.send(
            self._core, header, body, self._core.priority if priority is None else priority
        )
        self.connection.wake()

    async def wait_unsent_below(self, count: int) -> None:
        """Wait until fewer than `count` messages are unsent. Raises as `send` does."""
        await trio.lowlevel.checkpoint_if_cancelled()
        waited = False
        self._raise_if_ended()
        while self._core.outgoing.unsent_messages >= count:
            await self._sent.park()
            self._raise_if_ended()
            waited = True
        if not waited:
            await trio.lowlevel.cancel_shielded_checkpoint()

    async def wait_drained(self) -> None:
        """Wait until nothing is unsent or the stream has ended. A closed stream still sends what was queued before."""
        await trio.lowlevel.checkpoint_if_cancelled()
        while self._core.outgoing.unsent_messages and self.connection.lost is None:
            await self._sent.park()

    async def receive(self, max_body: int = 0) -> RawMessage:
        """The next message. The peer gets credit for more only while a task waits here.

        max_body: the longest body to accept, in bytes; most messages have none. If cancelled, it has lost nothing.
            Raises trio.EndOfChannel after the peer finished; RemoteProtocolError if the bytes are no message, and
            Overloaded if too much of the peer's waits here (both reset the stream); ConnectionLost, StreamReset,
            trio.ClosedResourceError.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        waited = False
        while (message := self._receive_nowait(max_body)) is None:
            await self._readable.park()
            waited = True
        if not waited:
            await trio.lowlevel.cancel_shielded_checkpoint()
        return message

    def finish(self) -> None:
        """Send nothing after what is queued. The peer's messages can still be received."""
        self.connection.core.streams.finish(self._core)
        self.connection.wake()

    def reset(self, code: str) -> None:
        """End the stream at once, in both directions, and drop what is unsent. Does nothing if it has ended."""
        self._closed = True
        self.connection.core.streams.reset(self._core, code)
        self._wake_and_write()

    def close(self) -> None:
        """Receive no more, and finish after what is queued. Repeating it does nothing."""
        if not self._closed:
            self._closed = True
            self.connection.core.streams.close(self._core)
            self._wake_and_write()

    async def aclose(self) -> None:
        """`close`, and a checkpoint. It does not wait until everything is sent."""
        self.close()
        await trio.lowlevel.checkpoint()

    async def __aenter__(self) -> Stream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            await self.aclose()
        else:
            self.reset(code_of(error))

    def wake(self) -> None:
        """Let all waiting tasks look again, because something about the stream has changed."""
        self._readable.unpark_all()
        self._sent.unpark_all()

    def wake_receiver(self) -> None:
        """Wake the receiver: bytes, or the end, have arrived."""
        self._readable.unpark_all()

    def wake_sender(self) -> None:
        """Wake the sender: a message has been sent."""
        self._sent.unpark_all()

    def _wake_and_write(self) -> None:
        self.wake()
        self.connection.wake()

    def _receive_nowait(self, max_body: int) -> RawMessage | None:
        if self._closed:
            raise trio.ClosedResourceError("this stream was closed")
        message = self.connection.core.streams.read(self._core, max_body)
        # The read may have made credit due, or a RESET.
        self.connection.wake()
        if message is None and self._core.incoming.ended:
            raise trio.EndOfChannel
        if message is None:
            self._raise_if_ended()
        return message

    def _raise_if_ended(self) -> None:
        if self._closed:
            raise trio.ClosedResourceError("this stream was closed")
        if self._core.reset_code is not None:
            raise StreamReset(f"{self.peer} ended the stream: {self._core.reset_code}", self._core.reset_code)
        if self.connection.lost is not None:
            raise self.connection.lost_error()
        if self._core.state is streams.State.CLOSED:
            raise trio.ClosedResourceError("this stream has ended")


def code_of(error: BaseException) -> str:
    """The code with which an exception resets the stream that it ends."""
    match error:
        case PeerdError():
            return error.code
        case trio.Cancelled():
            return "cancelled"
        case _:
            return "closed"
