"""A daemon's status of a model's servers, from announcements alone."""

from __future__ import annotations

from collections.abc import Collection
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio

from peerd.api.status import Status, _avoided, _refused
from peerd.cli.watching.status import _avoided as said_avoided
from peerd.cli.watching.status import _refused as said_refused
from peerd.net.containment import Containment
from peerd.net.limits.scores import BANNED_S, BUG, MALFORMED
from peerd.protocol.identity import Identity, PeerId
from peerd.protocol.span import Span
from peerd.routing.failures.track_record import TrackRecord


class Announced:
    """A directory of servers in these states, each of the whole model."""

    def __init__(self, *states: str) -> None:
        #: What a fresh look shows, where it is something else.
        self.now: dict[str, str] = {}
        self._offers = [
            SimpleNamespace(peer_id=f"peer {number}", span=Span(0, 4), record=SimpleNamespace(state=state))
            for number, state in enumerate(states)
        ]

    async def servers(self, _model: bytes, _block_count: int, *, max_age_s: float) -> list[Any]:
        if max_age_s == 0.0:
            for offer in self._offers:
                offer.record.state = self.now.get(offer.peer_id, offer.record.state)
        return self._offers


def status_of(*states: str, now: str = "", gone: Collection[str] = ()) -> Status:
    announced = Announced(*states)
    announced.now = {"peer 0": now} if now else {}
    peer = SimpleNamespace(discovery=SimpleNamespace(directory=announced))
    model = SimpleNamespace(facts=SimpleNamespace(digest=b"", block_count=4), unreachable=lambda: frozenset(gone))
    return Status(cast(Any, peer), cast(Any, [("tiny", model)]))


@pytest.mark.parametrize("state", ["joining", "draining"])
async def test_a_server_that_accepts_no_sessions_does_not_count(state: str) -> None:
    ready, problem = await status_of(state).is_ready()
    assert not ready
    assert problem == "tiny needs 4 more blocks: 0-3"


async def test_a_model_is_ready_once_each_block_has_a_server_that_takes_sessions() -> None:
    assert await status_of("joining", "online").is_ready() == (True, "")


async def test_a_server_that_we_found_gone_does_not_count_though_it_is_announced() -> None:
    status = status_of("online", "online", gone={"peer 0"})
    assert await status.is_ready() == (True, "")
    status = status_of("online", "online", gone={"peer 0", "peer 1"})
    assert await status.is_ready() == (False, "tiny needs 4 more blocks: 0-3")


async def test_a_newcomer_is_not_missed_for_an_older_view() -> None:
    assert await status_of("joining", now="online").is_ready() == (True, "")


async def test_status_names_who_is_refused_and_who_is_avoided() -> None:
    culprit, server = Identity.from_seed(b"1" * 32).peer_id, Identity.from_seed(b"2" * 32).peer_id
    containment, track_record = Containment(), TrackRecord(trio.current_time)
    peer = cast(
        Any,
        SimpleNamespace(
            connections=SimpleNamespace(containment=containment), discovery=SimpleNamespace(track_record=track_record)
        ),
    )
    assert _refused(peer) == _avoided(peer) == []
    for _ in range(3):
        containment.scores.note("a bug", BUG, culprit, None, trio.current_time())
    containment.scores.note("malformed messages", MALFORMED, PeerId("another"), None, trio.current_time())
    track_record.failed(server, "no answer\nafter 5 s")
    await trio.sleep(6)
    assert _refused(peer) == [
        {"name": culprit, "score": 145.0, "banned_s": BANNED_S - 6, "reasons": {"a bug": 3}},
        {"name": "another", "score": 5.0, "banned_s": 0.0, "reasons": {"malformed messages": 1}},
    ]
    assert said_refused(_refused(peer)[0]).endswith("for 0:09:54, score 145 of 100: a bug (3x)")
    assert said_refused(_refused(peer)[1]) == "another not yet, score 5 of 100: malformed messages (1x)"
    track_record.failed(server, "no answer\nafter 5 s")
    (one,) = _avoided(peer)
    assert one == {"peer_id": server, "for_s": 10.0, "failures": 2, "why": "no answer\nafter 5 s"}
    # A stranger's words stay on one line.
    assert said_avoided(one) == "for 0:00:10: no answer after 5 s"
    await trio.sleep(BANNED_S)
    assert _refused(peer) == _avoided(peer) == []
