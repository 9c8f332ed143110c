"""Rows go over as many chains as answer them soonest."""

from __future__ import annotations

import itertools
from collections.abc import Collection

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peerd.client.training.rows import cut, split
from peerd.client.training.several_chains import Share, plan_several, share_out
from peerd.protocol.errors import NoChain
from peerd.protocol.identity import Identity, PeerId
from peerd.protocol.span import Span
from peerd.routing.chains.chain import Chain, Hop

PEERS = [Identity.generate().peer_id for _ in range(4)]


def chain_of(cost_s: float, slowest_s: float, *peers: PeerId) -> Chain:
    """A chain over these peers; what they offer does not matter here."""
    hops = tuple(Hop(index, peer, Span(index, index + 1), None) for index, peer in enumerate(peers))  # type: ignore[arg-type]
    return Chain(hops, cost_s, slowest_s)


def test_requests_go_where_they_are_answered_soonest() -> None:
    fast, slow = chain_of(2.0, 1.0), chain_of(4.0, 2.0)
    assert share_out(5, [fast, slow]) == ([4, 1], 5.0)
    assert share_out(2, [fast, chain_of(9.0, 9.0)]) == ([2, 0], 3.0)


def planning(*chains: Chain) -> tuple[list[Collection[PeerId]], object]:
    asked: list[Collection[PeerId]] = []

    def plan(used: Collection[PeerId]) -> Chain:
        asked.append(set(used))
        if len(asked) > len(chains):
            raise NoChain("no more", ())
        return chains[len(asked) - 1]

    return asked, plan


def test_two_chains_are_used_if_they_are_done_sooner_than_one() -> None:
    one, two = chain_of(2.0, 1.0, PEERS[0], PEERS[1]), chain_of(2.0, 1.0, PEERS[2], PEERS[3])
    asked, plan = planning(one, two)
    # All four peers in one chain: each answers twice as often, the first request takes as long.
    in_a_row = chain_of(2.4, 0.6, *PEERS)
    assert plan_several(in_a_row, 8, plan) == [Share(one, 4), Share(two, 4)]  # type: ignore[arg-type]
    assert asked == [set(), set(PEERS[:2]), set(PEERS)]
    assert plan_several(chain_of(2.0, 0.4, *PEERS), 8, planning(one, two)[1]) == [  # type: ignore[arg-type]
        Share(chain_of(2.0, 0.4, *PEERS), 8)
    ]


def test_one_request_or_one_chain_stays_alone() -> None:
    one = chain_of(2.0, 1.0, PEERS[0])
    assert plan_several(one, 8, planning(one)[1]) == [Share(one, 8)]  # type: ignore[arg-type]
    asked, plan = planning(one, one)
    assert plan_several(one, 1, plan) == [Share(one, 1)]  # type: ignore[arg-type]
    assert asked == []


lengths = st.lists(st.integers(1, 50), min_size=1, max_size=20)


@given(lengths, st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_every_row_goes_to_one_chain_in_order(rows: list[int], shares: list[int]) -> None:
    parts = split(rows, shares)
    assert len(parts) == len(shares)
    assert list(itertools.chain(*parts)) == list(range(len(rows)))


@given(lengths, st.integers(1, 100), st.data())
def test_cutting_some_rows_gives_their_places_in_the_whole(rows: list[int], most: int, data: st.DataObject) -> None:
    begin = data.draw(st.integers(0, len(rows)))
    within = range(begin, data.draw(st.integers(begin, len(rows))))
    parts = cut(rows, most, within)
    assert [number for numbers, _, _ in parts for number in numbers] == list(within)
    for numbers, own, offset in parts:
        assert own == tuple(rows[number] for number in numbers)
        assert offset == sum(rows[: numbers[0]])


@pytest.mark.parametrize(("shares", "counts"), [((1, 1), [4, 4]), ((3, 1), [6, 2]), ((1, 0), [8, 0])])
def test_equal_rows_are_split_in_proportion(shares: tuple[int, int], counts: list[int]) -> None:
    assert [len(part) for part in split([20] * 8, shares)] == counts
