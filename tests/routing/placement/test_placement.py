from __future__ import annotations

import heapq
import itertools
import statistics
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import pytest

from peerd.protocol.identity import Identity, PeerId
from peerd.protocol.span import Span
from peerd.routing.directory.holding import Holding
from peerd.routing.directory.offer import Offer
from peerd.routing.placement.flow import swarm_flow
from peerd.routing.placement.placement import (
    Newcomer,
    are_choosing,
    block_rates,
    choose_first_span,
    choose_move,
)

MakeHolding = Callable[..., Holding]
NEWCOMER = Newcomer(Identity.from_seed(b"newcomer".ljust(32)).peer_id, 0)


@pytest.fixture
def make_holding(make_offer: Callable[..., Offer]) -> MakeHolding:
    """Makes holdings as `make_offer` makes offers."""

    def make(*args: Any, **fields: Any) -> Holding:
        offer = make_offer(*args, **fields)
        return Holding(offer.peer_id, offer.record)

    return make


def choose_span(offers: Sequence[Holding], block_count: int, size: int, on_disk: frozenset[int] = frozenset()) -> Span:
    """The choice of a newcomer that announces nothing yet."""
    return choose_first_span(offers, NEWCOMER, block_count, size, on_disk)


def test_the_first_server_starts_at_the_first_block() -> None:
    assert choose_span([], 24, 8) == Span(0, 8)


def test_a_gap_is_closed_first(make_holding: MakeHolding) -> None:
    offers = [make_holding(0, "0:10"), make_holding(1, "14:24")]
    assert choose_span(offers, 24, 4) == Span(10, 14)


def test_the_weakest_blocks_are_lifted(make_holding: MakeHolding) -> None:
    offers = [make_holding(0, "0:8", throughput=900), make_holding(1, "8:16", throughput=100), make_holding(2, "16:24")]
    offers[2] = make_holding(2, "16:24", throughput=300)
    assert choose_span(offers, 24, 8) == Span(8, 16)


def test_of_spans_as_weak_as_each_other_that_which_is_here_is_taken(make_holding: MakeHolding) -> None:
    assert choose_span([], 24, 8, frozenset(range(10, 20))) == Span(10, 18)
    assert choose_span([], 24, 8, frozenset({0, 20})) == Span(0, 8), "one block each: the lower"
    served = [make_holding(1, "8:24")]
    assert choose_span(served, 24, 8, frozenset(range(8, 24))) == Span(0, 8), "a gap counts more than a download"


def test_a_joining_server_counts_and_a_leaving_one_does_not(make_holding: MakeHolding) -> None:
    spans = (("0:4", "joining"), ("4:8", "draining"), ("8:12", "online"))
    offers = [make_holding(number, span, state=state) for number, (span, state) in enumerate(spans)]
    assert choose_span(offers, 12, 4) == Span(4, 8)


def test_a_longer_span_gives_each_block_less(make_holding: MakeHolding) -> None:
    rates = block_rates([make_holding(0, "0:4", throughput=100), make_holding(1, "2:4", throughput=100)], 5)
    assert rates.tolist() == pytest.approx([25, 25, 75, 75, 0])


def test_newcomers_in_turn_cover_the_model_evenly(make_holding: MakeHolding) -> None:
    offers: list[Holding] = []
    for number in range(12):
        offers.append(make_holding(number, str(choose_span(offers, 30, 10))))
    assert set(block_rates(offers, 30).round(6)) == {40.0}


def test_more_room_than_blocks_takes_all_of_them() -> None:
    assert choose_span([], 6, 100) == Span(0, 6)
    with pytest.raises(ValueError, match="at least one block"):
        choose_span([], 6, 0)


def test_among_equal_spans_the_one_on_disk_is_taken(make_holding: MakeHolding) -> None:
    assert choose_span([], 24, 8, on_disk=frozenset(range(10, 20))) == Span(10, 18)
    # Need comes before convenience.
    assert choose_span([make_holding(0, "8:24")], 24, 8, on_disk=frozenset(range(10, 20))) == Span(0, 8)


def test_a_server_that_is_one_of_too_many_moves_to_the_weakest_blocks(make_holding: MakeHolding) -> None:
    offers = [make_holding(number, "0:4") for number in range(3)] + [make_holding(3, "4:8")]
    assert choose_move(offers, offers[0], 8) == Span(4, 8)


def test_a_server_that_can_be_spared_closes_a_gap(make_holding: MakeHolding) -> None:
    offers = [make_holding(0, "0:4"), make_holding(1, "0:4"), make_holding(2, "4:8")]
    assert choose_move(offers, offers[1], 12) == Span(8, 12)


def test_nobody_leaves_blocks_that_nobody_else_serves(make_holding: MakeHolding) -> None:
    offers = [make_holding(0, "0:4"), make_holding(1, "3:8"), make_holding(2, "0:3", state="joining")]
    assert choose_move(offers, offers[0], 12) is None
    assert choose_move(offers, offers[1], 12) is None


