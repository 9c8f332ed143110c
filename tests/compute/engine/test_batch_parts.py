"""A batch that fails costs only the sessions that make it fail; the others get their normal results."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from peerd.compute.engine.batch_parts import MAX_RUNS, run_in_parts
from peerd.compute.engine.engine import Batch, BatchOutput, EngineStep, Fork, RowSlice, StepResult
from peerd.compute.errors import BatchFailedError
from peerd.protocol.rows import SessionSize
from peerd.protocol.span import Span
from peerd.testing.fake_engine import FakeEngine, fake_forward

SPAN = Span(2, 5)
WIDTH = 8


def tokens(count: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 251, (count, WIDTH), generator=torch.Generator().manual_seed(seed)).float()


class Fragile(FakeEngine):
    """An engine that fails on batches for which `fails` raises. `runs` records the sessions of each batch that it was
    given.
    """

    def __init__(self, fails: Callable[[set[object]], None]) -> None:
        super().__init__(SPAN, hidden_size=WIDTH, kv_tokens=4096)
        self.fails = fails
        self.runs: list[list[object]] = []
        self.given_back = 0

    def run(self, batch: Batch) -> BatchOutput:
        sessions = list(dict.fromkeys(piece.step.session for piece in batch.pieces))
        self.runs.append(sessions)
        # The device's work before the failure is not undone.
        output = super().run(batch)
        self.fails(set(sessions))
        return output

    def give_back(self) -> None:
        self.given_back += 1

    def turn(self, contains: Callable[[Exception], bool] = lambda error: True) -> dict[object, StepResult]:
        batch = self.plan()
        assert batch is not None
        output = run_in_parts(self.run, batch, self.give_back, contains)
        return {result.session: result for result in self.collect(batch, output)}

    def begin(self, *sessions: object) -> None:
        for session in sessions:
            self.open(session, SessionSize(64, 2, 0))
            self.say(session, 1, 0, 3)

    def say(self, session: object, seq: int, start: int, count: int) -> None:
        hidden = tokens(64, hash(session))[start : start + count]
        self.submit(EngineStep(session, seq, (), (RowSlice(0, start, count),), hidden))


def refuses(*culprits: object, error: type[Exception] = IndexError) -> Callable[[set[object]], None]:
    def check(sessions: set[object]) -> None:
        if sessions & set(culprits):
            raise error("no")

    return check


@pytest.mark.parametrize("culprits", [{3}, {0, 7}, {1, 2, 3}])
def test_only_those_fail_whose_steps_cannot_be_computed(culprits: set[int]) -> None:
    engine = Fragile(refuses(*culprits))
    engine.begin(*range(8))
    results = engine.turn()
    failed = {session for session, result in results.items() if isinstance(result.error, BatchFailedError)}
    assert failed == culprits
    for session in set(range(8)) - culprits:
        assert torch.equal(results[session].hidden, fake_forward(tokens(64, hash(session))[:3], SPAN))
    # The caches of the other sessions are intact.
    for session in range(8):
        engine.say(session, 2, 0 if session in culprits else 3, 3)
    engine.fails = refuses()
    again = engine.turn()
    for session in range(8):
        row = fake_forward(tokens(64, hash(session))[:6], SPAN)
        assert torch.equal(again[session].hidden, row[:3] if session in culprits else row[3:])


def test_a_batch_without_memory_runs_in_parts_that_fit() -> None:
    def at_most_three(sessions: set[object]) -> None:
        if len(sessions) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")

    engine = Fragile(at_most_three)
    engine.begin(*range(8))
    assert all(result.error is None for result in engine.turn().values())
    assert [len(run) for run in engine.runs] == [8, 4, 2, 2, 4, 2, 2]
    assert engine.given_back == 3


def test_a_batch_that_does_not_fail_runs_once() -> None:
    engine = Fragile(refuses())
    engine.begin(*range(8))
    engine.turn()
    assert len(engine.runs) == 1


def test_rows_that_share_pages_are_copied_whatever_fails_between_them() -> None:
    engine = Fragile(refuses())
    names = ("forks", "fails", "other")
    engine.begin(*names)
    engine.turn()
    # From position 3 on the second row differs, and both write to the page that they share.
    rows = {
        name: (tokens(64, hash(name))[:5], torch.cat([tokens(64, hash(name))[:3], tokens(2, 99)])) for name in names
    }

    def go_on(name: str, seq: int, at: int) -> None:
        slices = (RowSlice(0, at, 1), RowSlice(1, at, 1))
        ops = (Fork(0, 1, 3),) if at == 3 else ()
        engine.submit(EngineStep(name, seq, ops, slices, torch.stack([row[at] for row in rows[name]])))

    for name in names:
        go_on(name, 2, 3)
    engine.fails = refuses("fails")
    results = engine.turn()
    assert isinstance(results["fails"].error, BatchFailedError)
    for name in ("forks", "other"):
        expected = [fake_forward(row, SPAN) for row in rows[name]]
        assert torch.equal(results[name].hidden, torch.stack([row[3] for row in expected]))
        # What they wrote after the copies is still there.
        go_on(name, 3, 4)
        assert torch.equal(engine.turn()[name].hidden, torch.stack([row[4] for row in expected]))


def test_where_everything_fails_it_is_not_tried_for_ever() -> None:
    engine = Fragile(refuses(*range(200)))
    for session in range(200):
        engine.open(session, SessionSize(16, 1, 0))
        engine.say(session, 1, 0, 1)
    results = engine.turn()
    assert len(results) == 200
    assert all(result.error is not None for result in results.values())
    assert len(engine.runs) == MAX_RUNS


def test_a_lost_device_is_not_asked_again() -> None:
    engine = Fragile(refuses(*range(8), error=torch.AcceleratorError))
    engine.begin(*range(8))
    batch = engine.plan()
    assert batch is not None
    output = run_in_parts(engine.run, batch, engine.give_back)
    assert output.is_device_lost
    assert output.hidden == (None,) * 8
    assert len(engine.runs) == 1
    assert "AcceleratorError" in output.failures[0]


def test_what_is_not_to_be_survived_is_raised() -> None:
    engine = Fragile(refuses(0))
    engine.begin(0, 1)
    with pytest.raises(IndexError):
        engine.turn(lambda error: isinstance(error, MemoryError))
