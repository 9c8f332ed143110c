"""Hello: the first message that two peers exchange on every connection (spec/connection/connection.md).

Everything in it is an unproven claim; only the PeerId of the connection is proven.
"""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import ClassVar

from peerd.protocol.addresses import MAX_ADDRESS_CHARS, MAX_IP_CHARS, Multiaddr, canonical_ip
from peerd.protocol.connection.frames import MAX_PROTOCOL_CHARS
from peerd.protocol.encoding.schema import Message, integer, many, optional, required, text

HELLO_PROTOCOL = "/peerd/hello/1"

MAX_AGENT_CHARS = 64
MAX_ROLE_CHARS = 32
MAX_ITEMS = 64


@dataclass(frozen=True, slots=True)
class Hello(Message):
    """The peer's claims about itself, and how it sees us.

    agent: program and version, for people.
    time_us: the peer's clock when it wrote this, in microseconds since 1970.
    protocols: the protocols of streams that the peer accepts.
    addresses: multiaddrs at which the peer listens; as text, since a newer peer may have kinds that we cannot read.
    observed_ip: the IP address from which it sees us connect; "" if it cannot tell.
    roles: what the peer does, such as `serve` or `relay`.
    observed_port: the TCP port from which it sees us connect; 0 if it cannot tell.
    """

    TYPE: ClassVar[str] = "hello"

    agent: str = required(text(MAX_AGENT_CHARS))
    time_us: int = required(integer(0, 2**63 - 1))
    protocols: tuple[str, ...] = optional(many(text(MAX_PROTOCOL_CHARS), MAX_ITEMS), ())
    addresses: tuple[str, ...] = optional(many(text(MAX_ADDRESS_CHARS), MAX_ITEMS), ())
    observed_ip: str = optional(text(MAX_IP_CHARS), "")
    roles: tuple[str, ...] = optional(many(text(MAX_ROLE_CHARS), MAX_ITEMS), ())
    observed_port: int = optional(integer(0, 65535), 0)

    @property
    def seen_at(self) -> IPv4Address | IPv6Address | None:
        """`observed_ip` as an address; None if it is not a valid one."""
        try:
            return canonical_ip(self.observed_ip)
        except ValueError:
            return None

    @property
    def multiaddrs(self) -> tuple[Multiaddr, ...]:
        """The `addresses` that this version understands."""
        found = []
        for address in self.addresses:
            try:
                found.append(Multiaddr.parse(address))
            except ValueError:
                continue
        return tuple(found)
