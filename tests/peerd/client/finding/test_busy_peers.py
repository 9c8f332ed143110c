"""How a client treats full peers: it stays away longer each time, at random, and queues if it holds nothing else."""

from random import Random

import pytest

from peerd.client.finding.busy_peers import FIRST_RANGE_S, MAX_RANGE_S, NEWCOMER_S, QUEUE_S, BusyPeers
from peerd.protocol.errors import Draining, NoRoom, Overloaded
from peerd.protocol.identity import Identity
from peerd.protocol.span import Span

A, B = (Identity.from_seed(bytes([number]) * 32).peer_id for number in (1, 2))


def away_s(busy: BusyPeers, now: float) -> float:
    """How long A is left alone from now on, to a twentieth of a second."""
    return next(tick / 20 for tick in range(10_000) if A not in busy.away(now + tick / 20))


def test_a_peer_is_left_alone_at_random_from_a_range_that_doubles():
    delays: list[list[float]] = [[] for _ in range(8)]
    for seed in range(60):
        busy = BusyPeers(Random(seed))
        now = 0.0
        for refusal in delays:
            busy.refused(A, Overloaded("full"), now)
            refusal.append(away_s(busy, now))
            now += refusal[-1]
    for number, refusal in enumerate(delays):
        range_s = min(MAX_RANGE_S, FIRST_RANGE_S * 2**number)
        assert max(refusal) <= range_s + 0.05
        # The whole range is used: two clients that were refused together do not come back together.
        assert max(refusal) > 0.8 * range_s
        assert min(refusal) < 0.2 * range_s + 0.05


def test_a_hint_is_followed_about_and_within_bounds():
    for seed in range(20):
        busy = BusyPeers(Random(seed))
        busy.refused(A, NoRoom("full", 0, retry_after_s=10), 0)
        assert 5 <= away_s(busy, 0) <= 10.05
        busy = BusyPeers(Random(seed))
        busy.refused(A, NoRoom("full", 0, retry_after_s=1e6), 0)
        assert away_s(busy, 0) <= MAX_RANGE_S + 0.05


def test_peers_are_counted_each_for_itself():
    busy = BusyPeers(Random(1))
    for _ in range(6):
        busy.refused(A, Overloaded("full", 10), 0)
    busy.refused(B, Overloaded("full", 1), 0)
    assert busy.away(FIRST_RANGE_S + 0.05) == {A}


def test_waiting_ends_with_the_first_delay_and_in_time_to_find_newcomers():
    busy = BusyPeers(Random(1))
    busy.refused(A, Overloaded("full", 30), 0)
    busy.refused(B, Overloaded("full", 2), 0)
    first = busy.next_try(0, until_s=1000)
    assert busy.away(first) == {A}
    assert NEWCOMER_S / 2 <= busy.next_try(first, until_s=1000) - first <= NEWCOMER_S
    assert busy.next_try(first, until_s=first + 0.5) == first + 0.5


def test_whoever_was_refused_queues_at_one_hop_but_never_along_a_chain():
    busy = BusyPeers(Random(1))
    assert busy.timeout_ms(2000, 120, alone=True) == 2000
    busy.refused(A, Overloaded("full"), 0)
    assert busy.timeout_ms(2000, 120, alone=True) == 1000 * QUEUE_S
    assert busy.timeout_ms(2000, 9, alone=True) == 9000
    assert busy.timeout_ms(2000, -3, alone=True) == 2000
    assert busy.timeout_ms(2000, 120, alone=False) == 2000


@pytest.mark.parametrize("last", [NoRoom("12 free", 12, 3.0), Draining("leaving"), Overloaded("busy", 2.0)])
def test_the_error_in_the_end_is_as_typed_as_the_last_refusal(last: Overloaded):
    busy = BusyPeers(Random(1))
    busy.refused(A, last, 0)
    busy.refused(B, last, 0)
    error = busy.error(Span(0, 4), 120.4)
    assert type(error) is type(last)
    assert error.retry_after_s == last.retry_after_s
    assert getattr(error, "free_tokens", None) == getattr(last, "free_tokens", None)
    assert str(error) == (
        "all servers of blocks 0:4 are full: asked 2 times in 120 s; the last answer was: " + str(last)
    )
