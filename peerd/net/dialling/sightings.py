"""Where peers proved who they are when we dialled them: of all that is said about addresses, what we know ourselves."""

from __future__ import annotations

from collections import OrderedDict

from peerd.net.owners import network_of
from peerd.protocol.addresses import IpAddress, Multiaddr
from peerd.protocol.identity import PeerId

# Strangers make peers up: those seen longest ago are forgotten.
MAX_PEERS = 4096


class Sightings:
    """Addresses by peer, each with the public network that it led to."""

    def __init__(self) -> None:
        self._seen: OrderedDict[PeerId, dict[Multiaddr, str]] = OrderedDict()

    def __repr__(self) -> str:
        return f"<Sightings of {len(self._seen)}>"

    def found(self, peer_id: PeerId, address: Multiaddr, ip: IpAddress | None) -> None:
        """The peer answered at this address, which led to this IP address."""
        self._seen.setdefault(peer_id, {})[address.with_peer(None)] = network_of(ip)
        self._seen.move_to_end(peer_id)
        if len(self._seen) > MAX_PEERS:
            self._seen.popitem(last=False)

    def missed(self, peer_id: PeerId, address: Multiaddr) -> None:
        """It no longer does."""
        self._seen.get(peer_id, {}).pop(address.with_peer(None), None)

    def addresses_of(self, peer_id: PeerId) -> frozenset[Multiaddr]:
        """Where it answered, without its PeerId."""
        return frozenset(self._seen.get(peer_id, ()))

    def network_of(self, peer_id: PeerId) -> str:
        """A public network in which it answered; "" for none."""
        return next(filter(None, self._seen.get(peer_id, {}).values()), "")
