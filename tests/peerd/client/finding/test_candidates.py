"""Whom a session and a training chain ask, whom they leave out, and when they give up: pure decisions, as tables."""

from random import Random

import pytest

from peerd.client.finding.candidates import (
    AVOIDED_S,
    FIRST_RETRY_S,
    RETRY_S,
    SESSION_RULES,
    TRAINING_RULES,
    AskAgain,
    Candidates,
    Fault,
    GiveUp,
    Rules,
    Search,
    WaitUntil,
    fault_of,
)
from peerd.client.finding.finder import Patience
from peerd.protocol.errors import (
    BadResult,
    ConnectionLost,
    ContextTooLong,
    Draining,
    Evicted,
    InternalError,
    InvalidRequest,
    NoChain,
    NoRoom,
    NotServed,
    Overloaded,
    PeerdError,
    RelayLost,
    RemoteProtocolError,
    TicketRefused,
    Unresponsive,
    UnsupportedFeature,
)
from peerd.protocol.identity import Identity
from peerd.protocol.span import Span

A, B = (Identity.from_seed(bytes([number]) * 32).peer_id for number in (1, 2))
BLOCKS = Span(0, 4)
PATIENCE = Patience(missing_s=5, busy_s=60)
MISSING = NoChain("no reachable peer serves blocks 0:4", ((0, 4),))
BUSY = Overloaded("full")
NO_ROOM = NoRoom("no room", 0)


def candidates(rules: Rules = SESSION_RULES) -> Candidates:
    return Candidates(rules, PATIENCE, Random(1))


def refuse(search: Search, error: PeerdError, at: float = 0.0) -> AskAgain | GiveUp:
    return search.refused(A, error, BLOCKS, asked_at=at, now=at)


def find_nobody(search: Search, at: float, *, all_busy: bool = False, may_return: bool = False) -> WaitUntil | GiveUp:
    return search.found_nobody(MISSING, BLOCKS, asked_at=at, now=at, all_busy=all_busy, may_return=may_return)


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (Evicted("idle"), Fault.ABSENCE),
        (RelayLost("gone"), Fault.ABSENCE),
        (NO_ROOM, Fault.FULL),
        (Draining("leaving"), Fault.FULL),
        (BUSY, Fault.FULL),
        (NotServed("elsewhere"), Fault.UNFIT),
        (UnsupportedFeature("no adapter"), Fault.UNFIT),
        (BadResult("nan"), Fault.UNFIT),
        (ConnectionLost("gone"), Fault.BROKEN_PROMISE),
        (Unresponsive("silent"), Fault.BROKEN_PROMISE),
        (RemoteProtocolError("nonsense"), Fault.BROKEN_PROMISE),
        (InternalError("a bug of theirs"), Fault.BROKEN_PROMISE),
        (InvalidRequest("wrong"), Fault.OURS),
        (ContextTooLong("too long"), Fault.OURS),
        (TicketRefused("expired"), Fault.OURS),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, PeerdError) else value.name,
)
def test_each_error_has_one_fault(error: PeerdError, fault: Fault):
    assert fault_of(error) is fault


@pytest.mark.parametrize(
    ("rules", "error", "is_blamed", "is_asked_again_now", "is_asked_again_in_need"),
    [
        (SESSION_RULES, Unresponsive("silent"), True, False, True),
        (SESSION_RULES, NotServed("elsewhere"), True, False, True),
        (SESSION_RULES, RelayLost("gone"), False, False, True),
        (TRAINING_RULES, UnsupportedFeature("does not train"), False, False, False),
        (TRAINING_RULES, BadResult("nan"), False, False, False),
        # The finder leaves it out, as long as it sees fit.
        (TRAINING_RULES, Unresponsive("silent"), True, True, True),
        (TRAINING_RULES, Evicted("idle"), False, True, True),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, PeerdError) else None,
)
def test_what_a_fault_means_for_the_peer(
    rules: Rules, error: PeerdError, is_blamed: bool, is_asked_again_now: bool, is_asked_again_in_need: bool
):
    search = candidates(rules).search(0.0)
    assert refuse(search, error) == AskAgain(is_blamed)
    assert (A not in search.exclude(0.0)) == is_asked_again_now
    assert isinstance(find_nobody(search, 0.0), WaitUntil)
    assert (A not in search.exclude(0.0)) == is_asked_again_in_need


