"""Peers on a network in memory with NATs, whose addresses change."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace

import trio
import trio.lowlevel

from peerd.net.connections import PeerConnection
from peerd.net.dial_policy import ANYWHERE, DialPolicy
from peerd.net.transport import MessageChannel
from peerd.peer import Peer, open_peer
from peerd.protocol.addresses import Multiaddr
from peerd.protocol.connection.hello import Hello
from peerd.protocol.identity import Identity
from peerd.protocol.records.envelope import ServerRecord
from peerd.protocol.span import Span
from peerd.routing.reach.verdict import Reach
from peerd.testing.network import MemoryNetwork, MemoryTransport

EPOCH = 1_800_000_000.0

PORT = 31330

# Peers on the internet, each in a network of its own; a router, and two machines behind it.
PUBLIC = ("5.1.1.1", "5.2.2.2", "5.3.3.3", "5.4.4.4", "5.5.5.5")

ROUTER = "6.6.6.6"

# The first of them.
NAME = "peer.example.org"

HOME, NEIGHBOUR = "192.168.1.2", "192.168.1.3"


@dataclass
class NotingTransport:
    """Notes which peer dials which address."""

    transport: MemoryTransport
    dialled: list[tuple[str, str]]

    async def dial(self, address: Multiaddr, tasks: trio.Nursery, policy: DialPolicy = ANYWHERE) -> MessageChannel:
        if policy.of([address]):
            self.dialled.append((self.transport.host, f"{address.host}:{address.port}"))
        if address.host == NAME:
            address = replace(address, kind="ip4", host=PUBLIC[0])
        return await self.transport.dial(address, tasks, policy)

    async def dial_from_own_port(self, address: Multiaddr, tasks: trio.Nursery) -> MessageChannel:
        return await self.transport.dial_from_own_port(address, tasks)

    def expecting(self, address: Multiaddr) -> AbstractContextManager[object]:
        return self.transport.expecting(address)

    async def meet(self, address: Multiaddr, tasks: trio.Nursery, *, as_server: bool) -> MessageChannel:
        return await self.transport.meet(address, tasks, as_server=as_server)

    async def listen(
        self,
        address: Multiaddr,
        handler: Callable[[MessageChannel], object],
        *,
        task_status: trio.TaskStatus[Multiaddr],
    ) -> None:
        await self.transport.listen(address, handler, task_status=task_status)  # type: ignore[arg-type]


@dataclass
class World:
    """Opens peers; all join through those in `bootstrap`."""

    stack: AsyncExitStack
    network: MemoryNetwork = field(default_factory=lambda: MemoryNetwork(latency_s=0.01))
    bootstrap: tuple[Multiaddr, ...] = ()
    dialled: list[tuple[str, str]] = field(default_factory=list)
    ahead_s: float = 0.0

    def transport(self, host: str) -> NotingTransport:
        return NotingTransport(self.network.transport(host), self.dialled)

    async def open(self, host: str, *, listen: Sequence[str] | None = None, **options: object) -> Peer:
        at = [f"/ip4/{host}/tcp/{PORT}/ws"] if listen is None else listen
        opening = open_peer(
            Identity.from_seed(host.encode().ljust(32)),
            listen=at,
            bootstrap=self.bootstrap,
            transport=self.transport(host),
            now=lambda: EPOCH + trio.current_time() + self.ahead_s,
            **options,  # type: ignore[arg-type]
        )
        return await self.stack.enter_async_context(opening)

    async def internet(self, count: int) -> list[Peer]:
        """Public peers, which join through the first."""
        peers = [await self.open(PUBLIC[0])]
        self.bootstrap = peers[0].addresses
        peers += [await self.open(host) for host in PUBLIC[1:count]]
        self.bootstrap = tuple(address for peer in peers for address in peer.addresses)
        return peers

    async def at_home(self, host: str = HOME, **options: object) -> Peer:
        self.network.put_behind_nat(host, ROUTER)
        return await self.open(host, **options)  # type: ignore[arg-type]


@asynccontextmanager
async def world() -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        yield World(stack)


async def until(condition: Callable[[], object], within_s: float = 300) -> None:
    with trio.fail_after(within_s):
        while not condition():
            await trio.sleep(0.1)


def reach(peer: Peer, expected: Reach) -> Callable[[], bool]:
    return lambda: peer.reachability.reach is expected


def hosts(addresses: Sequence[Multiaddr]) -> list[str]:
    return [address.host for address in addresses]


def server_record() -> ServerRecord:
    return ServerRecord(
        seq=0,
        expires=0.0,
        model=bytes(32),
        span=Span(0, 4),
        state="online",
        dtype="float32",
        quantization="none",
        codecs=("exact",),
        throughput=1.0,
        free_tokens=1,
        max_length=1,
    )


def hello_with(say: Callable[[PeerConnection], Hello], observed_ip: str, connection: PeerConnection) -> Hello:
    return replace(say(connection), observed_ip=observed_ip)
