"""A network in memory: hosts, delays, slow lines, NATs, partitions and crashes, for tests of whole swarms.

It implements `Transport`, so all code above it is the real code. Under Trio's MockClock it is deterministic and takes
no time. `MemoryNetwork` holds how things stand between the hosts; a `MemoryChannel` carries messages accordingly. It
fails as a real network does: a partition gives no sign to either side, the kernel of a killed process answers at once,
the kernel of a stopped process acknowledges what the process cannot read, and a slow line makes the sender wait.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager, nullcontext
from ipaddress import ip_address

import trio

from peerd.net.dial_policy import ANYWHERE, DialPolicy
from peerd.net.transport import MessageChannel
from peerd.protocol.addresses import Multiaddr
from peerd.protocol.errors import ConnectFailed
from peerd.testing.meetings import Meetings
from peerd.testing.memory_channel import MemoryChannel
from peerd.testing.nats import NatKind, Nats

_FIRST_PORT = 49152

Handler = Callable[[MessageChannel], Awaitable[None]]


class MemoryNetwork:
    """Hosts by IP address, with `transport(host)` for each.

    latency_s: one way, between any two hosts that `set_latency` did not name.
    bytes_a_second: for each direction of each channel; None is as fast as the reader.
    """

    def __init__(self, *, latency_s: float = 0.0, bytes_a_second: float | None = None) -> None:
        self.latency_s = latency_s
        self.bytes_a_second = bytes_a_second
        #: The IP addresses of names.
        self.names: dict[str, str] = {}
        #: Every permitted dial, in order: from which host to which.
        self.dialled: list[tuple[str, str]] = []
        self._latencies: dict[frozenset[str], float] = {}
        # Pairs (from, to): messages in this direction are lost.
        self._holes: set[tuple[str, str]] = set()
        self._stopped: set[str] = set()
        self._channels: set[MemoryChannel] = set()
        self._listeners: dict[tuple[str, int], tuple[trio.Nursery, Handler]] = {}
        self._next_port = _FIRST_PORT
        #: The NATs in front of hosts.
        self.nats = Nats()
        #: Hosts that dial each other now.
        self.meetings = Meetings(self.nats, self.latency, self._pipe, self.dialled)

    def __repr__(self) -> str:
        return f"<MemoryNetwork channels={len(self._channels)} listeners={len(self._listeners)}>"

    def transport(self, host: str) -> MemoryTransport:
        """The transport of the host with this IP address."""
        return MemoryTransport(self, host)

    def set_latency(self, one: str, other: str, seconds: float) -> None:
        """Set the one-way latency between two hosts, from the next message on."""
        self._latencies[frozenset((one, other))] = seconds

    def partition(self, one: str, other: str) -> None:
        """Drop everything between two hosts, without a sign to either."""
        self.lose(one, other)
        self.lose(other, one)

    def lose(self, sender: str, receiver: str) -> None:
        """Drop everything in this direction; the other direction stays open."""
        for channel in self._channels:
            channel.delivery()
        self._holes.add((sender, receiver))

    def heal(self, one: str, other: str) -> None:
        """End a partition. Messages sent meanwhile arrive, as TCP would retransmit them."""
        self._holes -= {(one, other), (other, one)}
        self._wake_all()

    def stop(self, host: str) -> None:
        """Make the process on this host hang: it neither reads nor writes, while its kernel goes on acknowledging."""
        self._stopped.add(host)

    def resume(self, host: str) -> None:
        """Let a process that hung go on."""
        self._stopped.discard(host)
        self._wake_all()

    def give_up(self, host: str) -> None:
        """End all other hosts' connections to this host, which notices only when it sends something."""
        for channel in [c for c in self._channels if c.remote_host == host]:
            channel.break_off(f"{host} was given up")

    def _wake_all(self) -> None:
        for channel in self._channels:
            channel.wake()

    def disconnect(self, one: str, other: str) -> None:
        """Break all channels between two hosts; new ones can be opened."""
        for channel in [c for c in self._channels if {c.host, c.remote_host} == {one, other}]:
            channel.break_off("reset by the network")

    def kill(self, host: str) -> None:
        """Kill the process on this host: its channels break, and its listeners end."""
        for channel in [c for c in self._channels if host in (c.host, c.remote_host)]:
            channel.break_off(f"{host} was killed")
        for key in [key for key in self._listeners if key[0] == host]:
            del self._listeners[key]

    def put_behind_nat(self, host: str, outside: str, kind: NatKind = "port_preserving") -> None:
        """From now on others see the host at `outside`; only hosts behind the same address can dial it."""
        self.nats.put(host, outside, kind)

    def forward(self, outside: str, port: int, host: str) -> None:
        """Forward dials to a NAT's port to the same port of a host behind it."""
        self.nats.forward(outside, port, host)

    def latency(self, one: str, other: str) -> float:
        """The seconds that a message takes one way."""
        return self._latencies.get(frozenset((one, other)), self.latency_s)

    def loses(self, sender: str, receiver: str) -> bool:
        """Whether messages in this direction are lost."""
        return (sender, receiver) in self._holes

    def parted(self, one: str, other: str) -> bool:
        """Whether an exchange between them is impossible, because one direction is cut."""
        return self.loses(one, other) or self.loses(other, one)

    def is_stopped(self, host: str) -> bool:
        """Whether the process on this host hangs."""
        return host in self._stopped

    def bind(self, host: str, port: int, nursery: trio.Nursery, handler: Handler) -> int:
        """Listen; returns the port. Raises OSError if the port is taken."""
        if not port:
            port, self._next_port = self._next_port, self._next_port + 1
        if (host, port) in self._listeners:
            raise OSError(f"{host}:{port} is in use")
        self._listeners[host, port] = (nursery, handler)
        return port

    def unbind(self, host: str, port: int, nursery: trio.Nursery) -> None:
        """Stop listening, unless a later listener has the port by now."""
        if self._listeners.get((host, port), (None,))[0] is nursery:
            del self._listeners[host, port]

    def connect(self, host: str, remote_host: str, port: int, own_port: int | None = None) -> MemoryChannel:
        """A channel to the host that listens there. Raises ConnectFailed. own_port: from which port; None: any."""
        if own_port is None:
            own_port, self._next_port = self._next_port, self._next_port + 1
        dialled, dialled_port = ip_address(remote_host), port
        seen_at, seen_port = self.nats.outside((host, own_port), (remote_host, port))
        remote_host, port = self.nats.forwarded(remote_host, port)
        if (remote_host, port) not in self._listeners:
            refusal = ConnectionRefusedError(f"{remote_host}:{port} refused the connection")
            raise ConnectFailed(str(refusal)) from refusal
        nursery, handler = self._listeners[remote_host, port]
        here, there = self._pipe(host, remote_host)
        here.remote_ip, here.remote_port = dialled, dialled_port
        there.remote_ip, there.remote_port = ip_address(seen_at), seen_port
        nursery.start_soon(_serve, handler, there)
        return here

    def _pipe(self, one: str, other: str) -> tuple[MemoryChannel, MemoryChannel]:
        here, there = MemoryChannel(self, one, other), MemoryChannel(self, other, one)
        here.other, there.other = there, here
        self._channels |= {here, there}
        return here, there

    def port_of(self, host: str) -> int:
        """The port on which a host listens, or else a free one."""
        for name, port in self._listeners:
            if name == host:
                return port
        self._next_port += 1
        return self._next_port - 1

    def forget(self, channel: MemoryChannel) -> None:
        self._channels.discard(channel)


