"""Signs records and checks them: the envelope in which announcements travel.

Cheap checks come before the signature. A payload is verified as it arrived and never encoded again, and every fault
of a record is one RemoteProtocolError (spec/discovery/records.md). The clock is an argument.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from peerd.protocol.encoding.packing import pack, unpack
from peerd.protocol.errors import RemoteProtocolError
from peerd.protocol.identity import KEY_BYTES, SIGNATURE_BYTES, Identity, PeerId, peer_id_of, verify
from peerd.protocol.records.bodies import (
    SHARD_BLOCKS,
    Announcement,
    ModelRecord,
    PeerRecord,
    ServerRecord,
    ServerState,
    block_roots,
    next_seq,
    shards_of,
)
from peerd.protocol.records.keys import MAX_SPLITS, keys_of, split_keys_of

__all__ = [
    "MAX_RECORD_BYTES",
    "MAX_TTL_S",
    "SKEW_S",
    "SignedRecord",
    "VerifiedRecord",
    "RecordSubject",
    "sign_record",
    "open_record",
    "replaces",
    # The bodies, from bodies.py.
    "Announcement",
    "PeerRecord",
    "ServerRecord",
    "ServerState",
    "ModelRecord",
    "SHARD_BLOCKS",
    "shards_of",
    "block_roots",
    "next_seq",
]

MAX_RECORD_BYTES = 1024
# The longest time that a record may still live, and how far the announcer's clock may be ahead of ours.
MAX_TTL_S = 600.0
SKEW_S = 60.0
_DOMAIN = b"/peerd/record/1"
_MAX_KIND_CHARS = 16
# The same bytes arrive under each of a record's keys and with every lookup until they are renewed. Results that depend
# on the bytes alone are cached: reading a record takes 50 us and checking its signature 150 us. At most 4 MiB are kept.
_CACHED_RECORDS = 2048

_BODIES: dict[str, type[Announcement]] = {cls.TYPE: cls for cls in (PeerRecord, ServerRecord, ModelRecord)}


class RecordSubject(NamedTuple):
    """What a record is about. Among all records with one subject, wherever they were found, only the newest counts."""

    peer_id: PeerId
    kind: str
    name: bytes


@dataclass(frozen=True, slots=True)
class SignedRecord:
    """The envelope as it travels. Nothing in it is trusted before `open_record`."""

    public_key: bytes
    kind: str
    payload: bytes
    signature: bytes

    @property
    def peer_id(self) -> PeerId:
        """The peer that claims to have signed the record."""
        return peer_id_of(self.public_key)

    def encode(self) -> bytes:
        """A msgpack array of the four fields."""
        return pack([self.public_key, self.kind, self.payload, self.signature])

    @classmethod
    def decode(cls, data: bytes) -> SignedRecord:
        """Read a record, which has exactly one valid encoding. Raises RemoteProtocolError."""
        return _decoded(bytes(data))

    @classmethod
    def _decode(cls, data: bytes) -> SignedRecord:
        if len(data) > MAX_RECORD_BYTES:
            raise RemoteProtocolError(f"a record has at most {MAX_RECORD_BYTES} bytes, not {len(data)}")
        fields = unpack(data, max_depth=1)
        if type(fields) is not list or [type(field) for field in fields] != [bytes, str, bytes, bytes]:
            raise RemoteProtocolError("a record is a list of a key, a kind, a payload and a signature")
        record = cls(*fields)
        if len(record.public_key) != KEY_BYTES or len(record.signature) != SIGNATURE_BYTES:
            raise RemoteProtocolError("a record's key or signature has a wrong length")
        if len(record.kind) > _MAX_KIND_CHARS:
            raise RemoteProtocolError(f"a record's kind has at most {_MAX_KIND_CHARS} characters")
        if record.encode() != data:
            raise RemoteProtocolError("a record must be encoded in msgpack's shortest form")
        return record


@dataclass(frozen=True, slots=True)
class VerifiedRecord:
    """A record that passed every check of `open_record`. Only that function makes these."""

    peer_id: PeerId
    kind: str
    body: Announcement
    signed: SignedRecord

    @property
    def slot(self) -> RecordSubject:
        """The subject of the record: the peer itself, one of its numbered spans, or a model."""
        match self.body:
            case ServerRecord():
                name = bytes([self.body.slot])
            case ModelRecord():
                name = self.body.model
            case _:
                name = b""
        return RecordSubject(self.peer_id, self.kind, name)


def sign_record(identity: Identity, body: Announcement) -> SignedRecord:
    """Announce `body` as `identity`. Raises ValueError if `body` breaks a limit, since other peers would refuse it."""
    payload = body.to_payload()
    try:
        type(body).from_payload(payload)
    except RemoteProtocolError as error:
        raise ValueError(str(error)) from None
    signature = identity.sign(_signed_bytes(body.TYPE, payload))
    return SignedRecord(identity.public_key, body.TYPE, payload, signature)


def open_record(signed: SignedRecord, *, now: float, key: bytes | None = None) -> VerifiedRecord:
    """Check a decoded record at `now` (unix seconds) and, with `key`, that it belongs under that DHT key.

    Raises RemoteProtocolError saying what is wrong.
    """
    body = _known_body(signed)
    if body.expires <= now:
        raise RemoteProtocolError(f"the record expired {now - body.expires:.0f} s ago")
    if body.expires > now + MAX_TTL_S + SKEW_S:
        raise RemoteProtocolError(f"the record expires in {body.expires - now:.0f} s, more than {MAX_TTL_S:.0f}")
    return open_untimely(signed, key=key)


def open_untimely(signed: SignedRecord, *, key: bytes | None = None) -> VerifiedRecord:
    """`open_record` but for the time: to say why a record does not count. Raises RemoteProtocolError."""
    body = _known_body(signed)
    peer_id = signed.peer_id
    if key is not None and not _belongs_under(key, body, peer_id):
        raise RemoteProtocolError("the record does not belong under this key")
    if not _is_genuine(signed):
        raise RemoteProtocolError("the record's signature is wrong")
    return VerifiedRecord(peer_id, signed.kind, body, signed)


def _known_body(signed: SignedRecord) -> Announcement:
    if signed.kind not in _BODIES:
        raise RemoteProtocolError(f"unknown kind of record {signed.kind!r}")
    return _body(signed.kind, signed.payload)


def _belongs_under(key: bytes, body: Announcement, peer_id: PeerId) -> bool:
    if key in keys_of(body, peer_id):
        return True
    return any(key in split_keys_of(body, peer_id, depth) for depth in range(1, MAX_SPLITS + 1))


def replaces(new: VerifiedRecord, old: VerifiedRecord) -> bool:
    """Whether `new` takes the place of `old` in a set: same slot, greater `seq`.

    With equal `seq` the old record stays, whether the bytes are equal (nothing changes) or not (the peer contradicts
    itself). Raises ValueError for records of different slots.
    """
    if new.slot != old.slot:
        raise ValueError("records of different slots do not replace each other")
    return new.body.seq > old.body.seq


@lru_cache(maxsize=_CACHED_RECORDS)
def _decoded(data: bytes) -> SignedRecord:
    return SignedRecord._decode(data)


@lru_cache(maxsize=_CACHED_RECORDS)
def _body(kind: str, payload: bytes) -> Announcement:
    return _BODIES[kind].from_payload(payload)


@lru_cache(maxsize=_CACHED_RECORDS)
def _is_genuine(signed: SignedRecord) -> bool:
    return verify(signed.public_key, _signed_bytes(signed.kind, signed.payload), signed.signature)


def _signed_bytes(kind: str, payload: bytes) -> bytes:
    """The signed bytes, as in libp2p's RFC 0002: domain, kind and payload, each behind its length.

    Without the lengths, bytes of one part could be read as part of the next.
    """
    parts = (_DOMAIN, kind.encode(), payload)
    return b"".join([_varint(len(part)) + part for part in parts])


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
