"""More sessions than the pool could hold at their longest: steps wait for pages, and results stay the same."""

from __future__ import annotations

import random

import pytest
import torch

from peerd.compute.errors import NoRoomError
from peerd.compute.kv.layout import Keep
from peerd.compute.steps import EngineStep
from peerd.protocol.rows import Fork, RowSlice, SessionSize
from peerd.protocol.span import Span
from peerd.testing.fake_engine import FakeEngine, fake_forward

SPAN, PAGE, WIDTH = Span(0, 2), 4, 2
SHORT = SessionSize(40, prompt_length=1)


def engine_of(pages: int, **options: object) -> FakeEngine:
    return FakeEngine(SPAN, hidden_size=WIDTH, kv_tokens=pages * PAGE, page_tokens=PAGE, batch_tokens=16, **options)


def submit(engine: FakeEngine, name: str, start: int, hidden: torch.Tensor, *ops: Fork, row: int = 0) -> None:
    rows = (RowSlice(row, start, len(hidden)),) if len(hidden) else ()
    engine.submit(EngineStep(name, start + len(hidden), tuple(ops), rows, hidden))


def turn(engine: FakeEngine) -> dict[str, torch.Tensor]:
    """The results of one batch, by session; none if no session can run."""
    batch = engine.plan()
    if batch is None:
        return {}
    return {result.session: result.hidden for result in engine.collect(batch, engine.run(batch))}


@pytest.mark.parametrize("keeps", [{}, {1: Keep(window=6)}], ids=["everything", "a window"])
def test_sessions_that_outgrow_the_pool_wait_and_end_with_the_same_results(keeps: dict[int, Keep]):
    chance = random.Random(3)
    engine = engine_of(24, keeps=keeps)
    texts = {f"s{number}": torch.randint(99, (chance.randint(10, 40), WIDTH)).float() for number in range(12)}
    done = dict.fromkeys(texts, 0)
    opened: list[str] = []
    preempted = 0
    while any(done[name] < len(text) for name, text in texts.items()):
        for name, text in texts.items():
            if name in opened or done[name] == len(text):
                continue
            try:
                engine.open(name, SHORT)
            except NoRoomError:
                break
            opened.append(name)
            # What was answered already is sent again in front, as after a failover.
            submit(engine, name, 0, text[: done[name] + 1])
        for name, hidden in turn(engine).items():
            done[name] += 1
            assert torch.equal(hidden[-1], fake_forward(texts[name][: done[name]], SPAN, keeps=keeps)[-1])
            if done[name] < len(texts[name]):
                submit(engine, name, done[name], texts[name][done[name] : done[name] + 1])
            else:
                engine.close(name)
                opened.remove(name)
        if engine.short and not engine.ready():
            assert engine.plan() is None
            engine.close(opened.pop())
            preempted += 1
    assert preempted > 2
    assert engine.free_tokens == engine.total_tokens


def test_a_step_that_waits_for_pages_keeps_nobody_waiting_who_needs_none():
    engine = engine_of(4)
    for name in ("first", "second"):
        engine.open(name, SessionSize(16, prompt_length=1))
    submit(engine, "first", 0, torch.ones(PAGE, WIDTH))
    submit(engine, "second", 0, torch.ones(3 * PAGE - 1, WIDTH))
    turn(engine)
    submit(engine, "first", PAGE, torch.ones(1, WIDTH))
    submit(engine, "second", 3 * PAGE - 1, torch.ones(1, WIDTH))
    assert list(turn(engine)) == ["second"]
    assert (engine.short, engine.ready(), engine.plan()) == (["first"], False, None)
    engine.close("second")
    assert (engine.short, engine.ready()) == ([], True)
    assert list(turn(engine)) == ["first"]


def test_blocks_whose_sessions_all_wait_for_pages_leave_the_turn_to_other_blocks():
    engine = engine_of(4)
    engine.open("waits", SessionSize(16, prompt_length=1), blocks=Span(0, 1))
    engine.open("runs", SessionSize(8, prompt_length=1), blocks=Span(1, 2))
    submit(engine, "waits", 0, torch.ones(3 * PAGE, WIDTH))
    turn(engine)
    submit(engine, "runs", 0, torch.ones(PAGE - 1, WIDTH))
    turn(engine)
    submit(engine, "waits", 3 * PAGE, torch.ones(1, WIDTH))
    submit(engine, "runs", PAGE - 1, torch.ones(1, WIDTH))
    assert list(turn(engine)) == ["runs"]


def test_a_prompt_goes_as_far_as_there_are_pages():
    engine = engine_of(6)
    engine.open("small", SessionSize(8))
    submit(engine, "small", 0, torch.ones(2 * PAGE, WIDTH))
    turn(engine)
    engine.open("long", SessionSize(24, prompt_length=1))
    text = torch.arange(2.0 * 20).reshape(20, WIDTH)
    submit(engine, "long", 0, text)
    assert turn(engine) == {}
    assert engine.lengths("long") == {0: 4 * PAGE}
    assert (engine.plan(), engine.short) == (None, ["long"])
    engine.close("small")
    assert torch.equal(turn(engine)["long"], fake_forward(text, SPAN))


def test_a_fork_that_waits_for_the_page_of_its_copy_is_done_once():
    engine = engine_of(6)
    engine.open("beams", SessionSize(8, 2, prompt_length=1))
    engine.open("other", SessionSize(20, prompt_length=1))
    text = torch.arange(2.0 * 20).reshape(20, WIDTH)
    submit(engine, "beams", 0, text[:3])
    submit(engine, "other", 0, text)
    while engine.ready():
        turn(engine)
    submit(engine, "beams", 3, text[3:4], Fork(0, 1, 3), row=1)
    assert (turn(engine), engine.short) == ({}, ["beams"])
    engine.close("other")
    assert torch.equal(turn(engine)["beams"], fake_forward(text[:4], SPAN)[3:])
    assert engine.lengths("beams") == {0: 3, 1: 4}


def test_pages_that_the_running_batch_of_a_closed_session_still_has_are_not_missing():
    engine = engine_of(4)
    for name in ("waits", "closed"):
        engine.open(name, SessionSize(16, prompt_length=1))
    submit(engine, "waits", 0, torch.ones(PAGE, WIDTH))
    submit(engine, "closed", 0, torch.ones(3 * PAGE - 1, WIDTH))
    turn(engine)
    submit(engine, "waits", PAGE, torch.ones(1, WIDTH))
    submit(engine, "closed", 3 * PAGE - 1, torch.ones(1, WIDTH))
    batch = engine.plan()
    assert batch is not None
    assert (engine.short, engine.missing_pages) == (["waits"], 1)
    engine.close("closed")
    assert (engine.short, engine.missing_pages) == (["waits"], 1 - 3)
    engine.collect(batch, engine.run(batch))
    assert engine.short == []


def test_a_session_whose_waiting_steps_failed_waits_no_more_for_their_pages():
    engine = engine_of(4)
    for name in ("fails", "full"):
        engine.open(name, SessionSize(16, prompt_length=1))
    submit(engine, "fails", 0, torch.ones(PAGE - 1, WIDTH))
    submit(engine, "full", 0, torch.ones(3 * PAGE, WIDTH))
    turn(engine)
    submit(engine, "fails", PAGE - 1, torch.full((1, WIDTH), torch.nan))
    submit(engine, "fails", PAGE, torch.ones(1, WIDTH))
    turn(engine)
    submit(engine, "fails", PAGE - 1, torch.ones(1, WIDTH))
    assert engine.short == []
    assert list(turn(engine)) == ["fails"]
