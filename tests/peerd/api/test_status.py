"""What a daemon says of a model's servers, made of announcements alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from peerd.api.status import Status
from peerd.protocol.span import Span


class Announced:
    """A directory of servers in these states, each of the whole model."""

    def __init__(self, *states: str) -> None:
        self._offers = [
            SimpleNamespace(peer_id=f"peer {number}", span=Span(0, 4), record=SimpleNamespace(state=state))
            for number, state in enumerate(states)
        ]

    async def servers(self, _model: bytes, _block_count: int, *, max_age_s: float) -> list[Any]:
        return self._offers


def status_of(*states: str) -> Status:
    peer = SimpleNamespace(discovery=SimpleNamespace(directory=Announced(*states)))
    model = SimpleNamespace(facts=SimpleNamespace(digest=b"", block_count=4))
    return Status(cast(Any, peer), cast(Any, [("tiny", model)]))


@pytest.mark.parametrize("state", ["joining", "draining"])
async def test_whoever_takes_no_sessions_serves_nobody(state: str) -> None:
    ready, problem = await status_of(state).is_ready()
    assert not ready
    assert problem == "nobody serves blocks 0:4 of tiny"


async def test_a_model_is_ready_once_each_block_has_a_server_that_takes_sessions() -> None:
    assert await status_of("joining", "online").is_ready() == (True, "")
