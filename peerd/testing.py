"""A network in memory: hosts, delays, slow lines, NATs, partitions and crashes, for tests of whole swarms.

Implements `Transport`, so that everything above it is the real thing. Under Trio's MockClock it is
deterministic and takes no time. The difficulty is to fail as a real network does: a partition says
nothing to anybody, a killed process's kernel answers at once, and a slow line makes the sender wait.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable
from ipaddress import IPv4Address, IPv6Address, ip_address

import trio

from peerd.protocol.addresses import Multiaddr
from peerd.protocol.errors import ConnectFailed, ConnectionLost
from peerd.transport import MessageChannel

# What a sender may have on its way: about a socket's two buffers.
_PIPE_BYTES = 256 * 1024
_FIRST_PORT = 49152

Handler = Callable[[MessageChannel], Awaitable[None]]


class MemoryNetwork:
    """Hosts by IP address, with `transport(host)` for each.

    latency_s: one way, between any two hosts that `set_latency` did not name.
    bytes_a_second: of each direction of each channel; None is as fast as its reader.
    """

    def __init__(self, *, latency_s: float = 0.0, bytes_a_second: float | None = None) -> None:
        self.latency_s = latency_s
        self.bytes_a_second = bytes_a_second
        self._latencies: dict[frozenset[str], float] = {}
        self._partitions: set[frozenset[str]] = set()
        self._channels: set[MemoryChannel] = set()
        self._listeners: dict[tuple[str, int], tuple[trio.Nursery, Handler]] = {}
        self._nats: dict[str, str] = {}
        self._forwards: dict[tuple[str, int], tuple[str, int]] = {}
        self._next_port = _FIRST_PORT

    def __repr__(self) -> str:
        return f"<MemoryNetwork channels={len(self._channels)} listeners={len(self._listeners)}>"

    def transport(self, host: str) -> MemoryTransport:
        """The transport of the host with this IP address."""
        return MemoryTransport(self, host)

    def set_latency(self, one: str, other: str, seconds: float) -> None:
        """One way, between two hosts, from the next message on."""
        self._latencies[frozenset((one, other))] = seconds

    def partition(self, one: str, other: str) -> None:
        """Let nothing through between two hosts, and tell neither."""
        self._partitions.add(frozenset((one, other)))

    def heal(self, one: str, other: str) -> None:
        """End a partition: what was sent meanwhile arrives, as TCP would send it again."""
        self._partitions.discard(frozenset((one, other)))
        for channel in self._channels:
            channel.wake()

    def disconnect(self, one: str, other: str) -> None:
        """Break all channels between two hosts; new ones can be made."""
        for channel in [c for c in self._channels if {c.host, c.remote_host} == {one, other}]:
            channel.break_off("reset by the network")

    def kill(self, host: str) -> None:
        """The process on this host dies: its channels break, nothing listens there any more."""
        for channel in [c for c in self._channels if host in (c.host, c.remote_host)]:
            channel.break_off(f"{host} was killed")
        for key in [key for key in self._listeners if key[0] == host]:
            del self._listeners[key]

    def put_behind_nat(self, host: str, outside: str) -> None:
        """From now on others see the host at `outside`; only hosts behind the same address can dial it."""
        self._nats[host] = outside

    def forward(self, outside: str, port: int, host: str) -> None:
        """Let what is dialled at a NAT's port through to the same port of a host behind it."""
        self._forwards[outside, port] = (host, port)

    def latency(self, one: str, other: str) -> float:
        """Seconds that a message takes one way."""
        return self._latencies.get(frozenset((one, other)), self.latency_s)

    def parted(self, one: str, other: str) -> bool:
        """Whether a partition lies between them."""
        return frozenset((one, other)) in self._partitions

    def bind(self, host: str, port: int, nursery: trio.Nursery, handler: Handler) -> int:
        """Listen; returns the port. Raises OSError for one that is taken."""
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

    def swallows(self, host: str, remote_host: str, port: int) -> bool:
        """Whether a NAT drops what is dialled there, without a word."""
        inside = self._nats.get(remote_host)
        if inside is not None and inside != self._nats.get(host):
            return True
        return remote_host in self._nats.values() and (remote_host, port) not in self._forwards

    def connect(self, host: str, remote_host: str, port: int) -> MemoryChannel:
        """A channel to whoever listens there. Raises ConnectFailed."""
        seen_at = self._nats.get(host, host)
        if self._nats.get(remote_host) == seen_at:
            seen_at = host
        dialled = ip_address(remote_host)
        remote_host, port = self._forwards.get((remote_host, port), (remote_host, port))
        if (remote_host, port) not in self._listeners:
            refusal = ConnectionRefusedError(f"{remote_host}:{port} refused the connection")
            raise ConnectFailed(str(refusal)) from refusal
        nursery, handler = self._listeners[remote_host, port]
        here, there = MemoryChannel(self, host, remote_host), MemoryChannel(self, remote_host, host)
        here.other, there.other = there, here
        here.remote_ip, there.remote_ip = dialled, ip_address(seen_at)
        self._channels |= {here, there}
        nursery.start_soon(_serve, handler, there)
        return here

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

    async def dial(self, address: Multiaddr, tasks: trio.Nursery | None = None) -> MemoryChannel:
        """Connect, one round trip later. Across a partition this never returns. Nothing runs in `tasks`."""
        await trio.sleep(2 * self._network.latency(self.host, address.host))
        if self._network.parted(self.host, address.host):
            await trio.sleep_forever()
        if self._network.swallows(self.host, address.host, address.port):
            await trio.sleep_forever()
        return self._network.connect(self.host, address.host, address.port)

    async def listen(self, address: Multiaddr, handler: Handler, *, task_status: trio.TaskStatus[Multiaddr]) -> None:
        """Listen on this host, whichever of its addresses is named. Raises OSError."""
        async with trio.open_nursery() as nursery:
            port = self._network.bind(self.host, address.port, nursery, handler)
            try:
                task_status.started(Multiaddr(address.kind, address.host, port, peer_id=address.peer_id))
                await trio.sleep_forever()
            finally:
                self._network.unbind(self.host, port, nursery)