@pytest.mark.parametrize("rules", [TRAINING_RULES, SESSION_RULES], ids=["training", "session"])
def test_no_single_peer_is_believed_that_the_request_is_wrong(rules: Rules):
    search = candidates(rules).search(0.0)
    assert refuse(search, InvalidRequest("wrong")) == AskAgain(is_doubted=True)
    assert A in search.exclude(0.0)


def test_a_full_peer_is_left_out_for_a_while_and_without_blame():
    search = candidates().search(0.0)
    assert refuse(search, BUSY) == AskAgain()
    assert search.exclude(0.0) == {A}
    assert search.exclude(30.0) == set()


@pytest.mark.parametrize(
    ("at", "all_busy", "gives_up"),
    [
        (4.9, False, None),
        (5.0, False, NoChain),
        (5.0, True, None),
        (59.9, True, None),
        (60.0, True, Overloaded),
    ],
)
def test_what_nobody_serves_is_given_up_sooner_than_what_is_only_full(
    at: float, all_busy: bool, gives_up: type[PeerdError] | None
):
    search = candidates().search(0.0)
    refuse(search, BUSY)
    answer = find_nobody(search, at, all_busy=all_busy)
    if gives_up is None:
        assert isinstance(answer, WaitUntil)
        assert at <= answer.time <= PATIENCE.busy_s
    else:
        assert isinstance(answer, GiveUp)
        assert type(answer.error) is gives_up


def test_a_peer_that_is_full_when_patience_has_ended_is_the_last_one_asked():
    search = candidates().search(100.0)
    assert refuse(search, BUSY, at=159.0) == AskAgain()
    answer = refuse(search, BUSY, at=160.0)
    assert isinstance(answer, GiveUp)
    assert "asked 2 times in 60 s" in str(answer.error)


def test_sessions_wait_for_room_and_passes_do_not():
    for rules, waits in ((SESSION_RULES, True), (TRAINING_RULES, False)):
        search = candidates(rules).search(0.0)
        refuse(search, NO_ROOM)
        answer = find_nobody(search, 0.0, all_busy=True)
        assert isinstance(answer, WaitUntil) == waits
        assert waits or isinstance(answer, GiveUp)
        assert waits or isinstance(answer.error, NoRoom)


def test_pauses_are_random_and_grow_to_a_bound():
    chosen = candidates()
    for bound_s in (FIRST_RETRY_S, 2 * FIRST_RETRY_S, 4 * FIRST_RETRY_S, 8 * FIRST_RETRY_S, RETRY_S, RETRY_S):
        # Far more tries than a search has time for, all of them "now".
        times = []
        for _ in range(50):
            search = chosen.search(0.0)
            while search._pause_s < bound_s:
                find_nobody(search, 0.0)
            answer = find_nobody(search, 0.0)
            assert isinstance(answer, WaitUntil)
            times.append(answer.time)
        assert bound_s / 2 < max(times) <= bound_s
        assert min(times) < bound_s / 4


def test_a_peer_is_avoided_for_a_while_or_until_there_is_nobody_else():
    mine = candidates()
    mine.avoid(A, 10.0)
    assert mine.search(10.0).exclude(10.0 + AVOIDED_S - 1) == {A}
    assert mine.search(10.0).exclude(10.0 + AVOIDED_S) == set()
    search = mine.search(11.0)
    assert isinstance(find_nobody(search, 11.0), WaitUntil)
    assert search.exclude(11.0) == set()


def test_what_peers_say_of_a_request_stands_where_no_other_peer_is_left():
    said = BadResult("nan")
    for at, may_return, gives_up in ((0.0, True, False), (0.0, False, True), (PATIENCE.missing_s, True, True)):
        search = candidates().search(0.0)
        answer = search.found_nobody(
            MISSING, BLOCKS, asked_at=at, now=at, all_busy=False, may_return=may_return, answer=said
        )
        assert (answer == GiveUp(said)) == gives_up
