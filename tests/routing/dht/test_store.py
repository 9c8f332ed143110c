from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from ipaddress import ip_address

import pytest

from peerd.protocol.encoding.packing import pack
from peerd.protocol.identity import Identity
from peerd.protocol.records.envelope import MAX_TTL_S, SKEW_S, Announcement, ServerRecord, sign_record
from peerd.protocol.records.keys import keys_of, server_key, split_keys_of
from peerd.protocol.span import Span
from peerd.routing.dht.store import RecordStore, StoreLimits

PARTS = [(), *((nibble,) for nibble in range(16))]
MODEL = bytes(range(32))
KEY = server_key(MODEL, 0)
MakeServer = Callable[..., ServerRecord]


class Clock:
    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def identity(number: int) -> Identity:
    return Identity.from_seed(number.to_bytes(32, "big"))


ME = identity(0)


def signed(body: Announcement, who: Identity = ME) -> bytes:
    return sign_record(who, body).encode()


@pytest.fixture
def clock(epoch: float) -> Clock:
    return Clock(epoch)


@pytest.fixture
def store(clock: Clock) -> RecordStore:
    return RecordStore(clock)


def test_a_key_holds_one_record_of_each_slot(store: RecordStore, server_body: MakeServer) -> None:
    wanted = []
    for number in range(3):
        for slot in range(2):
            data = signed(server_body(slot=slot), identity(number))
            assert store.put(KEY, data, storer=identity(number).peer_id) == "stored"
            wanted.append(data)
    assert store.get_encoded(KEY) == tuple(wanted)
    assert [record.signed.encode() for record in store.get(KEY)] == wanted
    assert store.used_bytes == sum(map(len, wanted))


def test_a_newer_record_replaces_and_all_others_change_nothing(store: RecordStore, server_body: MakeServer) -> None:
    put = partial(store.put, KEY, storer=ME.peer_id)
    assert put(signed(server_body(seq=5))) == "stored"
    assert put(signed(server_body(seq=5))) == "known"
    newest = signed(server_body(seq=6))
    assert put(newest) == "stored"
    assert put(signed(server_body(seq=5))) == "older"
    assert put(signed(server_body(seq=6, free_tokens=1))) == "older"
    assert store.get_encoded(KEY) == (newest,)
    assert store.used_bytes == len(newest)


def test_offline_outlives_what_it_withdraws(store: RecordStore, clock: Clock, server_body: MakeServer) -> None:
    body = server_body(expires=clock.now + 60)
    offline = body.offline(seq=2, expires=clock.now + 60)
    for one, outcome in ((body, "stored"), (offline, "stored"), (body, "older")):
        assert store.put(KEY, signed(one), storer=ME.peer_id) == outcome
    clock.now += 60
    assert store.put(KEY, signed(body), storer=ME.peer_id) == "invalid"
    assert len(store) == 0


def test_a_record_ends_when_it_expires(store: RecordStore, clock: Clock, server_body: MakeServer) -> None:
    start = clock.now
    for number, ttl in enumerate((10, 20, 30)):
        store.put(KEY, signed(server_body(expires=start + ttl), identity(number)), storer=ME.peer_id)
    for passed, left in ((9.9, 3), (10, 2), (19.9, 2), (20, 1), (30, 0)):
        clock.now = start + passed
        assert len(store.get(KEY)) == len(store) == left
    assert store.used_bytes == 0


def test_a_replaced_record_does_not_take_its_successor_along(
    store: RecordStore, clock: Clock, server_body: MakeServer
) -> None:
    store.put(KEY, signed(server_body(seq=1, expires=clock.now + 10)), storer=ME.peer_id)
    store.put(KEY, signed(server_body(seq=2, expires=clock.now + 20)), storer=ME.peer_id)
    clock.now += 15
    assert [record.body.seq for record in store.get(KEY)] == [2]


def test_what_is_not_valid_is_refused(store: RecordStore, clock: Clock, server_body: MakeServer) -> None:
    body = server_body()
    good = sign_record(ME, body)
    bad = {
        "noise": b"noise",
        "nothing": b"",
        "forged": replace(good, payload=server_body(seq=9).to_payload()).encode(),
        "unsigned": replace(good, signature=bytes(64)).encode(),
        "of another": replace(good, public_key=identity(1).public_key).encode(),
        "of an unknown kind": replace(good, kind="rumour").encode(),
        "expired": signed(server_body(expires=clock.now)),
        "far too long": signed(server_body(expires=clock.now + MAX_TTL_S + SKEW_S + 1)),
        "oversized": pack([good.public_key, good.kind, bytes(1024), good.signature]),
        "trailing": good.encode() + b"\0",
        "of other blocks": signed(server_body(span=Span(16, 20))),
        "of another model": signed(server_body(model=bytes(32))),
    }
    for what, data in bad.items():
        assert store.put(KEY, data, storer=ME.peer_id) == "invalid", what
    assert len(store) == store.used_bytes == 0


