"""Every error that peers tell each other, split by who is to blame.

The class decides what a caller does next: a `PeerFault` makes it avoid that peer, an
`Overloaded` try elsewhere without blame, a `CallerError` is raised to the user. Whatever is none
of these is a bug of ours and ends the task loudly. Knows the wire form of each (`code`, spec/errors.md).
"""

from __future__ import annotations

from typing import ClassVar


class PeerdError(Exception):
    """Something went wrong that peerd has a name for. `code` is its name on the wire."""

    code: ClassVar[str] = "error"


class LocalProtocolError(PeerdError):
    """Our own code asked the protocol machine for something it may not do now: our bug."""

    code = "local_protocol"


# The peer's fault: avoid it, with growing delays.


class PeerFault(PeerdError):
    """The other peer broke a promise; avoid it for a while."""

    code = "peer_fault"


class RemoteProtocolError(PeerFault):
    """It sent bytes that the protocol does not allow."""

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
    """No address of the peer could be connected to."""

    code = "connect"


class ConnectionLost(PeerFault):
    """The connection ended under us: closed, reset, or silent for too long."""

    code = "connection_lost"


class RelayLost(ConnectionLost):
    """A relay ended the way to the peer, or is gone itself. The peer may be well, and reached in another way."""

    code = "relay_lost"


class StreamReset(PeerFault):
    """The peer ended one stream; `reason` is the code it gave. The connection lives on."""

    code = "stream_reset"

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason


class BadResult(PeerFault):
    """It answered with values that cannot be right: wrong shape, non-finite."""

    code = "bad_result"


class Unresponsive(PeerFault):
    """It did not answer within its deadline."""

    code = "unresponsive"


class LinkFailed(PeerdError):
    """A hop could not reach its next hop. Blames the link, neither peer."""

    code = "link_failed"


# Overload: try elsewhere, no blame.


class Overloaded(PeerdError):
    """It cannot now; another peer, or the same one later, can.

    retry_after_s: in how many seconds it may be able to, by its own reckoning; 0 where it does not say.
    """

    code = "overloaded"

    def __init__(self, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NoRoom(Overloaded):
    """Too few free KV tokens within the caller's timeout."""

    code = "no_room"

    def __init__(self, message: str, free_tokens: int = 0, retry_after_s: float = 0.0) -> None:
        super().__init__(message, retry_after_s)
        self.free_tokens = free_tokens


class Draining(Overloaded):
    """The peer is leaving and takes no new sessions."""

    code = "draining"


class Evicted(Overloaded):
    """The session was idle for too long and its KV pages were given to others."""

    code = "evicted"


# The caller's fault: raise.


class CallerError(PeerdError):
    """The request cannot be served by anybody as it stands."""

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
    """Nobody reachable serves some of the model's blocks; `missing` says which."""

    code = "no_chain"

    def __init__(self, message: str, missing: tuple[tuple[int, int], ...] = ()) -> None:
        super().__init__(message)
        self.missing = missing


class InternalError(PeerFault):
    """The peer says that it has a bug. Told apart so that its operator can be told."""

    code = "internal"


def _subclasses(cls: type[PeerdError]) -> list[type[PeerdError]]:
    return [cls, *(found for sub in cls.__subclasses__() for found in _subclasses(sub))]


_BY_CODE = {cls.code: cls for cls in _subclasses(PeerdError)}


def from_wire(code: str, message: str, free_tokens: int = 0, retry_after_s: float = 0.0) -> PeerdError:
    """The error a peer told us. An unknown code is the peer's fault: it is newer, or lying."""
    cls = _BY_CODE.get(code, PeerFault)
    if cls is NoRoom:
        return NoRoom(message, free_tokens, retry_after_s)
    if issubclass(cls, Overloaded):
        return cls(message, retry_after_s)
    return cls(message)
