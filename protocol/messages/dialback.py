"""The dial-back messages: a peer asks another peer to dial it, and learns whether that worked.

Any peer may ask, also one that wants a third party dialled. So the question contains no IP address: the answering
peer dials the address from which the question came, and only if `may_dial` allows it (spec/discovery/reachability.md).
This file dials nothing.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from peerd.protocol.addresses import MAX_IP_CHARS, IpAddress, Multiaddr, canonical_ip, is_private_ip, private_range
from peerd.protocol.encoding.schema import Message, choice, integer, many, required, text

DIALBACK_PROTOCOL = "/peerd/dialback/1"

# One port for IPv4, one for IPv6, and as many again. A peer that asks for more may be scanning for open ports.
MAX_PORTS = 4
# Time from the question's first byte to the answer's last byte.
ANSWER_DEADLINE_S = 10.0

Outcome = Literal["reached", "refused", "silent", "wrong_peer", "failed"]
"""The result of dialling one port: "reached": the asking peer answered; "refused": nothing listens there; "silent": no
answer in time; "wrong_peer": another peer answered; "failed": the answer did not come from a peerd peer.
"""


_outcome = choice("reached", "refused", "silent", "wrong_peer", "failed")
_ports_rule = many(integer(1, 65535), MAX_PORTS)
_outcomes_rule = many(_outcome, MAX_PORTS)
_ip_text = text(MAX_IP_CHARS)


def _ports(value: Any) -> tuple[int, ...]:
    ports: tuple[int, ...] = _ports_rule(value)
    if not ports or len(set(ports)) < len(ports):
        raise ValueError(f"1 to {MAX_PORTS} ports, each once")
    return ports


def _outcomes(value: Any) -> tuple[Outcome, ...]:
    outcomes: tuple[Outcome, ...] = _outcomes_rule(value)
    return outcomes


def _ip(value: Any) -> IpAddress:
    try:
        ip = canonical_ip(_ip_text(value))
    except ValueError:
        raise ValueError("an IP address") from None
    return ip


@dataclass(frozen=True, slots=True)
class DialMe(Message):
    """Request: dial the address at which you see me, at these TCP ports, and check whether I answer."""

    TYPE: ClassVar[str] = "dial_me"

    ports: tuple[int, ...] = required(_ports, list)


@dataclass(frozen=True, slots=True)
class Dialled(Message):
    """Answer: I dialled `ip`; `outcomes` has one result for each port, in the order of the request."""

    TYPE: ClassVar[str] = "dialled"

    ip: IpAddress = required(_ip, str)
    outcomes: tuple[Outcome, ...] = required(_outcomes, list)


def may_dial(ip: IpAddress | None, ours: Iterable[Multiaddr]) -> bool:
    """Whether a peer with the announced addresses `ours` may dial an asking peer that it sees at `ip`.

    A public address may always be dialled. A private address may be dialled only by a peer that announces addresses
    in that private range and no others: if the peer also has a public address or a name, a connection from a private
    address may come through a proxy, behind which any client can stand.
    """
    if ip is None or ip.is_unspecified or ip.is_multicast:
        return False
    if not is_private_ip(ip):
        return True
    ours = tuple(ours)
    known = private_range(ip)
    return (
        known is not None
        and all(address.is_private for address in ours)
        and any(address.ip is not None and private_range(address.ip) == known for address in ours)
    )


def dial_address(ip: IpAddress, port: int) -> Multiaddr:
    """The address to dial for one port."""
    return Multiaddr("ip4" if isinstance(ip, ipaddress.IPv4Address) else "ip6", str(ip), port)
