"""Limits how many peers may be connected, and how many incoming connections may be unproven.

Every connection takes a file descriptor. A process without free descriptors cannot read a checkpoint, write its state
or dial. So peers get only what the process's limit (`ulimit -n`) leaves beside a reserve.

A connection is unproven until its peer has proved its identity. The gate counts these in total and by public address.
Private addresses count in the total only, because one may be a proxy in front of all peers.
"""

from __future__ import annotations

import resource
import sys
from collections import Counter
from dataclasses import dataclass
from ipaddress import IPv6Address, IPv6Network
from typing import Final

from peerd.protocol.addresses import IpAddress, is_private_ip

# With this many connections no other peer may dial us: each costs a few tasks, and up to 80 MiB under attack.
MAX_CONNECTIONS: Final = 1024
# Incoming connections whose peers have not proved their identity.
MAX_UNPROVEN: Final = 64
# For files, dials, the local API, worker threads and the event loop. A bootstrap peer that is idle has 12.
RESERVED: Final = 128
MAX_UNPROVEN_AN_ADDRESS = 8
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


def descriptor_limit() -> int:
    """This process's current limit of descriptors."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft


class Gate:
    """The unproven incoming connections. Call `enter` and `leave` once for each."""

    def __init__(self, max_unproven: int = MAX_UNPROVEN, max_an_address: int = MAX_UNPROVEN_AN_ADDRESS) -> None:
        self._max_unproven = max_unproven
        self._max_an_address = max_an_address
        self._unproven = 0
        self._by_host: Counter[str] = Counter()

    def __repr__(self) -> str:
        return f"<Gate unproven={self._unproven}>"

    def has_room(self, ip: IpAddress | None) -> bool:
        """Whether one more connection may come from this address."""
        host = host_of(ip)
        return self._unproven < self._max_unproven and not (host and self._by_host[host] >= self._max_an_address)

    def enter(self, ip: IpAddress | None) -> bool:
        """Whether one more connection may come from this address; if so, it is counted."""
        host = host_of(ip)
        if not self.has_room(ip):
            return False
        self._unproven += 1
        if host:
            self._by_host[host] += 1
        return True

    def leave(self, ip: IpAddress | None) -> None:
        """Stop counting a connection that is proven or gone."""
        self._unproven -= 1
        if host := host_of(ip):
            self._by_host[host] -= 1
            # Without this, every address that ever came would stay here.
            if not self._by_host[host]:
                del self._by_host[host]


class Visit:
    """One connection that has entered: `leave` when it is proven or gone. Repeating it changes nothing."""

    def __init__(self, gate: Gate, ip: IpAddress | None) -> None:
        self._gate = gate
        self._ip = ip
        self._has_left = False

    def leave(self) -> None:
        """Make room for another."""
        if not self._has_left:
            self._has_left = True
            self._gate.leave(self._ip)


def host_of(ip: IpAddress | None) -> str:
    """What counts as one host of the public internet; "" for a private or unknown address."""
    if ip is None or is_private_ip(ip):
        return ""
    if isinstance(ip, IPv6Address):
        return str(IPv6Network((ip, _HOST_PREFIX), strict=False))
    return str(ip)
