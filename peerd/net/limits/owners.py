"""Attributes usage to an owner: a PeerId, and the public network from which it comes.

Keys cost nothing and addresses do, so every quota holds for a PeerId and also for its /24 (IPv6: /48). Peers on
loopback, in private ranges or at unknown addresses are counted by PeerId only: one machine may run dozens of peers, and
a proxy may stand in front of all of them. A peer that comes through a relay counts in the relay's network.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from peerd.protocol.addresses import IpAddress, public_network
from peerd.protocol.identity import PeerId


@dataclass(frozen=True, slots=True)
class Owner:
    """A peer and its network; `network` is "" if no network is counted.

    weight: how much of a device it gets, for what it gave us; 1 for a stranger.
    """

    peer_id: PeerId
    network: str = ""
    weight: float = field(default=1.0, compare=False)

    @classmethod
    def at(cls, peer_id: PeerId, ip: IpAddress | None, weight: float = 1.0) -> Owner:
        """The owner of what a peer does that we see at `ip`."""
        return cls(peer_id, network_of(ip), weight)

    @property
    def share(self) -> str:
        """The key under which owners take turns: all peers of one public network share one, whatever they weigh.

        Keys cost nothing, so a network must not get more turns by having more keys that weigh something.
        """
        return self.network or self.peer_id


def network_of(ip: IpAddress | None) -> str:
    """The public network of an address; "" for a private or unknown one."""
    return public_network(ip) or ""


class Tally:
    """How much each owner holds, by PeerId and by network. What is added must be subtracted later."""

    def __init__(self) -> None:
        self.total = 0
        self._by_peer: Counter[str] = Counter()
        self._by_network: Counter[str] = Counter()

    def __repr__(self) -> str:
        return f"<Tally {self.total} of {len(self._by_peer)} peers>"

    def of_peer(self, owner: Owner) -> int:
        """The amount that the PeerId holds."""
        return self._by_peer[owner.peer_id]

    def of_network(self, owner: Owner) -> int:
        """The amount that all peers of its network hold; 0 if no network is counted."""
        return self._by_network[owner.network]

    def most(self, owner: Owner) -> int:
        """The greater of the two, for comparison with limits."""
        return max(self.of_peer(owner), self.of_network(owner))

    def has_room(self, owner: Owner, amount: int, *, a_peer: int, a_network: int) -> bool:
        """Whether the owner may hold `amount` more."""
        return self.of_peer(owner) + amount <= a_peer and self.of_network(owner) + amount <= a_network

    def add(self, owner: Owner, amount: int) -> None:
        """Note that the owner holds `amount` more, or less if it is negative."""
        self.total += amount
        count(self._by_peer, owner.peer_id, amount)
        count(self._by_network, owner.network, amount)


def count(counter: Counter[str], name: str, change: int) -> None:
    """Change a count, and delete it at 0, because strangers can make up names. The name "" is not counted."""
    if not name:
        return
    counter[name] += change
    if not counter[name]:
        del counter[name]
