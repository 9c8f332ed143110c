"""The messages between a peer, its relay and a calling peer (spec/discovery/relay.md).

This file defines fields and limits; the relay and the two ends decide which message may come when. Messages of an
established circuit have no fields: the relay forwards their bodies unread.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Final

from peerd.protocol.addresses import MAX_IP_CHARS, IpAddress, canonical_ip
from peerd.protocol.connection.frames import HEADER_BYTES
from peerd.protocol.connection.noise import TAG_BYTES
from peerd.protocol.encoding.schema import Message, boolean, integer, optional, required, text
from peerd.protocol.encoding.wire import RawMessage
from peerd.protocol.errors import RemoteProtocolError
from peerd.protocol.identity import PeerId, public_key_of
from peerd.protocol.messages.session import Failure

RELAY_PROTOCOL: Final = "/peerd/relay/1"
CIRCUIT_PROTOCOL: Final = "/peerd/circuit/1"
# The role that a relay names in its hello.
RELAY_ROLE: Final = "relay"

# The largest inner message: a frame with 31 KiB of payload, which leaves room for the outer connection's framing.
MAX_INNER_BYTES: Final = 31 * 1024 + HEADER_BYTES + TAG_BYTES
# The payload of a smaller inner frame, chosen so that the frame, with the inner message's own overhead and the outer
# message's lengths and header, fills one outer frame of 16 KiB.
INNER_PAYLOAD_BYTES: Final = 16 * 1024 - 64

MAX_EXPIRY_S = 86_400
MAX_CIRCUIT_S = 30 * 86_400
MAX_CIRCUITS = 65_535
MAX_RATE = 2**40


def _peer_id(value: Any) -> PeerId:
    if type(value) is not str:
        raise ValueError("a PeerId")
    public_key_of(value)
    return PeerId(value)


_ip_text = text(MAX_IP_CHARS)


def _ip(value: Any) -> IpAddress:
    try:
        return canonical_ip(_ip_text(value))
    except ValueError:
        raise ValueError("an IP address") from None


_rate = integer(1, MAX_RATE)
_circuit_s = integer(1, MAX_CIRCUIT_S)


@dataclass(frozen=True, slots=True)
class Reserve(Message):
    """Peer to relay: accept calls for me and pass them over this connection. Sent again to renew.

    shows_ip: callers that show theirs may be told the IP address at which the relay sees this peer.
    """

    TYPE: ClassVar[str] = "reserve"
    shows_ip: bool = optional(boolean, False)


@dataclass(frozen=True, slots=True)
class Reserved(Message):
    """Relay to peer: the reservation's duration, how many circuits it allows at a time, and each circuit's limits."""

    TYPE: ClassVar[str] = "reserved"
    expires_s: int = required(integer(1, MAX_EXPIRY_S))
    circuits: int = required(integer(1, MAX_CIRCUITS))
    bytes_a_second: int = required(_rate)
    circuit_s: int = required(_circuit_s)


@dataclass(frozen=True, slots=True)
class Connect(Message):
    """Caller to relay: open a circuit to this peer.

    shows_ip: the peer, if it shows its own, may be told the IP address at which the relay sees the caller.
    """

    TYPE: ClassVar[str] = "connect"
    peer: PeerId = required(_peer_id)
    shows_ip: bool = optional(boolean, False)


@dataclass(frozen=True, slots=True)
class IncomingCall(Message):
    """Relay to reserved peer, first on a new stream: `peer` calls. Its connection to the relay proved that PeerId.

    ip: the address at which the relay sees the caller; None unless both ends show theirs.
    """

    TYPE: ClassVar[str] = "circuit"
    peer: PeerId = required(_peer_id)
    ip: IpAddress | None = optional(_ip, None, str)


@dataclass(frozen=True, slots=True)
class Accepted(Message):
    """Reserved peer to relay: connect the caller."""

    TYPE: ClassVar[str] = "accepted"


@dataclass(frozen=True, slots=True)
class Connected(Message):
    """Relay to caller: the next message reaches the peer. Gives the circuit's limits.

    ip: the address at which the relay sees the reserved peer; None unless both ends show theirs.
    """

    TYPE: ClassVar[str] = "connected"
    bytes_a_second: int = required(_rate)
    circuit_s: int = required(_circuit_s)
    ip: IpAddress | None = optional(_ip, None, str)


# The messages that each receiver accepts.
TO_RELAY: tuple[type[Message], ...] = (Reserve, Connect)
TO_RESERVED: tuple[type[Message], ...] = (Reserved, Failure)
TO_CALLER: tuple[type[Message], ...] = (Connected, Failure)
FROM_ACCEPTOR: tuple[type[Message], ...] = (Accepted, Failure)


def inner_message(message: RawMessage) -> memoryview:
    """The body of a circuit's message. Raises RemoteProtocolError if it has a header, or if its length is not
    allowed.
    """
    if message.header:
        raise RemoteProtocolError("a circuit's message has no header")
    if not 0 < len(message.body) <= MAX_INNER_BYTES:
        raise RemoteProtocolError(f"a circuit's message of {len(message.body)} bytes: it has 1 to {MAX_INNER_BYTES}")
    return message.body
