from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import numpy as np
import pytest

from peerd.protocol.errors import NoChain
from peerd.protocol.identity import Identity, PeerId
from peerd.protocol.span import Span
from peerd.routing.chains.chain import (
    HOP_S,
    NEAR_BEST,
    NO_ROOM_S,
    UNKNOWN_RTT_S,
    Chain,
    ChainNeeds,
    OfferTable,
    plan_chain,
)
from peerd.routing.directory.offer import Offer

MakeOffer = Callable[..., Offer]


def hops_of(chain: Chain) -> list[tuple[PeerId, str]]:
    return [(hop.peer_id, str(hop.span)) for hop in chain.hops]


def plan(offers: list[Offer], blocks: str, seed: int = 0, avoid: tuple[PeerId, ...] = (), **needs: Any) -> Chain:
    return plan_chain(offers, Span.parse(blocks), needs=ChainNeeds(**needs), random=Random(seed), avoid=avoid)


def cheapest(offers: list[Offer], span: Span, needs: ChainNeeds) -> float:
    """The best cost by trying every chain, hop by hop."""
    records: dict[PeerId, list[dict[PeerId, float]]] = {}
    for offer in offers:
        records.setdefault(offer.peer_id, []).append(dict(offer.record.rtts))

    def delay(a: PeerId | None, b: PeerId | None) -> float:
        if a == b:
            return 0.0
        if a is None or b is None:
            return needs.rtts_s.get(a or b or PeerId(""), needs.unknown_rtt_s) / 2
        measured = [[said[y] / 2 for said in records.get(x, ()) if y in said] for x, y in ((a, b), (b, a))]
        if not any(measured):
            return max(delay(None, a), delay(None, b))
        is_checked = not all(measured) and a in needs.rtts_s and b in needs.rtts_s
        least = abs(delay(None, a) - delay(None, b)) if is_checked else 0.0
        return max(least, *measured[0], *measured[1])

    def sending(offer: Offer, to: PeerId | None, positions: int) -> float:
        if offer.peer_id == to or not offer.record.uplink:
            return 0.0
        return positions * needs.position_bytes / offer.record.uplink

    def costs(at: int, last: Offer | None) -> Iterator[float]:
        if at == span.end:
            assert last is not None
            count = needs.positions if needs.before is not None else 1
            yield delay(last.peer_id, needs.before) + sending(last, PeerId(""), count)
            return
        for offer in offers:
            if offer is last or at not in offer.span:
                continue
            enter = HOP_S + offer.record.queue_s + (NO_ROOM_S if offer.record.free_tokens < needs.tokens else 0.0)
            if last is None:
                enter += delay(needs.after, offer.peer_id)
            else:
                enter += delay(last.peer_id, offer.peer_id) + sending(last, offer.peer_id, needs.positions)
            for end in range(at + 1, min(offer.span.end, span.end) + 1):
                for rest in costs(end, offer):
                    yield enter + (end - at) * offer.block_s * needs.positions + rest

    return min(costs(span.start, None))


def test_it_enters_and_leaves_spans_inside(make_offer: MakeOffer) -> None:
    slow = make_offer(0, "0:8", throughput=10)
    fast = make_offer(1, "3:6", throughput=10_000)
    chain = plan([slow, fast], "1:8", rtts_s={slow.peer_id: 0.001, fast.peer_id: 0.001})
    assert hops_of(chain) == [(slow.peer_id, "1:3"), (fast.peer_id, "3:6"), (slow.peer_id, "6:8")]
    assert [hop.index for hop in chain.hops] == [0, 1, 2]


def test_a_slow_link_is_not_worth_a_faster_peer(make_offer: MakeOffer) -> None:
    slow = make_offer(0, "0:8", throughput=100)
    fast = make_offer(1, "3:6", throughput=10_000)
    chain = plan([slow, fast], "0:8", rtts_s={slow.peer_id: 0.001, fast.peer_id: 0.5})
    assert hops_of(chain) == [(slow.peer_id, "0:8")]


