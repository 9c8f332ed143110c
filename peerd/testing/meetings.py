"""Hosts of a network in memory that dial each other at the same moment, through the NATs in front of them.

As in TCP (RFC 9293, 3.5), they have met as soon as the first packet of one arrives at the other while that one tries
too. A first packet that no answer follows is repeated.
"""

from __future__ import annotations

from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Generic, Protocol, TypeVar

import trio

from peerd.testing.nats import Endpoint, Nats

# RFC 6298: when TCP repeats the first packet of a connection; each later pause is twice as long.
_FIRST_SYN_S = 1.0


class _Channel(Protocol):
    remote_ip: IPv4Address | IPv6Address | None
    remote_port: int


Channel = TypeVar("Channel", bound=_Channel)


class Meetings(Generic[Channel]):
    """The dials that wait for one in the opposite direction. join: makes both ends of a channel between two hosts."""

    def __init__(
        self,
        nats: Nats,
        latency: Callable[[str, str], float],
        join: Callable[[str, str], tuple[Channel, Channel]],
        dialled: list[tuple[str, str]],
    ) -> None:
        self._nats = nats
        self._latency = latency
        self._join = join
        self._dialled = dialled
        self._waiting: list[_Dial[Channel]] = []

    def __repr__(self) -> str:
        return f"<Meetings {self._waiting}>"

    def __len__(self) -> int:
        return len(self._waiting)

    async def dial(self, own: Endpoint, remote: Endpoint) -> Channel:
        """Dial until the other side dials too, and one side's packets get through."""
        dial: _Dial[Channel] = _Dial(own, remote)
        self._waiting.append(dial)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._repeat, dial)
                await dial.met.wait()
                nursery.cancel_scope.cancel()
        finally:
            self._waiting.remove(dial)
        assert dial.channel is not None
        return dial.channel

    async def _repeat(self, dial: _Dial[Channel]) -> None:
        pause_s = _FIRST_SYN_S
        while True:
            self._dialled.append((dial.own[0], dial.remote[0]))
            seen_at = self._nats.outside(dial.own, dial.remote)
            with trio.move_on_after(pause_s):
                await trio.sleep(self._latency(dial.own[0], dial.remote[0]))
                self._arrive(dial, seen_at)
                await trio.sleep_forever()
            pause_s *= 2

    def _arrive(self, dial: _Dial[Channel], seen_at: Endpoint) -> None:
        """Let a first packet arrive where a NAT lets it in."""
        there = self._nats.inside(dial.remote, seen_at)
        for other in self._waiting:
            if other.own == there and other.remote == seen_at and not dial.met.is_set():
                for one, end in zip((dial, other), self._join(dial.own[0], other.own[0]), strict=True):
                    end.remote_ip, end.remote_port = ip_address(one.remote[0]), one.remote[1]
                    one.channel = end
                    one.met.set()


class _Dial(Generic[Channel]):
    """A dial from a host's port to where it sees the other side."""

    def __init__(self, own: Endpoint, remote: Endpoint) -> None:
        self.own = own
        self.remote = remote
        self.met = trio.Event()
        self.channel: Channel | None = None

    def __repr__(self) -> str:
        return f"<dial {self.own} -> {self.remote}>"
