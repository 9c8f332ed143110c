"""Turns a connection through a relay into a direct one, where both ends are behind NATs (spec/discovery/punching.md).

Both dial each other at one moment, on which they agree over the relayed connection. The protocol is modelled on
libp2p's DCUtR. What a peer says here could aim us at anybody, so we dial only an IP address at which the relay, too,
sees that peer, and seldom. The relayed connection stays what it is until a direct one has taken its place, so nothing
is lost if this fails.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from peerd.net.connections import Connections, PeerConnection
from peerd.net.limits.owners import Owner
from peerd.net.limits.rates import Rates
from peerd.net.stream import Stream
from peerd.protocol.addresses import Multiaddr
from peerd.protocol.encoding.schema import parse
from peerd.protocol.errors import (
    ConnectFailed,
    InvalidRequest,
    Overloaded,
    PeerdError,
    RemoteProtocolError,
    Unresponsive,
    UnsupportedFeature,
)
from peerd.protocol.messages.punch import PUNCH_PROTOCOL, TO_RESERVED, Now, Punch
from peerd.protocol.messages.session import Failure
from peerd.reach.own_endpoint import OwnEndpoint
from peerd.routing.failures.track_record import TrackRecord

log = logging.getLogger(__name__)

# A client opens connections to more servers than it will use, measures the delay to each, and closes most of them.
PATIENCE_S = 1.0
# For the first message of a stream.
ASK_S = 10.0
# For the other end to learn where it is seen, and to answer.
ANSWER_S = 15.0
# How often both dial at a moment, and how long each time: TCP repeats its first packet after 1 s (RFC 6298). Together
# less than the 5 s after which a peer should know that it stays with the relay.
ROUNDS, MEET_S = 2, 2.0
# How often one peer, and the peers of one public network, may make us dial: each time costs that network ten packets.
PUNCHES_BURST, PUNCHES_A_SECOND, NETWORK_FACTOR = 3, 1 / 60, 8
MAX_AT_ONCE = 8
# For a place among those, while the other end waits for our answer.
PLACE_S = 5.0


class Puncher:
    """Meets the peers that are connected through a relay. `run` asks those that called us; `answer` handles the
    others' requests.
    """

    def __init__(self, connections: Connections) -> None:
        self._connections = connections
        self._own_endpoint = OwnEndpoint(connections)
        self._rates = Rates(PUNCHES_A_SECOND, PUNCHES_BURST, network_factor=NETWORK_FACTOR)
        # Many may call at once, as after a restart of their relay: the others wait.
        self._places = trio.Semaphore(MAX_AT_ONCE)
        # The peers that we could not meet, each left alone for longer every time.
        self._faults = TrackRecord(trio.current_time)

    def __repr__(self) -> str:
        return f"<Puncher running={MAX_AT_ONCE - self._places.value}>"

    async def run(self) -> None:
        """Ask each peer that calls us through a relay to dial us, while we dial it, until cancelled."""
        contained = self._connections.containment.contained
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._own_endpoint.run)

            def called(connection: PeerConnection) -> None:
                if connection.relay is not None and not connection.dialled and connection.far_ip is not None:
                    nursery.start_soon(lambda: contained(self._ask, connection, what="punching a hole"))

            with self._connections.watching(connected=called):
                await trio.sleep_forever()

    # The reserved peer's side.

    async def _ask(self, connection: PeerConnection) -> None:
        peer = connection.peer_id
        try:
            hello = await connection.wait_hello()
            await trio.sleep(PATIENCE_S)
            if PUNCH_PROTOCOL not in hello.protocols or self._faults.is_avoided(peer):
                return
            async with self._places:
                if connection.lost is not None:
                    return
                self._count(connection)
                await self._meet_asked(connection)
            self._faults.succeeded(peer)
            log.info("connected to %s directly: both sides dialled, and the relay is no longer needed", peer)
        except (PeerdError, trio.EndOfChannel, trio.ClosedResourceError) as error:
            again_s = self._faults.failed(peer)
            log.debug("%s stays behind a relay: %r; not tried again for %.0f s", peer, error, again_s)

    async def _meet_asked(self, connection: PeerConnection) -> None:
        """Agree with a peer and meet it. Raises the error with which it refuses, or a PeerFault."""
        async with (
            self._own_endpoint.seen_by(self._relay_of(connection)) as at,
            connection.open_stream(PUNCH_PROTOCOL) as stream,
        ):
            target = self._checked(connection, (await _agree(stream, at)).at)
            for _ in range(ROUNDS):
                rtt_s = await connection.measure()
                with self._connections.meetings.expecting(target):
                    await stream.send(Now().to_header())
                    # It arrives there after half of a round trip, so both dial at the same time.
                    await trio.sleep(rtt_s / 2)
                    if await self._meet(connection, target, as_dialler=False):
                        return
        raise ConnectFailed("its NAT, or ours, let nothing in")

    # The caller's side.

    async def answer(self, stream: Stream) -> None:
        """Handle one stream: say where we are seen, and dial the peer as often as it asks us to, at most twice."""
        connection = self._connections.live.get(stream.peer)
        try:
            with trio.fail_after(ASK_S):
                asked = parse((await stream.receive()).header, (Punch,))
        except trio.TooSlowError:
            stream.reset(Unresponsive.code)
            return
        try:
            if connection is not stream.connection or connection is None or not connection.dialled:
                raise InvalidRequest("only a peer that we called through a relay asks us to dial it")
            target = self._checked(connection, asked.at)
            async with self._place():
                self._count(connection)
                async with self._own_endpoint.seen_by(self._relay_of(connection)) as at:
                    with self._connections.meetings.expecting(target):
                        await stream.send(Punch(at).to_header())
                        await self._meet_when_told(stream, connection, target)
        except trio.EndOfChannel:
            return
        except (InvalidRequest, UnsupportedFeature, Overloaded, ConnectFailed) as error:
            log.debug("refused to dial %s: %s", stream.peer, error)
            await stream.send(Failure.of(error).to_header())

    async def _meet_when_told(self, stream: Stream, connection: PeerConnection, target: Multiaddr) -> None:
        for _ in range(ROUNDS):
            with trio.move_on_after(ANSWER_S) as waiting:
                parse((await stream.receive()).header, (Now,))
            if waiting.cancelled_caught:
                stream.reset(Unresponsive.code)
                return
            if await self._meet(connection, target, as_dialler=True):
                return

    # Both sides.

    async def _meet(self, connection: PeerConnection, target: Multiaddr, *, as_dialler: bool) -> bool:
        meetings = self._connections.meetings
        met = await meetings.meet(connection.peer_id, target, as_dialler=as_dialler, within_s=MEET_S)
        return met is not None

    def _relay_of(self, connection: PeerConnection) -> PeerConnection:
        """Our connection to the relay. Raises ConnectFailed if it is gone."""
        relay = None if connection.relay is None else self._connections.live.get(connection.relay.peer_id)
        if relay is None:
            raise ConnectFailed("the relay is gone")
        return relay

    def _checked(self, connection: PeerConnection, at: Multiaddr) -> Multiaddr:
        """The address that a peer names, if we may dial it. Raises InvalidRequest, UnsupportedFeature."""
        if connection.relay is None or connection.far_ip is None or at.ip is None:
            raise UnsupportedFeature("the relay does not say where it sees you")
        if at.ip != connection.far_ip:
            raise InvalidRequest("the relay does not see you at that address")
        # A relay on the internet that says it sees the peer in our own network lies.
        if not self._connections.strangers_policy.named_from(connection.relay.remote_ip).permits(at.ip):
            raise UnsupportedFeature("we dial no private address for a stranger")
        return at

    @asynccontextmanager
    async def _place(self) -> AsyncIterator[None]:
        """One of the places for meetings, while the peer that asks waits. Raises Overloaded if none becomes free."""
        try:
            with trio.fail_after(PLACE_S):
                await self._places.acquire()
        except trio.TooSlowError:
            raise Overloaded("too many holes to punch: stay with the relay") from None
        try:
            yield
        finally:
            self._places.release()

    def _count(self, connection: PeerConnection) -> None:
        """Count one meeting. Raises Overloaded if the peer or its network has had too many."""
        owner = Owner.at(connection.peer_id, connection.far_ip)
        if not self._rates.may(owner, trio.current_time()):
            raise Overloaded("too many holes to punch for you: stay with the relay")


async def _agree(stream: Stream, at: Multiaddr) -> Punch:
    """Say where we are seen, and return what the peer says. Raises the error with which it refuses, or a PeerFault."""
    try:
        with trio.fail_after(ANSWER_S):
            await stream.send(Punch(at).to_header())
            answer = parse((await stream.receive()).header, TO_RESERVED)
    except trio.TooSlowError:
        raise Unresponsive(f"{stream.peer} did not say where it is seen") from None
    except trio.EndOfChannel:
        raise RemoteProtocolError(f"{stream.peer} finished without an answer") from None
    if isinstance(answer, Failure):
        raise answer.error
    assert isinstance(answer, Punch)
    return answer
