"""What each piece of news changes, and which trouble is most urgent: tables, without any I/O."""

from __future__ import annotations

from itertools import permutations
from typing import cast

import pytest

from peerd.client.session.hops.control_stream import ControlStream
from peerd.client.session.live_chain import MAX_REPLAN_S, REPLAN_S, HopRoute, LiveChain
from peerd.client.session.troubles import (
    Behind,
    BridgeIdle,
    Consequences,
    Disagrees,
    Fatal,
    Hole,
    HopHangs,
    HopLost,
    HopRefuses,
    LinkBroken,
    News,
    NoAnswer,
    Queued,
    Trouble,
    consequences_of,
    ends_chain,
    most_urgent,
    still_stands,
)
from peerd.net.stream import Stream
from peerd.protocol.errors import (
    BadResult,
    ConnectionLost,
    ContextTooLong,
    Evicted,
    InternalError,
    InvalidRequest,
    LinkFailed,
    NoChain,
    NoRoom,
    Overloaded,
    PeerdError,
    RelayLost,
    RemoteProtocolError,
    Unresponsive,
)
from peerd.protocol.identity import PeerId
from peerd.protocol.messages.session import Opened
from peerd.protocol.span import Span
from peerd.routing.chains.chain import Hop
from peerd.routing.directory.offer import Offer


class DeafStream:
    """A stream; the test does not observe its end."""

    def reset(self, reason: str) -> None:
        pass


def control(number: int, span: Span) -> ControlStream:
    hop = Hop(number, cast(PeerId, f"peer {number}"), span, cast(Offer, None))
    return ControlStream(hop, number, 1, cast(Stream, DeafStream()), Opened(epoch=1, max_steps=4))


FIRST, SECOND = control(0, Span(0, 3)), control(1, Span(3, 6))
DROPPED = {"drops_hop": True}


def chain() -> LiveChain:
    chain = LiveChain(b"s" * 16, Span(0, 6))
    assert chain.put(Span(0, 6), [FIRST, SECOND])
    return chain


@pytest.mark.parametrize(
    ("news", "changes"),
    [
        # A hop that breaks a promise is blamed, for all sessions.
        (HopLost(FIRST, ConnectionLost("x")), DROPPED | {"is_blamed": True}),
        (HopLost(FIRST, BadResult("x")), DROPPED | {"is_blamed": True}),
        (HopLost(FIRST, RemoteProtocolError("x")), DROPPED | {"is_blamed": True}),
        (HopLost(FIRST, Unresponsive("x")), DROPPED | {"is_blamed": True}),
        (HopLost(FIRST, InternalError("x")), DROPPED | {"is_blamed": True}),
        # A relay's death is no fault of the peer behind it, which may be opened again at once.
        (HopLost(FIRST, RelayLost("x")), DROPPED),
        # A hop that evicted an idle session did right, and is needed only for the next step.
        (HopLost(FIRST, Evicted("x")), DROPPED | {"waits_for_work": True}),
        # A hop that is full or cannot be reached has broken no promise.
        (HopLost(FIRST, NoRoom("x", 0)), DROPPED | {"is_avoided": True}),
        (HopLost(FIRST, Overloaded("x")), DROPPED | {"is_avoided": True}),
        (HopLost(FIRST, LinkFailed("x")), DROPPED | {"is_avoided": True}),
        # One hop's word that the caller is wrong ends no step: another is asked.
        (HopRefuses(FIRST, InvalidRequest("x")), DROPPED),
        (HopRefuses(FIRST, ContextTooLong("x")), DROPPED),
        (HopRefuses(FIRST, BadResult("x")), DROPPED),
        # No hop is to blame, and none can be kept.
        (Disagrees(FIRST, Evicted("x")), {"drops_all": True}),
        (NoAnswer(Overloaded("x")), {"drops_all": True}),
        # These wait for their turn.
        (HopHangs(FIRST, 3), {}),
        (LinkBroken(FIRST), {}),
        (BridgeIdle(FIRST), {}),
    ],
    ids=lambda value: f"{type(value).__name__}-{type(getattr(value, 'error', None)).__name__}",
)
def test_news_change_what_the_table_says_and_nothing_else(news: News, changes: dict[str, bool]) -> None:
    assert consequences_of(news) == Consequences(**changes)


