"""Who counts as one with a peer where peers' words are counted, for keys are free."""

from __future__ import annotations

from peerd.net.connections import Connections
from peerd.net.limits.owners import network_of
from peerd.protocol.identity import PeerId


def voice_of(connections: Connections, peer_id: PeerId) -> str:
    """The peer's public network, where a connection shows it or once did; else the peer itself alone."""
    connection = connections.live.get(peer_id)
    network = network_of(connection.accountable_ip) if connection is not None else ""
    # A peer that has hung up must not become another voice by that.
    return network or connections.sightings.network_of(peer_id) or peer_id
