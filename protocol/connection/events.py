"""The events of a connection, as values for the code that drives it.

An event says that something changed; ask `ConnectionMachine` for what can be read or sent now.
"""

from __future__ import annotations

from dataclasses import dataclass

from peerd.protocol.connection.streams import StreamMachine
from peerd.protocol.identity import PeerId


@dataclass(frozen=True, slots=True)
class HandshakeDone:
    """The peer has proved its PeerId; streams may be opened."""

    peer_id: PeerId


@dataclass(frozen=True, slots=True)
class StreamOpened:
    """The peer opened a stream."""

    stream: StreamMachine


@dataclass(frozen=True, slots=True)
class StreamReadable:
    """Bytes of a stream, or its end, arrived: `Multiplexer.read` may return more."""

    stream: StreamMachine


@dataclass(frozen=True, slots=True)
class MessageSent:
    """The last byte of one of the stream's messages was sent."""

    stream: StreamMachine


@dataclass(frozen=True, slots=True)
class StreamEnded:
    """The stream is over in both directions; messages that arrived before may still be read.

    If the peer reset the stream, `stream.reset_code` has its code.
    """

    stream: StreamMachine


@dataclass(frozen=True, slots=True)
class GoneAway:
    """The peer ended the connection. This is the last event."""

    code: str
    reason: str


Event = HandshakeDone | StreamOpened | StreamReadable | MessageSent | StreamEnded | GoneAway
