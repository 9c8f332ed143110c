"""The watch of a session's pace, and what becomes of a session that meets a bug of ours."""

from __future__ import annotations

import pytest
import torch
import trio

from peerd.client.session.pace_watch import PaceWatch
from peerd.protocol.errors import InternalError
from peerd.protocol.span import Span

HIDDEN = torch.ones(1, 8)


class AnsweredAtTheLastMoment:
    """A step that is answered in the turn in which it becomes late."""

    late_after_s, oldest_seq = 1.0, None

    def __init__(self):
        self.changed = trio.lowlevel.ParkingLot()
        self.working_since = trio.current_time()

    @property
    def is_working(self):
        return trio.current_time() - self.working_since < self.late_after_s


async def test_an_answer_that_comes_in_the_turn_in_which_it_is_late_is_an_answer():
    with trio.move_on_after(10) as scope:
        await PaceWatch(AnsweredAtTheLastMoment(), None, None, pytest.fail).run()
    assert scope.cancelled_caught


async def test_a_bug_in_one_session_ends_that_session_alone(open_swarm, monkeypatch, caplog):
    async with open_swarm() as swarm:
        await swarm.serve(0, 4, step_s=5.0)
        client = await swarm.client()
        monkeypatch.setattr(client.connections.containment, "is_strict", False)
        broken, other = await client.session(Span(0, 4)), await client.session(Span(0, 4))
        monkeypatch.setattr(type(broken._supervisor.progress), "late_after_s", property(lambda self: 1 / 0))
        with pytest.raises(InternalError, match="a bug"):
            await broken.step(HIDDEN)
        assert broken.closed
        monkeypatch.undo()
        await other.step(HIDDEN)
        assert "a session of this client: ZeroDivisionError" in caplog.text
