"""Sessions, batches and pages, seen through the fake engine, whose results reveal every wrong position."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from peerd.compute.errors import (
    ContextTooLongError,
    InvalidStepError,
    NonFiniteError,
    NoRoomError,
    StepGapError,
)
from peerd.compute.steps import EngineStep, StepResult
from peerd.protocol.rows import Drop, Fork, RowSlice, SessionSize
from peerd.protocol.span import Span
from peerd.testing.fake_engine import FakeEngine, fake_forward

SPAN = Span(2, 5)
WIDTH = 4


def make_engine(**settings):
    return FakeEngine(
        SPAN, **{"hidden_size": WIDTH, "kv_tokens": 256, "page_tokens": 4, "batch_tokens": 64, **settings}
    )


def open_session(engine, name="s", *, max_length=64, max_rows=1, max_rollback=64, blocks=None, owner=None):
    engine.open(name, SessionSize(max_length, max_rows=max_rows, max_rollback=max_rollback), blocks=blocks, owner=owner)


def tokens(count, seed=0):
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


def step(hidden, *rows, session="s", seq=1, ops=()):
    """`rows`: (row, start) in order, sharing `hidden` evenly."""
    count = len(hidden) // max(len(rows), 1)
    slices = tuple(RowSlice(row, start, count) for row, start in rows)
    return EngineStep(session, seq, tuple(ops), slices, hidden)


def turn(engine) -> list[StepResult]:
    batch = engine.plan()
    return engine.collect(batch, engine.run(batch))


def drain(engine) -> list[StepResult]:
    results = []
    while engine.ready():
        results.extend(turn(engine))
    return results


def test_positions_cut_into_steps_and_batches_anyhow_give_the_same():
    prompt = tokens(50)
    for cuts in ([50], [1] * 50, [7, 20, 3, 20]):
        engine = make_engine(batch_tokens=8)
        open_session(engine)
        start = 0
        for seq, count in enumerate(cuts):
            engine.submit(step(prompt[start : start + count], (0, start), seq=seq))
            start += count
        results = drain(engine)
        assert [result.seq for result in results] == list(range(len(cuts)))
        assert torch.equal(torch.cat([result.hidden for result in results]), fake_forward(prompt, SPAN))


def test_a_chain_of_fakes_equals_one():
    prompt = tokens(9)
    middle = fake_forward(prompt, Span(0, 3))
    assert torch.equal(fake_forward(middle, Span(3, 8)), fake_forward(prompt, Span(0, 8)))
    engine = make_engine()
    assert torch.equal(engine.forward(prompt[None])[0], fake_forward(prompt, SPAN))


def test_consecutive_steps_of_a_session_share_a_batch():
    engine = make_engine()
    open_session(engine)
    for position in range(4):
        engine.submit(step(tokens(1, position), (0, position), seq=position))
    assert [result.seq for result in turn(engine)] == [0, 1, 2, 3]


def test_decode_goes_before_prefill_and_both_move_on():
    engine = make_engine(batch_tokens=40)
    open_session(engine, "long", max_length=100)
    open_session(engine, "short")
    engine.submit(step(tokens(100), (0, 0), session="long"))
    engine.submit(step(tokens(1), (0, 0), session="short"))
    batch = engine.plan()
    # Beside a decode a prefill gets a quarter of the budget.
    assert [(piece.step.session, piece.count) for piece in batch.pieces] == [("short", 1), ("long", 10)]
    assert [result.session for result in engine.collect(batch, engine.run(batch))] == ["short"]
    assert [result.session for result in drain(engine)] == ["long"]


def test_prefills_take_turns():
    engine = make_engine(batch_tokens=40)
    for name in ("a", "b"):
        open_session(engine, name, max_length=100)
        engine.submit(step(tokens(100), (0, 0), session=name))
    sessions = []
    while engine.ready():
        batch = engine.plan()
        sessions.append(batch.pieces[0].step.session)
        engine.collect(batch, engine.run(batch))
    assert sessions[:4] == ["a", "b", "a", "b"]


def test_a_prefill_is_not_starved_by_decodes_that_fill_every_batch():
    engine = make_engine(batch_tokens=2, kv_tokens=1024)
    for name in ("a", "b", "c"):
        open_session(engine, name, max_length=64)
    open_session(engine, "long", max_length=64)
    engine.submit(step(tokens(40), (0, 0), session="long"))
    lengths = {"a": 0, "b": 0, "c": 0}
    for _ in range(20):
        for name, length in lengths.items():
            if engine.lengths(name).get(0, 0) == length:
                engine.submit(step(tokens(1), (0, length), session=name))
                lengths[name] += 1
        turn(engine)
    assert engine.lengths("long")[0] >= 3


def served(engine, turns: int, queue: dict[str, int]) -> Counter[str]:
    """Run turns in which every session always has a step of so many positions waiting; positions by owner."""
    counts = Counter()
    for _ in range(turns):
        for name, count in queue.items():
            if not engine.has_queued(name):
                length = engine.lengths(name).get(0, 0)
                start = length if length + count <= 64 else 0
                engine.submit(step(tokens(count), (0, start), session=name))
        batch = engine.plan()
        for piece in batch.pieces:
            counts[piece.step.session[0]] += piece.count
        engine.collect(batch, engine.run(batch))
    return counts


class QueueWatcher(FakeEngine):
    def has_queued(self, session) -> bool:
        return bool(self._scheduler._sessions[session].queue)


@pytest.mark.parametrize("count", [1, 40], ids=["decodes", "prefills"])
def test_an_owner_of_many_sessions_gets_no_more_than_one_with_a_single_session(count: int):
    engine = QueueWatcher(SPAN, hidden_size=WIDTH, kv_tokens=2048, page_tokens=4, batch_tokens=2)
    queue = {}
    for owner, sessions in (("a", 16), ("b", 1), ("c", 2)):
        for number in range(sessions):
            name = f"{owner}{number}"
            open_session(engine, name, owner=owner)
            queue[name] = count
    counts = served(engine, 60, queue)
    assert sum(counts.values()) == 120
    assert max(counts.values()) - min(counts.values()) <= 2


def test_all_sessions_of_an_owner_get_their_turn():
    engine = QueueWatcher(SPAN, hidden_size=WIDTH, kv_tokens=2048, page_tokens=4, batch_tokens=3)
    queue = dict.fromkeys((f"{number}" for number in range(9)), 1)
    for name in queue:
        open_session(engine, name, owner="a")
    assert set(served(engine, 6, queue).values()) == {2}


def test_time_away_earns_an_owner_no_credit():
    engine = QueueWatcher(SPAN, hidden_size=WIDTH, kv_tokens=2048, page_tokens=4, batch_tokens=2)
    for owner in "ab":
        open_session(engine, owner, owner=owner)
    served(engine, 100, {"a": 2})
    counts = served(engine, 20, {"a": 2, "b": 2})
    assert abs(counts["a"] - counts["b"]) <= 2


def test_an_owners_prefill_leaves_decodes_of_others_alone():
    engine = QueueWatcher(SPAN, hidden_size=WIDTH, kv_tokens=2048, page_tokens=4, batch_tokens=8)
    for owner in "ab":
        open_session(engine, owner, owner=owner)
    counts = served(engine, 20, {"a": 60, "b": 1})
    # Every batch has b's token; beside it a prefill gets a quarter of the budget.
    assert counts == {"a": 40, "b": 20}


def test_sessions_on_different_blocks_both_get_their_turn():
    engine = make_engine()
    prompt = tokens(3)
    for name, blocks in (("head", Span(2, 4)), ("tail", Span(4, 5))):
        open_session(engine, name, blocks=blocks)
        engine.submit(step(prompt, (0, 0), session=name))
    results = {result.session: result.hidden for result in drain(engine)}
    assert torch.equal(results["head"], fake_forward(prompt, Span(2, 4)))
    assert torch.equal(results["tail"], fake_forward(prompt, Span(4, 5)))


def test_rolling_back_forgets_what_came_after():
    engine = make_engine()
    open_session(engine)
    prompt, other = tokens(11), tokens(5, seed=1)
    engine.submit(step(prompt, (0, 0)))
    engine.submit(step(other, (0, 6), seq=2))
    second = drain(engine)[1]
    assert torch.equal(second.hidden, fake_forward(torch.cat([prompt[:6], other]), SPAN)[6:])
    assert engine.lengths("s") == {0: 11}


def test_a_forked_row_goes_its_own_way_and_leaves_its_source_alone():
    engine = make_engine()
    open_session(engine, max_rows=3)
    prompt, left, right = tokens(6), tokens(3, seed=1), tokens(3, seed=2)
    engine.submit(step(prompt, (0, 0)))
    engine.submit(step(torch.cat([left, right]), (0, 6), (2, 6), seq=2, ops=[Fork(0, 2, 6)]))
    forked = drain(engine)[1].hidden
    assert torch.equal(forked[:3], fake_forward(torch.cat([prompt, left]), SPAN)[6:])
    assert torch.equal(forked[3:], fake_forward(torch.cat([prompt, right]), SPAN)[6:])
    assert engine.lengths("s") == {0: 9, 2: 9}


def test_a_fork_in_the_middle_of_a_page_copies_it_once_only_when_written():
    engine = make_engine()
    open_session(engine, max_rows=2)
    engine.submit(step(tokens(6), (0, 0)))
    drain(engine)
    engine.submit(step(tokens(0), seq=2, ops=[Fork(0, 1, 5)]))
    batch = engine.plan()
    assert not batch.copies
    assert engine.collect(batch, engine.run(batch))[0].hidden.shape == (0, WIDTH)
    engine.submit(step(tokens(1), (1, 5), seq=3))
    batch = engine.plan()
    assert len(batch.copies) == 1
    engine.collect(batch, engine.run(batch))


def test_a_dropped_row_starts_again():
    engine = make_engine()
    open_session(engine)
    prompt = tokens(4)
    engine.submit(step(tokens(6, seed=1), (0, 0)))
    engine.submit(step(prompt, (0, 0), seq=2, ops=[Drop(0)]))
    assert torch.equal(drain(engine)[1].hidden, fake_forward(prompt, SPAN))


def test_a_gap_is_told_with_the_lengths_that_queued_steps_will_leave():
    engine = make_engine()
    open_session(engine, max_rows=2)
    engine.submit(step(tokens(5), (0, 0)))
    with pytest.raises(StepGapError) as gap:
        engine.submit(step(tokens(1), (0, 6)))
    assert gap.value.have == {0: 5}
    with pytest.raises(StepGapError):
        engine.submit(step(tokens(0), ops=[Fork(0, 1, 6)]))
    engine.submit(step(tokens(1), (0, 5), seq=2))
    assert len(drain(engine)) == 2


def test_malformed_steps_are_refused_and_leave_no_trace():
    engine = make_engine()
    open_session(engine, max_length=10)
    refused = [
        (step(tokens(1), (1, 0)), InvalidStepError),
        (step(tokens(2), (0, 0), (0, 1)), InvalidStepError),
        (step(torch.zeros(3, WIDTH + 1), (0, 0)), InvalidStepError),
        (step(torch.zeros(3, WIDTH, dtype=torch.long), (0, 0)), InvalidStepError),
        (EngineStep("s", 1, (), (RowSlice(0, 0, 0),), tokens(0)), InvalidStepError),
        (step(tokens(0), ops=[Drop(4)]), InvalidStepError),
        (step(tokens(0), ops=[Fork(0, 0, -1)]), InvalidStepError),
        (step(tokens(11), (0, 0)), ContextTooLongError),
    ]
    for bad, error in refused:
        with pytest.raises(error):
            engine.submit(bad)
    assert not engine.ready()
    assert engine.lengths("s") == {}


def test_opening_says_whether_waiting_helps():
    engine = make_engine(kv_tokens=64)
    open_session(engine, "a", max_length=30)
    assert engine.free_tokens == 32
    with pytest.raises(NoRoomError) as refusal:
        open_session(engine, "b", max_length=33)
    assert refusal.value.free_tokens == 32
    with pytest.raises(ContextTooLongError):
        open_session(engine, "c", max_length=65)
    with pytest.raises(InvalidStepError):
        open_session(engine, "d", blocks=Span(0, 3))
    engine.close("a")
    assert engine.free_tokens == 64


def test_not_a_number_strikes_its_own_session_alone():
    engine = make_engine()
    prompt = tokens(4)
    for name in ("good", "bad"):
        open_session(engine, name)
        engine.submit(step(prompt, (0, 0), session=name))
    drain(engine)
    poisoned = tokens(2)
    poisoned[1] = torch.nan
    engine.submit(step(tokens(2), (0, 4), session="good", seq=2))
    for start in (4, 6):
        engine.submit(step(poisoned, (0, start), session="bad", seq=start))
    results = drain(engine)
    assert [(r.session, r.seq, type(r.error)) for r in results if r.error] == [
        ("bad", 4, NonFiniteError),
        ("bad", 6, NonFiniteError),
    ]
    assert engine.lengths("bad") == {0: 4}
    engine.submit(step(tokens(2), (0, 4), session="bad", seq=7))
    good = next(result for result in results if result.session == "good")
    assert torch.equal(good.hidden, drain(engine)[0].hidden)


def test_a_held_session_waits_and_others_do_not():
    engine = make_engine()
    for name in ("a", "b"):
        open_session(engine, name)
        engine.submit(step(tokens(1), (0, 0), session=name))
    engine.hold("a", True)
    assert [result.session for result in drain(engine)] == ["b"]
    engine.hold("a", False)
    assert [result.session for result in drain(engine)] == ["a"]


def test_pages_of_a_session_closed_while_its_batch_runs_are_freed_afterwards():
    engine = make_engine(kv_tokens=64)
    open_session(engine, max_length=64)
    engine.submit(step(tokens(3), (0, 0)))
    batch = engine.plan()
    output = engine.run(batch)
    engine.close("s")
    assert engine.free_tokens == 64 - 2 * 4
    assert engine.collect(batch, output) == []
    assert engine.free_tokens == 64
