"""What is said to, by and behind a relay (spec/relay.md).

Knows each message's fields and limits; what may be said when, and to whom, is the relay's and the ends'
business. What a circuit carries has no fields: a relay passes it on unread.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Final

from peerd.protocol.connection.frames import HEADER_BYTES
from peerd.protocol.connection.noise import TAG_BYTES
from peerd.protocol.encoding.schema import Message, integer, required
from peerd.protocol.encoding.wire import RawMessage
from peerd.protocol.errors import RemoteProtocolError
from peerd.protocol.identity import PeerId, public_key_of
from peerd.protocol.messages.session import Failure

RELAY_PROTOCOL: Final = "/peerd/relay/1"
CIRCUIT_PROTOCOL: Final = "/peerd/circuit/1"
# What a relay's hello says that it does.
RELAY_ROLE: Final = "relay"

# A frame of 31 KiB of payload, which leaves room for what the outer connection puts around it.
MAX_INNER_BYTES: Final = 31 * 1024 + HEADER_BYTES + TAG_BYTES
# With the outer message's lengths and header around it, and its own, this is one outer frame of 16 KiB.
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


_rate = integer(1, MAX_RATE)
_circuit_s = integer(1, MAX_CIRCUIT_S)


@dataclass(frozen=True, slots=True)
class Reserve(Message):
    """Peer to relay: reach me, over this connection, from now on. Again: I am still here."""

    TYPE: ClassVar[str] = "reserve"


@dataclass(frozen=True, slots=True)
class Reserved(Message):
    """Relay to peer: for so long, so many circuits at a time, each so fast and so long."""

    TYPE: ClassVar[str] = "reserved"
    expires_s: int = required(integer(1, MAX_EXPIRY_S))
    circuits: int = required(integer(1, MAX_CIRCUITS))
    bytes_a_second: int = required(_rate)
    circuit_s: int = required(_circuit_s)


@dataclass(frozen=True, slots=True)
class Connect(Message):
    """Caller to relay: a circuit to this peer."""

    TYPE: ClassVar[str] = "connect"
    peer: PeerId = required(_peer_id)


@dataclass(frozen=True, slots=True)
class Incoming(Message):
    """Relay to reserved peer, first on a stream: this peer calls, as its connection proved to the relay."""

    TYPE: ClassVar[str] = "circuit"
    peer: PeerId = required(_peer_id)


@dataclass(frozen=True, slots=True)
class Accepted(Message):
    """Reserved peer to relay: let it speak."""

    TYPE: ClassVar[str] = "accepted"


@dataclass(frozen=True, slots=True)
class Connected(Message):
    """Relay to caller: the next message reaches the peer."""

    TYPE: ClassVar[str] = "connected"
    bytes_a_second: int = required(_rate)
    circuit_s: int = required(_circuit_s)


# Who says what.
TO_RELAY: tuple[type[Message], ...] = (Reserve, Connect)
TO_RESERVED: tuple[type[Message], ...] = (Reserved, Failure)
TO_CALLER: tuple[type[Message], ...] = (Connected, Failure)
FROM_ACCEPTOR: tuple[type[Message], ...] = (Accepted, Failure)


def inner_message(message: RawMessage) -> memoryview:
    """What a circuit's message carries. Raises RemoteProtocolError for one that says more, or nothing."""
    if message.header:
        raise RemoteProtocolError("a circuit's message has no header")
    if not 0 < len(message.body) <= MAX_INNER_BYTES:
        raise RemoteProtocolError(f"a circuit's message of {len(message.body)} bytes: it has 1 to {MAX_INNER_BYTES}")
    return message.body
