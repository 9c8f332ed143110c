"""Dial-back: a peer asks another to dial it, and hears whether that worked (spec/reachability.md).

Knows the two messages and what may be asked for; dials nothing. The difficulty is that whoever asks may be
anybody and may want anybody dialled: so the question has no place for an address. What is dialled is the address
that the question itself came from, which `may_dial` still has to allow.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from peerd.protocol.addresses import MAX_IP_CHARS, IpAddress, Multiaddr, canonical_ip, is_private_ip, private_range
from peerd.protocol.encoding.schema import Message, choice, integer, many, required, text

DIALBACK_PROTOCOL = "/peerd/dialback/1"

# A port for IPv4 and one for IPv6, and as many again; somebody who looks for open ports asks for more.
MAX_PORTS = 4
# From the question's first byte to the answer's last.
ANSWER_DEADLINE_S = 10.0

Outcome = Literal["reached", "refused", "silent", "wrong_peer", "failed"]
"""What came of dialling one port: the asker itself answered; nobody listens there; nothing answered in time;
another peer answered; something answered that is no peer."""


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
    """Dial the address that you see me at, at these TCP ports, and look whether it is me who answers."""

    TYPE: ClassVar[str] = "dial_me"

    ports: tuple[int, ...] = required(_ports, list)


@dataclass(frozen=True, slots=True)
class Dialled(Message):
    """I dialled `ip`; `outcomes` has one for each port, in the question's order."""

    TYPE: ClassVar[str] = "dialled"

    ip: IpAddress = required(_ip, str)
    outcomes: tuple[Outcome, ...] = required(_outcomes, list)


def may_dial(ip: IpAddress | None, ours: Iterable[Multiaddr]) -> bool:
    """Whether somebody who is seen at `ip` may be dialled there by a peer that is announced at `ours`.

    A public address always. One in a private range only by a peer that is announced in that range and nowhere else:
    with a public address, or a name, what comes from a private one may be a proxy that anybody stands behind.
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
    """The address that is dialled for one port."""
    return Multiaddr("ip4" if isinstance(ip, ipaddress.IPv4Address) else "ip6", str(ip), port)
