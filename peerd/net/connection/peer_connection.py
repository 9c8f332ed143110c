"""One live connection as the rest of peerd uses it: streams, hello, delay, and its end with the reason.

`protocol.connection` decides what is sent and what received bytes mean; `pump` moves them. The hard part is the end.
The task that notices it first gives the reason, all tasks that wait on the connection are woken with that reason,
handlers get a moment to clean up, and nothing takes longer than a second.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from functools import cached_property, partial
from ipaddress import IPv4Address, IPv6Address
from typing import Literal

import trio

from peerd.net.connection.agreement import Agreement
from peerd.net.connection.incoming_streams import IncomingStreams
from peerd.net.connection.open_streams import OpenStreams
from peerd.net.connection.pump import Pump
from peerd.net.containment import Containment
from peerd.net.handlers import StreamHandler
from peerd.net.limits.entry_rates import EntryRates
from peerd.net.limits.owners import Owner, network_of
from peerd.net.limits.scores import FLOOD, MALFORMED
from peerd.net.stream import Carrier, Stream
from peerd.net.transport import MessageChannel
from peerd.protocol.addresses import IpAddress
from peerd.protocol.connection import streams
from peerd.protocol.connection.connection import ConnectionMachine
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
from peerd.protocol.errors import (
    ConnectionLost,
    InternalError,
    LocalProtocolError,
    Overloaded,
    PeerdError,
    PeerFault,
    RelayLost,
    RemoteProtocolError,
)
from peerd.protocol.identity import PeerId

log = logging.getLogger(__name__)

# How long handlers may clean up after the end of their connection, before they are cancelled.
HANDLER_GRACE_S = 0.5
# Every settled connection has had one stream, for the hello.
_HELLO_STREAMS = 1
# The code of a GOAWAY from a peer that leaves for good.
CLOSED = "closed"
# The code of a GOAWAY that ends one of two connections between the same peers.
_DUPLICATE = "duplicate"
# The code of a GOAWAY that ends an unused connection.
IDLE = "idle"


Way = Literal["direct", "punched", "relayed"]
"""direct: one side dialled the other; punched: both dialled, through their NATs; relayed: through a third peer."""


class PeerConnection:
    """A connection to `peer_id`. Streams may be opened on it once it is settled. Made by `Connections`.

    own: our PeerId. handlers: protocol id -> the function that runs for each stream of it that the peer opens; it may
        change.
    on_lost: called when the connection ends, before any task that waits on it is woken.
    """

    def __init__(
        self,
        core: ConnectionMachine,
        channel: MessageChannel,
        *,
        own: PeerId,
        handlers: Mapping[str, StreamHandler],
        containment: Containment,
        rates: EntryRates,
        on_lost: Callable[[PeerConnection], None],
        relay: Carrier | None = None,
        far_ip: IpAddress | None = None,
        punched: bool = False,
    ) -> None:
        self.relay = relay
        """The connection to the relay that carries this one; None for a direct one."""
        self.far_ip = far_ip
        """The address at which the relay says that it sees the peer; None for a direct connection, or if unknown."""
        self.punched = punched
        """Whether both sides dialled at the same moment, through NATs that let neither of them in."""
        self.core = core
        """The protocol machine. Only `Stream` uses it."""
        self.agreement = Agreement()
        """How far both sides have come towards using this connection."""
        self.lost: PeerdError | None = None
        """The reason why the connection ended; None while it lives."""
        self.is_duplicate = False
        """Whether we or the peer had a better connection."""
        self.closed_here = False
        """Whether we closed it without an error."""
        self.retired = trio.Event()
        """Set when a direct connection has taken its place: its streams go on, and new ones are opened on the other."""
        self.farewell = ""
        """The code with which the peer ended it; "" if the peer gave none."""
        self._channel = channel
        self._own = own
        self._containment = containment
        self._incoming = IncomingStreams(handlers, rates, trio.current_time())
        self._on_lost = on_lost
        self._streams = OpenStreams()
        self._pump = Pump(core, channel, self._take_events)
        self.uplink = self._pump.uplink
        """How fast the line to the peer takes what we send."""
        self._ended = trio.Event()
        self._moving = trio.CancelScope()

    def __repr__(self) -> str:
        state = f"lost ({self.lost})" if self.lost else "settled" if self.agreement.is_settled else "unsettled"
        return f"<PeerConnection {state} {self._channel!r} streams={len(self._streams)}>"

    # For all callers.

    @property
    def peer_id(self) -> PeerId:
        """The PeerId of the other end."""
        return self.core.peer_id

    @property
    def proven_peer(self) -> PeerId | None:
        """The PeerId of the other end; None before it has proved it."""
        try:
            return self.peer_id
        except LocalProtocolError:
            return None

    @property
    def remote_ip(self) -> IPv4Address | IPv6Address | None:
        """The address at which we see the peer, or that of the last proxy. None behind a relay."""
        return self._channel.remote_ip

    @property
    def remote_port(self) -> int:
        """The port from which we see the peer; 0 behind a relay."""
        return self._channel.remote_port

    @property
    def way(self) -> Way:
        """How the bytes reach the peer."""
        return "relayed" if self.relay is not None else "punched" if self.punched else "direct"

    @property
    def accountable_ip(self) -> IPv4Address | IPv6Address | None:
        """The address in whose quota this peer counts: its own, or its relay's."""
        return self.remote_ip if self.relay is None else self.relay.remote_ip

    @cached_property
    def network(self) -> str:
        """The public network in whose quota this peer counts; "" if none is counted."""
        # Kept: formatting an address takes longer than all else that a limit does.
        return network_of(self.accountable_ip)

    @property
    def dialled(self) -> bool:
        """Whether we dialled, rather than the peer."""
        return self.core.initiator

    @property
    def rtt_s(self) -> float | None:
        """The last measured round trip in seconds; None before the first."""
        return self.core.rtt_s

    @property
    def hello(self) -> Hello | None:
        """What the peer says about itself; None before its hello."""
        return self.agreement.hello

    @property
    def unused_since(self) -> float | None:
        """When the last stream ended, or the delay was measured, if nothing uses the connection now; else None."""
        return self._streams.unused_since if self.agreement.is_settled else None

    @property
    def idle_s(self) -> float:
        """Seconds for which nothing has used it."""
        since = self.unused_since
        return 0.0 if since is None else trio.current_time() - since

    def open_stream(self, protocol: str, *, priority: Priority = Priority.CONTROL) -> Stream:
        """Open a stream without waiting. The peer's first message shows whether it accepts the stream.

        priority: for messages, in both directions, that name none. Raises ConnectionLost, Overloaded.
        """
        if self.lost is not None:
            raise self.lost_error()
        stream = self._adopt(self.core.streams.open(protocol, priority))
        self.wake()
        return stream

    async def wait_hello(self) -> Hello:
        """The peer's hello, which comes a moment after the handshake. Raises ConnectionLost."""
        hello = await self.agreement.wait_hello()
        if hello is None:
            raise self.lost_error()
        return hello

    async def wait_lost(self) -> PeerdError:
        """Wait for the end of the connection. Returns the reason."""
        await self._ended.wait()
        assert self.lost is not None
        return self.lost

    async def answers(self, within_s: float) -> bool:
        """Ask for a sign of life. Returns whether any message of the peer arrives in time."""
        return self.lost is None and await self._pump.ask(within_s)

    async def measure(self) -> float:
        """Seconds to the peer and back, now. Raises ConnectionLost."""
        rtt_s = await self._pump.measure() if self.lost is None else None
        if rtt_s is None:
            raise self.lost_error()
        self._streams.touch()
        return rtt_s

    def close(self, code: str = CLOSED, reason: str = "") -> None:
        """End the connection. The peer is told the reason; unsent messages are dropped. Repeating it does nothing."""
        self.closed_here = self.closed_here or self.lost is None
        self.core.go_away(code, reason)
        self._lose(ConnectionLost(f"we closed the connection: {reason or code}"))

    def close_if_unused(self, code: str, reason: str) -> None:
        """End it unless either side has ever opened a stream on it, beside the hello's."""
        if self._streams.opened <= _HELLO_STREAMS:
            self.close(code, reason)

    def lost_error(self) -> ConnectionLost:
        """A new ConnectionLost for a caller that came too late."""
        kind = RelayLost if isinstance(self.lost, RelayLost) else ConnectionLost
        return kind(f"the connection to {self._name} is gone: {self.lost}")

    # For `Stream`, `settling` and `Connections`.

    def wake(self) -> None:
        """Note that there may be messages to send."""
        self._pump.wake()

    async def run(self, settle: Callable[[PeerConnection], Awaitable[None]]) -> None:
        """Run the connection from its first message to its last. When it returns, `lost` has the reason.

        settle: runs beside it until the connection is taken. If it raises a PeerFault, the connection ends; if the
            connection ends, it is cancelled.
        A bug, also in a handler, ends this connection with `internal`; it is raised only under PEERD_STRICT=1.
        """
        try:
            async with trio.open_nursery() as handling:
                self._handling = handling
                try:
                    await self._move(partial(settle, self))
                finally:
                    await self._channel.aclose()
                handling.cancel_scope.deadline = trio.current_time() + HANDLER_GRACE_S
        finally:
            self.core.release()

    @property
    def is_our_choice(self) -> bool:
        """Whether we, and not the peer, choose between several connections (spec/connection/connection.md)."""
        return self._own < self.peer_id

    def close_as_duplicate(self) -> None:
        """End it because there is a better connection to the peer."""
        self.is_duplicate = True
        self.close(_DUPLICATE, "we have another connection")

    # Tasks.

    async def _move(self, settle: Callable[[], Awaitable[None]]) -> None:
        async with trio.open_nursery() as writing:
            writing.start_soon(self._until_lost, self._pump.write)
            try:
                async with trio.open_nursery() as nursery:
                    self._moving = nursery.cancel_scope
                    if self.lost is None:
                        nursery.start_soon(self._until_lost, partial(self._pump.keep_time, self.agreement.proven))
                        nursery.start_soon(self._until_lost, settle)
                        await self._until_lost(partial(self._pump.read, self.agreement.wait_settled_if_greeted))
            finally:
                self.close()

    async def _until_lost(self, task: Callable[[], Awaitable[None]]) -> None:
        try:
            await task()
        except (PeerFault, Overloaded) as error:
            if isinstance(error, RemoteProtocolError):
                self._score("malformed messages", MALFORMED)
            self._lose(error)
        except Exception as error:
            self._fail(error, "a connection")

    def _fail(self, error: Exception, what: str) -> None:
        """End the connection because of a bug of ours."""
        self._containment.contain(error, what, self.proven_peer, self.remote_ip)
        self._lose(InternalError(f"a bug of ours in {what}"))

    # Events.

    def _take_events(self) -> None:
        while self.lost is None and (event := self.core.next_event()) is not None:
            match event:
                case StreamReadable() | MessageSent() | StreamEnded():
                    self._streams.deliver(event)
                case StreamOpened(core):
                    self._take_stream(core)
                case HandshakeDone():
                    self.agreement.proven.set()
                case GoneAway(code, reason):
                    self.is_duplicate = code == _DUPLICATE and not self.agreement.is_settled
                    self.farewell = code
                    self._lose(ConnectionLost(f"the peer ended the connection: {reason or code}"))

    def _take_stream(self, core: streams.StreamMachine) -> None:
        if core.protocol == HELLO_PROTOCOL:
            if self.agreement.greeting is not None or self.is_our_choice:
                raise RemoteProtocolError("the peer sent a second hello, or one out of turn")
            self.agreement.greet(self._adopt(core))
            return
        if not self.agreement.is_settled:
            raise RemoteProtocolError("the peer opened a stream before its hello")
        owner = Owner(self.peer_id, self.network)
        try:
            handler = self._incoming.handler_of(core.protocol, owner, self._streams.handled, trio.current_time())
        except PeerdError as refusal:
            self.core.streams.reset(core, refusal.code)
            if self._incoming.is_flood:
                self._score("too many streams", FLOOD)
                raise
        else:
            self._streams.handled += 1
            on_bug = partial(self._fail, what=f"the handler of {core.protocol}")
            self._handling.start_soon(self._streams.run_handler, handler, self._adopt(core), on_bug)

    def _score(self, reason: str, points: float) -> None:
        """Score the peer for what it did.

        What an unproven peer says that we dialled proves nothing of its address: strangers can make us dial any
        address. And a relay is not to blame for what it carries: it cannot read it.
        """
        ip = None if self.dialled and self.proven_peer is None else self.remote_ip
        self._containment.scores.note(reason, points, self.proven_peer, ip, trio.current_time())

    def _adopt(self, core: streams.StreamMachine) -> Stream:
        stream = self._streams.add(self, core)
        if len(self._streams) == 1:
            # While a task may wait for an answer, the machine asks for signs of life more often.
            self._pump.hurry()
        return stream

    def _lose(self, error: PeerdError) -> None:
        if self.lost is not None:
            return
        self.lost = error
        self.core.go_away(error.code, str(error))
        log.debug("%s", self)
        try:
            self._on_lost(self)
        finally:
            # Whatever an observer raises, the tasks of a connection that has ended must not wait for ever.
            self._ended.set()
            self.agreement.end()
            self._streams.wake_all()
            self._moving.cancel()
            self._pump.stop()

    @property
    def _name(self) -> str:
        return self.proven_peer or "an unproven peer"
