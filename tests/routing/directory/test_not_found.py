"""Servers whose addresses nobody has: anybody can announce hundreds, which must cost no client a storm of lookups."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import trio

from peerd.protocol.identity import Identity
from peerd.protocol.records.envelope import PeerRecord, ServerRecord, VerifiedRecord, open_record, sign_record
from peerd.protocol.records.keys import peer_key
from peerd.routing.dht.record_sets import RecordKey, servers_of
from peerd.routing.directory.directory import Directory

MODEL = bytes(range(32))


class Source:
    """Records by key, and how often each key was asked for."""

    def __init__(self) -> None:
        self.records: dict[bytes, list[VerifiedRecord]] = {}
        self.asked: Counter[bytes] = Counter()

    async def get_many(self, wanted: Sequence[RecordKey], *, whole: bool = False) -> list[list[VerifiedRecord]]:
        await trio.lowlevel.checkpoint()
        self.asked.update(one.key for one in wanted)
        return [self.records.get(one.key, []) for one in wanted]


def announce(
    source: Source, number: int, server_body: Callable[..., ServerRecord], now: float, *, found: bool
) -> Identity:
    identity = Identity.from_seed(number.to_bytes(32, "big"))
    body = server_body(expires=now + 500)
    signed = sign_record(identity, body)
    source.records.setdefault(servers_of(MODEL, 0).key, []).append(open_record(signed, now=now))
    if found:
        peer = sign_record(identity, PeerRecord(seq=1, expires=now + 500, addresses=("/ip4/10.0.0.1/tcp/1/ws",)))
        source.records[peer_key(identity.peer_id)] = [open_record(peer, now=now)]
    return identity


async def test_servers_without_addresses_cause_no_storm(
    server_body: Callable[..., ServerRecord], unix_now: Callable[[], float]
) -> None:
    source = Source()
    directory = Directory(source, unix_now)
    for number in range(256):
        announce(source, number, server_body, unix_now(), found=False)
    for _ in range(55):
        assert await directory.servers(MODEL, 16, max_age_s=1.0) == []
        await trio.sleep(1)
    of_addresses = sum(source.asked.values()) - source.asked[servers_of(MODEL, 0).key]
    # Once each, and then a few at a time, ever more seldom.
    assert 256 < of_addresses < 256 + 55 * 16
    assert max(source.asked[key] for key in source.asked if key != servers_of(MODEL, 0).key) <= 6


async def test_a_new_server_does_not_wait_behind_them(
    server_body: Callable[..., ServerRecord], unix_now: Callable[[], float]
) -> None:
    source = Source()
    directory = Directory(source, unix_now)
    for number in range(200):
        announce(source, number, server_body, unix_now(), found=False)
    for _ in range(20):
        await directory.servers(MODEL, 16, max_age_s=1.0)
        await trio.sleep(1)
    new = announce(source, 1000, server_body, unix_now(), found=True)
    assert [offer.peer_id for offer in await directory.servers(MODEL, 16, max_age_s=1.0)] == [new.peer_id]


async def test_one_whose_addresses_come_a_little_later_is_found_soon(
    server_body: Callable[..., ServerRecord], unix_now: Callable[[], float]
) -> None:
    source = Source()
    directory = Directory(source, unix_now)
    identity = announce(source, 1, server_body, unix_now(), found=False)
    assert await directory.servers(MODEL, 16) == []
    now = unix_now()
    peer = sign_record(identity, PeerRecord(seq=1, expires=now + 500, addresses=("/ip4/10.0.0.1/tcp/1/ws",)))
    source.records[peer_key(identity.peer_id)] = [open_record(peer, now=now)]
    await trio.sleep(1)
    assert [offer.peer_id for offer in await directory.servers(MODEL, 16)] == [identity.peer_id]
