from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import replace
from random import Random

import pytest
import trio

from peerd.client.finding.finder import SwarmFinder
from peerd.protocol.errors import NoChain
from peerd.protocol.identity import Identity, PeerId
from peerd.protocol.records.envelope import PeerRecord, ServerRecord, sign_record
from peerd.protocol.span import Span
from peerd.routing.directory.offer import Offer
from peerd.routing.failures.track_record import TrackRecord

MODEL = bytes(range(32))


def offer(number: int, **fields: object) -> Offer:
    identity = Identity.from_seed(number.to_bytes(32, "big"))
    body = {
        "seq": 1,
        "expires": 60.0,
        "model": MODEL,
        "span": Span(0, 8),
        "state": "online",
        "dtype": "float32",
        "quantization": "none",
        "codecs": ("exact",),
        "throughput": 1000.0,
        "free_tokens": 4096,
        "max_length": 2048,
    }
    peer = PeerRecord(seq=1, expires=60.0, addresses=("/ip4/10.0.0.1/tcp/1/ws",))
    return Offer(identity.peer_id, ServerRecord(**body | fields), (), sign_record(identity, peer))


class Announced:
    """What the directory says: the same list until something else is announced."""

    def __init__(self, offers: list[Offer]) -> None:
        self.offers = offers
        self.doubted: list[PeerId] = []

    async def servers(self, model: bytes, block_count: int, *, max_age_s: float = 0.0) -> list[Offer]:
        await trio.lowlevel.checkpoint()
        return self.offers

    def doubt(self, peer_id: PeerId) -> None:
        self.doubted.append(peer_id)

    def odd_clocks(self, model: bytes, missing: Collection[tuple[int, int]]) -> list[str]:
        return []


def finder_of(announced: Announced, seed: int) -> SwarmFinder:
    track_record = TrackRecord(trio.current_time)
    for each in announced.offers:
        track_record.measured(each.peer_id, Random(seed).uniform(0.019, 0.021))
    return SwarmFinder(announced, track_record, MODEL, 8, Random(seed))


async def chosen(finder: SwarmFinder) -> PeerId:
    chain = await finder.find(Span(0, 8), tokens=10, exclude=())
    return chain.hops[0].peer_id


async def test_fifty_clients_share_servers_though_all_have_heard_that_one_is_less_busy() -> None:
    offers = [offer(number, queue_s=0.1 if number else 0.02) for number in range(10)]
    announced = Announced(offers)
    counts = Counter([await chosen(finder_of(announced, client)) for client in range(50)])
    # It has most, but not all of them: then it would be the busiest.
    assert counts.most_common(1)[0][0] == offers[0].peer_id
    assert 10 <= counts[offers[0].peer_id] <= 32
    assert len(counts) >= 7


async def test_a_server_that_is_much_busier_is_left_alone_by_most() -> None:
    offers = [offer(number, queue_s=0.0 if number else 1.0) for number in range(4)]
    announced = Announced(offers)
    counts = Counter([await chosen(finder_of(announced, client)) for client in range(50)])
    assert counts[offers[0].peer_id] <= 5


async def test_a_client_keeps_its_opinion_when_announcements_are_renewed() -> None:
    announced = Announced([offer(number, queue_s=0.1) for number in range(10)])
    finder = finder_of(announced, 3)
    before = await chosen(finder)
    for seq in range(2, 12):
        announced.offers = [replace(o, record=replace(o.record, seq=seq)) for o in announced.offers]
        assert await chosen(finder) == before


async def test_where_nobody_else_is_left_a_peer_that_did_not_answer_is_asked_again_soon() -> None:
    """It may be back long before its next question is due."""
    gone, elsewhere = offer(0, span=Span(0, 4)), offer(1, span=Span(4, 8))
    record = TrackRecord(trio.current_time, by_proof=True)
    finder = SwarmFinder(Announced([gone, elsewhere]), record, MODEL, 8, Random(0))
    await finder.offers(0.0)
    for each in (gone, elsewhere):
        record.doubt(each.peer_id)
    for _ in range(4):
        for peer_id in record.take_doubted():
            record.unanswered(peer_id)
        await trio.sleep(record.asks_at_s - trio.current_time())
    for peer_id in record.take_doubted():
        record.unanswered(peer_id)
    assert record.asks_at_s > trio.current_time() + 30
    await trio.sleep(2)
    with pytest.raises(NoChain):
        await finder.find(Span(0, 4), tokens=10, exclude=())
    assert record.take_doubted() == [gone.peer_id]
    record.answered(gone.peer_id)
    assert (await finder.find(Span(0, 4), tokens=10, exclude=())).hops[0].peer_id == gone.peer_id
