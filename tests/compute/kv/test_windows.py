"""Blocks that keep only the end of a row: how far a session may roll back, what it commits, how groups are chosen."""

from __future__ import annotations

import pytest
import torch

from peerd.compute.errors import InvalidStepError, NonFiniteError, StepGapError
from peerd.compute.families.layer_kinds import LayerKind
from peerd.compute.kv import layout as kv_layout
from peerd.compute.kv.layout import EVERYTHING, Keep, group, lay_out
from peerd.compute.steps import EngineStep
from peerd.protocol.rows import Fork, RowSlice, SessionSize
from peerd.protocol.span import Span
from peerd.testing.fake_engine import FakeEngine, fake_forward

SPAN = Span(2, 5)
WIDTH = 4
WINDOW = Keep(window=5)
KEEPS = {"window": {3: WINDOW}, "chunk": {3: Keep(chunk=5)}, "both": {2: WINDOW, 4: Keep(chunk=5)}}
ROLLBACK = 6


@pytest.fixture(autouse=True)
def _nothing_is_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_layout, "RESENT_POSITIONS", 0)


@pytest.fixture(params=KEEPS)
def keeps(request: pytest.FixtureRequest) -> dict[int, Keep]:
    return KEEPS[request.param]


def make_engine(keeps: dict[int, Keep], **settings: int) -> FakeEngine:
    small = {"hidden_size": WIDTH, "kv_tokens": 400, "page_tokens": 4, "batch_tokens": 8} | settings
    return FakeEngine(SPAN, keeps=keeps, **small)


def open_session(engine: FakeEngine, max_length: int = 200, max_rows: int = 1) -> None:
    engine.open("s", SessionSize(max_length, max_rows=max_rows, max_rollback=ROLLBACK))