def test_of_equal_costs_the_fewest_hops_win(make_offer: MakeOffer) -> None:
    halves = [make_offer(0, "0:4"), make_offer(1, "4:8")]
    whole = make_offer(2, "0:8")
    for seed in range(10):
        assert hops_of(plan([*halves, whole], "0:8", seed, positions=1)) == [(whole.peer_id, "0:8")]


def test_links_that_peers_measured_count(make_offer: MakeOffer) -> None:
    near, far = make_offer(1, "4:8"), make_offer(2, "4:8")
    first = make_offer(0, "0:4", rtts=((near.peer_id, 0.002), (far.peer_id, 0.6)))
    for seed in range(10):
        assert [hop.peer_id for hop in plan([first, near, far], "0:8", seed).hops] == [first.peer_id, near.peer_id]


def test_a_peer_without_room_is_used_only_where_nobody_else_serves(make_offer: MakeOffer) -> None:
    full = make_offer(0, "0:8", throughput=10_000, free_tokens=10)
    roomy = make_offer(1, "0:8", throughput=10)
    assert hops_of(plan([full, roomy], "0:8", tokens=10)) == [(full.peer_id, "0:8")]
    assert hops_of(plan([full, roomy], "0:8", tokens=11)) == [(roomy.peer_id, "0:8")]
    assert hops_of(plan([full], "0:8", tokens=11)) == [(full.peer_id, "0:8")]


def test_equally_good_peers_share_the_clients(make_offer: MakeOffer) -> None:
    offers = [make_offer(number, "0:8") for number in range(4)]
    chosen = {plan(offers, "0:8", seed).hops[0].peer_id for seed in range(40)}
    assert chosen == {offer.peer_id for offer in offers}


@pytest.mark.parametrize(
    ("spans", "missing"),
    [
        ([], ((0, 8),)),
        (["1:3", "5:7"], ((0, 1), (3, 5), (7, 8))),
        (["0:4", "6:8"], ((4, 6),)),
        (["8:12"], ((0, 8),)),
    ],
)
def test_no_chain_names_the_missing_blocks(
    make_offer: MakeOffer, spans: list[str], missing: tuple[tuple[int, int], ...]
) -> None:
    offers = [make_offer(number, span) for number, span in enumerate(spans)]
    with pytest.raises(NoChain, match="no reachable peer serves blocks") as caught:
        plan(offers, "0:8")
    assert caught.value.missing == missing


def test_avoided_peers_and_those_that_take_no_sessions_are_left_out(make_offer: MakeOffer) -> None:
    avoided = make_offer(0, "0:8")
    joining, draining = make_offer(1, "0:8", state="joining"), make_offer(2, "0:8", state="draining")
    with pytest.raises(NoChain):
        plan([avoided, joining, draining], "0:8", avoid=(avoided.peer_id,))


def test_peers_whose_blocks_differ_from_the_others_are_left_out(make_offer: MakeOffer) -> None:
    good = [make_offer(number, "0:8", block_roots=(b"g" * 32,)) for number in range(2)]
    odd = make_offer(3, "0:8", block_roots=(b"z" * 32,), throughput=1e9)
    silent = make_offer(4, "8:16")
    for seed in range(10):
        assert odd.peer_id not in {hop.peer_id for hop in plan([*good, odd, silent], "0:16", seed).hops}


def test_a_peer_may_stand_in_a_chain_twice(make_offer: MakeOffer) -> None:
    twice = [make_offer(0, "0:2"), make_offer(0, "6:8", slot=1)]
    between = make_offer(1, "2:6")
    assert [hop.peer_id for hop in plan([*twice, between], "0:8").hops] == [
        twice[0].peer_id,
        between.peer_id,
        twice[0].peer_id,
    ]


