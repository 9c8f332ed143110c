from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest

from peerd.protocol.identity import Identity, PeerId
from peerd.protocol.records.envelope import (
    Announcement,
    PeerRecord,
    ServerRecord,
    VerifiedRecord,
    open_record,
    sign_record,
)
from peerd.protocol.records.keys import keys_of
from peerd.protocol.span import Span
from peerd.routing.dht.record_sets import RecordKey
from peerd.routing.directory.announcer import TTL_S
from peerd.routing.directory.directory import CACHE_S, Directory

MODEL = bytes(range(32))
MakeServer = Callable[..., ServerRecord]
MakePeer = Callable[..., PeerRecord]


@dataclass
class Swarm:
    """What is announced, under its keys, and what was asked."""

    now: float
    records: dict[bytes, list[VerifiedRecord]] = field(default_factory=dict)
    asked: list[Sequence[RecordKey]] = field(default_factory=list)

    def announce(self, number: int, *bodies: Announcement) -> str:
        identity = Identity.from_seed(number.to_bytes(32, "big"))
        for body in bodies:
            record = open_record(sign_record(identity, body), now=self.now)
            for key in keys_of(body, identity.peer_id):
                self.records.setdefault(key, []).append(record)
        return identity.peer_id

    async def get_many(self, wanted: Sequence[RecordKey], *, whole: bool = False) -> list[list[VerifiedRecord]]:
        self.asked.append(wanted)
        return [self.records.get(one.key, []) for one in wanted]


@pytest.fixture
def swarm(epoch: float) -> Swarm:
    return Swarm(epoch)


@pytest.fixture
def directory(swarm: Swarm) -> Directory:
    return Directory(swarm, lambda: swarm.now)


async def test_servers_of_all_shards_are_offered_with_the_ways_to_them(
    swarm: Swarm, directory: Directory, server_body: MakeServer, peer_body: MakePeer
) -> None:
    first = swarm.announce(1, server_body(span=Span(0, 20)), peer_body())
    second = swarm.announce(2, server_body(span=Span(30, 40)), server_body(span=Span(2, 4), slot=1), peer_body())
    offers = await directory.servers(MODEL, 40)
    assert sorted((offer.peer_id, str(offer.span)) for offer in offers) == sorted(
        [(first, "0:20"), (second, "30:40"), (second, "2:4")]
    )
    for offer in offers:
        assert [str(address) for address in offer.addresses] == [f"/ip4/10.0.0.1/tcp/1/ws/p2p/{offer.peer_id}"]
        assert offer.peer_record.peer_id == offer.peer_id


async def test_offline_unreachable_and_unsuitable_servers_are_not_offered(
    swarm: Swarm, directory: Directory, server_body: MakeServer, peer_body: MakePeer
) -> None:
    swarm.announce(1, server_body(state="offline"), peer_body())
    swarm.announce(2, server_body())
    swarm.announce(3, server_body(span=Span(0, 9)), peer_body())
    draining = swarm.announce(4, server_body(state="draining"), peer_body())
    assert [offer.peer_id for offer in await directory.servers(MODEL, 8)] == [draining]


async def test_our_own_spans_are_offered_to_us_though_others_are_told_that_they_drain(
    swarm: Swarm, directory: Directory, server_body: MakeServer, peer_body: MakePeer
) -> None:
    own = swarm.announce(1, server_body(state="draining"), peer_body())
    other = swarm.announce(2, server_body(state="draining"), peer_body())
    directory.open_to_us.add(PeerId(own))
    states = {offer.peer_id: offer.record.state for offer in await directory.servers(MODEL, 8)}
    assert states == {own: "online", other: "draining"}


async def test_a_span_that_moved_is_offered_once(
    swarm: Swarm, directory: Directory, server_body: MakeServer, peer_body: MakePeer
) -> None:
    swarm.announce(1, server_body(seq=2, span=Span(16, 20)), server_body(seq=1, span=Span(0, 4)), peer_body())
    assert [str(offer.span) for offer in await directory.servers(MODEL, 40)] == ["16:20"]


async def test_an_older_copy_does_not_come_back(
    swarm: Swarm, directory: Directory, server_body: MakeServer, peer_body: MakePeer
) -> None:
    swarm.announce(1, server_body(seq=2, state="offline"), peer_body())
    assert await directory.servers(MODEL, 8) == []
    swarm.records.clear()
    swarm.announce(1, server_body(seq=1), peer_body())
    swarm.now += CACHE_S
    assert await directory.servers(MODEL, 8) == []


async def test_lookups_are_not_repeated_at_once_nor_forever(
    swarm: Swarm, directory: Directory, server_body: MakeServer, peer_body: MakePeer
) -> None:
    swarm.announce(1, server_body(expires=swarm.now + 60), peer_body())
    await directory.servers(MODEL, 8)
    asked = len([one for wanted in swarm.asked for one in wanted])
    assert len(await directory.servers(MODEL, 8)) == 1
    assert len([one for wanted in swarm.asked for one in wanted]) == asked
    swarm.announce(2, server_body(), peer_body())
    assert len(await directory.servers(MODEL, 8)) == 1
    assert len(await directory.servers(MODEL, 8, max_age_s=0)) == 2
    # Peer 1 is heard of no more.
    swarm.records = {key: records[1:] for key, records in swarm.records.items()}
    swarm.now += 60
    assert len(await directory.servers(MODEL, 8)) == 1


async def test_nobody_is_offered_while_nobody_serves(directory: Directory) -> None:
    assert await directory.servers(MODEL, 80) == []


