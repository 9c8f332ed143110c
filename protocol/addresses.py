"""Reads and writes the multiaddrs at which a peer can be reached, and says which hosts are private.

The text form is in spec/connection/addresses.md. This file resolves no names and opens no sockets. Addresses come from
untrusted peers, so each address has exactly one spelling and a bounded length, and an IPv6 address that leads to a
private IPv4 address counts as private.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv6Address
from typing import Literal, cast, get_args

from peerd.protocol.identity import PeerId, public_key_of

IpAddress = IPv4Address | IPv6Address
HostKind = Literal["ip4", "ip6", "dns4", "dns6", "dns"]
_HOST_KINDS: tuple[str, ...] = get_args(HostKind)

# The longest valid address: a 253-character name, /wss, a relay and a peer make 399 characters.
MAX_ADDRESS_CHARS = 400
# An IPv6 address in full.
MAX_IP_CHARS = 45
# RFC 1035, 2.3.4.
_MAX_NAME_CHARS = 253
_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")
# A resolver reads `127.1`, `2130706433` and `0x7f000001` as IP addresses, so we do not accept them as names.
_NUMERIC_LABEL = re.compile(r"[0-9]+|0x[0-9a-f]*")
_PORT = re.compile(r"0|[1-9][0-9]{0,4}")
# RFC 6052: an IPv4 address in the last 32 bits.
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
# Networks that are not reachable from the internet: RFC 1122, 1918, 6598 (carriers' NAT), 3927, 4193, 4291.
_PRIVATE_RANGES = tuple(
    map(
        ipaddress.ip_network,
        (
            *("127.0.0.0/8", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "169.254.0.0/16"),
            *("::1/128", "fc00::/7", "fe80::/10"),
        ),
    )
)

_ALLOWED = (
    "/ip4|ip6|dns4|dns6|dns/HOST/tcp/PORT/ws|wss, then optionally /p2p/PEER, "
    "or /p2p/RELAY/p2p-circuit with an optional /p2p/PEER"
)


@dataclass(frozen=True, slots=True)
class Multiaddr:
    """One address of a peer. Two addresses are equal exactly if their texts are.

    Raises ValueError for an invalid host or port.

    host: an IP address in canonical form or a lower-case name; with `relay`, the relay's.
    port: 0 to 65535; 0 means "any free port" and only makes sense to listen on.
    peer_id: the peer at this address; None if the address does not say.
    relay: the peer at `host` that forwards our bytes to `peer_id`.
    """

    kind: HostKind
    host: str
    port: int
    secure: bool = False
    peer_id: PeerId | None = None
    relay: PeerId | None = None

    def __post_init__(self) -> None:
        if self.kind not in _HOST_KINDS:
            raise ValueError(f"a host is one of {', '.join(_HOST_KINDS)}, not {self.kind!r}")
        if not 0 <= self.port <= 65535:
            raise ValueError(f"a port lies between 0 and 65535, not {self.port}")
        _check_host(self.kind, self.host)
        for peer_id in (self.peer_id, self.relay):
            if peer_id is not None:
                public_key_of(peer_id)

    @classmethod
    def parse(cls, text: str) -> Multiaddr:
        """Read `/ip4/192.0.2.1/tcp/31330/ws/p2p/12D3KooW...`. Raises ValueError that lists the allowed forms."""
        if len(text) > MAX_ADDRESS_CHARS:
            raise ValueError(f"an address has at most {MAX_ADDRESS_CHARS} characters, not {len(text)}")
        try:
            return cls._parse_parts(text.split("/"))
        except ValueError as error:
            raise ValueError(f"{text!r} is not a peerd address: {error}; allowed is {_ALLOWED}") from None

    @classmethod
    def _parse_parts(cls, parts: list[str]) -> Multiaddr:
        if len(parts) < 6 or parts[0] or parts[3] != "tcp" or parts[5] not in ("ws", "wss"):
            raise ValueError("it does not begin with a host, a TCP port and ws or wss")
        if _PORT.fullmatch(parts[4]) is None:
            raise ValueError(f"{parts[4]!r} is not a port")
        peer_id, relay = _parse_peers(parts[6:])
        kind = cast(HostKind, parts[1])
        return cls(kind, parts[2], int(parts[4]), parts[5] == "wss", peer_id, relay)

    def __str__(self) -> str:
        text = f"/{self.kind}/{self.host}/tcp/{self.port}/{'wss' if self.secure else 'ws'}"
        if self.relay is not None:
            text += f"/p2p/{self.relay}/p2p-circuit"
        if self.peer_id is not None:
            text += f"/p2p/{self.peer_id}"
        return text

    def with_peer(self, peer_id: PeerId | None) -> Multiaddr:
        """The same address with another peer id; None accepts any peer that answers there."""
        return replace(self, peer_id=peer_id)

    @property
    def url(self) -> str:
        """The URL that a websocket client dials: `ws://host:port/`. For a relayed address, the relay's URL."""
        host = f"[{self.host}]" if self.kind == "ip6" else self.host
        return f"{'wss' if self.secure else 'ws'}://{host}:{self.port}/"

    @property
    def ip(self) -> IPv4Address | IPv6Address | None:
        """The host as an IP address; None for a name."""
        if self.kind == "ip4":
            return IPv4Address(self.host)
        return IPv6Address(self.host) if self.kind == "ip6" else None

    @property
    def is_wildcard(self) -> bool:
        """Whether the host means every interface. A peer can listen on such an address, but cannot dial it."""
        ip = self.ip
        return ip is not None and ip.is_unspecified

    @property
    def is_dialable(self) -> bool:
        """Whether the address can be dialled: its host is not a wildcard and its port is not 0."""
        return self.port != 0 and not self.is_wildcard

    @property
    def is_loopback(self) -> bool:
        """Whether the host is this machine. Among names, only `localhost` counts."""
        ip = self.ip
        return self.host == "localhost" if ip is None else _inner(ip).is_loopback

    @property
    def is_private(self) -> bool:
        """Whether the host cannot be reached from the whole internet: loopback, LANs, link-local, CGNAT and the like.

        A name other than `localhost` counts as public; the caller that dials it must check each IP address to which
        it resolves with `is_private_ip`.
        """
        ip = self.ip
        return self.is_loopback if ip is None else is_private_ip(ip)


