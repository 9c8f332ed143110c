"""Limits how many peers may be connected, and how many incoming connections may be unproven.

Every connection takes a file descriptor. A process without free descriptors cannot read a checkpoint, write its state
or dial. So peers get only what the process's limit (`ulimit -n`) leaves beside a reserve.

A connection is unproven until its peer has proved its identity. The gate counts these in total, by public address and
by public network. Private addresses count in the total only, because one may be a proxy in front of all peers.
"""

from __future__ import annotations

import resource
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv6Address, IPv6Network
from typing import Final

from peerd.net.limits.owners import network_of
from peerd.protocol.addresses import IpAddress, is_private_ip

# With this many connections no other peer may dial us: each costs a few tasks, and up to 80 MiB under attack.
MAX_CONNECTIONS: Final = 1024
# Connections to a socket of the local API, which answers 128 requests at a time.
MAX_LOCAL: Final = 512
# Incoming connections whose peers have not proved their identity.
MAX_UNPROVEN: Final = 64
# For files, dials, the local API, worker threads and the event loop. A bootstrap peer that is idle has 12.
RESERVED: Final = 128
MAX_UNPROVEN_AN_ADDRESS = 8
# A rented machine often has 256 networks of the size /64: of a /24 or an IPv6 /48, a quarter of all places.
MAX_UNPROVEN_A_NETWORK = 16
# One host has a whole /64 of IPv6 addresses.
_HOST_PREFIX = 64


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """How many peers may be connected, and how many more connections may be unproven."""

    settled: int
    unproven: int


def connection_limits(limit: int) -> ConnectionLimits:
    """How many connections a process with `limit` descriptors can have: at least one of each kind."""
    free = limit - min(RESERVED, limit // 2)
    unproven = max(1, min(MAX_UNPROVEN, free // 4))
    return ConnectionLimits(settled=max(1, min(MAX_CONNECTIONS, free - unproven)), unproven=unproven)


def local_connections(limit: int) -> int:
    """How many connections each of the local API's two sockets can have: half of the reserve is for files and dials."""
    reserved, peers = min(RESERVED, limit // 2), connection_limits(limit)
    return max(1, min(MAX_LOCAL, (limit - peers.settled - peers.unproven - reserved // 2) // 2))


def descriptor_limit() -> int:
    """This process's current limit of descriptors."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft


class Gate:
    """The unproven incoming connections. `enter` lets one in; its visit must `leave`.

    If all places are taken, a newcomer from a network that has fewer of them replaces the oldest visit from the network
    that has most. An honest peer proves itself within some round trips, so the oldest one is hardly ever honest.
    """

    def __init__(
        self,
        max_unproven: int = MAX_UNPROVEN,
        max_an_address: int = MAX_UNPROVEN_AN_ADDRESS,
        max_a_network: int = MAX_UNPROVEN_A_NETWORK,
    ) -> None:
        self._max_unproven = max_unproven
        self._max_an_address = max_an_address
        self._max_a_network = max_a_network
        # Oldest first.
        self._visits: dict[Visit, None] = {}
        self._by_host: Counter[str] = Counter()
        self._by_network: Counter[str] = Counter()

    def __repr__(self) -> str:
        return f"<Gate unproven={len(self._visits)}>"

    def has_room(self, ip: IpAddress | None) -> bool:
        """Whether one more connection may come from this address."""
        host, network = host_of(ip), network_of(ip)
        if host and self._by_host[host] >= self._max_an_address:
            return False
        if network and self._by_network[network] >= self._max_a_network:
            return False
        return len(self._visits) < self._max_unproven or self._replaceable(network) is not None

    def enter(self, ip: IpAddress | None, on_replaced: Callable[[], None]) -> Visit | None:
        """Count one more connection from this address; None if there is no room for it.

        on_replaced: called when the visit has lost its place to another one.
        """
        if not self.has_room(ip):
            return None
        if len(self._visits) >= self._max_unproven and (oldest := self._replaceable(network_of(ip))) is not None:
            oldest.leave()
            oldest.on_replaced()
        visit = Visit(self, host_of(ip), network_of(ip), on_replaced)
        self._visits[visit] = None
        self._count(visit, 1)
        return visit

    def forget(self, visit: Visit) -> None:
        """Stop counting a visit, if it is still counted."""
        if visit in self._visits:
            del self._visits[visit]
            self._count(visit, -1)

    def _replaceable(self, network: str) -> Visit | None:
        """The visit that a newcomer from this network replaces; None if no network has two places more than it has."""
        crowded, places = max(self._by_network.items(), key=lambda item: item[1], default=("", 0))
        if places < self._by_network[network] + 2:
            return None
        return next(visit for visit in self._visits if visit.network == crowded)

    def _count(self, visit: Visit, change: int) -> None:
        # At 0 a name is deleted: otherwise every address that ever came would stay here.
        for counter, name in ((self._by_host, visit.host), (self._by_network, visit.network)):
            counter[name] += change
            if not counter[name]:
                del counter[name]


class Visit:
    """One connection that has entered: `leave` when it is proven or gone. Repeating it changes nothing."""

    def __init__(self, gate: Gate, host: str, network: str, on_replaced: Callable[[], None]) -> None:
        self.host = host
        self.network = network
        self.on_replaced = on_replaced
        self._gate = gate

    def leave(self) -> None:
        """Make room for another."""
        self._gate.forget(self)


def host_of(ip: IpAddress | None) -> str:
    """What counts as one host of the public internet; "" for a private or unknown address."""
    if ip is None or is_private_ip(ip):
        return ""
    if isinstance(ip, IPv6Address):
        return str(IPv6Network((ip, _HOST_PREFIX), strict=False))
    return str(ip)
