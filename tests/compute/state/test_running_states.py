"""Rows with running states go on, back, apart and again, and compute what the whole Transformers model computes."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from peerd.compute.attention.attention import register_attention
from peerd.compute.engine.batch_parts import run_in_parts
from peerd.compute.engine.engine import Batch, BatchOutput, Engine, EngineStep
from peerd.compute.engine.self_test import check_span
from peerd.compute.errors import InvalidStepError, NoRoomError, StepGapError, UnsupportedModelError
from peerd.compute.kv.layout import RESENT_POSITIONS
from peerd.compute.model.span_model import load_span
from peerd.compute.state import mixers
from peerd.compute.state.mixers import BlockMixer
from peerd.compute.state.store import RowStates
from peerd.protocol.rows import Fork, RowSlice, SessionSize
from peerd.protocol.span import Span
from tests.compute.engine_chain import Chain, Part, Reference
from tests.compute.state.conftest import BACK, LONG

# What a row that promises to go back by BACK can be cut.
ROOM = BACK + RESENT_POSITIONS


# A convolution alone, and beside windows; linear attention, also beside latents; state spaces of both kinds: alone, in
# each block beside attention, and between feed-forwards.
@pytest.fixture(params=["lfm2", "lfm3", "qwen3_next", "kimi_linear", "mamba", "falcon_h1", "nemotron_h"])
def whole(request: pytest.FixtureRequest, references: Callable[[str], Reference]) -> Reference:
    return references(request.param)


def test_long_rows_equal_the_whole_model_whatever_is_cut_forked_and_batched(whole: Reference) -> None:
    chain = Chain(whole, batch_tokens=24)
    chain.open("a", max_length=LONG, max_rows=3, max_rollback=BACK)
    chain.open("b", max_length=LONG, max_rollback=BACK)
    chain.check(Part("a", 0, 0, 0, 130), Part("b", 0, 1, 0, 7))
    chain.check(Part("a", 0, 0, 130, 1), Part("b", 0, 1, 7, 120))
    # Rows fork at their ends and before; the copies go their own ways.
    chain.check(Part("a", 1, 0, 128, 4), ops=[Fork(0, 1, 128)])
    chain.check(Part("a", 2, 0, 131, 1), ops=[Fork(0, 2, 131)])
    chain.run(Part("a", 1, 2, 132, 3))
    chain.check(Part("a", 0, 0, 131, 20), Part("b", 0, 1, 127, 30), Part("a", 2, 0, 132, 2))
    # Back by what was promised, into the middle of a step, with other positions and then the right ones.
    chain.run(Part("a", 0, 1, 147, 2))
    chain.check(Part("a", 0, 0, 147, 9), Part("b", 0, 1, 153, 4))
    for turn in range(3):
        chain.check(Part("a", 0, 0, 156 + turn, 1), Part("b", 0, 1, 157 + turn, 1))


@pytest.mark.parametrize(("name", "seed"), [("lfm2", 0), ("mamba", 1), ("falcon_h1", 2)])
def test_any_way_of_going_on_and_back_equals_the_whole_model(
    references: Callable[[str], Reference], name: str, seed: int
) -> None:
    """Prompts, tokens, guesses that are rejected, and wrong positions that are cut off again."""
    draw = random.Random(seed)
    chain = Chain(references(name), (Span(2, 5),), batch_tokens=48)
    before = Chain(references(name), (Span(0, 2),))
    before.open("r", max_length=LONG)
    inputs = before.run(*(Part("r", 0, 0, start, 40) for start in range(0, LONG, 40)))
    given = torch.cat(inputs)
    expected = chain.engines[0].forward(given[None])[0]
    engine, length, longest = chain.engines[0], 0, 0
    engine.open("a", SessionSize(LONG, 1, BACK))
    for seq in range(120):
        start = max(length - draw.choice([0, 0, 0, 1, 2, BACK]), longest - BACK, 0)
        count = min(draw.choice([1, 1, 1, 1, 3, 5, 30, 100]), LONG - start)
        if not count:
            break
        is_wrong = draw.random() < 0.2 and count <= BACK
        hidden = given[start : start + count].flip(0) * 2 if is_wrong else given[start : start + count]
        engine.submit(EngineStep("a", seq, (), (RowSlice(0, start, count),), hidden))
        results = []
        while batch := engine.plan():
            results += engine.collect(batch, engine.run(batch))
        output = results[0].hidden
        assert output is not None
        longest = max(longest, start + count)
        length = start if is_wrong else start + count
        if not is_wrong:
            torch.testing.assert_close(output, expected[start : start + count], rtol=1e-4, atol=1e-4)
    assert longest == LONG


def test_a_row_cut_further_back_than_was_promised_starts_again(whole: Reference) -> None:
    chain = Chain(whole, batch_tokens=24)
    chain.open("a", max_length=LONG, max_rows=2, max_rollback=BACK)
    chain.check(Part("a", 0, 0, 0, 150))
    keeping = [any(kind.state for kind in span.kinds) for span in chain.spans]
    for engine in itertools.compress(chain.engines, keeping):
        engine.check(EngineStep("a", 9, (), (RowSlice(0, 150 - ROOM, 1),), whole.inputs[0, :1]))
        with pytest.raises(StepGapError) as gap:
            engine.check(EngineStep("a", 9, (), (RowSlice(0, 149 - ROOM, 1),), whole.inputs[0, :1]))
        assert gap.value.have == {0: 0}
        with pytest.raises(InvalidStepError, match="cannot be forked at 60"):
            engine.check(EngineStep("a", 9, (Fork(0, 1, 60),), (), whole.inputs[0, :0]))
    chain.check(Part("a", 0, 0, 150 - ROOM, ROOM))
    chain.check(Part("a", 0, 0, 0, 100))


def test_a_part_of_a_span_keeps_its_own_states(convolved: Reference) -> None:
    split = Chain(convolved, (Span(0, 5), Span(5, 8)))
    split.open("a")
    split.run(Part("a", 0, 0, 0, 9))
    expected = split.run(Part("a", 0, 0, 9, 3))[0]
    chain = Chain(convolved, (Span(0, 8), Span(3, 8)))
    for engine, blocks in zip(chain.engines, (Span(0, 5), Span(5, 8)), strict=True):
        engine.open("a", SessionSize(LONG, max_rollback=BACK), blocks=blocks)
    chain.run(Part("a", 0, 0, 0, 9))
    torch.testing.assert_close(chain.run(Part("a", 0, 0, 9, 3))[0], expected, rtol=1e-4, atol=1e-4)


def test_a_batch_that_fails_halfway_and_runs_again_changes_nothing(
    convolved: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = Chain(convolved, (Span(0, 8),), batch_tokens=256)
    engine = chain.engines[0]
    mix, failures = BlockMixer._mix, [0]

    def fragile(self: BlockMixer, *args: Any) -> Any:
        # The last block with a state fails while those before it have gone on.
        if self._layer == 7 and failures[0]:
            failures[0] -= 1
            raise RuntimeError("no memory for this batch")
        return mix(self, *args)

    monkeypatch.setattr(BlockMixer, "_mix", fragile)

    def run(batch: Batch) -> BatchOutput:
        # One session alone would fail for good.
        failures[0] = 1 if len({piece.step.session for piece in batch.pieces}) > 1 else 0
        return run_in_parts(engine.run, batch, engine.give_back)

    chain.open("a", max_length=LONG, max_rows=2, max_rollback=BACK)
    chain.open("b", max_length=LONG, max_rollback=BACK)
    steps = [
        (Part("a", 0, 0, 0, 100), Part("b", 0, 1, 0, 90)),
        (Part("a", 0, 0, 100, 1), Part("b", 0, 1, 88, 4)),
        (Part("a", 0, 0, 99, 6), Part("b", 0, 1, 92, 1)),
        (Part("a", 1, 0, 103, 3), Part("b", 0, 1, 93, 1)),
    ]
    for parts in steps:
        for seq, part in enumerate(parts):
            ops = (Fork(0, 1, 103),) if part.row == 1 else ()
            hidden = convolved.inputs[part.text, part.start : part.start + part.count]
            engine.submit(EngineStep(part.session, seq, ops, (RowSlice(part.row, part.start, part.count),), hidden))
        results = {}
        while batch := engine.plan():
            for result in engine.collect(batch, run(batch)):
                results[result.seq] = result.hidden
        for seq, part in enumerate(parts):
            expected = convolved.outputs[part.text, part.start : part.start + part.count]
            torch.testing.assert_close(results[seq], expected, rtol=1e-4, atol=1e-4)


def test_inputs_run_again_a_few_at_a_time_however_far_a_row_goes_back(
    whole: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = Chain(whole, batch_tokens=16)
    chain.open("a", max_length=LONG, max_rollback=LONG)
    chain.check(Part("a", 0, 0, 0, 100))
    monkeypatch.setattr(mixers, "REPLAYED_AT_ONCE", 16)
    mix, lengths = BlockMixer._mix, []

    def watched(self: BlockMixer, hidden: torch.Tensor, *others: Any) -> Any:
        lengths.append(hidden.shape[1])
        return mix(self, hidden, *others)

    monkeypatch.setattr(BlockMixer, "_mix", watched)
    chain.check(Part("a", 0, 0, 75, 2))
    assert sum(lengths) > 50
    assert max(lengths) == 16


def test_states_take_kv_tokens_for_as_long_as_their_session_lives(convolved: Reference) -> None:
    chain = Chain(convolved, (Span(0, 3),), kv_tokens=4096)
    engine = chain.engines[0]
    one, two = (engine.tokens_wanted(SessionSize(8, rows)) for rows in (1, 2))
    assert one > 8
    assert two > 2 * one - 8
    # A longer row takes more KV, and no more states; one that can go back further takes a longer log.
    assert engine.tokens_wanted(SessionSize(808)) == one + 800
    assert engine.tokens_wanted(SessionSize(8, 1, 40)) > one
    for number in range(4096 // one):
        engine.open(number, SessionSize(8))
    with pytest.raises(NoRoomError):
        engine.open("more", SessionSize(8))
    for number in range(4096 // one):
        engine.close(number)
    assert engine.free_tokens == engine.total_tokens


def test_a_block_whose_state_is_not_kept_is_found_before_it_is_served(
    convolved: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    span = load_span(convolved.checkpoint, Span(0, 3), dtype=torch.float32, attention=register_attention())
    engine = Engine(span, kv_tokens=8192)
    check_span(engine, span, "none")
    monkeypatch.setattr(RowStates, "load", lambda self, layer, _: _ZEROS(self, layer, None))
    with pytest.raises(UnsupportedModelError, match="computes something else with its KV cache"):
        check_span(engine, span, "none")


_ZEROS = RowStates.load
