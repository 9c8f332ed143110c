"""What a connection tells whoever drives it: everything that can happen, as values.

Knows nothing but the streams that it happened to. An event says that it is worth looking, never more than
that: what can be read or sent now, `Connection` knows.
"""

from __future__ import annotations

from dataclasses import dataclass

from peerd.protocol.connection.streams import Stream
from peerd.protocol.identity import PeerId


@dataclass(frozen=True, slots=True)
class HandshakeDone:
    """The peer has proved who it is; streams may be opened."""

    peer_id: PeerId


@dataclass(frozen=True, slots=True)
class StreamOpened:
    """The peer opened a stream."""

    stream: Stream


@dataclass(frozen=True, slots=True)
class StreamReadable:
    """Bytes of a stream, or its end, arrived: `Connection.read` may have more."""

    stream: Stream


@dataclass(frozen=True, slots=True)
class MessageSent:
    """The last byte of one of the stream's messages left."""

    stream: Stream


@dataclass(frozen=True, slots=True)
class StreamEnded:
    """The stream is over in both directions; what arrived before may still be read.

    Where the peer reset it, `stream.reset_code` says why.
    """

    stream: Stream


@dataclass(frozen=True, slots=True)
class GoneAway:
    """The peer ended the connection. Nothing comes after this."""

    code: str
    reason: str


Event = HandshakeDone | StreamOpened | StreamReadable | MessageSent | StreamEnded | GoneAway
