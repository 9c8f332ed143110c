"""How many peers may come to us, and how many strangers may stand at the door: those that have not proved who they are.

Every connection takes a file descriptor. A process that has none left cannot read a checkpoint, write its state or
dial, so peers get only what the process's limit (`ulimit -n`) leaves beside a reserve.

The gate counts strangers in all and by public address; a private one may be a proxy in front of everybody, so those
count in all only. Whoever is proven has left the door.
"""

from __future__ import annotations

import resource
import sys
from collections import Counter
from dataclasses import dataclass
from ipaddress import IPv6Address, IPv6Network
from typing import Final

from peerd.protocol.addresses import IpAddress, is_private_ip

# Beyond so many peers nobody else may dial us: each costs a few tasks and up to 80 MiB if it tries hard.
MAX_CONNECTIONS: Final = 1024
# Strangers at the door, who have not proved who they are.
MAX_UNPROVEN: Final = 64
# For files, dials, the local API, worker threads and the event loop. A daemon that serves a model and is idle has 40.
RESERVED: Final = 128
MAX_UNPROVEN_AN_ADDRESS = 8
# One host has a whole /64 of IPv6 addresses to come from.
_HOST_PREFIX = 64


@dataclass(frozen=True, slots=True)
class Places:
    """How many peers may be connected, and how many more may be at the door."""

    settled: int
    unproven: int


def places(limit: int) -> Places:
    """What a process that may have `limit` descriptors can give to peers: at least one place of each kind."""
    free = limit - min(RESERVED, limit // 2)
    unproven = max(1, min(MAX_UNPROVEN, free // 4))
    return Places(settled=max(1, min(MAX_CONNECTIONS, free - unproven)), unproven=unproven)


def descriptor_limit() -> int:
    """How many descriptors this process may have now."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft


class Gate:
    """The connections at the door. `enter` and `leave` once each."""

    def __init__(self, max_unproven: int = MAX_UNPROVEN, max_an_address: int = MAX_UNPROVEN_AN_ADDRESS) -> None:
        self._max_unproven = max_unproven
        self._max_an_address = max_an_address
        self._unproven = 0
        self._by_host: Counter[str] = Counter()

    def __repr__(self) -> str:
        return f"<Gate unproven={self._unproven}>"

    def has_room(self, ip: IpAddress | None) -> bool:
        """Whether one more may come in from there."""
        host = host_of(ip)
        return self._unproven < self._max_unproven and not (host and self._by_host[host] >= self._max_an_address)

    def enter(self, ip: IpAddress | None) -> bool:
        """Whether one more may come in from there; if so it is counted."""
        host = host_of(ip)
        if not self.has_room(ip):
            return False
        self._unproven += 1
        if host:
            self._by_host[host] += 1
        return True

    def leave(self, ip: IpAddress | None) -> None:
        """One that entered is proven, or gone."""
        self._unproven -= 1
        if host := host_of(ip):
            self._by_host[host] -= 1
            # Or every address that ever came would stay here.
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
