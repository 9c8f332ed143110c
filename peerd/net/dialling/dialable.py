"""Which addresses a peer may be dialled at on another peer's word."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import trio

from peerd.protocol.addresses import Multiaddr


async def _located(claimed: Iterable[Multiaddr], ours: Iterable[Multiaddr]) -> list[Multiaddr]:
    """The addresses with their names looked up: a name may lead where its owner could not name the place."""
    found: list[Multiaddr] = []
    for address in claimed:
        if address.ip is not None:
            found.append(address)
            continue
        places = await _places(address)
        if not address.secure:
            found += places
        elif places and len(dialable(places, ours)) == len(places):
            # TLS proves the name, so the name is what must be dialled.
            found.append(address)
    return found


async def _places(address: Multiaddr) -> list[Multiaddr]:
    try:
        infos = await trio.socket.getaddrinfo(address.host, address.port, type=trio.socket.SOCK_STREAM)
    except OSError:
        return []
    ips = dict.fromkeys(str(info[4][0]) for info in infos)
    return [replace(address, kind="ip6" if ":" in ip else "ip4", host=ip) for ip in ips]


def dialable(claimed: Iterable[Multiaddr], ours: Iterable[Multiaddr]) -> tuple[Multiaddr, ...]:
    """Of the addresses a peer claims, those that may be dialled from here.

    Loopback and private ones only where we ourselves listen on such an address, or on all of them.
    """
    ours = tuple(ours)
    loopback = any(address.is_loopback or address.is_wildcard for address in ours)
    private = any(address.is_private for address in ours)
    return tuple(
        address
        for address in claimed
        if (loopback or not address.is_loopback) and (private or address.is_loopback or not address.is_private)
    )
