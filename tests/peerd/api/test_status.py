"""A daemon's status of a model's servers, from announcements alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from peerd.api.status import Status
from peerd.protocol.span import Span


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


def status_of(*states: str, now: str = "") -> Status:
    announced = Announced(*states)
    announced.now = {"peer 0": now} if now else {}
    peer = SimpleNamespace(discovery=SimpleNamespace(directory=announced))
    model = SimpleNamespace(facts=SimpleNamespace(digest=b"", block_count=4))
    return Status(cast(Any, peer), cast(Any, [("tiny", model)]))


@pytest.mark.parametrize("state", ["joining", "draining"])
async def test_a_server_that_accepts_no_sessions_does_not_count(state: str) -> None:
    ready, problem = await status_of(state).is_ready()
    assert not ready
    assert problem == "no server for blocks 0:4 of tiny"


async def test_a_model_is_ready_once_each_block_has_a_server_that_takes_sessions() -> None:
    assert await status_of("joining", "online").is_ready() == (True, "")


async def test_a_newcomer_is_not_missed_for_an_older_view() -> None:
    assert await status_of("joining", now="online").is_ready() == (True, "")
