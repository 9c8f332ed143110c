"""What goes wrong or takes memory in rows with running states: no row is wrong, and no other client pays."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from peerd.compute.engine.batch_parts import run_in_parts
from peerd.compute.engine.capacity import working_bytes
from peerd.compute.engine.engine import EngineStep
from peerd.compute.errors import BatchFailedError, StepGapError
from peerd.compute.kv.layout import BATCH_TOKENS
from peerd.compute.state.mixers import BlockMixer
from peerd.compute.state.store import StateStore
from peerd.protocol.rows import Fork, RowSlice, SessionSize
from peerd.protocol.span import Span
from tests.compute.engine_chain import Chain, Part, Reference
from tests.compute.state.conftest import BACK, LONG


def test_a_row_whose_states_could_not_be_copied_is_lost_and_no_mixture_of_two(
    convolved: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = Chain(convolved, (Span(0, 8),), batch_tokens=64)
    engine = chain.engines[0]
    chain.open("a", max_rows=2, max_rollback=BACK)
    chain.open("b", max_rollback=BACK)
    for part in (Part("a", 0, 0, 0, 20), Part("a", 1, 1, 0, 20), Part("b", 0, 2, 0, 20)):
        chain.check(part)
    whole_of = StateStore._whole

    def without_memory(*args: Any) -> Iterator[Any]:
        yield next(whole_of(*args))
        raise RuntimeError("no memory for the second tensor")

    monkeypatch.setattr(StateStore, "_whole", without_memory)
    engine.submit(EngineStep("a", 0, (Fork(0, 1, 20),), (RowSlice(1, 20, 1),), convolved.inputs[0, 20:21]))
    engine.submit(EngineStep("b", 1, (), (RowSlice(0, 20, 1),), convolved.inputs[2, 20:21]))
    batch = engine.plan()
    assert batch is not None
    results = {
        result.session: result for result in engine.collect(batch, run_in_parts(engine.run, batch, lambda: None))
    }
    assert isinstance(results["a"].error, BatchFailedError)
    torch.testing.assert_close(results["b"].hidden, convolved.outputs[2, 20:21], rtol=1e-4, atol=1e-4)
    monkeypatch.undo()
    assert engine.lengths("a") == {0: 20}
    with pytest.raises(StepGapError):
        engine.check(EngineStep("a", 1, (), (RowSlice(1, 20, 1),), convolved.inputs[1, 20:21]))
    chain.check(Part("a", 1, 0, 20, 2), ops=[Fork(0, 1, 20)])


def test_a_client_pays_for_the_positions_that_its_ways_back_compute_again(convolved: Reference) -> None:
    engine = Chain(convolved, (Span(0, 3),), batch_tokens=1).engines[0]
    for name in ("goes back", "goes on"):
        engine.open(name, SessionSize(LONG, 1, LONG), owner=name)
    for start in range(60):
        for name in ("goes back", "goes on"):
            engine.submit(EngineStep(name, start, (), (RowSlice(0, start, 1),), convolved.inputs[0, start : start + 1]))
    while batch := engine.plan():
        engine.collect(batch, engine.run(batch))
    for turn in range(5):
        for name, start in (("goes back", 50 - 10 * turn), ("goes on", 60 + turn)):
            hidden = convolved.inputs[0, start : start + 1]
            engine.submit(EngineStep(name, 60 + turn, (), (RowSlice(0, start, 1),), hidden))
    order = []
    while batch := engine.plan():
        order.append(batch.pieces[0].step.session)
        engine.collect(batch, engine.run(batch))
    assert order.count("goes on") == order.count("goes back") == 5
    # The first way back costs more than all that the other asks for.
    assert order[:6].count("goes on") == 5


def test_rows_run_together_only_as_far_as_memory_was_planned_for(
    references: Callable[[str], Reference], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = references("qwen3_next")
    chain = Chain(whole, kv_tokens=32768)
    mix, rows = BlockMixer._mix, []

    def watched(self: BlockMixer, hidden: torch.Tensor, *others: Any) -> Any:
        rows.append(hidden.shape[0])
        return mix(self, hidden, *others)

    monkeypatch.setattr(BlockMixer, "_mix", watched)
    names = [str(number) for number in range(6)]
    for name in names:
        chain.open(name, max_rollback=0)
    # Two positions are padded to a chunk of 64.
    chain.check(*(Part(name, 0, int(name) % 3, 0, 2) for name in names))
    state = next(kind.state for kind in chain.spans[0].kinds if kind.state is not None)
    planned = working_bytes(whole.checkpoint, torch.float32, BATCH_TOKENS)
    assert 1 < max(rows) < len(names)
    assert max(rows) * state.working_values(2) * torch.float32.itemsize <= planned
