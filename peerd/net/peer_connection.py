"""One live connection: the tasks that move its bytes, and the handlers of the streams that the peer opens.

Drives `protocol.connection`, which decides everything. Three tasks: one reads and never sends, one sends
and is never cancelled for a request's sake, one watches the clock. The difficulty is the end: whoever
notices it first says why, all who wait are woken with that reason, handlers get a moment to clean up,
and nothing takes longer than a second.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from functools import partial
from ipaddress import IPv4Address, IPv6Address
from typing import Protocol

import trio

from peerd.net.containment import split
from peerd.net.stream import Carrier, Stream
from peerd.net.transport import MessageChannel
from peerd.net.uplink_meter import UplinkMeter
from peerd.protocol.connection import streams
from peerd.protocol.connection.connection import Connection
from peerd.protocol.connection.events import (
    GoneAway,
    HandshakeDone,
    MessageSent,
    StreamEnded,
    StreamOpened,
    StreamReadable,
)
from peerd.protocol.connection.frames import Priority
from peerd.protocol.connection.hello import HELLO_PROTOCOL, Hello
from peerd.protocol.connection.stream_table import MAX_STREAMS
from peerd.protocol.errors import (
    ConnectionLost,
    HandshakeFailed,
    InternalError,
    LocalProtocolError,
    Overloaded,
    PeerdError,
    PeerFault,
    RelayLost,
    RemoteProtocolError,
    UnsupportedFeature,
)
from peerd.protocol.identity import PeerId

log = logging.getLogger(__name__)

StreamHandler = Callable[[Stream], Awaitable[None]]

# From HandshakeDone until both sides agree that this is their connection and know each other's hello.
SETTLE_S = 10.0
# What handlers get to notice that their connection is gone, before they are cancelled.
HANDLER_GRACE_S = 0.5
# What a handler leaves unsent may wait for the peer to read it for so long, or it would lie here as long as it likes.
LEFTOVER_S = 30.0
# How long our last words may take.
FAREWELL_S = 0.4
# Every settled connection has had this one.
_HELLO_STREAMS = 1
# The code of a GOAWAY of somebody who leaves for good.
CLOSED = "closed"
# The code of a GOAWAY that ends one of two connections between the same peers.
_DUPLICATE = "duplicate"
# The code of a GOAWAY that ends a connection which nobody uses.
IDLE = "idle"
# Whoever dialled closes what nobody has used for so long: each connection costs both sides 4 KiB of PINGs a minute, and
# in a swarm of a thousand a peer meets most of the others within hours.
IDLE_S = 120.0


# What a handler may end with: an error that peers have a name for, or the end of its stream.
_STREAM_ENDS = (PeerdError, trio.EndOfChannel, trio.ClosedResourceError, trio.BrokenResourceError)


class Owner(Protocol):
    """What a PeerConnection asks of the `Connections` it belongs to."""

    handlers: dict[str, StreamHandler]

    def hello_to(self, connection: PeerConnection) -> Hello:
        """What we say about ourselves."""

    def decides(self, peer_id: PeerId) -> bool:
        """Whether we, and not the peer, choose between several connections."""

    async def decide(self, connection: PeerConnection) -> bool:
        """Whether to take this one; else another to the same peer is kept."""

    def can_spare_one(self) -> bool:
        """Whether there are enough connections beside one that nobody uses."""

    def settled(self, connection: PeerConnection) -> None:
        """Both sides take this connection."""

    def ended(self, connection: PeerConnection) -> None:
        """It was lost or closed."""

    def refuses(self, connection: PeerConnection) -> bool:
        """Whether we want nothing to do with the peer, now that it has proved who it is."""

    def contain(self, error: Exception, what: str, connection: PeerConnection) -> None:
        """Log and count an exception that nobody named. Raises it where failures are to be loud."""


class PeerConnection:
    """A connection to `peer_id`. Streams may be opened on it once it is settled."""

    def __init__(self, core: Connection, channel: MessageChannel, owner: Owner, relay: Carrier | None = None) -> None:
        self.relay = relay
        """The connection to the relay that carries this one; None for a direct one."""
        self.core = core
        """The protocol machine; for `Stream` alone."""
        self.hello: Hello | None = None
        self.lost: PeerdError | None = None
        """Why it ended; None while it lives."""
        self.settled = False
        self.is_duplicate = False
        """Whether we or the peer had a better connection."""
        self.closed_here = False
        """Whether we ended it, in good order."""
        self.farewell = ""
        """The code with which the peer ended it; "" where it did not say."""
        self._streams_opened = 0
        self._used = trio.current_time()
        self.uplink = UplinkMeter()
        """How fast the line to the peer takes what we send."""
        self.on_proven: Callable[[], None] = _nothing
        self.on_settled: Callable[[], None] = _nothing
        self._channel = channel
        self._owner = owner
        self._streams: dict[int, Stream] = {}
        self._handlers_running = 0
        self._idle = trio.lowlevel.ParkingLot()
        self._hurry = trio.lowlevel.ParkingLot()
        self._heard = trio.lowlevel.ParkingLot()
        self._proven = trio.Event()
        self._said_hello = trio.Event()
        self._ended = trio.Event()
        self._moving = trio.CancelScope()
        self._writing = trio.CancelScope(shield=True)

    def __repr__(self) -> str:
        state = f"lost ({self.lost})" if self.lost else "settled" if self.settled else "unsettled"
        return f"<PeerConnection {state} {self._channel!r} streams={len(self._streams)}>"

    # For everybody.

    @property
    def peer_id(self) -> PeerId:
        """Who is at the other end."""
        return self.core.peer_id

    @property
    def proven_peer(self) -> PeerId | None:
        """Who is at the other end; None before it has proved it."""
        try:
            return self.peer_id
        except LocalProtocolError:
            return None

    @property
    def remote_ip(self) -> IPv4Address | IPv6Address | None:
        """Where we see the peer: the last proxy's address, if there is one. None behind a relay."""
        return self._channel.remote_ip

    @property
    def accountable_ip(self) -> IPv4Address | IPv6Address | None:
        """Whose share what this peer does is counted in: its own address's, or its relay's."""
        return self.remote_ip if self.relay is None else self.relay.remote_ip

    @property
    def dialled(self) -> bool:
        """Whether we dialled, rather than the peer."""
        return self.core.initiator

    @property
    def rtt_s(self) -> float | None:
        """The last measured round trip; None before the first."""
        return self.core.rtt_s

    @property
    def idle_s(self) -> float:
        """Seconds since it was of use to anybody: since the last stream ended, or the delay was measured."""
        in_use = self._streams or self._handlers_running or not self.settled
        return 0.0 if in_use else trio.current_time() - self._used

    def open_stream(self, protocol: str, *, priority: Priority = Priority.CONTROL) -> Stream:
        """Open a stream, at once: whether the peer takes it, its first message will show.

        priority: of messages, in both directions, that name none. Raises ConnectionLost, Overloaded.
        """
        if self.lost is not None:
            raise self.lost_error()
        stream = self._adopt(self.core.open_stream(protocol, priority))
        self.wake()
        return stream

    async def wait_hello(self) -> Hello:
        """What the peer says about itself, a moment after the handshake. Raises ConnectionLost."""
        await self._said_hello.wait()
        if self.hello is None:
            raise self.lost_error()
        return self.hello

    async def wait_lost(self) -> PeerdError:
        """Why it ended, once it has."""
        await self._ended.wait()
        assert self.lost is not None
        return self.lost

    async def answers(self, within_s: float) -> bool:
        """Whether the peer is there: something of it arrives in time after we asked."""
        if self.lost is None:
            self.core.ask(trio.current_time())
            self.wake()
            with trio.move_on_after(within_s):
                await self._heard.park()
                return self.lost is None
        return False

    async def measure(self) -> float:
        """Seconds to the peer and back, now. Raises ConnectionLost."""
        answers = self.core.answers
        self.core.ask(trio.current_time())
        self.wake()
        while self.core.answers == answers:
            if self.lost is not None:
                raise self.lost_error()
            await self._heard.park()
        assert self.rtt_s is not None
        self._used = trio.current_time()
        return self.rtt_s

    def close(self, code: str = CLOSED, reason: str = "") -> None:
        """End it: the peer is told why, unsent messages are dropped. Nothing after its end."""
        self.closed_here = self.closed_here or self.lost is None
        self.core.go_away(code, reason)
        self._lose(ConnectionLost(f"we closed the connection: {reason or code}"))

    def close_if_unused(self, code: str, reason: str) -> None:
        """End it unless either side has ever opened a stream on it, beside the hello's."""
        if self._streams_opened <= _HELLO_STREAMS:
            self.close(code, reason)

    def lost_error(self) -> ConnectionLost:
        """A fresh ConnectionLost for somebody who came too late."""
        kind = RelayLost if isinstance(self.lost, RelayLost) else ConnectionLost
        return kind(f"the connection to {self._name} is gone: {self.lost}")

    # For `Stream` and `Connections`.

    def wake(self) -> None:
        """There may be something to send."""
        self._idle.unpark_all()

    async def run(self) -> None:
        """Be this connection, from the first byte to the last. Returns when it has ended; `lost` says why.

        A bug, in a handler too, ends this connection with `internal`; it is raised only under PEERD_STRICT=1.
        """
        async with trio.open_nursery() as handlers:
            self._handlers = handlers
            try:
                await self._move()
            finally:
                await self._channel.aclose()
            handlers.cancel_scope.deadline = trio.current_time() + HANDLER_GRACE_S
        self.core.release()

    # Tasks.

    async def _move(self) -> None:
        async with trio.open_nursery() as writing:
            writing.start_soon(self._until_lost, self._write)
            try:
                async with trio.open_nursery() as nursery:
                    self._moving = nursery.cancel_scope
                    if self.lost is None:
                        nursery.start_soon(self._until_lost, self._keep_time)
                        nursery.start_soon(self._until_lost, self._settle)
                        await self._until_lost(self._read)
            finally:
                self.close()

    async def _until_lost(self, task: Callable[[], Awaitable[None]]) -> None:
        try:
            await task()
        except (PeerFault, Overloaded) as error:
            self._lose(error)
        except Exception as error:
            self._fail(error, "a connection")

    def _fail(self, error: Exception, what: str) -> None:
        """End the connection because of a bug of ours."""
        self._owner.contain(error, what, self)
        self._lose(InternalError(f"a bug of ours in {what}"))

    async def _read(self) -> None:
        while True:
            message = await self._channel.receive()
            self.core.receive(message, trio.current_time())
            self._take_events()
            self.wake()
            self._heard.unpark_all()

    async def _write(self) -> None:
        # Shielded, so that nothing is ever cut off in the middle but by `_lose`'s deadline.
        with self._writing:
            while True:
                message = self.core.next_message(trio.current_time())
                self._take_events()
                if message is not None:
                    began = trio.current_time()
                    await self._channel.send(message)
                    self.uplink.sent(len(message), began, trio.current_time())
                elif self.lost is None:
                    self.uplink.idle()
                    await self._idle.park()
                else:
                    return

    async def _keep_time(self) -> None:
        with trio.move_on_at(self.core.deadline):
            await self._proven.wait()
        while True:
            self.core.check(trio.current_time(), self._channel.delivery())
            if self.dialled and self.idle_s >= IDLE_S and self._owner.can_spare_one():
                self.close(IDLE, f"nobody has used it for {IDLE_S:g} s")
            self.wake()
            with trio.move_on_at(self._next_look()):
                await self._hurry.park()

    def _next_look(self) -> float:
        idle_at = self._used + IDLE_S
        # Not with the PINGs, which both sides send at the same time: what crosses the end of a connection may undo it.
        return min(self.core.deadline, idle_at) if idle_at > trio.current_time() else self.core.deadline

    async def _settle(self) -> None:
        """Agree with the peer on this connection: the smaller PeerId chooses, its hello says so."""
        await self._proven.wait()
        with trio.move_on_after(SETTLE_S):
            if self._owner.decides(self.peer_id):
                is_taken = await self._owner.decide(self)
                if self.lost is not None:
                    # It ended in the very tick in which we decided: no checkpoint told us.
                    return
                if not is_taken:
                    self.is_duplicate = True
                    self.close(_DUPLICATE, "we have another connection")
                    return
                self._be_settled()
                stream = self.open_stream(HELLO_PROTOCOL)
                stream.send_nowait(self._owner.hello_to(self).to_header())
                await self._take_hello(stream)
            await self._said_hello.wait()
            return
        raise HandshakeFailed(f"the peer did not say hello within {SETTLE_S:g} s")

    async def _take_hello(self, stream: Stream) -> None:
        try:
            said = await stream.receive()
        except trio.EndOfChannel:
            raise RemoteProtocolError("the peer finished its hello without saying it") from None
        self.hello = Hello.from_header(said.header)
        stream.finish()
        self._said_hello.set()

    async def _answer_hello(self, stream: Stream) -> None:
        stream.send_nowait(self._owner.hello_to(self).to_header())
        await self._take_hello(stream)

    async def _handle(self, handler: StreamHandler, stream: Stream) -> None:
        """Run a handler. Its stream ends with it; a bug of ours ends the connection."""
        try:
            await handler(stream)
            await self._see_off(stream)
        except (Exception, BaseExceptionGroup) as error:
            failure, rest = split(error)
            if failure is not None:
                self._end_handler(failure, stream)
            if rest is not None:
                raise rest from None
        finally:
            self._handlers_running -= 1
            self._used = trio.current_time()

    async def _see_off(self, stream: Stream) -> None:
        """Send what the handler left to be sent; what the peer does not read in time is dropped."""
        stream.close()
        if stream.unsent_messages:
            with trio.move_on_after(LEFTOVER_S):
                await stream.wait_drained()
                return
            stream.reset(Overloaded.code)

    def _end_handler(self, error: Exception, stream: Stream) -> None:
        fault = _fault(error)
        if fault is not None:
            log.debug("%s ends: %r", stream, fault)
            stream.reset(fault.code if isinstance(fault, PeerdError) else RemoteProtocolError.code)
        else:
            stream.reset(InternalError.code)
            self._fail(error, f"the handler of {stream.protocol}")

    # Events.

    def _take_events(self) -> None:
        while self.lost is None and (event := self.core.next_event()) is not None:
            match event:
                case StreamReadable(core):
                    if (stream := self._streams.get(core.id)) is not None:
                        stream.wake_receiver()
                case MessageSent(core):
                    if (stream := self._streams.get(core.id)) is not None:
                        stream.wake_sender()
                case StreamOpened(core):
                    self._take_stream(core)
                case StreamEnded(core):
                    if (stream := self._streams.pop(core.id, None)) is not None:
                        self._used = trio.current_time()
                        stream.wake()
                case HandshakeDone():
                    if self._owner.refuses(self):
                        raise PeerFault("the peer caused failures of ours lately")
                    self.on_proven()
                    self._proven.set()
                case GoneAway(code, reason):
                    self.is_duplicate = code == _DUPLICATE and not self.settled
                    self.farewell = code
                    self._lose(ConnectionLost(f"the peer ended the connection: {reason or code}"))

    def _take_stream(self, core: streams.Stream) -> None:
        if core.protocol == HELLO_PROTOCOL:
            if self.settled or self._owner.decides(self.peer_id):
                raise RemoteProtocolError("the peer says hello twice, or out of turn")
            self._be_settled()
            self._handlers.start_soon(self._until_lost, partial(self._answer_hello, self._adopt(core)))
            return
        if not self.settled:
            raise RemoteProtocolError("the peer opened a stream before it said hello")
        handler = self._owner.handlers.get(core.protocol)
        if handler is None:
            self.core.reset(core, UnsupportedFeature.code)
        elif self._handlers_running >= MAX_STREAMS:
            self.core.reset(core, Overloaded.code)
        else:
            self._handlers_running += 1
            self._handlers.start_soon(self._handle, handler, self._adopt(core))

    def _adopt(self, core: streams.Stream) -> Stream:
        stream = Stream(self, core)
        self._streams[core.id] = stream
        self._streams_opened += 1
        if len(self._streams) == 1:
            # Somebody may wait for an answer now.
            self._hurry.unpark_all()
        return stream

    def _be_settled(self) -> None:
        assert self.lost is None
        self.settled = True
        self.on_settled()
        self._owner.settled(self)

    def _lose(self, error: PeerdError) -> None:
        if self.lost is not None:
            return
        self.lost = error
        self.core.go_away(error.code, str(error))
        log.debug("%s", self)
        self._owner.ended(self)
        self._ended.set()
        self._said_hello.set()
        self._heard.unpark_all()
        for stream in self._streams.values():
            stream.wake()
        self._moving.cancel()
        self._writing.deadline = trio.current_time() + FAREWELL_S
        self.wake()

    @property
    def _name(self) -> str:
        return self.proven_peer or "an unproven peer"


def _nothing() -> None:
    pass


def _fault(error: Exception) -> Exception | None:
    """What a handler's exception says about its stream; None where it is no fault of the peer's or caller's.

    A stream that is closed or broken under a handler has ended, whichever task noticed first.
    """
    if isinstance(error, ExceptionGroup):
        faults = [_fault(part) for part in error.exceptions]
        return None if None in faults else faults[0]
    if isinstance(error, LocalProtocolError):
        return None
    return error if isinstance(error, _STREAM_ENDS) else None
