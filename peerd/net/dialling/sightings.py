"""The addresses at which peers proved their identity when we dialled them. Unlike what others say, we know these
ourselves.
"""

from __future__ import annotations

from collections import OrderedDict

from peerd.net.limits.owners import network_of
from peerd.protocol.addresses import IpAddress, Multiaddr
from peerd.protocol.identity import PeerId

# Strangers can make up any number of peers; those seen longest ago are forgotten.
MAX_PEERS = 4096


class Sightings:
    """Addresses by peer, each with the public network to which it led."""

    def __init__(self) -> None:
        self._seen: OrderedDict[PeerId, dict[Multiaddr, str]] = OrderedDict()

    def __repr__(self) -> str:
        return f"<Sightings of {len(self._seen)}>"

    def found(self, peer_id: PeerId, address: Multiaddr, ip: IpAddress | None) -> None:
        """Note that the peer answered at this address, which led to this IP address."""
        self._seen.setdefault(peer_id, {})[address.with_peer(None)] = network_of(ip)
        self._seen.move_to_end(peer_id)
        if len(self._seen) > MAX_PEERS:
            self._seen.popitem(last=False)

    def missed(self, peer_id: PeerId, address: Multiaddr) -> None:
        """Note that the peer no longer answers at this address."""
        self._seen.get(peer_id, {}).pop(address.with_peer(None), None)

    def addresses_of(self, peer_id: PeerId) -> frozenset[Multiaddr]:
        """The addresses at which the peer answered, without its PeerId."""
        return frozenset(self._seen.get(peer_id, ()))

    def network_of(self, peer_id: PeerId) -> str:
        """A public network in which the peer answered; "" for none."""
        return next(filter(None, self._seen.get(peer_id, {}).values()), "")
