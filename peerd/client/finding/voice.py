"""Who counts as one with a peer where peers' words are counted, for keys are free."""

from __future__ import annotations

from peerd.net.connections import Connections
from peerd.net.limits.owners import Owner
from peerd.protocol.identity import PeerId


def voice_of(connections: Connections, peer_id: PeerId) -> str:
    """The peer's public network, where a live connection shows it; else the peer itself alone."""
    connection = connections.live.get(peer_id)
    return Owner.at(peer_id, connection.accountable_ip if connection is not None else None).share
