"""The messages by which two peers behind NATs agree to dial each other at one moment (spec/discovery/punching.md).

They travel inside a circuit, so both ends have proved who they are. This file defines fields; `reach/puncher.py`
decides which addresses may be dialled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Final

from peerd.protocol.addresses import MAX_ADDRESS_CHARS, Multiaddr
from peerd.protocol.encoding.schema import Message, required, text
from peerd.protocol.messages.session import Failure

PUNCH_PROTOCOL: Final = "/peerd/punch/1"

_text = text(MAX_ADDRESS_CHARS)


def _at(value: Any) -> Multiaddr:
    try:
        address = Multiaddr.parse(_text(value))
    except ValueError:
        raise ValueError("an address") from None
    if address.ip is None or address.secure or not address.is_dialable or address.peer_id is not None:
        raise ValueError("an address of the form /ip4|ip6/IP/tcp/PORT/ws")
    return address


@dataclass(frozen=True, slots=True)
class Punch(Message):
    """Either end: others see the port from which I dial at this address. First the reserved peer says it, then the
    caller.
    """

    TYPE: ClassVar[str] = "punch"

    at: Multiaddr = required(_at, str)


@dataclass(frozen=True, slots=True)
class Now(Message):
    """Reserved peer to caller: dial me as soon as you read this. I dial you half a round trip after I sent it."""

    TYPE: ClassVar[str] = "now"


# The messages that each end accepts: the caller first `Punch` and then `Now`, the reserved peer one answer.
TO_RESERVED: tuple[type[Message], ...] = (Punch, Failure)