def random_offers(make_offer: MakeOffer, random: Random, blocks: int, ids: list[PeerId]) -> list[Offer]:
    """A slow peer that has all blocks, four others, and a second span of one of those."""
    offers = [make_offer(4, f"0:{blocks}", throughput=20)]
    for number in (0, 1, 2, 3, random.randrange(4)):
        start = random.randrange(blocks - 1)
        end = random.randrange(start + 1, blocks + 1)
        fields: dict[str, object] = {
            "throughput": random.uniform(5, 500),
            "free_tokens": random.choice([0, 100]),
            "rtts": tuple((peer, random.uniform(0.001, 0.3)) for peer in random.sample(ids, 2)),
            "queue_s": random.choice([0.0, random.uniform(0, 0.2)]),
            "uplink": random.choice([0.0, random.uniform(1e4, 1e6)]),
            "slot": len(offers) // 5,
        }
        offers.append(make_offer(number, f"{start}:{end}", **fields))
    return offers


@pytest.mark.parametrize("seed", range(40))
def test_no_chain_is_much_cheaper_than_the_chosen_one(make_offer: MakeOffer, seed: int) -> None:
    random = Random(seed)
    blocks = 5
    ids = [Identity.from_seed(number.to_bytes(32, "big")).peer_id for number in range(5)]
    offers = random_offers(make_offer, random, blocks, ids)
    needs = ChainNeeds(
        {peer: random.uniform(0.001, 0.4) for peer in ids[:3]},
        tokens=50,
        positions=2,
        position_bytes=random.choice([0, 4096]),
        after=random.choice([None, ids[3]]),
        before=random.choice([None, ids[0]]),
        unknown_rtt_s=random.choice([0.02, 0.2]),
    )
    chain = plan_chain(offers, Span(0, blocks), needs=needs, random=random)
    best = cheapest(offers, Span(0, blocks), needs)
    assert best - 1e-9 <= chain.cost_s <= best * NEAR_BEST + 1e-9
    assert [hop.span.end for hop in chain.hops[:-1]] == [hop.span.start for hop in chain.hops[1:]]
    assert all(hop.offer.span.covers(hop.span) for hop in chain.hops)


def cheapest_by_every_edge(offers: list[Offer], span: Span, needs: ChainNeeds) -> float:
    """The best cost by relaxing every edge between two offers before every block: slow, and plain."""
    said: dict[tuple[PeerId, PeerId], float] = {}
    for offer in offers:
        for peer, rtt_s in offer.record.rtts:
            for pair in ((offer.peer_id, peer), (peer, offer.peer_id)):
                said[pair] = max(said.get(pair, 0.0), rtt_s / 2)
    client_s = [needs.rtts_s.get(offer.peer_id, UNKNOWN_RTT_S) / 2 for offer in offers]
    links = np.zeros((len(offers), len(offers)))
    for i, one in enumerate(offers):
        for j, other in enumerate(offers):
            if one.peer_id != other.peer_id:
                links[i, j] = said.get((one.peer_id, other.peer_id), max(client_s[i], client_s[j]))
    no_room = [NO_ROOM_S * (offer.record.free_tokens < needs.tokens) for offer in offers]
    enter_s = np.array([HOP_S + offer.record.queue_s + no for offer, no in zip(offers, no_room, strict=True)])
    block_s = np.array([offer.block_s * needs.positions for offer in offers])
    reach = np.full(len(offers), np.inf)
    for block in range(span.start, span.end):
        arrive = np.array(client_s) if block == span.start else (reach[:, None] + links).min(axis=0)
        reach = np.minimum(reach, arrive + enter_s) + block_s
        for i, offer in enumerate(offers):
            first, last = needs.first_by, needs.last_by
            if (
                block not in offer.span
                or (block == span.start and first is not None and offer.peer_id not in first)
                or (block == span.end - 1 and last is not None and offer.peer_id not in last)
            ):
                reach[i] = np.inf
    return float((reach + client_s).min())


