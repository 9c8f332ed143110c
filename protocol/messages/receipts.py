"""Signs and reads receipts, with which a client acknowledges how many positions a hop has computed for its session.

`open_receipt` checks the bytes and the signature. The caller must check that the receipt is about its own hop of that
session, and that the numbers are true (spec/sessions/receipts.md).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import ClassVar

from peerd.protocol.encoding.schema import Message, binary, integer, required
from peerd.protocol.errors import RemoteProtocolError
from peerd.protocol.identity import SIGNATURE_BYTES, Identity, PeerId, peer_id_of, public_key_of, verify
from peerd.protocol.messages.tickets import SESSION_ID_BYTES

MODEL_BYTES = 32
# session, hop, server, model, start, end, positions
_LAYOUT = struct.Struct(">16sH32s32sHHQ")
RECEIPT_BYTES = _LAYOUT.size + SIGNATURE_BYTES
_DOMAIN = b"/peerd/receipt/1"
# The most that `opened` may ask a client to let pass between two receipts.
MAX_EVERY = 2**24


@dataclass(frozen=True, slots=True)
class Receipt:
    """The session's client has got what `server` computed as `hop` of `session`: `positions` positions in all so far,
    each through the blocks `[start, end)` of `model`.
    """

    session: bytes
    hop: int
    server: PeerId
    model: bytes
    start: int
    end: int
    positions: int


@dataclass(frozen=True, slots=True)
class Acknowledge(Message):
    """Client to hop: a signed receipt."""

    TYPE: ClassVar[str] = "receipt"
    receipt: bytes = required(binary(RECEIPT_BYTES, RECEIPT_BYTES))


#: How many positions may pass between two receipts, in `opened`; 0: the hop wants none.
receipt_every = integer(0, MAX_EVERY)


def sign_receipt(identity: Identity, receipt: Receipt) -> bytes:
    """The bytes that the client sends to the server. Raises ValueError if a field does not fit."""
    for name, value, size in (("session", receipt.session, SESSION_ID_BYTES), ("model", receipt.model, MODEL_BYTES)):
        if len(value) != size:
            raise ValueError(f"the {name} of a receipt has {size} bytes, not {len(value)}")
    server = public_key_of(receipt.server)
    numbers = receipt.start, receipt.end, receipt.positions
    try:
        body = _LAYOUT.pack(receipt.session, receipt.hop, server, receipt.model, *numbers)
    except struct.error as error:
        raise ValueError(f"a receipt's number is out of range: {error}") from None
    return body + identity.sign(_DOMAIN + body)


def open_receipt(data: bytes, *, client: PeerId) -> Receipt:
    """Read a receipt that `client` signed. Raises RemoteProtocolError."""
    if len(data) != RECEIPT_BYTES:
        raise RemoteProtocolError(f"a receipt has {RECEIPT_BYTES} bytes, not {len(data)}")
    body, signature = data[: _LAYOUT.size], data[_LAYOUT.size :]
    session, hop, server, model, start, end, positions = _LAYOUT.unpack(body)
    if not verify(public_key_of(client), _DOMAIN + body, signature):
        raise RemoteProtocolError("the receipt was not signed by the session's client")
    return Receipt(session, hop, peer_id_of(server), model, start, end, positions)
