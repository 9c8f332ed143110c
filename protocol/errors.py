"""Every error that peers tell each other, split by blame.

The class decides what the caller does next: after a `PeerFault` it avoids that peer, after an `Overloaded` it tries
another peer without blame, a `CallerError` goes to the user. An exception outside this taxonomy is a bug in peerd.
Each class carries its name on the wire (`code`, spec/errors.md).
"""

from __future__ import annotations

from typing import ClassVar


class PeerdError(Exception):
    """The base of every error with a name on the wire, which is `code`."""

    code: ClassVar[str] = "error"


class LocalProtocolError(PeerdError):
    """Our own code called the protocol machine at the wrong time or with a wrong value: a bug in peerd."""

    code = "local_protocol"


# The peer's fault: avoid it, with growing delays.


class PeerFault(PeerdError):
    """The other peer broke a promise; the caller avoids it for a while."""

    code = "peer_fault"


class RemoteProtocolError(PeerFault):
    """The peer sent bytes that the protocol does not allow."""

    code = "protocol"


class HandshakeFailed(PeerFault):
    """The Noise handshake did not complete: wrong key, wrong swarm key or not our protocol."""

    code = "handshake"


class WrongPeer(HandshakeFailed):
    """The peer proved another PeerId than the one that was dialled."""

    code = "wrong_peer"


class VersionMismatch(HandshakeFailed):
    """The peer speaks another major version."""

    code = "version"


class ConnectFailed(PeerFault):
    """No connection to any of the peer's addresses could be made."""

    code = "connect"


class ConnectionLost(PeerFault):
    """The connection ended during use: closed, reset, or silent for too long."""

    code = "connection_lost"


class RelayLost(ConnectionLost):
    """A relay ended the circuit to the peer or died itself. The peer may be well and reachable by another address."""

    code = "relay_lost"


class StreamReset(PeerFault):
    """The peer ended one stream; `reason` is the code it gave. The connection stays open."""

    code = "stream_reset"

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason

    @property
    def refusal(self) -> PeerdError:
        """The error for a caller whose question was never answered: Overloaded if the peer had no room for it."""
        return Overloaded(str(self)) if self.reason == Overloaded.code else self


class BadResult(PeerFault):
    """The peer answered with values that cannot be right: wrong shape, non-finite."""

    code = "bad_result"


class Unresponsive(PeerFault):
    """The peer did not answer within its deadline."""

    code = "unresponsive"


class LinkFailed(PeerdError):
    """A hop could not reach its next hop. Blames the link and neither peer."""

    code = "link_failed"


# Overload: try elsewhere, no blame.


class Overloaded(PeerdError):
    """The peer cannot serve the request now; another peer, or the same peer later, can.

    retry_after_s: the peer's own estimate of when it can serve again, in seconds; 0 if it gives none.
    """

    code = "overloaded"

    def __init__(self, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NoRoom(Overloaded):
    """The peer had too few free KV tokens within the caller's timeout."""

    code = "no_room"

    def __init__(self, message: str, free_tokens: int = 0, retry_after_s: float = 0.0) -> None:
        super().__init__(message, retry_after_s)
        self.free_tokens = free_tokens


class Draining(Overloaded):
    """The peer is leaving and takes no new sessions."""

    code = "draining"


class Evicted(Overloaded):
    """The session was idle for too long, and the peer gave its KV pages to other sessions."""

    code = "evicted"


# The caller's fault: raise.


class CallerError(PeerdError):
    """No peer can serve the request as it is."""

    code = "caller"


class InvalidRequest(CallerError):
    """A field is missing, of the wrong type, or out of range."""

    code = "invalid"


class ContextTooLong(CallerError):
    """More positions than the model, the peer or the session's `max_length` allow."""

    code = "context_too_long"


class UnsupportedFeature(CallerError):
    """The request `needs` a feature, codec or adapter that the peer lacks; the message names it."""

    code = "unsupported"


class NotServed(CallerError):
    """The peer does not serve this model or these blocks."""

    code = "not_served"


class TicketRefused(CallerError):
    """A link's ticket was not signed by the session's owner, or names another peer, hop or time."""

    code = "ticket"


class Superseded(CallerError):
    """The message belongs to an epoch that a newer one has replaced."""

    code = "superseded"


class NoChain(PeerdError):
    """No reachable peer serves some of the model's blocks; `missing` lists them as (start, end) pairs."""

    code = "no_chain"

    def __init__(self, message: str, missing: tuple[tuple[int, int], ...] = ()) -> None:
        super().__init__(message)
        self.missing = missing


class InternalError(PeerFault):
    """The peer reports a bug of its own. It has its own class so that the peer's operator can be told."""

    code = "internal"


# What may travel as a code (spec/errors.md). The others name what only we can know: a bug, a relay that is gone, or a
# chain that we looked for; a peer that says them is lying, and must not choose what our own code believes of itself.
_ON_THE_WIRE: tuple[type[PeerdError], ...] = (
    RemoteProtocolError,
    HandshakeFailed,
    WrongPeer,
    VersionMismatch,
    ConnectFailed,
    ConnectionLost,
    StreamReset,
    BadResult,
    Unresponsive,
    InternalError,
    LinkFailed,
    Overloaded,
    NoRoom,
    Draining,
    Evicted,
    InvalidRequest,
    ContextTooLong,
    UnsupportedFeature,
    NotServed,
    TicketRefused,
    Superseded,
)
_BY_CODE = {cls.code: cls for cls in _ON_THE_WIRE}


def from_wire(code: str, message: str, free_tokens: int = 0, retry_after_s: float = 0.0) -> PeerdError:
    """The error that a peer sent us. A code that may not travel becomes a PeerFault.

    Such a peer is newer than we are, or lies.
    What comes out is a PeerFault, LinkFailed, an Overloaded or a CallerError.
    """
    cls = _BY_CODE.get(code, PeerFault)
    if cls is NoRoom:
        return NoRoom(message, free_tokens, retry_after_s)
    if issubclass(cls, Overloaded):
        return cls(message, retry_after_s)
    return cls(message)
