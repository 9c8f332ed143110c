"""Who runs next, and what is remembered of owners that have gone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import pytest

from peerd.compute.engine.fair_shares import KEPT_S, MAX_ABSENT, FairShares


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def run(shares: FairShares, owners: set[str], turns: int, weights: Mapping[str, float] | None = None) -> Counter[str]:
    """Give each turn's position to the owner who is first; how many each owner got."""
    got: Counter[str] = Counter()
    for _ in range(turns):
        shares.begin_turn(set(owners))
        first = next(shares.in_order({owner: [owner] for owner in sorted(owners)}))
        shares.charge(first, 1, (weights or {}).get(first, 1.0))
        got[first] += 1
    return got


def test_owners_get_shares_by_weight() -> None:
    got = run(FairShares(), {"a", "b", "c"}, 1000, {"a": 8.0})
    assert got == {"a": pytest.approx(800, abs=2), "b": pytest.approx(100, abs=2), "c": pytest.approx(100, abs=2)}


def test_an_owner_alone_gets_everything_whatever_it_weighs() -> None:
    assert run(FairShares(), {"a"}, 10) == {"a": 10}


@pytest.mark.parametrize(("away_s", "first"), [(0.0, "b"), (KEPT_S - 1, "b"), (KEPT_S + 1, "a")])
def test_closing_a_session_cancels_no_debt_for_ten_minutes(away_s: float, first: str) -> None:
    clock = Clock()
    shares = FairShares(clock)
    shares.begin_turn({"a", "b"})
    shares.charge("b", 1)
    shares.charge("a", 1000)
    shares.leave("a")
    clock.now += away_s
    shares.begin_turn({"b"})
    shares.begin_turn({"a", "b"})
    assert next(shares.in_order({"a": [1], "b": [2]})) == {"a": 1, "b": 2}[first]


def test_time_away_earns_no_credit() -> None:
    shares = FairShares()
    run(shares, {"a", "b"}, 10)
    shares.leave("a")
    run(shares, {"b"}, 1000)
    assert run(shares, {"a", "b"}, 100) == {"a": pytest.approx(50, abs=1), "b": pytest.approx(50, abs=1)}


def test_owners_that_come_once_leave_a_bounded_memory() -> None:
    shares = FairShares(Clock())
    for number in range(MAX_ABSENT + 100):
        shares.begin_turn({number})
        shares.charge(number, 1000)
        shares.leave(number)
    assert len(shares._scores) <= MAX_ABSENT
