"""The bodies of the three kinds of record that peers announce.

A peer may move a span while old records of it are still valid on other peers. So each span is announced in a numbered
slot, and a reader that sees two records of one slot believes the newer one (spec/discovery/records.md). Signatures are
`envelope`'s work, and `keys` says where a record is stored.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

from peerd.protocol.addresses import MAX_ADDRESS_CHARS, Multiaddr
from peerd.protocol.encoding.packing import pack, unpack
from peerd.protocol.encoding.schema import (
    Message,
    Rule,
    binary,
    boolean,
    built,
    choice,
    group,
    integer,
    many,
    number,
    optional,
    required,
)
from peerd.protocol.errors import RemoteProtocolError
from peerd.protocol.identity import KEY_BYTES, PeerId, peer_id_of, public_key_of
from peerd.protocol.span import MAX_BLOCKS, Span

DIGEST_BYTES = 32
#: `org/name`, and perhaps the path of a GGUF file in that repository.
MAX_HUB_ID_CHARS = 128
# A DHT key covers this many blocks, and so does one root of block digests.
SHARD_BLOCKS = 16
# The most shards that one record announces; a longer span takes several slots. 16 roots fill half of a record's 1 KiB.
MAX_SHARDS = 16
# Spans that one peer may host at a time. As many further slots announce where it will move them.
MAX_SLOTS = 8
MAX_ADDRESSES = 8
MAX_RELAYS = 4
# `fitted` keeps this many addresses and relays before it removes more of the other kind: a second one for the day on
# which the first fails.
_KEPT_WAYS = 2
MAX_RTTS = 8
MAX_NAMES = 8
# A record has at most 1024 bytes; its envelope takes up to 121 of them.
MAX_PAYLOAD_BYTES = 896
# A body is a map that holds lists of lists.
_MAX_PAYLOAD_DEPTH = 4


def intention_slot(slot: int) -> int:
    """The slot in which a peer announces, as `joining`, the span to which it will move the span of `slot`."""
    return MAX_SLOTS + slot


ServerState = Literal["joining", "online", "draining", "offline"]


def _label(max_chars: int, *, min_chars: int = 1) -> Rule:
    """Text that people will see, so it may hold no control characters."""

    def rule(value: Any) -> str:
        if type(value) is not str or not min_chars <= len(value) <= max_chars or not value.isprintable():
            raise ValueError(f"{min_chars} to {max_chars} printable characters")
        return value

    return rule


def _peer(value: Any) -> PeerId:
    return peer_id_of(_key(value))


def _dump_rtts(rtts: tuple[tuple[PeerId, float], ...]) -> list[tuple[bytes, float]]:
    return [(public_key_of(peer_id), rtt_s) for peer_id, rtt_s in rtts]


def _dump_span(span: Span) -> tuple[int, int]:
    return span.start, span.end


_key = binary(KEY_BYTES, KEY_BYTES)
_digest = binary(DIGEST_BYTES, DIGEST_BYTES)
_codecs = many(_label(32), MAX_NAMES)
_adapters = many(_label(128), MAX_NAMES)
_span = built(group(integer(0, MAX_BLOCKS), integer(0, MAX_BLOCKS)), Span)


@dataclass(frozen=True, slots=True)
class Announcement(Message):
    """The fields of every body. `seq` grows with each record of a slot; `expires` is in unix seconds."""

    seq: int = required(integer(0, 2**63 - 1))
    expires: float = required(number(0, 2**53))

    def to_payload(self) -> bytes:
        """The bytes that are signed. The envelope names the kind, so the payload leaves it out."""
        header = self.to_header()
        del header["type"]
        return pack(header)

    @classmethod
    def from_payload(cls, payload: bytes) -> Self:
        """Check the fields and build the body. Ignores unknown fields. Raises RemoteProtocolError naming the field."""
        if len(payload) > MAX_PAYLOAD_BYTES:
            raise RemoteProtocolError(f"{cls.TYPE}: the payload has {len(payload)} bytes, over {MAX_PAYLOAD_BYTES}")
        fields = unpack(payload, max_depth=_MAX_PAYLOAD_DEPTH)
        if type(fields) is not dict:
            raise RemoteProtocolError(f"{cls.TYPE}: the payload is not a map")
        try:
            return cls.from_header(fields)
        except ValueError as error:
            raise RemoteProtocolError(f"{cls.TYPE}: {error}") from None


@dataclass(frozen=True, slots=True)
class PeerRecord(Announcement):
    """The addresses at which the signing peer can be reached.

    addresses: multiaddrs without a peer, best first.
    relays: multiaddrs of relays, each with the relay's PeerId.
    """

    TYPE: ClassVar[str] = "peer"

    addresses: tuple[str, ...] = required(many(_label(MAX_ADDRESS_CHARS), MAX_ADDRESSES))
    relays: tuple[str, ...] = optional(many(_label(MAX_ADDRESS_CHARS), MAX_RELAYS), ())

    def ways_to(self, peer_id: PeerId) -> tuple[Multiaddr, ...]:
        """The addresses that a client can dial to reach `peer_id`, which signed this: direct ones, then relayed ones.

        Leaves out texts that this version cannot read: a newer peer may have more transports.
        """
        direct = [address.with_peer(peer_id) for address in _understood(self.addresses) if address.peer_id is None]
        relayed = [
            replace(address, relay=address.peer_id, peer_id=peer_id)
            for address in _understood(self.relays)
            if address.peer_id is not None
        ]
        return (*direct, *relayed)

    def fitted(self) -> PeerRecord:
        """This record without its last addresses, so many that it fits; the first two of each kind are removed last."""
        body = self
        while len(body.to_payload()) > MAX_PAYLOAD_BYTES:
            if len(body.addresses) > min(len(body.relays), _KEPT_WAYS):
                body = replace(body, addresses=body.addresses[:-1])
            else:
                body = replace(body, relays=body.relays[:-1])
        return body


def _understood(texts: tuple[str, ...]) -> list[Multiaddr]:
    found = []
    for text in texts:
        try:
            address = Multiaddr.parse(text)
        except ValueError:
            continue
        if address.is_dialable and address.relay is None:
            found.append(address)
    return found


@dataclass(frozen=True, slots=True)
class ServerRecord(Announcement):
    """One span that the signing peer hosts. Raises ValueError if span and roots do not fit together.

    throughput: positions a second through one block; 0 if not measured.
    free_tokens: positions that one more row could have.
    adapters: ids of the adapters that sessions may ask for (spec/sessions/adapters.md).
    client_adapters: how many bytes of its own adapter a client may upload for one session; 0: none.
    rtts: round-trip seconds to peers to which this peer may push, most useful first.
    block_roots: one for each shard that the span touches (`block_roots`), or empty while they are unknown.
    slot: the number of this span among the peer's spans, which stays when the span moves; or its `intention_slot`.
    queue_s: seconds that a step takes on this peer beyond what `throughput` says, because it serves other sessions too.
    uplink: bytes a second that the peer can send; 0: unknown.
    head: whether the peer draws tokens for sessions whose last hop it is (spec/sessions/drawing.md).
    """

    TYPE: ClassVar[str] = "server"

    model: bytes = required(_digest)
    span: Span = required(_span, _dump_span)
    state: ServerState = required(choice("joining", "online", "draining", "offline"))
    dtype: str = required(_label(16))
    quantization: str = required(_label(16))
    codecs: tuple[str, ...] = required(_codecs)
    throughput: float = required(number(0, 1e12))
    free_tokens: int = required(integer(0, 2**40))
    max_length: int = required(integer(0, 2**32 - 1))
    adapters: tuple[str, ...] = optional(_adapters, ())
    rtts: tuple[tuple[PeerId, float], ...] = optional(many(group(_peer, number(0, 3600)), MAX_RTTS), (), _dump_rtts)
    block_roots: tuple[bytes, ...] = optional(many(_digest, MAX_SHARDS), ())
    slot: int = optional(integer(0, 2 * MAX_SLOTS - 1), 0)
    client_adapters: int = optional(integer(0, 2**40), 0)
    queue_s: float = optional(number(0, 3600), 0.0)
    uplink: float = optional(number(0, 1e12), 0.0)
    head: bool = optional(boolean, False)

    def __post_init__(self) -> None:
        shards = len(shards_of(self.span))
        if shards > MAX_SHARDS:
            raise ValueError(f"{self.span} touches {shards} shards of {SHARD_BLOCKS} blocks, more than {MAX_SHARDS}")
        if self.block_roots and len(self.block_roots) != shards:
            raise ValueError(f"{self.span} needs {shards} block_roots, not {len(self.block_roots)}")

    def fitted(self) -> ServerRecord:
        """This record without its last RTTs, so many that it fits: RTTs are only hints."""
        body = self
        while body.rtts and len(body.to_payload()) > MAX_PAYLOAD_BYTES:
            body = replace(body, rtts=body.rtts[:-1])
        return body

    def offline(self, *, seq: int, expires: float) -> ServerRecord:
        """The record that withdraws this one and every other record of its slot that expires by `expires`.

        Raises ValueError if this record would outlive it: an old record that turns up again must meet a newer one.
        """
        if seq <= self.seq or expires < self.expires:
            raise ValueError("an offline record must be newer than what it withdraws, and expire no sooner")
        return replace(self, seq=seq, expires=expires, state="offline", rtts=(), block_roots=())


@dataclass(frozen=True, slots=True)
class ModelRecord(Announcement):
    """Names a model digest. `hub_id` and `revision` (a commit) are empty for a local checkpoint."""

    TYPE: ClassVar[str] = "model"

    model: bytes = required(_digest)
    name: str = required(_label(96))
    hub_id: str = required(_label(MAX_HUB_ID_CHARS, min_chars=0))
    revision: str = required(_label(64, min_chars=0))
    block_count: int = required(integer(1, MAX_BLOCKS))


def shards_of(span: Span) -> range:
    """The shards that contain at least one block of `span`."""
    return range(span.start // SHARD_BLOCKS, (span.end - 1) // SHARD_BLOCKS + 1)


def block_roots(span: Span, digests: Sequence[bytes]) -> tuple[bytes, ...]:
    """For each shard, the sha256 of the digests of those blocks of `span` that lie in it.

    digests: 32 bytes for each block of `span`. Raises ValueError for another number of digests.
    """
    if len(digests) != len(span):
        raise ValueError(f"{span} has {len(span)} blocks, not {len(digests)}")
    roots = []
    for shard in shards_of(span):
        first = max(shard * SHARD_BLOCKS, span.start) - span.start
        last = min((shard + 1) * SHARD_BLOCKS, span.end) - span.start
        roots.append(hashlib.sha256(b"".join(digests[first:last])).digest())
    return tuple(roots)


def next_seq(now: float, last: int) -> int:
    """The next `seq`: `now` (unix seconds) in microseconds, but at least `last` + 1, also after a restart."""
    return max(int(now * 1e6), last + 1)