class MemoryChannel:
    """One end of a channel. What it receives waits here, with the time of its arrival."""

    other: MemoryChannel

    def __init__(self, network: MemoryNetwork, host: str, remote_host: str) -> None:
        self._network = network
        self.host = host
        self.remote_host = remote_host
        self.remote_ip: IPv4Address | IPv6Address | None = ip_address(remote_host)
        self._inbox: deque[tuple[float, bytes]] = deque()
        self._inbox_bytes = 0
        self._moved = trio.lowlevel.ParkingLot()
        self._line_free_at = 0.0
        self._broken: str | None = None
        self._finished = False

    def __repr__(self) -> str:
        return f"<MemoryChannel {self.host} -> {self.remote_host} waiting={len(self._inbox)}>"

    async def send(self, message: bytes) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()
        while self._broken is None and self.other._broken is None and self.other._inbox_bytes > _PIPE_BYTES:
            await self.other._moved.park()
        self._raise_if_broken()
        self.other._raise_if_broken()
        left_at = trio.current_time()
        if self._network.bytes_a_second is not None:
            left_at = max(left_at, self._line_free_at) + len(message) / self._network.bytes_a_second
            self._line_free_at = left_at
        self.other._deliver(left_at + self._network.latency(self.host, self.remote_host), message)
        await trio.sleep_until(left_at)

    async def receive(self) -> bytes:
        await trio.lowlevel.checkpoint_if_cancelled()
        while True:
            arrives = self._next_arrival()
            if arrives <= trio.current_time():
                break
            with trio.move_on_at(arrives):
                await self._moved.park()
        _, message = self._inbox.popleft()
        self._inbox_bytes -= len(message)
        self._moved.unpark_all()
        await trio.lowlevel.cancel_shielded_checkpoint()
        return message

    async def aclose(self) -> None:
        if self._broken is None:
            self._broken = "closed"
            self.other._finished = True
            self.wake()
            self.other.wake()
        self._network.forget(self)
        await trio.lowlevel.checkpoint()

    def break_off(self, why: str) -> None:
        """End this side at once; what waits here is lost."""
        self._broken = self._broken or why
        self._network.forget(self)
        self.wake()

    def wake(self) -> None:
        """Look again: something about the channel has changed."""
        self._moved.unpark_all()

    def _deliver(self, arrives: float, message: bytes) -> None:
        if self._broken is None:
            self._inbox.append((arrives, message))
            self._inbox_bytes += len(message)
            self._moved.unpark_all()

    def _next_arrival(self) -> float:
        """When the next message may be taken. Raises ConnectionLost when none will come."""
        self._raise_if_broken()
        if self._network.parted(self.host, self.remote_host):
            return float("inf")
        if self._inbox:
            return self._inbox[0][0]
        if self._finished:
            raise ConnectionLost("the other side closed the channel")
        return float("inf")

    def _raise_if_broken(self) -> None:
        if self._broken is not None:
            raise ConnectionLost(f"the channel to {self.remote_host} ended: {self._broken}")