def is_private_ip(ip: IPv4Address | IPv6Address) -> bool:
    """Whether `ip` is not the address of one host on the public internet. Looks inside IPv6 for an IPv4 address."""
    inner = _inner(ip)
    return not inner.is_global or inner.is_multicast


def private_range(ip: IPv4Address | IPv6Address) -> str | None:
    """The loopback or private range that contains `ip` itself; None if there is none."""
    return next((str(network) for network in _PRIVATE_RANGES if ip in network), None)


def public_network(ip: IPv4Address | IPv6Address | None) -> str | None:
    """The /24 (IPv6: /48, which is what one site gets) of a public address; None for other addresses."""
    if ip is None or is_private_ip(ip):
        return None
    inner = ip.ipv4_mapped or ip if isinstance(ip, IPv6Address) else ip
    return str(ipaddress.ip_network((inner, 24 if inner.version == 4 else 48), strict=False))


def canonical_ip(text: str) -> IPv4Address | IPv6Address:
    """The IP address that a peer wrote as text; an IPv4-mapped IPv6 address becomes IPv4. Raises ValueError."""
    ip = ipaddress.ip_address(text)
    if isinstance(ip, IPv4Address):
        return ip
    if ip.scope_id is not None:
        raise ValueError(f"{text!r} has a zone, which only its own machine understands")
    return ip.ipv4_mapped or ip


def _inner(ip: IPv4Address | IPv6Address) -> IPv4Address | IPv6Address:
    """The IPv4 address to which an IPv6 address leads (mapped, 6to4, NAT64), else `ip` itself."""
    if isinstance(ip, IPv4Address):
        return ip
    if ip in _NAT64:
        return IPv4Address(int(ip) & 0xFFFFFFFF)
    return ip.ipv4_mapped or ip.sixtofour or ip


def _parse_peers(parts: list[str]) -> tuple[PeerId | None, PeerId | None]:
    """The peer and the relay from the parts of an address behind `/ws`."""
    match parts:
        case []:
            return None, None
        case ["p2p", peer]:
            return PeerId(peer), None
        case ["p2p", relay, "p2p-circuit"]:
            return None, PeerId(relay)
        case ["p2p", relay, "p2p-circuit", "p2p", peer]:
            return PeerId(peer), PeerId(relay)
        case _:
            raise ValueError(f"{'/' + '/'.join(parts)!r} cannot follow ws or wss")


def _check_host(kind: HostKind, host: str) -> None:
    if kind == "ip4":
        canonical = str(IPv4Address(host))
    elif kind == "ip6":
        if "%" in host:
            raise ValueError(f"{host!r} has a zone, which only its own machine understands")
        address = IPv6Address(host)
        if address.ipv4_mapped is not None:
            raise ValueError(f"{host!r} is written as /ip4/{address.ipv4_mapped}")
        canonical = str(address)
    else:
        _check_name(host)
        return
    if canonical != host:
        raise ValueError(f"{host!r} is not in canonical form, which is {canonical!r}")


def _check_name(host: str) -> None:
    labels = host.split(".")
    if len(host) > _MAX_NAME_CHARS or not all(_LABEL.fullmatch(label) for label in labels):
        raise ValueError(f"{host!r} is not a lower-case ASCII host name")
    if _NUMERIC_LABEL.fullmatch(labels[-1]):
        raise ValueError(f"{host!r} is not a host name: it ends in a number, as IP addresses do")