@pytest.mark.parametrize("seed", range(12))
def test_among_many_peers_no_chain_is_much_cheaper_either(make_offer: MakeOffer, seed: int) -> None:
    # Peers on a plane, with no way shorter than the straight one; each measured 8 others, so that all pairs are known.
    random = Random(seed)
    ids = [make_offer(number, "0:1").peer_id for number in range(17)]
    places = [complex(random.random(), random.random()) for _ in ids]
    offers = []
    for slot in range(4):
        for number in range(17):
            start = random.randrange(32)
            span = f"{start}:{min(32, start + random.choice([1, 3, 8, 24]))}"
            nexts = [(number + step) % 17 for step in range(1, 9)]
            fields = {
                "throughput": random.uniform(20, 500),
                "free_tokens": random.choice([0, 100, 100]),
                "rtts": tuple((ids[n], 0.2 * abs(places[n] - places[number])) for n in nexts),
                "queue_s": random.choice([0.0, random.uniform(0, 0.05)]),
                "slot": slot,
            }
            offers.append(
                make_offer(number, span if slot or number > 7 else f"{4 * number}:{4 * number + 4}", **fields)
            )
    here = complex(random.random(), random.random())
    needs = ChainNeeds(
        {peer: 0.2 * abs(place - here) for peer, place in zip(ids, places, strict=True)},
        tokens=50,
        first_by=random.choice([None, frozenset(offer.peer_id for offer in offers if 0 in offer.span)]),
        last_by=random.choice([None, frozenset([offers[7].peer_id])]),
    )
    chain = plan_chain(offers, Span(0, 32), needs=needs, random=random)
    best = cheapest_by_every_edge(offers, Span(0, 32), needs)
    assert best - 1e-9 <= chain.cost_s <= best * NEAR_BEST + 1e-9


@pytest.mark.parametrize("seed", range(10))
def test_a_part_of_the_blocks_is_planned_as_if_there_were_no_others(make_offer: MakeOffer, seed: int) -> None:
    random = Random(seed)
    ids = [Identity.from_seed(number.to_bytes(32, "big")).peer_id for number in range(5)]
    offers = random_offers(make_offer, random, 8, ids)
    table = OfferTable(offers)
    part = Span(2, 6)
    for gone in ids[:4]:
        needs = ChainNeeds({peer: random.uniform(0.001, 0.4) for peer in ids}, tokens=50)
        chain = plan_chain(table, part, needs=needs, random=random, avoid=(gone,))
        assert gone not in {hop.peer_id for hop in chain.hops}
        assert (chain.hops[0].span.start, chain.hops[-1].span.end) == (2, 6)
        best = cheapest([offer for offer in offers if offer.peer_id != gone], part, needs)
        assert best - 1e-9 <= chain.cost_s <= best * NEAR_BEST + 1e-9


def test_a_chain_that_stays_on_its_continent_wins(make_offer: MakeOffer) -> None:
    # Even numbers are here, odd ones over the sea; all hold about a half, and overlap.
    spans = ["0:5", "0:5", "3:8", "3:8", "2:7", "1:6"]
    ids = [make_offer(number, "0:1").peer_id for number in range(6)]

    def rtts(number: int) -> tuple[tuple[PeerId, float], ...]:
        return tuple((ids[n], 0.01 if (n - number) % 2 == 0 else 0.15) for n in range(6) if n != number)

    offers = [make_offer(n, span, rtts=rtts(n), throughput=2000 if n % 2 else 1000) for n, span in enumerate(spans)]
    here, there = {peer: 0.01 if n % 2 == 0 else 0.15 for n, peer in enumerate(ids)}, dict[PeerId, float]()
    there = {peer: 0.16 - rtt_s for peer, rtt_s in here.items()}
    for seed in range(10):
        assert {ids.index(hop.peer_id) % 2 for hop in plan(offers, "0:8", seed, rtts_s=here).hops} == {0}
        assert {ids.index(hop.peer_id) % 2 for hop in plan(offers, "0:8", seed, rtts_s=there).hops} == {1}


def test_a_peer_where_steps_wait_is_left_to_the_others(make_offer: MakeOffer) -> None:
    busy, free = make_offer(0, "0:8", throughput=1000, queue_s=0.1), make_offer(1, "0:8", throughput=500)
    for seed in range(10):
        assert hops_of(plan([busy, free], "0:8", seed)) == [(free.peer_id, "0:8")]


