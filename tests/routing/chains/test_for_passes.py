"""Chains for training passes, against every chain that there is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import pytest

from peerd.protocol.identity import Identity, PeerId
from peerd.protocol.span import Span
from peerd.routing.chains.chain import HOP_S, NEAR_BEST, ChainNeeds, plan_chain
from peerd.routing.directory.offer import Offer

MakeOffer = Callable[..., Offer]
Runs = list[tuple[Offer, int]]


def every_chain(offers: list[Offer], at: int, blocks: int, *, again: bool = False) -> Iterator[Runs]:
    """Each chain as offers with the number of blocks that each runs; none is used twice, unless `again`."""
    if at == blocks:
        yield []
    for number, offer in enumerate(offers):
        if at in offer.span:
            others = offers if again else offers[:number] + offers[number + 1 :]
            for end in range(at + 1, min(offer.span.end, blocks) + 1):
                for rest in every_chain(others, end, blocks, again=again):
                    yield [(offer, end - at), *rest]


def sending_s(offer: Offer, needs: ChainNeeds) -> float:
    return needs.positions * needs.position_bytes / offer.record.uplink if offer.record.uplink else 0.0


def total_s(runs: Runs, needs: ChainNeeds) -> float:
    return sum(
        needs.rtts_s[offer.peer_id]
        + HOP_S
        + offer.record.queue_s
        + count * offer.block_s * needs.positions
        + sending_s(offer, needs)
        for offer, count in runs
    )


def slowest_s(runs: Runs, needs: ChainNeeds) -> float:
    return max(
        max(HOP_S + offer.record.queue_s + count * offer.block_s * needs.positions, sending_s(offer, needs))
        for offer, count in runs
    )


def random_case(make_offer: MakeOffer, random: Random, blocks: int) -> tuple[list[Offer], dict[PeerId, float]]:
    offers = [make_offer(5, f"0:{blocks}", throughput=20)]
    for number in range(5):
        start = random.randrange(blocks - 1)
        fields = {
            "throughput": random.uniform(10, 200),
            "queue_s": random.choice([0.0, random.uniform(0, 0.2)]),
            "uplink": random.choice([0.0, random.uniform(1e4, 1e6)]),
        }
        offers.append(make_offer(number, f"{start}:{random.randrange(start + 1, blocks + 1)}", **fields))
    ids = [Identity.from_seed(number.to_bytes(32, "big")).peer_id for number in range(6)]
    return offers, {peer: random.uniform(0.001, 0.4) for peer in ids}


@pytest.mark.parametrize("seed", range(20))
def test_no_chain_answers_one_pass_much_sooner(make_offer: MakeOffer, seed: int) -> None:
    random = Random(seed)
    offers, rtts_s = random_case(make_offer, random, 5)
    needs = ChainNeeds(rtts_s, positions=8, position_bytes=4096, requests=1)
    chain = plan_chain(offers, Span(0, 5), needs=needs, random=random)
    best = min(total_s(runs, needs) for runs in every_chain(offers, 0, 5, again=True))
    assert best - 1e-9 <= chain.cost_s <= best * NEAR_BEST + 1e-9
    assert chain.cost_s == pytest.approx(total_s([(hop.offer, len(hop.span)) for hop in chain.hops], needs))


@pytest.mark.parametrize("seed", range(20))
def test_no_chain_takes_many_passes_much_faster(make_offer: MakeOffer, seed: int) -> None:
    random = Random(seed)
    offers, rtts_s = random_case(make_offer, random, 5)
    needs = ChainNeeds(rtts_s, positions=8, position_bytes=4096, requests=10**6)
    chain = plan_chain(offers, Span(0, 5), needs=needs, random=random)
    runs = [(hop.offer, len(hop.span)) for hop in chain.hops]
    best = min(slowest_s(runs, needs) for runs in every_chain(offers, 0, 5))
    assert best - 1e-9 <= slowest_s(runs, needs) <= best * NEAR_BEST + 1e-9
    assert chain.slowest_s == pytest.approx(slowest_s(runs, needs))
    assert chain.cost_s == pytest.approx(total_s(runs, needs))
    assert len({hop.peer_id for hop in chain.hops}) == len(chain.hops)
    assert [hop.span.end for hop in chain.hops[:-1]] == [hop.span.start for hop in chain.hops[1:]]


@pytest.mark.parametrize("requests", [2, 8, 32])
@pytest.mark.parametrize("seed", range(8))
def test_the_last_of_some_passes_is_answered_soon(make_offer: MakeOffer, seed: int, requests: int) -> None:
    random = Random(seed)
    offers, rtts_s = random_case(make_offer, random, 5)
    needs = ChainNeeds(rtts_s, positions=8, position_bytes=4096, requests=requests)
    chain = plan_chain(offers, Span(0, 5), needs=needs, random=random)
    best = min(total_s(runs, needs) + (requests - 1) * slowest_s(runs, needs) for runs in every_chain(offers, 0, 5))
    # A search that gives up in time finds nearly the best.
    assert chain.cost_s + (requests - 1) * chain.slowest_s <= best * 1.15


def test_many_passes_share_their_blocks_among_peers_where_one_would_rather_stay(make_offer: MakeOffer) -> None:
    offers = [make_offer(number, "0:8", throughput=100) for number in range(4)]
    needs: dict[str, Any] = {"rtts_s": {offer.peer_id: 0.2 for offer in offers}, "positions": 10}
    one = plan_chain(offers, Span(0, 8), needs=ChainNeeds(**needs, requests=1), random=Random(1))
    many = plan_chain(offers, Span(0, 8), needs=ChainNeeds(**needs, requests=10**6), random=Random(1))
    assert [len(hop.span) for hop in one.hops] == [8]
    assert [len(hop.span) for hop in many.hops] == [2, 2, 2, 2]


def test_of_equally_fast_chains_the_nearest_wins(make_offer: MakeOffer) -> None:
    offers = [make_offer(number, "0:1" if number % 2 else "1:2", throughput=100) for number in range(8)]
    rtts = {offer.peer_id: 0.01 if number < 2 else 0.3 for number, offer in enumerate(offers)}
    for seed in range(10):
        needs = ChainNeeds(rtts, positions=10, requests=10**6)
        chain = plan_chain(offers, Span(0, 2), needs=needs, random=Random(seed))
        assert {hop.peer_id for hop in chain.hops} == {offers[0].peer_id, offers[1].peer_id}


def test_a_thousand_peers_are_searched_in_bounded_time(make_offer: MakeOffer) -> None:
    random = Random(2)
    offers = []
    for number in range(300):
        start = random.randrange(60)
        span = (
            f"{start}:{min(64, start + random.randrange(2, 16))}"
            if number > 8
            else f"{8 * (number % 8)}:{8 * (number % 8) + 8}"
        )
        offers.append(make_offer(number, span, throughput=random.uniform(50, 1000)))
    needs = ChainNeeds(positions=128, requests=10**6)
    chain = plan_chain(offers, Span(0, 64), needs=needs, random=random)
    # No peer may have less to do at any pace below: a bound that allows peers to be used twice.
    assert len({hop.peer_id for hop in chain.hops}) == len(chain.hops)
    assert (chain.hops[0].span.start, chain.hops[-1].span.end) == (0, 64)