def test_a_small_gain_is_not_worth_a_move(make_holding: MakeHolding) -> None:
    even = [make_holding(number, blocks) for number, blocks in enumerate(("0:4", "0:4", "4:8", "4:8"))]
    assert choose_move(even, even[0], 8) is None
    nearly = [make_holding(0, "0:4", throughput=even[0].record.throughput * 1.05), *even[1:]]
    assert choose_move(nearly, nearly[1], 8) is None


def test_a_move_looks_at_the_swarm_without_the_one_that_moves(make_holding: MakeHolding) -> None:
    offers = [make_holding(0, "0:4"), make_holding(1, "0:4"), make_holding(2, "4:8")]
    own = offers[0]
    assert choose_move(offers, own, 8) == choose_move(offers[1:], own, 8)


@pytest.mark.parametrize("seed", range(4))
def test_one_move_after_another_ends_near_the_best_that_there_is(make_holding: MakeHolding, seed: int) -> None:
    """Beside the best of all placements of five servers, tried one by one."""
    random, blocks = Random(seed), 6
    sizes = [random.randint(2, 4) for _ in range(5)]
    speeds = [random.uniform(100, 1000) for _ in range(5)]
    offers: list[Holding] = []
    for number in range(5):
        span = choose_span(offers, blocks, sizes[number])
        offers.append(make_holding(number, str(span), throughput=speeds[number]))
    for _ in range(20):
        for number, own in enumerate(offers):
            if (better := choose_move(offers, own, blocks)) is not None:
                offers[number] = make_holding(number, str(better), throughput=speeds[number])
    places = itertools.product(*(range(blocks - size + 1) for size in sizes))
    best = max(
        swarm_flow([(Span(at, at + size), speed) for at, size, speed in zip(place, sizes, speeds, strict=True)], blocks)
        for place in places
    )
    assert flow_of(offers, blocks) >= 0.95 * best


def flow_of(offers: list[Holding], blocks: int) -> float:
    return swarm_flow([(offer.record.span, offer.record.throughput) for offer in offers], blocks)


@pytest.mark.parametrize("churn_an_hour", [0.0, 0.3])
def test_a_swarm_of_40_settles_stays_covered_and_does_not_thrash(
    make_holding: MakeHolding, churn_an_hour: float
) -> None:
    """Two hours in which servers look around every few minutes and, with churn, leave and come back."""
    swarm = SimulatedSwarm(make_holding, Random(7), blocks=24, churn_an_hour=churn_an_hour)
    swarm.run(servers=40, hours=2)
    assert swarm.covered_share > 0.99
    assert statistics.mean(swarm.shares) > (0.95 if not churn_an_hour else 0.9)
    assert swarm.moves / 40 / 2 < (0.3 if not churn_an_hour else 0.8)
    if not churn_an_hour:
        # No server moves any more once the swarm has settled.
        assert swarm.last_move_s < 3600


class SimulatedSwarm:
    """Servers that place themselves with the planner, in simulated time. `shares`: flow beside an even swarm."""

    def __init__(self, make_holding: MakeHolding, random: Random, *, blocks: int, churn_an_hour: float) -> None:
        self.shares: list[float] = []
        self.moves = 0
        self.last_move_s = 0.0
        self._make_holding = make_holding
        self._random = random
        self._blocks = blocks
        self._churn = churn_an_hour
        self._online: dict[int, Holding] = {}
        self._events: list[tuple[float, int, str]] = []
        self._covered = [0, 0]

    @property
    def covered_share(self) -> float:
        return self._covered[1] / self._covered[0]

    def run(self, *, servers: int, hours: float) -> None:
        self._sizes = [max(1, min(self._blocks, int(self._random.lognormvariate(1.4, 0.5)))) for _ in range(servers)]
        self._speeds = [self._random.lognormvariate(6, 0.6) for _ in range(servers)]
        for number in range(servers):
            self._later(self._random.uniform(0, 600), number, "join")
        settled_s = 1200.0
        while self._events and self._events[0][0] < hours * 3600:
            now, number, what = heapq.heappop(self._events)
            getattr(self, f"_{what}")(now, number)
            if now > settled_s:
                self._note()

    def _later(self, at: float, number: int, what: str) -> None:
        heapq.heappush(self._events, (at, number, what))

    def _place(self, number: int, span: Span) -> None:
        self._online[number] = self._make_holding(number, str(span), throughput=self._speeds[number])

    def _join(self, now: float, number: int) -> None:
        self._place(number, choose_span(list(self._online.values()), self._blocks, self._sizes[number]))
        self._later(now + self._random.uniform(150, 450), number, "look")
        if self._churn:
            self._later(now + self._random.expovariate(self._churn / 3600), number, "leave")

    def _leave(self, now: float, number: int) -> None:
        del self._online[number]
        self._later(now + self._random.uniform(0, 120), number, "join")

    def _look(self, now: float, number: int) -> None:
        if number not in self._online:
            return
        span = choose_move(list(self._online.values()), self._online[number], self._blocks)
        if span is not None:
            self.moves += 1
            self.last_move_s = now
            self._place(number, span)
        self._later(now + self._random.uniform(150, 450), number, "look")

    def _note(self) -> None:
        offers = list(self._online.values())
        flow = flow_of(offers, self._blocks)
        self._covered[0] += 1
        self._covered[1] += flow > 0
        self.shares.append(flow * self._blocks / sum(offer.record.throughput for offer in offers))


