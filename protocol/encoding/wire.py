"""Splits a stream's bytes into messages: a small header that is checked and a raw body that is not.

A length field must not make us allocate memory: nothing is allocated for the body before the header is complete and
the body's length is within the caller's limit, and then only as fast as bytes arrive. So a peer that merely claims
64 MiB costs us 4 KiB. The format is in spec/connection/wire.md; the fields
of a header are schema.py's work.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from peerd.protocol.encoding.packing import MAX_DEPTH, pack, unpack
from peerd.protocol.errors import LocalProtocolError, RemoteProtocolError

Buffer = bytes | bytearray | memoryview

_LENGTH: Final = struct.Struct(">I")
LENGTH_BYTES = _LENGTH.size
MAX_HEADER_BYTES = 16 * 1024
MAX_BODY_BYTES = 2**32 - 1
# How much memory the first byte of a body may make us allocate; from there on the buffer doubles as bytes arrive.
FIRST_ALLOCATION_BYTES = 4 * 1024


class Memory(Protocol):
    """Where a reader reserves what it holds of a message that has begun."""

    def take(self, count: int) -> None:
        """Reserve bytes. Raises Overloaded if there are none left for this peer."""

    def give(self, count: int) -> None:
        """Give bytes back."""


@dataclass(frozen=True, slots=True)
class RawMessage:
    """One received message: `header` is well-formed but its fields are unchecked, `body` may be read-only."""

    header: dict[str, Any]
    body: memoryview


def encode_message(header: Mapping[str, Any], body: Sequence[Buffer] = ()) -> list[Buffer]:
    """The message as buffers to send in order. Contains the body's own buffers, not copies.

    Raises LocalProtocolError if header or body exceeds its limit, or if msgpack cannot hold the header.
    """
    try:
        packed = pack(dict(header))
    except (TypeError, ValueError) as error:
        raise LocalProtocolError(f"a header that cannot be packed: {error}") from error
    if len(packed) > MAX_HEADER_BYTES:
        raise LocalProtocolError(f"a header has at most {MAX_HEADER_BYTES} bytes, not {len(packed)}")
    parts = [memoryview(part).cast("B") for part in body]
    length = sum(map(len, parts))
    if length > MAX_BODY_BYTES:
        raise LocalProtocolError(f"a body has at most {MAX_BODY_BYTES} bytes, not {length}")
    prefix = b"".join((_LENGTH.pack(len(packed)), packed, _LENGTH.pack(length)))
    return [prefix, *(part for part in parts if len(part))]


class MessageReader:
    """Cuts a stream of bytes into messages, however the bytes were split.

    max_body: the most bytes that a body may have, checked when its length arrives. The caller may change it between
    messages.
    memory: where the reader reserves what a message that has begun holds; None: nowhere.
    """

    __slots__ = ("_body", "_body_bytes", "_filled", "_head", "_header", "_memory", "_ready", "_reserved", "max_body")

    def __init__(self, max_body: int, memory: Memory | None = None) -> None:
        self.max_body = max_body
        self._memory = memory
        self._reserved = 0
        self._head = bytearray()
        self._header: dict[str, Any] | None = None
        self._body_bytes = 0
        self._body = bytearray()
        self._filled = 0
        self._ready: RawMessage | None = None

    def __repr__(self) -> str:
        if self._header is None:
            return f"<MessageReader head {len(self._head)}/{self._head_bytes}>"
        return f"<MessageReader body {self._filled}/{self._body_bytes}>"

    @property
    def in_message(self) -> bool:
        """Whether a message has begun and is not complete: a stream must not end here."""
        return bool(self._head) or self._header is not None

    @property
    def missing_body_bytes(self) -> int:
        """How many bytes of the current body are still missing; 0 while its length is unknown."""
        return self._body_bytes - self._filled if self._header is not None else 0

    def feed(self, data: Buffer) -> int:
        """Take bytes up to the end of one message, which `take` then returns. Returns how many bytes were taken.

        A body that lies whole in `data` is not copied: the message's body is a view of it, so `data` must not
        change. Raises RemoteProtocolError, or Overloaded if there is no memory left for the peer; the stream cannot be
        read any further then.
        """
        view = memoryview(data)
        used = 0
        if self._header is None:
            used = self._feed_head(view)
        if self._header is not None:
            used += self._feed_body(self._header, view[used:])
        self._reserve(len(self._head) + len(self._body))
        return used

    def drop(self) -> None:
        """Forget the message that has begun."""
        self._head, self._body, self._header, self._ready = bytearray(), bytearray(), None, None
        self._reserve(0)

    def _reserve(self, wanted: int) -> None:
        """Hold so many bytes of memory, no more and no fewer."""
        more = wanted - self._reserved
        if more and self._memory is not None:
            if more > 0:
                self._memory.take(more)
            else:
                self._memory.give(-more)
            self._reserved = wanted

    def take(self) -> RawMessage | None:
        """The message that `feed` completed; None if there is none. Returns each message once."""
        ready, self._ready = self._ready, None
        return ready

    @property
    def _head_bytes(self) -> int:
        """The length of the head in bytes, as far as known: header length, header, body length."""
        if len(self._head) < LENGTH_BYTES:
            return LENGTH_BYTES
        (header_bytes,) = _LENGTH.unpack_from(self._head)
        return LENGTH_BYTES + int(header_bytes) + LENGTH_BYTES

    def _feed_head(self, view: memoryview) -> int:
        used = 0
        while used < len(view):
            wanted = self._head_bytes - len(self._head)
            self._head += view[used : used + wanted]
            used += min(wanted, len(view) - used)
            if len(self._head) == LENGTH_BYTES:
                _check_header_length(self._head)
            elif len(self._head) == self._head_bytes:
                self._end_head()
                break
        return used

    def _end_head(self) -> None:
        (body_bytes,) = _LENGTH.unpack_from(self._head, len(self._head) - LENGTH_BYTES)
        if body_bytes > self.max_body:
            raise RemoteProtocolError(f"a body of {body_bytes} bytes where at most {self.max_body} were expected")
        header = unpack(memoryview(self._head)[LENGTH_BYTES:-LENGTH_BYTES], max_depth=MAX_DEPTH)
        if type(header) is not dict:
            raise RemoteProtocolError("a message's header is not a map")
        self._head = bytearray()
        self._header, self._body_bytes, self._filled = header, body_bytes, 0

    def _feed_body(self, header: dict[str, Any], view: memoryview) -> int:
        wanted = self._body_bytes - self._filled
        if not self._filled and len(view) >= wanted:
            self._complete(header, view[:wanted])
            return wanted
        used = min(wanted, len(view))
        if used:
            self._grow(self._filled + used)
            self._body[self._filled : self._filled + used] = view[:used]
            self._filled += used
        if used == wanted:
            self._complete(header, memoryview(self._body))
            self._body = bytearray()
        return used

    def _grow(self, least: int) -> None:
        if least > len(self._body):
            wanted = min(max(least, 2 * len(self._body), FIRST_ALLOCATION_BYTES), self._body_bytes)
            self._reserve(wanted)
            self._body += bytes(wanted - len(self._body))

    def _complete(self, header: dict[str, Any], body: memoryview) -> None:
        self._ready = RawMessage(header, body)
        self._header = None


def _check_header_length(head: bytearray) -> None:
    (header_bytes,) = _LENGTH.unpack_from(head)
    if not 0 < header_bytes <= MAX_HEADER_BYTES:
        raise RemoteProtocolError(f"a header of {header_bytes} bytes: it has 1 to {MAX_HEADER_BYTES}")
