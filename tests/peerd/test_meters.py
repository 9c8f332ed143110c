"""What is counted and timed while a peer works."""

from __future__ import annotations

import pytest
import torch
import trio

from peerd.client.answer_meter import AnswerMeter
from peerd.compute.errors import BatchFailedError
from peerd.compute.steps import Batch, EngineStep, Piece, StepResult
from peerd.meters import Histogram, Meters
from peerd.protocol.errors import InvalidRequest, NoChain, Overloaded, PeerdError, RemoteProtocolError
from peerd.protocol.rows import RowSlice
from peerd.protocol.span import Span
from peerd.server.step_meter import StepMeter


def test_a_value_at_a_bound_lies_in_the_bucket_of_that_bound() -> None:
    histogram = Histogram((1, 2, 4))
    for value in (0, 1, 1.5, 4, 5):
        histogram.observe(value)
    assert histogram.counts == [2, 1, 1, 1]
    assert histogram.total == 11.5


def test_bytes_are_counted_by_codec_and_direction() -> None:
    meters = Meters()
    meters.sent("exact", [memoryview(bytes(10)), memoryview(bytes(5))])
    meters.sent("int8", [])
    meters.received("int8", memoryview(bytes(7)))
    assert dict(meters.tensor_bytes) == {("exact", "sent"): 15, ("int8", "received"): 7}


# Steps of a server.


def batch_of(*steps: tuple[str, int, int]) -> Batch:
    """A batch of (session, number of the step, offset in the step)."""
    pieces = [
        Piece(EngineStep(session, seq, (), (RowSlice(0, 0, 4),), torch.zeros(4, 1)), offset, 2, ())
        for session, seq, offset in steps
    ]
    return Batch(Span(0, 1), tuple(pieces), ())


async def test_a_step_waits_until_the_first_batch_that_takes_it() -> None:
    meter = StepMeter(Meters())
    meter.queued("a", 1)
    await trio.sleep(0.02)
    meter.queued("b", 1)
    began = trio.current_time()
    meter.ran(batch_of(("a", 1, 0), ("b", 1, 0)), began, began + 0.3)
    meter.ran(batch_of(("a", 1, 2)), began + 5, began + 5.3)
    queued = meter.meters.queued_s
    assert sum(queued.counts) == 2
    assert queued.total == pytest.approx(0.02)
    assert meter.meters.batch_sessions.total == 3
    assert meter.meters.batch_positions.total == 6
    assert meter.meters.batch_s.total == pytest.approx(0.6)


async def test_nothing_is_kept_of_steps_that_fail_or_whose_session_ends() -> None:
    meter = StepMeter(Meters())
    for number in range(5):
        meter.queued("a", number)
        meter.queued("b", number)
    meter.ended(StepResult("a", 3, None, BatchFailedError("no")))
    meter.ended(StepResult("gone", 3, None, BatchFailedError("no")))
    meter.ended(StepResult("b", 1, torch.zeros(1)))
    meter.left("b")
    meter.left("b")
    assert repr(meter) == "<StepMeter waiting=4>"
    assert dict(meter.meters.steps) == {"failed": 2, "computed": 1}


# Tokens of a client.


async def test_the_time_between_tokens_is_that_of_one_row() -> None:
    meters = Meters()
    meter = AnswerMeter(meters, None)
    meter.prompt(30, 20)
    with meter.running():
        await trio.sleep(2)
        meter.token(0)
        meter.token(1)
        await trio.sleep(0.25)
        meter.token(0)
        meter.token(1)
    assert meters.tokens == 4
    assert (meters.prompt_tokens, meters.cached_tokens) == (30, 20)
    assert (sum(meters.first_token_s.counts), meters.first_token_s.total) == (1, 2)
    assert (sum(meters.between_tokens_s.counts), meters.between_tokens_s.total) == (2, 0.5)


@pytest.mark.parametrize(
    ("error", "end"),
    [
        (NoChain("no server"), "no_chain"),
        (Overloaded("busy"), "overloaded"),
        (InvalidRequest("too long"), "refused"),
        (RemoteProtocolError("nonsense"), "failed"),
    ],
)
async def test_answers_are_counted_by_how_they_end(error: PeerdError, end: str) -> None:
    meters = Meters()
    meter = AnswerMeter(meters, None)
    with pytest.raises(type(error)), meter.running():
        raise error
    with meter.running():
        pass
    with trio.CancelScope() as scope, meter.running():
        scope.cancel()
        await trio.sleep(1)
    assert dict(meters.answers) == {end: 1, "complete": 1, "abandoned": 1}


class Guesses:
    """A speculator's figures."""

    def __init__(self) -> None:
        self.drafted = self.accepted = 0


async def test_guesses_of_an_answer_that_runs_twice_count_once() -> None:
    meters, guesses = Meters(), Guesses()
    meter = AnswerMeter(meters, guesses)  # type: ignore[arg-type]
    with meter.running():
        guesses.drafted, guesses.accepted = 8, 3
    with meter.running():
        guesses.drafted, guesses.accepted = 10, 4
    assert (meters.drafted, meters.accepted) == (10, 4)
