"""A channel between two hosts in memory: what was sent arrives when the network between them lets it."""

from __future__ import annotations

import math
from collections import deque
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Protocol

import trio

from peerd.protocol.connection.liveness import Delivery
from peerd.protocol.errors import ConnectionLost

# How much a sender may have on its way: about a socket's two buffers.
_PIPE_BYTES = 256 * 1024
# RFC 6298 as in Linux: the time to the first retransmission; each later one waits twice as long.
_FIRST_REPETITION_S = 0.2


class Network(Protocol):
    """How things stand between two hosts at the moment."""

    @property
    def bytes_a_second(self) -> float | None: ...

    def latency(self, one: str, other: str) -> float:
        """The seconds that a message takes one way."""

    def loses(self, sender: str, receiver: str) -> bool:
        """Whether messages in this direction are lost."""

    def parted(self, one: str, other: str) -> bool:
        """Whether an exchange between them is impossible, because one direction is cut."""

    def is_stopped(self, host: str) -> bool:
        """Whether the process on this host hangs."""

    def forget(self, channel: MemoryChannel) -> None:
        """Note that a channel has ended."""


class MemoryChannel:
    """One end of a channel. Received messages wait here, with the times of their arrival."""

    other: MemoryChannel

    def __init__(self, network: Network, host: str, remote_host: str) -> None:
        self._network = network
        self.host = host
        self.remote_host = remote_host
        self.remote_ip: IPv4Address | IPv6Address | None = ip_address(remote_host)
        self.remote_port = 0
        self._inbox: deque[tuple[float, bytes]] = deque()
        self._inbox_bytes = 0
        self._moved = trio.lowlevel.ParkingLot()
        self._line_free_at = 0.0
        # What the other side's kernel has not acknowledged: (sent, arrives, bytes).
        self._unacknowledged: deque[tuple[float, float, int]] = deque()
        self._acknowledged_bytes = 0
        self._broken: str | None = None
        self._finished = False

    def __repr__(self) -> str:
        return f"<MemoryChannel {self.host} -> {self.remote_host} waiting={len(self._inbox)}>"

    async def send(self, message: bytes) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()
        while self._must_wait():
            await self.other._moved.park()
        self._raise_if_broken()
        self.other._raise_if_broken()
        left_at = trio.current_time()
        if self._network.bytes_a_second is not None:
            left_at = max(left_at, self._line_free_at) + len(message) / self._network.bytes_a_second
            self._line_free_at = left_at
        self.delivery()
        arrives = left_at + self._network.latency(self.host, self.remote_host)
        self.other._deliver(arrives, message)
        self._unacknowledged.append((trio.current_time(), arrives, len(message)))
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

    def delivery(self) -> Delivery | None:
        """The counts that a system's TCP would give."""
        now = trio.current_time()
        latency_s = self._network.latency(self.host, self.remote_host)
        if not self._network.parted(self.host, self.remote_host):
            while self._unacknowledged and self._unacknowledged[0][1] + latency_s <= now:
                self._acknowledged_bytes += self._unacknowledged.popleft()[2]
        if not self._unacknowledged:
            return Delivery(self._acknowledged_bytes, 0)
        sent, arrives, _ = self._unacknowledged[0]
        waited_s = now - max(sent, arrives - latency_s)
        unanswered = math.log2(1 + max(0.0, waited_s) / (_FIRST_REPETITION_S + 2 * latency_s))
        return Delivery(self._acknowledged_bytes, int(unanswered))

    async def aclose(self) -> None:
        if self._broken is None:
            self._broken = "closed"
            self.other._finished = True
            self.wake()
            self.other.wake()
        self._network.forget(self)
        await trio.lowlevel.checkpoint()

    def break_off(self, why: str) -> None:
        """End this side at once; received messages that wait here are lost."""
        self._broken = self._broken or why
        self._network.forget(self)
        self.wake()

    def wake(self) -> None:
        """Look again, because something about the channel has changed."""
        self._moved.unpark_all()

    def _must_wait(self) -> bool:
        """Whether the pipe is full, or our process hangs."""
        if self._broken is not None or self.other._broken is not None:
            return False
        return self.other._inbox_bytes > _PIPE_BYTES or self._network.is_stopped(self.host)

    def _deliver(self, arrives: float, message: bytes) -> None:
        if self._broken is None:
            self._inbox.append((arrives, message))
            self._inbox_bytes += len(message)
            self._moved.unpark_all()

    def _next_arrival(self) -> float:
        """When the next message may be taken. Raises ConnectionLost if none will come."""
        self._raise_if_broken()
        if self._network.loses(self.remote_host, self.host) or self._network.is_stopped(self.host):
            return float("inf")
        if self._inbox:
            return self._inbox[0][0]
        if self._finished and not self._network.is_stopped(self.remote_host):
            raise ConnectionLost("the other side closed the channel")
        return float("inf")

    def _raise_if_broken(self) -> None:
        if self._broken is not None:
            raise ConnectionLost(f"the channel to {self.remote_host} ended: {self._broken}")