async def _serve(handler: Handler, channel: MemoryChannel) -> None:
    try:
        await handler(channel)
    finally:
        await channel.aclose()


class MemoryTransport:
    """A Transport between the hosts of one MemoryNetwork."""

    def __init__(self, network: MemoryNetwork, host: str) -> None:
        self._network = network
        self.host = host
        # The port from which it dials peers that are to see where it is.
        self._own_port = 0

    async def dial(
        self, address: Multiaddr, tasks: trio.Nursery | None = None, policy: DialPolicy = ANYWHERE
    ) -> MemoryChannel:
        """Connect, one round trip later. Across a partition this never returns. Nothing runs in `tasks`."""
        remote = address.host if address.ip is not None else self._network.names.get(address.host)
        if remote is None:
            raise ConnectFailed(f"there is no name {address.host}")
        if not policy.permits(ip_address(remote)):
            raise ConnectFailed(f"{address.host} leads into a private network that is not ours")
        return await self._dial(remote, address.port)

    async def dial_from_own_port(self, address: Multiaddr, tasks: trio.Nursery | None = None) -> MemoryChannel:
        """As `dial`, from the port on which this host listens first, or else from one that stays the same."""
        return await self._dial(address.host, address.port, self._port())

    def expecting(self, address: Multiaddr) -> AbstractContextManager[None]:
        """Do nothing: hosts here meet only while both dial."""
        return nullcontext()

    async def meet(
        self, address: Multiaddr, tasks: trio.Nursery | None = None, *, as_server: bool = False
    ) -> MemoryChannel:
        """Dial a host that dials us. The two sides of a channel in memory are alike."""
        return await self._network.meetings.dial((self.host, self._port()), (address.host, address.port))

    def _port(self) -> int:
        self._own_port = self._own_port or self._network.port_of(self.host)
        return self._own_port

    async def _dial(self, remote: str, port: int, own_port: int | None = None) -> MemoryChannel:
        self._network.dialled.append((self.host, remote))
        await trio.sleep(2 * self._network.latency(self.host, remote))
        if self._network.parted(self.host, remote):
            await trio.sleep_forever()
        if self._network.nats.swallow(self.host, remote, port):
            await trio.sleep_forever()
        return self._network.connect(self.host, remote, port, own_port)

    async def listen(self, address: Multiaddr, handler: Handler, *, task_status: trio.TaskStatus[Multiaddr]) -> None:
        """Listen on this host, whichever of its addresses is given. Raises OSError."""
        async with trio.open_nursery() as nursery:
            port = self._network.bind(self.host, address.port, nursery, handler)
            try:
                task_status.started(Multiaddr(address.kind, address.host, port, peer_id=address.peer_id))
                await trio.sleep_forever()
            finally:
                self._network.unbind(self.host, port, nursery)