FATAL, HANGS, BROKEN, IDLE = Fatal(NoChain("x", ())), HopHangs(FIRST, 3), LinkBroken(FIRST), BridgeIdle(SECOND)
HOLE = Span(3, 6)


@pytest.mark.parametrize(
    ("queued", "holes", "is_ready", "first"),
    [
        ([], [], True, None),
        ([], [], False, Behind()),
        ([], [HOLE], False, Hole(HOLE)),
        ([FATAL, BROKEN, HANGS, IDLE], [HOLE], False, FATAL),
        ([BROKEN, HANGS, IDLE], [HOLE], False, Hole(HOLE)),
        # What a hop sends is lost while its link is broken: before anything is sent, the link is bridged.
        ([BROKEN, HANGS, IDLE], [], False, BROKEN),
        ([HANGS, IDLE], [], False, Behind()),
        ([HANGS, IDLE], [], True, HANGS),
        ([IDLE], [], True, IDLE),
    ],
)
def test_the_most_urgent_trouble_comes_first_in_whatever_order_they_were_reported(
    queued: list[Queued], holes: list[Span], is_ready: bool, first: Trouble | None
) -> None:
    for order in permutations(queued):
        assert most_urgent(order, holes, is_ready=is_ready) == first


def test_holes_are_filled_from_the_front() -> None:
    assert most_urgent([], [Span(0, 2), Span(4, 6)], is_ready=False) == Hole(Span(0, 2))


def test_of_two_hops_that_hang_the_one_reported_first_comes_first() -> None:
    other = HopHangs(SECOND, 3)
    assert most_urgent([other, HANGS], [], is_ready=True) == other


@pytest.mark.parametrize(("oldest_seq", "stands"), [(3, True), (4, False), (None, False)])
def test_a_hop_hangs_until_its_step_is_answered_or_given_up(oldest_seq: int | None, stands: bool) -> None:
    assert still_stands(HANGS, chain(), oldest_seq) is stands


@pytest.mark.parametrize(
    ("route", "is_broken", "is_idle"), [(HopRoute(1), True, False), (HopRoute(2, True, True), False, True)]
)
def test_a_link_is_bridged_once_and_only_a_bridge_is_ended(route: HopRoute, is_broken: bool, is_idle: bool) -> None:
    whole = chain()
    whole.set_route(FIRST, route)
    assert still_stands(LinkBroken(FIRST), whole, None) is is_broken
    assert still_stands(BridgeIdle(FIRST), whole, None) is is_idle


def test_no_link_is_broken_behind_the_last_hop_or_before_a_hole() -> None:
    whole = chain()
    assert not still_stands(LinkBroken(SECOND), whole, None)
    whole.drop(SECOND)
    assert not still_stands(LinkBroken(FIRST), whole, None)


def test_a_hop_that_is_gone_has_neither_link_nor_bridge() -> None:
    whole = chain()
    whole.set_route(FIRST, HopRoute(2, is_bridged=True, is_bridge_wanted=True))
    whole.drop(FIRST)
    assert not still_stands(LinkBroken(FIRST), whole, None)
    assert not still_stands(BridgeIdle(FIRST), whole, None)


@pytest.mark.parametrize(
    ("error", "ends"),
    [(InvalidRequest("x"), True), (LinkFailed("x"), True), (NoChain("x", ()), False), (Overloaded("x"), False)],
)
def test_hops_are_kept_unless_they_would_fail_the_next_step_too(error: PeerdError, ends: bool) -> None:
    assert ends_chain(error) is ends


def test_a_bridge_is_doubted_ever_more_seldom() -> None:
    route = HopRoute(1)
    pauses = []
    for _ in range(7):
        pauses.append(route.replan_after_s)
        route = route.with_longer_pause()
    assert pauses == [REPLAN_S, 20, 40, 80, 160, MAX_REPLAN_S, MAX_REPLAN_S]


def test_a_new_route_keeps_the_patience_of_the_old_and_may_be_carried_until_it_stands() -> None:
    old = HopRoute(1, is_bridged=True, is_bridge_wanted=True).with_longer_pause()
    assert old.direct(5) == HopRoute(5, replan_after_s=20)
    assert old.direct(5, is_bridged=True) == HopRoute(5, is_bridged=True, replan_after_s=20)