async def test_peers_are_not_looked_up_again_whether_they_are_found_or_not(
    swarm: Swarm, directory: Directory, server_body: MakeServer, peer_body: MakePeer
) -> None:
    swarm.announce(1, server_body(), peer_body())
    swarm.announce(2, server_body())
    await directory.servers(MODEL, 8)
    swarm.asked.clear()
    await directory.servers(MODEL, 8)
    assert [one for wanted in swarm.asked for one in wanted] == []
    swarm.now += CACHE_S
    await directory.servers(MODEL, 8)
    # The shard, and the peer that was not found.
    assert len([one for wanted in swarm.asked for one in wanted]) == 2


async def test_a_peers_record_stays_valid_for_a_while_when_handed_on(
    swarm: Swarm, directory: Directory, peer_body: MakePeer
) -> None:
    peer_id = PeerId(swarm.announce(1, peer_body(seq=1, expires=swarm.now + 100)))
    first = await directory.peer_record(peer_id)
    swarm.records.clear()
    swarm.announce(1, peer_body(seq=2, expires=swarm.now + 600))
    swarm.now += 30
    assert await directory.peer_record(peer_id) == first
    swarm.now += 20
    second = await directory.peer_record(peer_id)
    assert second is not None
    assert open_record(second, now=swarm.now).body.seq == 2


async def test_a_peer_that_was_not_where_its_record_says_is_looked_up_anew(
    swarm: Swarm, directory: Directory, peer_body: MakePeer
) -> None:
    peer_id = PeerId(swarm.announce(1, peer_body(seq=1, expires=swarm.now + 600)))
    first = await directory.peer_record(peer_id)
    swarm.announce(1, peer_body(seq=2, expires=swarm.now + 600))
    assert await directory.peer_record(peer_id) == first
    directory.doubt(peer_id)
    second = await directory.peer_record(peer_id)
    assert second is not None
    assert open_record(second, now=swarm.now).body.seq == 2
    # An older copy does not come back for it, and peers that were never looked up are not remembered.
    swarm.records.clear()
    directory.doubt(peer_id)
    assert await directory.peer_record(peer_id) == second
    directory.doubt(Identity.from_seed(bytes(32)).peer_id)
    assert len(directory._peers) == 1


async def test_a_peer_that_nobody_knows_has_no_record(directory: Directory) -> None:
    assert await directory.peer_record(Identity.from_seed(bytes(32)).peer_id) is None


async def test_offers_are_the_same_until_something_changes(
    swarm: Swarm, directory: Directory, server_body: MakeServer, peer_body: MakePeer
) -> None:
    for number in range(3):
        swarm.announce(number, server_body(span=Span(0, 4)), peer_body())
    first = await directory.servers(MODEL, 4, max_age_s=0.0)
    assert await directory.servers(MODEL, 4, max_age_s=0.0) is first
    swarm.announce(1, server_body(span=Span(0, 3), seq=2))
    second = await directory.servers(MODEL, 4, max_age_s=0.0)
    assert sorted(str(offer.span) for offer in second) == ["0:3", "0:4", "0:4"]
    # Only what has changed is read again.
    assert len({id(offer) for offer in first} & {id(offer) for offer in second}) == 2


async def test_the_holders_of_blocks_are_known_without_their_addresses(
    swarm: Swarm, directory: Directory, server_body: MakeServer
) -> None:
    expected = {
        (swarm.announce(1, server_body(span=Span(0, 4))), "online"),
        (swarm.announce(2, server_body(span=Span(16, 20), state="joining", slot=9)), "joining"),
    }
    swarm.announce(3, server_body(state="offline"))
    swarm.announce(4, server_body(span=Span(38, 44)))
    for _ in range(2):
        found = await directory.holdings(MODEL, 40)
        assert {(one.peer_id, one.record.state) for one in found} == expected
    assert len(swarm.asked) == 2, "it is looked up each time"


async def test_a_ghost_is_believed_for_one_lifetime_whatever_its_clock_said(
    swarm: Swarm, directory: Directory, server_body: MakeServer, peer_body: MakePeer
) -> None:
    swarm.announce(1, server_body(seq=1, expires=swarm.now + 600), peer_body(expires=swarm.now + 600))
    living = swarm.announce(2, server_body(seq=1, expires=swarm.now + 60), peer_body(expires=swarm.now + 600))
    for round_number in range(1, 16):
        # Another peer holds the record of the first, and hands it out all the time.
        offers = await directory.servers(MODEL, 8)
        assert len(offers) == (2 if 20 * (round_number - 1) <= TTL_S else 1)
        assert living in {offer.peer_id for offer in offers}
        swarm.now += 20
        swarm.announce(2, server_body(seq=1 + round_number, expires=swarm.now + 60))


async def test_a_record_that_an_old_store_hands_out_again_does_not_bring_a_ghost_back(
    swarm: Swarm, directory: Directory, server_body: MakeServer, peer_body: MakePeer
) -> None:
    swarm.announce(1, server_body(seq=5, expires=swarm.now + 60), peer_body(expires=swarm.now + 600))
    assert len(await directory.servers(MODEL, 8)) == 1
    # It leaves: what outlives every record of its own is what counts.
    swarm.announce(1, server_body(seq=6, state="offline", expires=swarm.now + 60))
    swarm.now += CACHE_S
    assert await directory.servers(MODEL, 8) == []
    for seq in (5, 4):
        for key in list(swarm.records):
            swarm.records[key] = [r for r in swarm.records[key] if not isinstance(r.body, ServerRecord)]
        swarm.announce(1, server_body(seq=seq, expires=swarm.now + 20))
        swarm.now += CACHE_S
        assert await directory.servers(MODEL, 8) == []