def test_a_server_that_is_about_to_go_covers_nothing_for_another(make_holding: MakeHolding) -> None:
    own, twin = make_holding(0, "0:4"), make_holding(1, "0:4")
    assert choose_move([own, twin], own, 12) is not None
    goes = make_holding(1, "8:12", state="joining", slot=8)
    assert choose_move([own, twin, goes], own, 12) is None
    assert choose_move([own, twin, goes, make_holding(2, "0:4")], own, 12) == Span(4, 8)


def test_of_several_gaps_one_is_closed_though_the_swarm_is_not_whole_by_that(make_holding: MakeHolding) -> None:
    offers = [make_holding(number, "0:4") for number in range(3)]
    assert choose_move(offers, offers[2], 12) == Span(4, 8)
    offers[2] = make_holding(2, "4:8")
    assert choose_move(offers, offers[1], 12) == Span(8, 12)
    assert choose_move(offers, offers[2], 12) is None


def in_order(make_holding: MakeHolding, count: int) -> list[int]:
    """Numbers of offers, in the order of their PeerIds."""
    return sorted(range(count), key=lambda number: make_holding(number, "0:1").peer_id)


def test_a_server_that_was_never_measured_counts_as_much_as_one_in_the_middle(make_holding: MakeHolding) -> None:
    speeds = {"0:2": 100, "2:4": 300, "4:6": 500, "6:8": 0}
    offers = [make_holding(number, span, throughput=speed) for number, (span, speed) in enumerate(speeds.items())]
    assert block_rates(offers, 8).tolist() == pytest.approx([50, 50, 150, 150, 250, 250, 150, 150])
    assert block_rates([offers[3]], 8)[7] > 0


def test_newcomers_that_see_each_other_go_where_they_would_one_after_another(make_holding: MakeHolding) -> None:
    first, second, third = in_order(make_holding, 3)
    # Each has said what it chose alone.
    said = [make_holding(number, "0:4", state="joining", slot=8, throughput=0) for number in range(3)]
    chosen = {
        number: choose_first_span(said, Newcomer(said[number].peer_id, 0), 12, 4) for number in (third, first, second)
    }
    assert chosen == {first: Span(0, 4), second: Span(4, 8), third: Span(8, 12)}
    assert are_choosing(said, said[0].peer_id)
    assert not are_choosing(said[:1], said[0].peer_id)


def test_a_newcomer_that_has_decided_is_not_placed_anew(make_holding: MakeHolding) -> None:
    first, second = in_order(make_holding, 2)
    decided = make_holding(first, "8:12", state="joining", slot=0, throughput=0)
    assert not are_choosing([decided], PeerId("another"))
    own = Newcomer(make_holding(second, "0:4").peer_id, 0)
    assert choose_first_span([decided], own, 12, 4) == Span(0, 4)


def test_a_server_that_means_to_move_is_no_newcomer(make_holding: MakeHolding) -> None:
    first, second = in_order(make_holding, 2)
    moving = [make_holding(first, "0:4"), make_holding(first, "8:12", state="joining", slot=8)]
    assert not are_choosing(moving, PeerId("another"))
    own = Newcomer(make_holding(second, "0:4").peer_id, 0)
    assert choose_first_span(moving, own, 12, 4) == Span(0, 4), "where it leaves"


def test_of_several_that_mean_to_close_a_gap_the_first_goes_and_the_others_stay(make_holding: MakeHolding) -> None:
    first, second = in_order(make_holding, 2)
    online = [make_holding(number, "0:4") for number in range(2)]
    intend = [make_holding(number, "4:8", state="joining", slot=8) for number in range(2)]
    swarm = [*online, *intend]
    assert choose_move(swarm, online[first], 8, intended=Span(4, 8)) == Span(4, 8)
    assert choose_move(swarm, online[second], 8, intended=Span(4, 8)) is None
    # A server that has not announced anything yet gives way to all others.
    assert choose_move([*online, intend[second]], online[first], 8) is None


def test_nobody_goes_before_another_that_has_begun(make_holding: MakeHolding) -> None:
    first, second = in_order(make_holding, 2)
    own, intends = make_holding(first, "0:4"), make_holding(second, "4:8", state="joining", slot=8)
    for begun in (make_holding(second, "0:4", state="draining"), make_holding(second, "4:8", state="joining", slot=0)):
        assert choose_move([own, make_holding(2, "0:4"), begun, intends], own, 8, intended=Span(4, 8)) != Span(4, 8)
