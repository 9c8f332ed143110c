"""llama.cpp computes what our own engine computes, however work is cut, batched, rolled back and forked."""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Sequence

import gguf
import pytest
import torch

from peerd.compute.engine.batch_parts import run_in_parts
from peerd.compute.engine.engine import BaseEngine
from peerd.compute.errors import (
    AdapterError,
    ContextTooLongError,
    InvalidStepError,
    NonFiniteError,
    NoRoomError,
    StepGapError,
)
from peerd.compute.llamacpp.engine import LlamaEngine
from peerd.compute.llamacpp.structs import MAX_SEQUENCES
from peerd.compute.steps import EngineStep, StepResult
from peerd.protocol.rows import Drop, Fork, Op, RowSlice, SessionSize
from peerd.protocol.span import Span
from tests.compute.llamacpp.conftest import TinyFile, needs_llamacpp

pytestmark = needs_llamacpp

WIDTH = 32
SPAN = Span(2, 6)
# With weights in F32 llama.cpp still rounds keys and values to fp16.
CLOSE = 5e-3

Load = Callable[..., BaseEngine]


def tokens(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed)) * 0.3


def step(session: Hashable, rows: Sequence[RowSlice], ops: Sequence[Op] = (), seed: int = 0) -> EngineStep:
    return EngineStep(session, seed, tuple(ops), tuple(rows), tokens(sum(row.count for row in rows), seed))


def drain(engine: BaseEngine) -> list[StepResult]:
    results: list[StepResult] = []
    while batch := engine.plan():
        results += engine.collect(batch, engine.run(batch))
    return results


def run(engine: BaseEngine, *steps: EngineStep) -> dict[Hashable, torch.Tensor]:
    for each in steps:
        engine.submit(each)
    return {result.session: result.hidden for result in drain(engine)}


