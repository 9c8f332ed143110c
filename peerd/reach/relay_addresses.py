"""Chooses the addresses under which other peers find a relay that reaches us."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from peerd.net.connections import PeerConnection
from peerd.protocol.addresses import Multiaddr

# How many addresses of each relay are announced; a record has room for four.
ADDRESSES_A_RELAY = 2
# A longer address would leave no room for others in a record of 1 KiB. A contact's addresses are no longer either
# (spec/discovery/dht.md).
MAX_ANNOUNCED_CHARS = 128


def addresses_of(
    relay: PeerConnection, claimed: Iterable[Multiaddr], known: Iterable[Multiaddr]
) -> tuple[Multiaddr, ...]:
    """Where others find a relay: only its most public addresses, and first the one at which we ourselves see it."""
    direct = [
        replace(address, relay=None, peer_id=None)
        for address in (*claimed, *known)
        if address.relay is None and address.is_dialable and len(str(address)) <= MAX_ANNOUNCED_CHARS
    ]
    widest = min(map(_narrowness, direct), default=0)
    usable = [address for address in direct if _narrowness(address) == widest]
    usable.sort(key=lambda address: address.ip != relay.remote_ip)
    return tuple(address.with_peer(relay.peer_id) for address in dict.fromkeys(usable))[:ADDRESSES_A_RELAY]


def _narrowness(address: Multiaddr) -> int:
    """0 for an address on the internet, 1 for one in a private network, 2 for one on this machine."""
    return address.is_private + address.is_loopback