def tokens(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


def step(start: int, hidden: torch.Tensor, row: int = 0, ops: tuple[Fork, ...] = (), seq: int = 1) -> EngineStep:
    rows = (RowSlice(row, start, len(hidden)),) if len(hidden) else ()
    return EngineStep("s", seq, ops, rows, hidden)


def run(engine: FakeEngine, *steps: EngineStep) -> torch.Tensor:
    """Run steps; the last one's result."""
    for each in steps:
        engine.submit(each)
    hidden = None
    while batch := engine.plan():
        for result in engine.collect(batch, engine.run(batch)):
            if result.error:
                raise result.error
            hidden = result.hidden
    assert hidden is not None
    return hidden


def test_a_row_may_be_cut_by_max_rollback_from_the_longest_that_it_was_and_no_further(keeps):
    engine = make_engine(keeps)
    open_session(engine)
    prompt, other = tokens(43), tokens(2, seed=1)
    run(engine, step(0, prompt))
    result = run(engine, step(43 - ROLLBACK, other))
    assert torch.equal(result, fake_forward(torch.cat([prompt[: 43 - ROLLBACK], other]), SPAN, keeps=keeps)[-2:])
    # It is shorter now, and what it had further back is gone all the same.
    with pytest.raises(StepGapError) as gap:
        engine.submit(step(43 - 2 * ROLLBACK, other))
    assert gap.value.have == {0: 0}
    assert engine.lengths("s") == {0: 43 - ROLLBACK + 2}
    assert torch.equal(run(engine, step(0, prompt)), fake_forward(prompt, SPAN, keeps=keeps))


def test_a_queued_step_counts_for_how_far_back_the_next_may_go(keeps):
    engine = make_engine(keeps)
    open_session(engine)
    engine.submit(step(0, tokens(43)))
    engine.check(step(43 - ROLLBACK, tokens(1)))
    with pytest.raises(StepGapError):
        engine.check(step(20, tokens(1)))


def test_a_fork_that_windows_forgot_is_refused_and_a_later_one_is_right(keeps):
    engine = make_engine(keeps)
    open_session(engine, max_length=80, max_rows=3)
    prompt, other = tokens(43), tokens(30, seed=1)
    run(engine, step(0, prompt))
    with pytest.raises(InvalidStepError, match="cannot be forked at 20"):
        engine.submit(step(0, tokens(0), ops=(Fork(0, 1, 20),)))
    fork = 43 - ROLLBACK
    result = run(engine, step(fork, other, 1, (Fork(0, 1, fork),)), step(43, other))
    both = [fake_forward(torch.cat([prompt[:kept], other]), SPAN, keeps=keeps)[kept:] for kept in (fork, 43)]
    assert torch.equal(result, both[1])
    # The copy may go back no further than its source could.
    with pytest.raises(StepGapError):
        engine.check(step(fork + 30 - ROLLBACK - 6, other, 2, (Fork(1, 2, fork + 30),)))
    assert torch.equal(run(engine, step(fork + 25, other[25:], 1)), both[0][25:])


def test_a_long_step_that_fails_after_windows_moved_leaves_nothing_of_its_row(keeps):
    engine = make_engine(keeps)
    open_session(engine)
    run(engine, step(0, tokens(20)))
    prompt = tokens(40)
    prompt[-1] = torch.nan
    with pytest.raises(NonFiniteError):
        run(engine, step(20, prompt))
    assert engine.lengths("s") == {}
    with pytest.raises(StepGapError) as gap:
        engine.submit(step(20, prompt))
    assert gap.value.have == {}
    assert torch.equal(run(engine, step(0, tokens(20))), fake_forward(tokens(20), SPAN, keeps=keeps))


def test_a_short_step_that_fails_leaves_its_row_where_it_was(keeps):
    engine = make_engine(keeps)
    open_session(engine)
    prompt = tokens(44)
    run(engine, step(0, prompt[:40]))
    with pytest.raises(NonFiniteError):
        run(engine, step(40, torch.full((4, WIDTH), torch.nan)))
    assert torch.equal(run(engine, step(40, prompt[40:])), fake_forward(prompt, SPAN, keeps=keeps)[40:])


def test_rows_too_short_for_windows_to_matter_may_be_cut_anywhere(keeps):
    engine = make_engine(keeps, batch_tokens=64)
    open_session(engine, max_length=40)
    prompt = tokens(40)
    run(engine, step(0, prompt))
    assert torch.equal(run(engine, step(3, prompt[3:9])), fake_forward(prompt[:9], SPAN, keeps=keeps)[3:])


def test_sessions_commit_what_each_kind_of_block_keeps():
    engine = make_engine({2: WINDOW, 4: WINDOW}, kv_tokens=240)
    assert engine.total_tokens == 240
    # Of the window 4 positions, 6 to go back, 8 of a batch: 17 after the first are 5 pages, and one begun.
    rows = 3
    pages = rows * (200 // 4 + 2 * 6)
    assert engine.tokens_wanted(SessionSize(200, max_rows=rows, max_rollback=ROLLBACK)) == -(-pages // 3) * 4
    open_session(engine, max_length=200, max_rows=2)
    assert engine.free_tokens == 240 - -(-2 * 62 // 3) * 4
    engine.close("s")
    assert engine.tokens_wanted(SessionSize(engine.free_length)) <= engine.free_tokens
    assert engine.tokens_wanted(SessionSize(engine.free_length + 1)) > engine.free_tokens
    assert engine.free_length > 2 * engine.free_tokens


def test_without_windows_a_token_is_a_position():
    engine = make_engine({})
    assert engine.tokens_wanted(SessionSize(33, max_rows=2, max_rollback=9)) == 2 * 36
    assert engine.free_length == engine.free_tokens == 400


def kinds(pattern: str) -> list[LayerKind]:
    """`f` sees everything, `w` has a window."""
    return [LayerKind(None if each == "f" else 512, None, 2, 8, 8) for each in pattern]


@pytest.mark.parametrize(
    ("pattern", "groups", "blocks_per_page"),
    [
        ("ffff", 1, 4),
        ("wwww", 1, 4),
        ("wf" * 9, 2, 9),
        ("wwwwwf", 6, 1),
        # Of 26 blocks 22 have windows: six groups of four, of which two places stay empty.
        ("wwwwwf" * 4 + "ww", 7, 4),
    ],
)
def test_blocks_are_grouped_so_that_pages_serve_all_and_little_is_wasted(pattern, groups, blocks_per_page):
    layout = lay_out(kinds(pattern))
    assert (layout.groups, layout.blocks_per_page) == (groups, blocks_per_page)
    places = list(zip(layout.group_of, layout.page_index_of, strict=True))
    assert len(set(places)) == len(pattern)
    assert {(keep.window, number) for keep, number in layout.kinds if number} == {
        (None if each == "f" else 512, len({layout.group_of[i] for i, other in enumerate(pattern) if other == each}))
        for each in pattern
    }
    for index, each in enumerate(pattern):
        alike = [keep for keep, number in layout.kinds for _ in range(number)]
        assert alike[layout.group_of[index]] == (EVERYTHING if each == "f" else Keep(window=512))


def test_caches_of_different_shapes_keep_everything():
    assert lay_out([*kinds("wf"), LayerKind(512, None, 1, 16, 16)]) == group([EVERYTHING] * 3)


def test_a_long_conversation_with_five_windows_to_one_takes_a_sixth():
    layout = lay_out(kinds("wwwwwf" * 4 + "ww"))
    wanted = layout.tokens_wanted(max_length=32768, max_rollback=64)
    assert wanted / 32768 == pytest.approx(0.166, abs=0.005)
    per_token = layout.bytes_per_token(kinds("wwwwwf" * 4 + "ww"), itemsize=2)
    assert per_token == 28 * 2 * 16 * 2
