from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest

from peerd.protocol.identity import PeerId
from peerd.protocol.records.bodies import MAX_PAYLOAD_BYTES
from peerd.protocol.span import Span
from peerd.routing.chains.chain import ChainNeeds, OfferTable
from peerd.routing.chains.probes import next_hops, with_rtts, worth_probing
from peerd.routing.directory.offer import Offer

MakeOffer = Callable[..., Offer]
BLOCKS = Span(0, 32)


@pytest.fixture(scope="module")
def many() -> list[tuple[int, str, float]]:
    random = Random(7)
    return [
        (number, f"{start}:{start + 8}", random.uniform(100, 1000))
        for number in range(200)
        for start in [8 * random.randrange(4)]
    ]


def offers_of(make_offer: MakeOffer, many: list[tuple[int, str, float]]) -> list[Offer]:
    return [make_offer(number, span, throughput=throughput) for number, span, throughput in many]


def test_few_of_many_peers_are_asked_and_some_for_every_block(
    make_offer: MakeOffer, many: list[tuple[int, str, float]]
) -> None:
    offers = offers_of(make_offer, many)
    chosen = worth_probing(OfferTable(offers), BLOCKS, ChainNeeds(), 24, Random(1))
    assert len(chosen) == len({offer.peer_id for offer in chosen}) == 24
    for start in range(0, 32, 8):
        span = Span(start, start + 8)
        fastest = sorted((o for o in offers if o.span == span), key=lambda offer: offer.block_s)
        assert len([offer for offer in chosen if offer.span == span]) >= 4
        # 4.5 chains of 4 hops are asked: the best of each part, but for near ties.
        assert len({o.peer_id for o in chosen} & {o.peer_id for o in fastest[:16]}) >= 3


def test_a_peer_measured_as_far_makes_way_for_others(make_offer: MakeOffer, many: list[tuple[int, str, float]]) -> None:
    offers = offers_of(make_offer, many)
    table, rtts = OfferTable(offers), dict[PeerId, float]()
    asked: set[PeerId] = set()
    for seed in range(4):
        chosen = {o.peer_id for o in worth_probing(table, BLOCKS, ChainNeeds(rtts), 24, Random(seed))}
        assert not chosen & asked
        asked |= chosen
        rtts |= dict.fromkeys(chosen, 0.3)


def test_a_peer_measured_as_near_is_measured_again(make_offer: MakeOffer, many: list[tuple[int, str, float]]) -> None:
    table = OfferTable(offers_of(make_offer, many))
    chosen = worth_probing(table, BLOCKS, ChainNeeds(), 24, Random(1))
    needs = ChainNeeds(dict.fromkeys((offer.peer_id for offer in chosen), 0.001))
    again = worth_probing(table, BLOCKS, needs, 12, Random(2))
    assert len({offer.peer_id for offer in again} & needs.rtts_s.keys()) >= 8


def test_clients_do_not_all_ask_the_same(make_offer: MakeOffer) -> None:
    offers = [make_offer(number, "0:8", throughput=1000) for number in range(60)]
    table = OfferTable(offers)
    asked = [{o.peer_id for o in worth_probing(table, Span(0, 8), ChainNeeds(), 12, Random(n))} for n in range(40)]
    assert set().union(*asked) == {offer.peer_id for offer in offers}


def test_a_block_that_only_one_has_keeps_nobody_from_asking_others(make_offer: MakeOffer) -> None:
    only = make_offer(0, "0:8")
    twins = [make_offer(number, "8:16") for number in range(1, 9)]
    chosen = worth_probing(OfferTable([only, *twins]), Span(0, 16), ChainNeeds(), 8, Random(1))
    assert len(chosen) == 8
    assert only in chosen


def test_nobody_is_asked_where_nobody_is_there_or_all_are_avoided(make_offer: MakeOffer) -> None:
    offers = [make_offer(number, "0:8") for number in range(3)]
    assert worth_probing(OfferTable([]), BLOCKS, ChainNeeds(), 8, Random(1)) == []
    avoid = [offer.peer_id for offer in offers]
    assert worth_probing(OfferTable(offers), Span(0, 8), ChainNeeds(), 8, Random(1), avoid) == []


def test_those_that_begin_where_a_span_ends_or_overlap_it_may_follow(make_offer: MakeOffer) -> None:
    after, overlapping = make_offer(1, "8:16"), make_offer(2, "4:16", throughput=90)
    inside = make_offer(3, "2:6")
    strangers = [
        make_offer(4, "0:4"),
        make_offer(5, "9:16"),
        make_offer(6, "8:16", state="draining"),
        make_offer(0, "8:16"),
    ]
    found = next_hops([inside, *strangers, overlapping, after], strangers[-1].peer_id, Span(4, 8), {})
    assert found == [after, overlapping, inside]
    assert next_hops([make_offer(1, "2:4")], strangers[-1].peer_id, Span(4, 8), {}) == []


def test_the_near_ones_are_announced_first_and_the_unknown_not_at_all(make_offer: MakeOffer) -> None:
    offers = [make_offer(number, "8:16") for number in range(1, 13)]
    own = make_offer(0, "0:8", block_roots=(b"r" * 32,))
    rtts = {offer.peer_id: 0.3 - 0.02 * number for number, offer in enumerate(offers[:11])}
    record = with_rtts(own.record, offers, own.peer_id, rtts, 8)
    assert [peer for peer, _ in record.rtts] == [offer.peer_id for offer in offers[10:2:-1]]
    assert record.rtts[0][1] == pytest.approx(0.1)
    assert len(record.fitted().to_payload()) <= MAX_PAYLOAD_BYTES
