"""Signs and reads tickets, with which a client lets one peer open a link of its session to another peer.

`open_ticket` checks the bytes, the expiry and the signature. The caller must check that `sender` is the peer on the
connection and that session, hop and epoch are current (spec/sessions/tickets.md).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from peerd.protocol.errors import TicketRefused
from peerd.protocol.identity import SIGNATURE_BYTES, Identity, PeerId, peer_id_of, public_key_of, verify

SESSION_ID_BYTES = 16
# session, hop, epoch, from, to, expires
_LAYOUT = struct.Struct(">16sHI32s32sQ")
TICKET_BYTES = _LAYOUT.size + SIGNATURE_BYTES
# How far the receiver's clock may be ahead of the client's, in seconds.
SKEW_S = 60.0
_DOMAIN = b"/peerd/ticket/1"


@dataclass(frozen=True, slots=True)
class Ticket:
    """Allows `sender` to open the link into `hop` of `session`, on `receiver`, in `epoch`, until `expires` (unix
    seconds).
    """

    session: bytes
    hop: int
    epoch: int
    sender: PeerId
    receiver: PeerId
    expires: int


def sign_ticket(identity: Identity, ticket: Ticket) -> bytes:
    """The bytes that `sender` shows to `receiver`. Raises ValueError if a field does not fit."""
    if len(ticket.session) != SESSION_ID_BYTES:
        raise ValueError(f"a session id has {SESSION_ID_BYTES} bytes, not {len(ticket.session)}")
    sender, receiver = public_key_of(ticket.sender), public_key_of(ticket.receiver)
    try:
        body = _LAYOUT.pack(ticket.session, ticket.hop, ticket.epoch, sender, receiver, ticket.expires)
    except struct.error as error:
        raise ValueError(f"a ticket's number is out of range: {error}") from None
    return body + identity.sign(_DOMAIN + body)


def open_ticket(data: bytes, *, owner: PeerId, now: float) -> Ticket:
    """Read a ticket that `owner`, the session's client, signed. `now` is in unix seconds. Raises TicketRefused."""
    if len(data) != TICKET_BYTES:
        raise TicketRefused(f"a ticket has {TICKET_BYTES} bytes, not {len(data)}")
    body, signature = data[: _LAYOUT.size], data[_LAYOUT.size :]
    session, hop, epoch, sender, receiver, expires = _LAYOUT.unpack(body)
    if expires + SKEW_S <= now:
        raise TicketRefused(f"the ticket expired {now - expires:.0f} s ago")
    if not verify(public_key_of(owner), _DOMAIN + body, signature):
        raise TicketRefused("the ticket was not signed by the session's owner")
    return Ticket(session, hop, epoch, peer_id_of(sender), peer_id_of(receiver), expires)
