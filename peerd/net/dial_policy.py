"""Which IP addresses may be dialled on another peer's word.

A public address may always be dialled. A loopback or private one may be dialled only where we live in that very range
ourselves, or strangers could aim us at our own machine and network. Names say nothing: the transport looks them up,
asks the policy about each address, and connects to one that was permitted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from peerd.protocol.addresses import IpAddress, Multiaddr, is_private_ip, private_range


@dataclass(frozen=True, slots=True)
class DialPolicy:
    """Permits private addresses in the ranges of `ours`, which is asked each time; None permits every address."""

    ours: Callable[[], Iterable[Multiaddr]] | None = None

    def permits(self, ip: IpAddress) -> bool:
        """Whether this address may be dialled."""
        if self.ours is None or not is_private_ip(ip):
            return True
        known = private_range(ip)
        return known is not None and any(one.ip is not None and private_range(one.ip) == known for one in self.ours())

    def of(self, claimed: Iterable[Multiaddr]) -> tuple[Multiaddr, ...]:
        """The addresses without those that are surely not permitted. Where a name leads is seen when it is dialled."""
        return tuple(one for one in claimed if one.ip is None or self.permits(one.ip))


# For addresses that our own operator gave us.
ANYWHERE = DialPolicy()
