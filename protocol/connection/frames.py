"""Encodes and decodes frames, the units that a connection encrypts, sends and interleaves (spec/connection/frames.md).

A frame has one valid reading or is refused, and nothing in it makes us allocate more than its own length. Which
frame may come when on a stream is defined in `streams`.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from peerd.protocol.errors import RemoteProtocolError

# Header: kind u8, flags u8, stream u32.
_HEADER: Final = struct.Struct(">BBI")
_OPEN: Final = struct.Struct(">BI")
_U32: Final = struct.Struct(">I")
HEADER_BYTES = _HEADER.size
MAX_PAYLOAD_BYTES = 32 * 1024
MAX_FRAME_BYTES = HEADER_BYTES + MAX_PAYLOAD_BYTES

MAX_STREAM_ID = 2**32 - 1
MAX_CREDIT = 2**31 - 1
MAX_PROTOCOL_CHARS = 128
MAX_CODE_CHARS = 64
MAX_REASON_BYTES = 500
PING_BYTES = 8

FIN = 0x01
"""The only flag: on DATA, the sender says that it sends nothing more on this stream."""

_PROTOCOL_ID = re.compile(r"/[!-~]+")
_CODE = re.compile(r"[a-z0-9_]+")


class Priority(IntEnum):
    """The priority of a message. Of two waiting messages, the one with the smaller value goes first."""

    CONTROL = 0
    DECODE = 1
    PREFILL = 2
    BULK = 3


class Kind(IntEnum):
    OPEN = 1
    DATA = 2
    CREDIT = 3
    RESET = 4
    PING = 5
    PONG = 6
    GOAWAY = 7


@dataclass(frozen=True, slots=True)
class OpenFrame:
    """Opens a stream. `credit`: how many bytes the receiver may send back before it is given more."""

    stream: int
    protocol: str
    priority: Priority
    credit: int


@dataclass(frozen=True, slots=True)
class DataFrame:
    """Bytes of a stream's messages. Empty only with `fin`."""

    stream: int
    payload: memoryview
    fin: bool = False


@dataclass(frozen=True, slots=True)
class CreditFrame:
    """The receiver has consumed bytes of the stream: the other side may send `amount` more."""

    stream: int
    amount: int


@dataclass(frozen=True, slots=True)
class ResetFrame:
    """The stream ends at once, in both directions; `code` is one of spec/errors.md or of the protocol on the stream."""

    stream: int
    code: str


@dataclass(frozen=True, slots=True)
class PingFrame:
    token: bytes


@dataclass(frozen=True, slots=True)
class PongFrame:
    token: bytes


@dataclass(frozen=True, slots=True)
class GoAwayFrame:
    """The sender's last frame. `reason` is for people."""

    code: str
    reason: str = ""


Frame = OpenFrame | DataFrame | CreditFrame | ResetFrame | PingFrame | PongFrame | GoAwayFrame


def encode_frame(frame: Frame) -> bytes:
    """The frame's bytes. Raises ValueError or struct.error if our own code breaks a limit."""
    match frame:
        case OpenFrame(stream, protocol, priority, credit):
            payload = _OPEN.pack(priority, credit) + _checked_protocol(protocol).encode()
            return _HEADER.pack(Kind.OPEN, 0, stream) + payload
        case DataFrame(stream, view, fin):
            return encode_data(stream, (view,), fin=fin)
        case CreditFrame(stream, amount):
            return _HEADER.pack(Kind.CREDIT, 0, stream) + _U32.pack(amount)
        case ResetFrame(stream, code):
            return _HEADER.pack(Kind.RESET, 0, stream) + _checked_code(code).encode()
        case PingFrame(token):
            return _HEADER.pack(Kind.PING, 0, 0) + token
        case PongFrame(token):
            return _HEADER.pack(Kind.PONG, 0, 0) + token
        case GoAwayFrame(code, reason):
            text = reason.encode()[:MAX_REASON_BYTES].decode(errors="ignore").encode()
            coded = _checked_code(code).encode()
            return _HEADER.pack(Kind.GOAWAY, 0, 0) + bytes((len(coded),)) + coded + text


def encode_data(stream: int, parts: Sequence[bytes | bytearray | memoryview], *, fin: bool) -> bytes:
    """A DATA frame whose payload is `parts`. They are copied only once, since every tensor takes this path."""
    return b"".join((_HEADER.pack(Kind.DATA, FIN if fin else 0, stream), *parts))


