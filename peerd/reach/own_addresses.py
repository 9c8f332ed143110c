"""Finds the addresses at which others can dial us, from the addresses on which we listen."""

from __future__ import annotations

import socket
from collections.abc import Iterable
from dataclasses import replace

from peerd.protocol.addresses import Multiaddr

# Addresses for documentation (RFC 5737, RFC 3849). Connecting a UDP socket asks the routing table and sends nothing.
_SOMEWHERE = {"ip4": (socket.AF_INET, "192.0.2.1"), "ip6": (socket.AF_INET6, "2001:db8::1")}
_LOOPBACK = {"ip4": "127.0.0.1", "ip6": "::1"}


def dialable_forms(listening: Iterable[Multiaddr]) -> tuple[Multiaddr, ...]:
    """The addresses to announce for those on which we listen: a wildcard becomes this machine's own address and
    loopback.
    """
    found: list[Multiaddr] = []
    for address in listening:
        if not address.is_wildcard:
            found.append(address)
            continue
        hosts = [_own_address(address.kind), _LOOPBACK[address.kind]]
        found += [replace(address, host=host) for host in dict.fromkeys(hosts) if host is not None]
    return tuple(dict.fromkeys(found))


def own_networks() -> tuple[Multiaddr, ...]:
    """This machine's own addresses in the networks through which it speaks to the internet; the port says nothing."""
    hosts = {kind: _own_address(kind) for kind in _SOMEWHERE}
    return tuple(Multiaddr.parse(f"/{kind}/{host}/tcp/0/ws") for kind, host in hosts.items() if host is not None)


def _own_address(kind: str) -> str | None:
    """The address from which this machine would speak to the internet; None without a route, or a free descriptor."""
    family, somewhere = _SOMEWHERE[kind]
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((somewhere, 9))
            return str(probe.getsockname()[0])
    except OSError:
        return None
