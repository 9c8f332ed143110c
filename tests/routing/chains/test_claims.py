"""What peers claim of their speed is limited by what others claim, and by what they have shown."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest

from peerd.protocol.identity import Identity, PeerId
from peerd.protocol.span import Span
from peerd.routing.chains.chain import ChainNeeds, plan_chain
from peerd.routing.chains.claims import believed
from peerd.routing.chains.offer_table import OfferTable
from peerd.routing.directory.offer import Offer
from peerd.routing.directory.standing import Standing, unknown

MakeOffer = Callable[..., Offer]
IDS = [Identity.from_seed(number.to_bytes(32, "big")).peer_id for number in range(40)]
HONEST = [500.0, 600.0, 700.0, 800.0, 900.0, 1000.0, 1100.0, 1200.0, 1300.0, 5000.0]


def claims_of(*claims: float) -> list[tuple[PeerId, float]]:
    return list(zip(IDS, claims, strict=False))


def reached_in(networks: dict[PeerId, str]) -> Callable[[PeerId], Standing]:
    return lambda peer: Standing(networks[peer], is_reached=True) if peer in networks else unknown(peer)


def test_honest_claims_are_believed_and_the_fastest_tenth_counts_as_much_as_the_next() -> None:
    assert believed(claims_of(*HONEST), unknown) == [*HONEST[:-2], 1200.0, 1200.0]


@pytest.mark.parametrize("liars", [1, 2])
def test_a_claim_beyond_all_others_counts_as_a_fast_honest_one(liars: int) -> None:
    found = believed(claims_of(*HONEST[:9], *[1e9] * liars), unknown)
    assert found[:8] == HONEST[:8]
    assert max(found[9:]) <= 1300.0


def test_a_fast_server_is_believed_as_far_as_it_has_shown_its_speed() -> None:
    assert believed(claims_of(*HONEST), unknown, {IDS[9]: 4000.0})[-1] == 4000.0
    assert believed(claims_of(*HONEST), unknown, {IDS[9]: 9000.0})[-1] == 5000.0


def test_one_of_three_may_be_a_hundred_times_as_fast() -> None:
    assert believed(claims_of(100, 120, 10_000), unknown) == [100, 120, 10_000]


def test_many_keys_in_one_network_are_one_voice() -> None:
    networks = {peer: f"net {number}" for number, peer in enumerate(IDS[:10])}
    networks |= dict.fromkeys(IDS[10:30], "net of liars")
    found = believed(claims_of(*HONEST, *[1e9] * 20), reached_in(networks))
    assert max(found[10:]) <= 1300.0


def test_where_some_were_reached_the_claims_of_others_set_no_limit() -> None:
    networks = {peer: f"net {number}" for number, peer in enumerate(IDS[:10])}
    assert max(believed(claims_of(*HONEST, *[1e9] * 20), reached_in(networks))) <= 1300.0


def test_a_server_that_was_never_measured_stays_so() -> None:
    assert believed(claims_of(*HONEST, 0.0), unknown)[-1] == 0.0


def delay_s(one: complex, other: complex) -> float:
    return 0.005 + 0.2 * abs(one - other)


def shares(make_offer: MakeOffer, speed: float, proven: dict[PeerId, float] | None, *, is_near_all: bool) -> float:
    """In which share of clients' chains a server is that claims this speed, and perhaps that it is near all others.

    The other 18 are on a plane, as the clients are, and tell the truth.
    """
    random = Random(3)
    spans = ["0:16", "16:32", "8:24"]
    places = [complex(random.random(), random.random()) for _ in range(19)]

    def offer(number: int) -> Offer:
        others = [n for n in range(19) if n != number]
        nearest = sorted(others, key=lambda n: abs(places[n] - places[number]))[:8]
        lies = number == 18 and is_near_all
        told = tuple((IDS[n], 0.0 if lies else delay_s(places[number], places[n])) for n in nearest)
        throughput = speed if number == 18 else random.uniform(90, 110)
        return make_offer(number, spans[number % 3], throughput=throughput, rtts=told)

    table = OfferTable([offer(number) for number in range(19)], proven=proven)
    chains = []
    for _ in range(300):
        here = complex(random.random(), random.random())
        rtts = {peer: delay_s(here, place) for peer, place in zip(IDS, places, strict=False)}
        chains.append(plan_chain(table, Span(0, 32), needs=ChainNeeds(rtts), random=random))
    return sum(IDS[18] in {hop.peer_id for hop in chain.hops} for chain in chains) / len(chains)


def test_a_liar_that_claims_all_speed_and_no_delay_is_not_in_every_chain(make_offer: MakeOffer) -> None:
    assert shares(make_offer, 1e9, None, is_near_all=True) > 0.9
    assert shares(make_offer, 1e9, {}, is_near_all=True) < 0.25
    # As one of six servers of its blocks, it would be in one of six chains if they were all as near.
    assert 0.02 < shares(make_offer, 100, {}, is_near_all=False) < 0.2


def test_a_delay_that_one_end_announces_is_no_shorter_than_the_difference_to_the_client(make_offer: MakeOffer) -> None:
    first, far = make_offer(1, "0:4"), make_offer(2, "4:8")
    liar = make_offer(3, "4:8", rtts=((first.peer_id, 0.0),))
    rtts = {first.peer_id: 0.02, far.peer_id: 0.3, liar.peer_id: 0.32}

    def chosen(*offers: Offer) -> PeerId:
        chain = plan_chain(OfferTable(offers), Span(0, 8), needs=ChainNeeds(rtts), random=Random(1))
        return chain.hops[-1].peer_id

    assert chosen(first, far, liar) == far.peer_id
    # Where the other end says the same, it is believed.
    agreed = make_offer(1, "0:4", rtts=((liar.peer_id, 0.0),))
    assert chosen(agreed, far, liar) == liar.peer_id


def test_of_two_announced_delays_the_longer_counts(make_offer: MakeOffer) -> None:
    liar_id = make_offer(3, "4:8").peer_id
    first = make_offer(1, "0:4", rtts=((liar_id, 0.4),))
    liar, other = make_offer(3, "4:8", rtts=((first.peer_id, 0.0),)), make_offer(2, "4:8")
    rtts = {first.peer_id: 0.2, liar.peer_id: 0.2, other.peer_id: 0.21}
    chain = plan_chain(OfferTable([first, liar, other]), Span(0, 8), needs=ChainNeeds(rtts), random=Random(1))
    assert chain.hops[-1].peer_id == other.peer_id


@pytest.mark.parametrize("reached", [2, 3])
def test_a_client_that_has_reached_few_servers_compares_with_all(reached: int) -> None:
    networks = {peer: f"network {number}" for number, peer in enumerate(IDS[:reached])}
    found = believed(claims_of(*HONEST[:9], 1e9), reached_in(networks))
    assert found[-1] <= max(HONEST[:9])