def assert_close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    assert got.shape == wanted.shape
    assert float(((got - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max()) < CLOSE


@pytest.mark.parametrize("name", ["llama", "llama_biased", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe"])
def test_blocks_of_every_architecture_compute_what_they_compute_in_torch(
    name: str, tiny_file: TinyFile, llama_engine: Load, torch_engine: Load
):
    path = tiny_file(name, gguf.GGMLQuantizationType.Q8_0)
    hidden = tokens(20)[None]
    got, wanted = (engine(SPAN, path).forward(hidden)[0] for engine in (llama_engine, torch_engine))
    # Activations are rounded to 8 bits. A median, because that may choose another expert for a position.
    assert float(((got - wanted).norm(dim=-1) / wanted.norm(dim=-1)).median()) < 0.06


def test_spans_cut_anywhere_make_the_same_chain(llama_engine: Load, torch_engine: Load):
    hidden = tokens(12)
    wanted = torch_engine(Span(0, 8)).forward(hidden[None])[0]
    for spans in ([Span(0, 8)], [Span(0, 3), Span(3, 8)], [Span(0, 1), Span(1, 7), Span(7, 8)]):
        passed = hidden
        for span in spans:
            engine = llama_engine(span)
            engine.open("a", SessionSize(16))
            engine.submit(EngineStep("a", 1, (), (RowSlice(0, 0, 12),), passed))
            (result,) = drain(engine)
            passed = result.hidden
        assert_close(passed, wanted)


@pytest.mark.parametrize("blocks", [Span(2, 4), Span(3, 5), Span(5, 6)], ids=str)
def test_a_session_may_use_a_part_of_the_span(blocks: Span, llama_engine: Load, torch_engine: Load):
    engines = llama_engine(SPAN), torch_engine(SPAN)
    found = []
    for engine in engines:
        engine.open("part", SessionSize(32), blocks=blocks)
        engine.open("whole", SessionSize(32))
        outputs = [run(engine, step(name, [RowSlice(0, 0, 5)])) for name in ("part", "whole")]
        outputs += [run(engine, *(step(name, [RowSlice(0, 5, 1)], seed=1) for name in ("part", "whole")))]
        found.append([output[name] for output in outputs for name in sorted(output, key=str)])
    for got, wanted in zip(*found, strict=True):
        assert_close(got, wanted)


def test_many_sessions_that_roll_back_fork_and_drop_rows_compute_what_torch_computes(
    llama_engine: Load, torch_engine: Load
):
    """The same random steps go through both engines, in the same ragged batches."""
    both = llama_engine(SPAN, kv_tokens=2048), torch_engine(SPAN, kv_tokens=2048)
    chance = random.Random(1)
    lengths: dict[int, dict[int, int]] = {session: {} for session in range(5)}
    for session in lengths:
        for engine in both:
            engine.open(session, SessionSize(64, max_rows=3, max_rollback=64))
    for seed in range(30):
        chosen = chance.sample(sorted(lengths), 3)
        steps = [_random_step(session, lengths[session], chance, seed) for session in chosen]
        got, wanted = (run(engine, *steps) for engine in both)
        for session in chosen:
            assert_close(got[session], wanted[session])


def _random_step(session: int, lengths: dict[int, int], chance: random.Random, seed: int) -> EngineStep:
    ops: list[Op] = []
    if lengths and chance.random() < 0.4:
        source, target = chance.choice(sorted(lengths)), chance.randrange(3)
        length = chance.randint(1, lengths[source])
        ops.append(Fork(source, target, length))
        lengths[target] = length
    if len(lengths) > 1 and chance.random() < 0.2:
        row = chance.choice(sorted(lengths))
        ops.append(Drop(row))
        del lengths[row]
    rows = []
    for row in chance.sample(range(3), chance.randint(1, 3)):
        start = max(0, lengths.get(row, 0) - chance.choice([0, 0, 0, 1, 4]))
        count = min(chance.choice([1, 1, 2, 7]), 64 - start)
        if count:
            rows.append(RowSlice(row, start, count))
            lengths[row] = start + count
    return step(session, rows, ops, seed)


def test_all_of_the_announced_room_can_be_filled(llama_engine: Load):
    engine = llama_engine(SPAN, kv_tokens=256)
    for session in ("a", "b"):
        engine.open(session, SessionSize(128))
    results = run(engine, *(step(session, [RowSlice(0, 0, 128)]) for session in ("a", "b")))
    assert all(hidden is not None for hidden in results.values())
    assert engine.forward(tokens(32)[None]).isfinite().all()
    with pytest.raises(NoRoomError):
        engine.open("c", SessionSize(1))
    for session in ("a", "b"):
        engine.close(session)
    engine.open("c", SessionSize(256))
    assert run(engine, step("c", [RowSlice(0, 0, 256)]))["c"] is not None


def test_a_step_that_takes_several_batches_forks_its_rows_once(llama_engine: Load, torch_engine: Load):
    found = []
    for engine in (llama_engine(SPAN), torch_engine(SPAN)):
        engine.open("a", SessionSize(64, max_rows=2))
        run(engine, step("a", [RowSlice(0, 0, 6)]))
        found.append(run(engine, step("a", [RowSlice(1, 4, 50)], [Fork(0, 1, 4)]))["a"])
        assert engine.batches_run > 2
    assert_close(*found)


def test_sessions_end_and_their_sequences_serve_others(llama_engine: Load):
    engine = llama_engine(SPAN, kv_tokens=2048)
    first = None
    for turn in range(MAX_SEQUENCES // 100 + 1):
        engine.open(turn, SessionSize(4, max_rows=100))
        output = run(engine, step(turn, [RowSlice(0, 0, 2), RowSlice(99, 0, 2)]))[turn]
        first = output if first is None else first
        torch.testing.assert_close(output, first, rtol=1e-3, atol=1e-3)
        engine.close(turn)
    assert engine.free_tokens == engine.total_tokens


def test_rows_beyond_the_sequences_are_refused_until_some_are_free(llama_engine: Load):
    engine = llama_engine(SPAN, kv_tokens=8192)
    with pytest.raises(ContextTooLongError, match="300 rows exceed the 255"):
        engine.open("all", SessionSize(1, max_rows=300))
    engine.open("many", SessionSize(1, max_rows=200))
    with pytest.raises(NoRoomError, match=r"100 rows wanted, llama.cpp has 55 of 255 free"):
        engine.open("more", SessionSize(1, max_rows=100))
    engine.close("many")
    engine.open("more", SessionSize(1, max_rows=100))


def test_many_short_rows_count_as_the_sequences_that_they_hold(llama_engine: Load):
    engine = llama_engine(SPAN, kv_tokens=8192)
    # Half of the sequences are half of the pool, which is what admission looks at; a usual row costs its positions.
    assert engine.tokens_wanted(SessionSize(1, max_rows=128)) > engine.total_tokens // 2
    assert engine.tokens_wanted(SessionSize(1, max_rows=255)) == engine.total_tokens
    assert engine.tokens_wanted(SessionSize(100)) == 112


def test_a_session_that_closes_in_a_running_batch_is_freed_behind_it(llama_engine: Load):
    engine = llama_engine(SPAN, kv_tokens=64)
    engine.open("a", SessionSize(64))
    engine.submit(step("a", [RowSlice(0, 0, 20)]))
    batch = engine.plan()
    engine.close("a")
    assert engine.free_tokens == 0
    assert engine.collect(batch, engine.run(batch)) == []
    engine.open("b", SessionSize(64))
    assert run(engine, step("b", [RowSlice(0, 0, 64)]))["b"] is not None


def test_steps_that_cannot_follow_are_refused(llama_engine: Load):
    engine = llama_engine(SPAN)
    engine.open("a", SessionSize(8))
    run(engine, step("a", [RowSlice(0, 0, 4)]))
    with pytest.raises(StepGapError):
        engine.submit(step("a", [RowSlice(0, 5, 1)]))
    with pytest.raises(ContextTooLongError):
        engine.submit(step("a", [RowSlice(0, 4, 5)]))
    with pytest.raises(InvalidStepError):
        engine.submit(step("a", [RowSlice(1, 0, 1)]))
    assert run(engine, step("a", [RowSlice(0, 4, 4)]))["a"] is not None


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e38])
def test_bad_numbers_in_one_session_change_nothing_in_its_neighbour(bad: float, llama_engine: Load):
    engine = llama_engine(SPAN)
    for session in ("good", "bad"):
        engine.open(session, SessionSize(64, max_rollback=64))
    wanted = run(engine, step("good", [RowSlice(0, 0, 20)]))["good"]
    poison = tokens(12)
    poison[4, 3] = bad
    engine.submit(EngineStep("bad", 1, (), (RowSlice(0, 0, 12),), poison))
    engine.submit(step("bad", [RowSlice(0, 12, 1)]))
    engine.submit(step("good", [RowSlice(0, 0, 20)]))
    results = {(result.session, result.seq): result for result in drain(engine)}
    torch.testing.assert_close(results["good", 0].hidden, wanted, rtol=1e-3, atol=1e-3)
    if bad != 1e38:
        assert isinstance(results["bad", 1].error, NonFiniteError)
        assert results["bad", 0].error is not None
        # The session goes on from where the step began.
        assert run(engine, step("bad", [RowSlice(0, 0, 12)]))["bad"].isfinite().all()


def test_a_batch_that_is_run_again_in_parts_forks_its_rows_once(llama_engine: Load, monkeypatch: pytest.MonkeyPatch):
    engine, undisturbed = llama_engine(SPAN), llama_engine(SPAN)
    assert isinstance(engine, LlamaEngine)
    first = [step(session, [RowSlice(0, 0, 6)], seed=session) for session in (1, 2)]
    # The fork's source is dropped: if the fork were made again, it would find nothing.
    second = [step(session, [RowSlice(1, 4, 1)], [Fork(0, 1, 4), Drop(0)], seed=session) for session in (1, 2)]
    for each in (engine, undisturbed):
        for session in (1, 2):
            each.open(session, SessionSize(16, max_rows=2, max_rollback=16))
        run(each, *first)
    wanted = run(undisturbed, *second)
    for each in second:
        engine.submit(each)
    batch = engine.plan()
    real, failures = engine._model.run, [RuntimeError("llama.cpp could not compute")]

    def fail_once(*arguments):
        if failures:
            raise failures.pop()
        return real(*arguments)

    monkeypatch.setattr(engine._model, "run", fail_once)
    output = run_in_parts(engine.run, batch, engine.give_back)
    results = {result.session: result.hidden for result in engine.collect(batch, output)}
    for session in (1, 2):
        assert_close(results[session], wanted[session])


def test_it_takes_no_adapters_and_trains_nothing(llama_engine: Load):
    engine = llama_engine(SPAN)
    assert engine.adapters == frozenset()
    assert engine.passes is None
    with pytest.raises(AdapterError, match=r"llama.cpp runs none; serve with --engine torch"):
        engine.load_adapter("one", {})
    assert engine.works()


def test_sessions_that_outgrow_the_cache_wait_and_compute_the_same(llama_engine: Load):
    engine, alone = llama_engine(SPAN, kv_tokens=64), llama_engine(SPAN)
    for name in ("first", "second"):
        engine.open(name, SessionSize(48, prompt_length=8))
    engine.submit(step("first", [RowSlice(0, 0, 31)], seed=1))
    engine.submit(step("second", [RowSlice(0, 0, 30)], seed=2))
    drain(engine)
    # The row is cut for a step that then waits for pages; the other session needs the cells which that leaves.
    engine.submit(step("second", [RowSlice(0, 0, 8)], seed=3))
    engine.submit(step("first", [RowSlice(0, 31, 17)], seed=4))
    assert len(drain(engine)) == 2
    engine.submit(step("second", [RowSlice(0, 8, 16)], seed=5))
    assert drain(engine) == []
    assert engine.short == ["second"]
    engine.close("first")
    (waited,) = drain(engine)
    alone.open("second", SessionSize(48))
    outputs = run(alone, step("second", [RowSlice(0, 0, 8)], seed=3), step("second", [RowSlice(0, 8, 16)], seed=5))
    assert_close(waited.hidden, outputs["second"])