def test_a_record_is_taken_under_its_own_keys_and_their_parts_only(store: RecordStore, server_body: MakeServer) -> None:
    body = server_body(span=Span(8, 40))
    own = {*keys_of(body, ME.peer_id), *split_keys_of(body, ME.peer_id)}
    every = {server_key(MODEL, shard, *path) for shard in range(4) for path in PARTS}
    for key in every:
        assert store.put(key, signed(body), storer=ME.peer_id) == ("stored" if key in own else "invalid")
    assert len(own) == len(store) == 6


def test_a_full_key_says_that_it_split_for_as_long_as_the_refused_record_lives(
    clock: Clock, server_body: MakeServer
) -> None:
    store = RecordStore(clock, StoreLimits(records_a_key=2))
    for number in range(2):
        data = signed(server_body(expires=clock.now + 10), identity(number))
        assert store.put(KEY, data, storer=identity(number).peer_id) == "stored"
    assert not store.is_split(KEY)
    late = signed(server_body(expires=clock.now + 30), identity(2))
    assert store.put(KEY, late, storer=identity(2).peer_id) == "full"
    assert store.put(KEY, signed(server_body(seq=2), identity(1)), storer=identity(1).peer_id) == "stored"
    clock.now += 29
    assert store.is_split(KEY)
    clock.now += 1
    assert not store.is_split(KEY)


def test_a_storer_uses_up_its_own_share_only(clock: Clock, server_body: MakeServer) -> None:
    size = len(signed(server_body()))
    store = RecordStore(clock, StoreLimits(storer_bytes=2 * size))
    greedy, modest = identity(1).peer_id, identity(2).peer_id
    outcomes = [store.put(KEY, signed(server_body(), identity(number)), storer=greedy) for number in range(3, 6)]
    assert outcomes == ["stored", "stored", "quota"]
    assert store.put(KEY, signed(server_body(), identity(5)), storer=modest) == "stored"
    # A peer whose share is used up may still renew its records.
    assert store.put(KEY, signed(server_body(seq=2), identity(3)), storer=greedy) == "stored"
    clock.now += 300
    assert store.put(KEY, signed(server_body(expires=clock.now + 9)), storer=greedy) == "stored"


def test_a_public_network_has_a_share_and_a_lan_has_none(clock: Clock, server_body: MakeServer) -> None:
    size = len(signed(server_body()))
    store = RecordStore(clock, StoreLimits(network_bytes=size))

    def put(number: int, source: str | None) -> str:
        who = identity(number)
        address = None if source is None else ip_address(source)
        return store.put(KEY, signed(server_body(), who), storer=who.peer_id, source=address)

    assert put(1, "8.8.4.1") == "stored"
    assert put(2, "8.8.4.200") == "quota"
    assert put(3, "::ffff:8.8.4.3") == "quota"
    assert put(4, "8.8.5.1") == "stored"
    assert put(5, "2a00:1:2:3::1") == "stored"
    assert put(6, "2a00:1:2:ffff::1") == "quota"
    for number, lan in enumerate(["127.0.0.1", "127.0.0.1", "192.168.0.7", "192.168.0.8", "::1", None, None], 10):
        assert put(number, lan) == "stored"


def test_one_network_cannot_take_all_places_of_a_key(clock: Clock, server_body: MakeServer) -> None:
    store = RecordStore(clock, StoreLimits(records_a_key=4, network_records_a_key=2))
    outcomes = []
    for number, source in enumerate(["8.8.4.1", "8.8.4.2", "8.8.4.3", "8.8.5.1", "8.8.6.1", "8.8.7.1"]):
        who = identity(number)
        data = signed(server_body(), who)
        outcomes.append(store.put(KEY, data, storer=who.peer_id, source=ip_address(source)))
    assert outcomes == ["stored", "stored", "full", "stored", "stored", "full"]
    assert store.is_split(KEY)


def test_a_full_store_takes_renewals_and_refuses_the_rest(clock: Clock, server_body: MakeServer) -> None:
    size = len(signed(server_body()))
    store = RecordStore(clock, StoreLimits(total_bytes=2 * size))
    for number, outcome in enumerate(["stored", "stored", "quota"]):
        assert store.put(KEY, signed(server_body(), identity(number)), storer=identity(number).peer_id) == outcome
    assert store.put(KEY, signed(server_body(seq=2)), storer=ME.peer_id) == "stored"
    assert store.used_bytes == 2 * size


def test_renewing_a_record_forever_takes_no_memory(store: RecordStore, clock: Clock, server_body: MakeServer) -> None:
    for seq in range(3000):
        assert store.put(KEY, signed(server_body(seq=seq)), storer=ME.peer_id) == "stored"
    assert len(store._ends) < 1100
    clock.now += 300
    assert len(store) == 0
    assert store._ends == []
