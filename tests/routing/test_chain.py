from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random

import pytest

from peerd.protocol.errors import NoChain
from peerd.protocol.identity import Identity, PeerId
from peerd.protocol.span import Span
from peerd.routing.chain import HOP_S, NEAR_BEST, NO_ROOM_S, UNKNOWN_RTT_S, Chain, ChainNeeds, plan_chain
from peerd.routing.offer import Offer

MakeOffer = Callable[..., Offer]


def hops_of(chain: Chain) -> list[tuple[PeerId, str]]:
    return [(hop.peer_id, str(hop.span)) for hop in chain.hops]


def plan(offers: list[Offer], blocks: str, seed: int = 0, avoid: tuple[PeerId, ...] = (), **needs: object) -> Chain:
    return plan_chain(offers, Span.parse(blocks), needs=ChainNeeds(**needs), random=Random(seed), avoid=avoid)


def cheapest(offers: list[Offer], span: Span, needs: ChainNeeds) -> float:
    """The best cost by trying every chain, hop by hop."""

    def delay(a: Offer | None, b: Offer | None) -> float:
        if a is None or b is None:
            known = a or b
            assert known is not None
            return needs.rtts_s.get(known.peer_id, UNKNOWN_RTT_S) / 2
        if a.peer_id == b.peer_id:
            return 0.0
        pairs = ((a, b), (b, a))
        measured = [dict(x.record.rtts)[y.peer_id] / 2 for x, y in pairs if y.peer_id in dict(x.record.rtts)]
        return min(measured, default=max(delay(None, a), delay(None, b)))

    def costs(at: int, last: Offer | None) -> Iterator[float]:
        if at == span.end:
            yield delay(last, None)
            return
        for offer in offers:
            if offer is last or at not in offer.span:
                continue
            enter = delay(last, offer) + HOP_S + (NO_ROOM_S if offer.record.free_tokens < needs.tokens else 0.0)
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
    with pytest.raises(NoChain, match="nobody reachable serves blocks") as caught:
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


@pytest.mark.parametrize("seed", range(30))
def test_no_chain_is_much_cheaper_than_the_chosen_one(make_offer: MakeOffer, seed: int) -> None:
    random = Random(seed)
    blocks = 6
    ids = [Identity.from_seed(number.to_bytes(32, "big")).peer_id for number in range(4)]
    offers = [make_offer(4, "0:6", throughput=20)]
    for number in range(4):
        start = random.randrange(blocks - 1)
        end = random.randrange(start + 1, blocks + 1)
        rtts = tuple((peer, random.uniform(0.001, 0.3)) for peer in random.sample(ids, 2))
        fields = {"throughput": random.uniform(5, 500), "free_tokens": random.choice([0, 100]), "rtts": rtts}
        offers.append(make_offer(number, f"{start}:{end}", **fields))
    needs = ChainNeeds({peer: random.uniform(0.001, 0.4) for peer in ids[:3]}, tokens=50, positions=2)
    chain = plan_chain(offers, Span(0, blocks), needs=needs, random=random)
    best = cheapest(offers, Span(0, blocks), needs)
    assert best - 1e-9 <= chain.cost_s <= best * NEAR_BEST + 1e-9
    assert [hop.span.end for hop in chain.hops[:-1]] == [hop.span.start for hop in chain.hops[1:]]
    assert all(hop.offer.span.covers(hop.span) for hop in chain.hops)
