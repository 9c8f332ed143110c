"""Decides which IP addresses may be dialled when another peer named them.

A public address may always be dialled. A loopback or private address may be dialled only if we have an address in the
same range ourselves, and if who names it is not on the public internet; otherwise strangers could aim us at our own
machine and network. A name alone decides nothing: the
transport looks it up, asks the policy about each address, and connects to one that is permitted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from peerd.protocol.addresses import IpAddress, Multiaddr, is_private_ip, private_range


@dataclass(frozen=True, slots=True)
class DialPolicy:
    """Permits private addresses in the ranges of `ours`, which is called each time. With None every address is
    permitted.
    """

    ours: Callable[[], Iterable[Multiaddr]] | None = None

    def permits(self, ip: IpAddress) -> bool:
        """Whether this address may be dialled."""
        if self.ours is None or not is_private_ip(ip):
            return True
        known = private_range(ip)
        return known is not None and any(one.ip is not None and private_range(one.ip) == known for one in self.ours())

    def named_from(self, ip: IpAddress | None) -> DialPolicy:
        """The policy for addresses that a peer at `ip` names: one on the public internet has none to name in our
        networks. None: a peer whose address is unknown.
        """
        return self if self.ours is None or ip is None or is_private_ip(ip) else DialPolicy(_nothing)

    def of(self, claimed: Iterable[Multiaddr]) -> tuple[Multiaddr, ...]:
        """The addresses without those that are certainly not permitted. For a name this is decided when it is
        dialled.
        """
        return tuple(one for one in claimed if one.ip is None or self.permits(one.ip))


def _nothing() -> Iterable[Multiaddr]:
    return ()


# For addresses that our own operator gave us.
ANYWHERE = DialPolicy()


@dataclass(frozen=True, slots=True)
class DialRules:
    """What one peer's connections may dial.

    own: which addresses for our own purposes. strangers: which ones if a stranger named them. trusted: addresses that
    our operator gave us, wherever they lead; their PeerIds do not matter.
    """

    own: DialPolicy = ANYWHERE
    strangers: DialPolicy = ANYWHERE
    trusted: tuple[Multiaddr, ...] = ()