def decode_frame(data: bytes) -> Frame:
    """Read one frame. DATA's payload is a view into `data`. Raises RemoteProtocolError."""
    if not HEADER_BYTES <= len(data) <= MAX_FRAME_BYTES:
        raise RemoteProtocolError(f"a frame of {len(data)} bytes: it has {HEADER_BYTES} to {MAX_FRAME_BYTES}")
    kind, flags, stream = _HEADER.unpack_from(data)
    decode = _DECODERS.get(kind)
    if decode is None:
        raise RemoteProtocolError(f"a frame of unknown kind {kind}")
    if flags and (kind != Kind.DATA or flags != FIN):
        raise RemoteProtocolError(f"{Kind(kind).name} with unknown flags {flags:#04x}")
    if (stream == 0) != (kind in _OF_CONNECTION):
        raise RemoteProtocolError(f"{Kind(kind).name} on stream {stream}")
    return decode(stream, flags, memoryview(data)[HEADER_BYTES:])


def _decode_open(stream: int, _flags: int, payload: memoryview) -> OpenFrame:
    if len(payload) < _OPEN.size:
        raise RemoteProtocolError("OPEN is too short")
    priority, credit = _OPEN.unpack_from(payload)
    if priority > max(Priority):
        raise RemoteProtocolError(f"OPEN with unknown priority {priority}")
    if credit > MAX_CREDIT:
        raise RemoteProtocolError(f"OPEN with more than {MAX_CREDIT} bytes of credit")
    try:
        protocol = _checked_protocol(str(payload[_OPEN.size :], "ascii"))
    except ValueError:
        raise RemoteProtocolError("OPEN without a protocol id such as /peerd/dht/1") from None
    return OpenFrame(stream, protocol, Priority(priority), credit)


def _decode_data(stream: int, flags: int, payload: memoryview) -> DataFrame:
    if not payload and not flags:
        raise RemoteProtocolError("DATA that is empty and does not finish the stream")
    return DataFrame(stream, payload, flags == FIN)


def _decode_credit(stream: int, _flags: int, payload: memoryview) -> CreditFrame:
    if len(payload) != _U32.size:
        raise RemoteProtocolError("CREDIT of a wrong length")
    (amount,) = _U32.unpack(payload)
    if not 0 < amount <= MAX_CREDIT:
        raise RemoteProtocolError(f"CREDIT of {amount} bytes: it gives 1 to {MAX_CREDIT}")
    return CreditFrame(stream, amount)


def _decode_reset(stream: int, _flags: int, payload: memoryview) -> ResetFrame:
    return ResetFrame(stream, _decode_code(payload, "RESET"))


def _decode_ping(_stream: int, _flags: int, payload: memoryview) -> PingFrame:
    return PingFrame(_decode_token(payload, "PING"))


def _decode_pong(_stream: int, _flags: int, payload: memoryview) -> PongFrame:
    return PongFrame(_decode_token(payload, "PONG"))


def _decode_goaway(_stream: int, _flags: int, payload: memoryview) -> GoAwayFrame:
    length = payload[0] if payload else 0
    code = _decode_code(payload[1 : 1 + length], "GOAWAY")
    reason = payload[1 + length :]
    if len(code) != length or len(reason) > MAX_REASON_BYTES:
        raise RemoteProtocolError("GOAWAY of a wrong length")
    try:
        return GoAwayFrame(code, str(reason, "utf-8"))
    except UnicodeDecodeError:
        raise RemoteProtocolError("GOAWAY whose reason is no text") from None


_DECODERS: Final[dict[int, Callable[[int, int, memoryview], Frame]]] = {
    Kind.OPEN: _decode_open,
    Kind.DATA: _decode_data,
    Kind.CREDIT: _decode_credit,
    Kind.RESET: _decode_reset,
    Kind.PING: _decode_ping,
    Kind.PONG: _decode_pong,
    Kind.GOAWAY: _decode_goaway,
}
# These frames concern the connection and carry stream 0; all others carry a stream's number.
_OF_CONNECTION: Final = frozenset((Kind.PING, Kind.PONG, Kind.GOAWAY))


def _decode_token(payload: memoryview, kind: str) -> bytes:
    if len(payload) != PING_BYTES:
        raise RemoteProtocolError(f"{kind} carries {PING_BYTES} bytes, not {len(payload)}")
    return bytes(payload)


def _decode_code(payload: memoryview, kind: str) -> str:
    try:
        return _checked_code(str(payload, "ascii"))
    except ValueError:
        raise RemoteProtocolError(f"{kind} without a code such as {RemoteProtocolError.code!r}") from None


def _checked_protocol(protocol: str) -> str:
    if len(protocol) > MAX_PROTOCOL_CHARS or _PROTOCOL_ID.fullmatch(protocol) is None:
        raise ValueError(f"{protocol[:MAX_PROTOCOL_CHARS]!r} is no protocol id")
    return protocol


def _checked_code(code: str) -> str:
    if len(code) > MAX_CODE_CHARS or _CODE.fullmatch(code) is None:
        raise ValueError(f"{code[:MAX_CODE_CHARS]!r} is no code: a-z, 0-9 and _ only, at most {MAX_CODE_CHARS}")
    return code
