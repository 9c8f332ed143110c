"""Connections between two peers that dial each other at the same moment, and what others see of our own port.

`reach/puncher.py` decides whom to meet, where and when. To be met, a peer must know where others see the port from
which it dials. A peer tells that in its hello to whom it is connected, so we dial it once more from that port, as
somebody else: between two identities there is only one connection. A NAT keeps a port open while it is used, so the
second connection lives as long as its result is needed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from dataclasses import replace
from typing import Protocol

import trio

from peerd.net.connection.peer_connection import PeerConnection
from peerd.net.connection.settling import agree, exchange_hellos
from peerd.net.containment import Containment
from peerd.net.introduction import Introduction
from peerd.net.limits.entry_rates import EntryRates
from peerd.net.transport import MessageChannel, Transport
from peerd.protocol.addresses import IpAddress, Multiaddr
from peerd.protocol.connection.connection import ConnectionMachine
from peerd.protocol.connection.hello import Hello
from peerd.protocol.errors import ConnectFailed, PeerFault
from peerd.protocol.identity import Identity, PeerId
from peerd.trio_tools import open_tasks

# For the dial of a second connection to a peer, and then for the handshake and its hello.
SIGHT_S = 5.0
# A NAT may let in what comes from an IP address to which we have sent something, from any port there, for as long as
# this (RFC 5382, 5: at least 4 minutes for a connection that has not ended properly).
OPEN_S = 300.0
MAX_REMEMBERED = 1024

Arrived = Callable[[PeerConnection], None]


class RunMet(Protocol):
    """Runs a connection for which both sides dialled to its end, and calls `arrived` when both sides have taken it."""

    def __call__(
        self, channel: MessageChannel, peer_id: PeerId, arrived: Arrived, *, initiator: bool
    ) -> Awaitable[PeerConnection]: ...


class Meetings:
    """Meets peers, from our own port. Connections run in `nursery`. introduction: what we say to a peer."""

    def __init__(
        self,
        transport: Transport,
        run: RunMet,
        introduction: Introduction,
        swarm_key: bytes | None,
        containment: Containment,
        nursery: trio.Nursery,
    ) -> None:
        self._transport = transport
        self._run = run
        self._introduction = introduction
        self._swarm_key = swarm_key
        self._containment = containment
        self._nursery = nursery
        self._reached: OrderedDict[IpAddress, float] = OrderedDict()

    def __repr__(self) -> str:
        return f"<Meetings reached={len(self._reached)}>"

    def has_reached(self, ip: IpAddress | None) -> bool:
        """Whether our own port sent something to this address lately, so that a NAT may let its answers in."""
        return ip is not None and self._reached.get(ip, -OPEN_S) > trio.current_time() - OPEN_S

    def expecting(self, address: Multiaddr) -> AbstractContextManager[object]:
        """Keep a connection from this address for `meet`: the peer may dial earlier than we do."""
        return self._transport.expecting(address)

    async def meet(
        self, peer_id: PeerId, address: Multiaddr, *, as_dialler: bool, within_s: float
    ) -> PeerConnection | None:
        """Dial a peer that dials us at this moment. Returns the connection that both sides have taken, or None.

        as_dialler: whether we count as the side that dialled; the peer must expect the opposite.
        """
        self._note(address.ip)
        channel = None
        with trio.move_on_after(within_s):
            try:
                channel = await self._transport.meet(address, self._nursery, as_server=not as_dialler)
            except PeerFault:
                return None
        if channel is None:
            return None
        met: list[PeerConnection] = []
        over = trio.Event()

        def arrived(connection: PeerConnection) -> None:
            met.append(connection)
            over.set()

        self._nursery.start_soon(self._run_to_end, channel, peer_id, arrived, as_dialler, over)
        await over.wait()
        return met[0] if met else None

    async def _run_to_end(
        self, channel: MessageChannel, peer_id: PeerId, arrived: Arrived, as_dialler: bool, over: trio.Event
    ) -> None:
        try:
            with self._containment.around("a punched connection", peer_id):
                await self._run(channel, peer_id, arrived, initiator=as_dialler)
        finally:
            over.set()

    @asynccontextmanager
    async def seen_by(self, address: Multiaddr) -> AsyncIterator[Multiaddr]:
        """Keep a second connection to the peer at `address`, and yield where the peer sees our own port.

        Raises ConnectFailed if it cannot be reached, or does not say.
        """
        self._note(address.ip)
        identity = Identity.generate()
        async with open_tasks() as tasks:
            with _as_failed():
                channel = await self._transport.dial_from_own_port(address, tasks)
            now = trio.current_time()
            core = ConnectionMachine(
                identity, initiator=True, now=now, expected=address.peer_id, swarm_key=self._swarm_key
            )
            connection = PeerConnection(
                core,
                channel,
                own=identity.peer_id,
                handlers={},
                containment=self._containment,
                rates=EntryRates(),
                on_lost=_tell_nobody,
            )
            tasks.start_soon(connection.run, self._introduce)
            try:
                with _as_failed():
                    hello = await connection.wait_hello()
                yield _seen_at(hello)
            finally:
                connection.close("measured", "it was opened to learn where the peer sees us")

    async def _introduce(self, connection: PeerConnection) -> None:
        await connection.agreement.proven.wait()
        if await agree(connection, _take):
            connection.agreement.settle()
            # The one who asks serves nothing, and cannot be dialled.
            ours = replace(self._introduction.hello_to(connection), protocols=(), addresses=(), roles=())
            connection.agreement.introduce(await exchange_hellos(connection, ours))

    def _note(self, ip: IpAddress | None) -> None:
        if ip is not None:
            self._reached[ip] = trio.current_time()
            self._reached.move_to_end(ip)
            if len(self._reached) > MAX_REMEMBERED:
                self._reached.popitem(last=False)


@contextmanager
def _as_failed() -> Iterator[None]:
    """Limit the block to SIGHT_S. Raises ConnectFailed if it takes longer, or for what the other side does."""
    try:
        with trio.fail_after(SIGHT_S):
            yield
    except trio.TooSlowError:
        raise ConnectFailed(f"no answer within {SIGHT_S:g} s") from None
    except PeerFault as error:
        raise ConnectFailed(str(error)) from error


def _seen_at(hello: Hello) -> Multiaddr:
    ip = hello.seen_at
    if ip is None or not hello.observed_port:
        raise ConnectFailed("the peer does not say where it sees us")
    return Multiaddr("ip4" if ip.version == 4 else "ip6", str(ip), hello.observed_port)


async def _take(_connection: PeerConnection) -> bool:
    await trio.lowlevel.checkpoint()
    return True


def _tell_nobody(_connection: PeerConnection) -> None:
    """Do nothing: observers of connections want to know about those between peers only."""