def test_a_slow_line_matters_to_long_steps_alone(make_offer: MakeOffer) -> None:
    fast_line = make_offer(0, "0:4", throughput=500, uplink=1e8)
    slow_line = make_offer(1, "0:4", throughput=1000, uplink=1e6)
    second = make_offer(2, "4:8", throughput=20_000)
    offers = [fast_line, slow_line, second]
    known = {offer.peer_id: 0.002 for offer in offers}
    for seed in range(10):
        one = plan(offers, "0:8", seed, rtts_s=known, position_bytes=256)
        many = plan(offers, "0:8", seed, rtts_s=known, position_bytes=16384, positions=128)
        assert (one.hops[0].peer_id, many.hops[0].peer_id) == (slow_line.peer_id, fast_line.peer_id)


def test_of_replacements_the_one_between_its_neighbours_wins(make_offer: MakeOffer) -> None:
    near, far = make_offer(2, "2:4"), make_offer(3, "2:4", throughput=1000)
    links = tuple((peer.peer_id, rtt) for peer, rtt in ((near, 0.01), (far, 0.3)))
    before, after = make_offer(0, "0:2", rtts=links), make_offer(1, "4:6", rtts=links)
    offers = [before, near, far, after]
    for seed in range(10):
        between = plan(offers, "2:4", seed, after=before.peer_id, before=after.peer_id)
        assert hops_of(between) == [(near.peer_id, "2:4")]
        # Seen from the client they are as near, and the other is faster.
        assert hops_of(plan(offers, "2:4", seed)) == [(far.peer_id, "2:4")]


def test_of_near_ties_a_peer_that_we_are_connected_to_wins(make_offer: MakeOffer) -> None:
    offers = [make_offer(number, "0:8", throughput=1000 + number) for number in range(8)]
    for seed in range(20):
        assert plan(offers, "0:8", seed, warm=frozenset({offers[3].peer_id})).hops[0].peer_id == offers[3].peer_id
    slow = make_offer(9, "0:8", throughput=100)
    assert plan([*offers, slow], "0:8", warm=frozenset({slow.peer_id})).hops[0].peer_id != slow.peer_id


def test_a_majority_stays_one_when_its_peers_fail_us(make_offer: MakeOffer) -> None:
    good = [make_offer(number, "0:8", block_roots=(b"g" * 32,)) for number in range(3)]
    odd = make_offer(3, "0:8", block_roots=(b"z" * 32,))
    with pytest.raises(NoChain):
        plan([*good, odd], "0:8", avoid=tuple(offer.peer_id for offer in good))


def test_fifty_clients_spread_over_servers_that_are_nearly_equal(make_offer: MakeOffer) -> None:
    offers = [make_offer(n, "0:4" if n < 5 else "4:8", throughput=1000 + 5 * n) for n in range(10)]
    table = OfferTable(offers)
    counts: dict[PeerId, int] = {}
    for client in range(50):
        random = Random(client)
        # Each measures for itself, a little differently.
        rtts = {offer.peer_id: random.uniform(0.0199, 0.0201) for offer in offers}
        chain = plan_chain(table, Span(0, 8), needs=ChainNeeds(rtts), random=random)
        assert len(chain.hops) == 2
        for hop in chain.hops:
            counts[hop.peer_id] = counts.get(hop.peer_id, 0) + 1
    assert len(counts) == 10
    # With 10 expected on each, by chance alone one in a thousand times one has 21.
    assert max(counts.values()) <= 20


def test_a_thousand_peers_of_128_blocks_are_planned_as_well_as_a_few(make_offer: MakeOffer) -> None:
    # A cheap chain hidden among many peers: nothing that makes the sweep fast may overlook it.
    random = Random(5)
    number = 0
    offers = []
    ids = [make_offer(n, "0:1").peer_id for n in range(8)]
    for number in range(8):
        rtts = ((ids[number + 1], 0.0001),) if number < 7 else ()
        offers.append(make_offer(number, f"{16 * number}:{16 * number + 16}", throughput=1e6, rtts=rtts))
    for number in range(8, 300):
        start = random.randrange(120)
        offers.append(make_offer(number, f"{start}:{random.randrange(start + 1, 129)}", throughput=300))
    random.shuffle(offers)
    chain = plan(offers, "0:128", rtts_s={ids[0]: 0.001, ids[7]: 0.001})
    assert [hop.peer_id for hop in chain.hops] == ids
