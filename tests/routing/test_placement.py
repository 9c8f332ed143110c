from __future__ import annotations

from collections.abc import Callable

import pytest

from peerd.protocol.span import Span
from peerd.routing.offer import Offer
from peerd.routing.placement import block_rates, choose_span

MakeOffer = Callable[..., Offer]


def test_the_first_server_starts_at_the_first_block() -> None:
    assert choose_span([], 24, 8) == Span(0, 8)


def test_a_gap_is_closed_first(make_offer: MakeOffer) -> None:
    offers = [make_offer(0, "0:10"), make_offer(1, "14:24")]
    assert choose_span(offers, 24, 4) == Span(10, 14)


def test_the_weakest_blocks_are_lifted(make_offer: MakeOffer) -> None:
    offers = [make_offer(0, "0:8", throughput=900), make_offer(1, "8:16", throughput=100), make_offer(2, "16:24")]
    offers[2] = make_offer(2, "16:24", throughput=300)
    assert choose_span(offers, 24, 8) == Span(8, 16)


def test_of_spans_as_weak_as_each_other_that_which_is_here_is_taken(make_offer: MakeOffer) -> None:
    assert choose_span([], 24, 8, frozenset(range(10, 20))) == Span(10, 18)
    assert choose_span([], 24, 8, frozenset({0, 20})) == Span(0, 8), "one block each: the lower"
    served = [make_offer(1, "8:24")]
    assert choose_span(served, 24, 8, frozenset(range(8, 24))) == Span(0, 8), "a gap counts more than a download"


def test_who_is_still_joining_counts_and_who_leaves_does_not(make_offer: MakeOffer) -> None:
    offers = [make_offer(0, "0:4", state="joining"), make_offer(1, "4:8", state="draining"), make_offer(2, "8:12")]
    assert choose_span(offers, 12, 4) == Span(4, 8)


def test_a_longer_span_gives_each_block_less(make_offer: MakeOffer) -> None:
    rates = block_rates([make_offer(0, "0:4", throughput=100), make_offer(1, "2:4", throughput=100)], 5)
    assert rates.tolist() == pytest.approx([25, 25, 75, 75, 0])


def test_newcomers_in_turn_cover_the_model_evenly(make_offer: MakeOffer) -> None:
    offers: list[Offer] = []
    for number in range(12):
        offers.append(make_offer(number, str(choose_span(offers, 30, 10))))
    assert set(block_rates(offers, 30).round(6)) == {40.0}


def test_more_room_than_blocks_takes_all_of_them() -> None:
    assert choose_span([], 6, 100) == Span(0, 6)
    with pytest.raises(ValueError, match="at least one block"):
        choose_span([], 6, 0)
