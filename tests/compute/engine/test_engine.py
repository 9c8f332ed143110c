"""The engine around a real, tiny model: its reports and its failures. Its numbers are tested in test_exactness."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from peerd.compute.attention.attention import register_attention
from peerd.compute.checkpoint.opening import open_checkpoint
from peerd.compute.engine.engine import Engine
from peerd.compute.errors import ContextTooLongError, InvalidStepError, NonFiniteError, StepGapError
from peerd.compute.model.span_model import load_span
from peerd.compute.steps import EngineStep, StepResult
from peerd.protocol.rows import RowSlice, SessionSize
from peerd.protocol.span import Span

SPAN = Span(2, 5)
WIDTH = 32


@pytest.fixture
def make_engine(tiny_checkpoint: Callable[[str], Path]) -> Callable[..., Engine]:
    def make(family: str = "llama", dtype: torch.dtype = torch.float32, **settings: int) -> Engine:
        with open_checkpoint(tiny_checkpoint(family)) as checkpoint:
            model = load_span(checkpoint, SPAN, dtype=dtype, attention=register_attention())
        return Engine(model, **{"kv_tokens": 128, "page_tokens": 4, "batch_tokens": 16} | settings)

    return make


def tokens(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


def submit(engine: Engine, session: str, start: int, hidden: torch.Tensor, seq: int = 1) -> None:
    engine.submit(EngineStep(session, seq, (), (RowSlice(0, start, len(hidden)),), hidden))


def drain(engine: Engine) -> Iterator[StepResult]:
    while batch := engine.plan():
        yield from engine.collect(batch, engine.run(batch))


def open_session(engine: Engine, name: str, max_length: int = 32) -> None:
    engine.open(name, SessionSize(max_length, max_rollback=4))


def test_an_engine_says_what_it_is_and_has_done(make_engine):
    engine = make_engine(kv_tokens=130)
    assert (engine.span, engine.hidden_size) == (SPAN, WIDTH)
    assert engine.total_tokens == engine.free_tokens == 128
    open_session(engine, "a", max_length=30)
    assert engine.tokens_wanted(SessionSize(30, max_rollback=4)) == 32
    assert engine.free_tokens == 96
    submit(engine, "a", 0, tokens(21))
    (result,) = drain(engine)
    assert result.hidden.shape == (21, WIDTH)
    assert (engine.positions_computed, engine.batches_run) == (21, 2)
    assert engine.lengths("a") == {0: 21}


@pytest.mark.parametrize("family", ["llama", "mixtral", "bloom"])
def test_not_a_number_in_one_session_changes_nothing_in_its_neighbour(make_engine, family: str):
    alone, beside = make_engine(family), make_engine(family)
    for engine in (alone, beside):
        open_session(engine, "good")
    open_session(beside, "bad")
    poison = tokens(3, seed=1)
    poison[1, 0] = torch.nan
    submit(beside, "bad", 0, poison)
    results = {}
    for engine in (alone, beside):
        submit(engine, "good", 0, tokens(5))
        results[engine] = {result.session: result for result in drain(engine)}
    assert isinstance(results[beside]["bad"].error, NonFiniteError)
    torch.testing.assert_close(results[beside]["good"].hidden, results[alone]["good"].hidden, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fault", ["produced", "width", "kind", "too long", "gap", "row"])
def test_what_is_wrong_with_one_session_changes_nothing_in_its_neighbour(make_engine, fault: str):
    alone, beside = make_engine(), make_engine()
    for engine in (alone, beside):
        open_session(engine, "good")
        submit(engine, "good", 0, tokens(9))
    open_session(beside, "bad", max_length=8)
    # A block in which numbers of this size overflow.
    beside._runner._whole.layers[1].register_forward_hook(
        lambda _module, _args, output: output * (output.abs() < 1e9) / (output.abs() < 1e9)
    )
    huge = tokens(5, seed=1) * 1e10
    wrong = {
        "produced": (huge, 0, None),
        "width": (torch.zeros(5, WIDTH + 1), 0, InvalidStepError),
        "kind": (torch.zeros(5, WIDTH, dtype=torch.long), 0, InvalidStepError),
        "too long": (tokens(9), 0, ContextTooLongError),
        "gap": (tokens(5), 3, StepGapError),
        "row": (tokens(5), -1, InvalidStepError),
    }
    hidden, start, refusal = wrong[fault]
    if refusal is None:
        submit(beside, "bad", start, hidden)
    else:
        with pytest.raises(refusal):
            submit(beside, "bad", start, hidden)
        submit(beside, "bad", 0, tokens(2))
    results = {engine: {result.session: result for result in drain(engine)} for engine in (alone, beside)}
    assert beside.batches_run == 1
    assert isinstance(results[beside]["bad"].error, NonFiniteError if refusal is None else type(None))
    torch.testing.assert_close(results[beside]["good"].hidden, results[alone]["good"].hidden, rtol=1e-5, atol=1e-5)
    # And it may go on as if nothing had been.
    submit(beside, "bad", 0, tokens(4))
    (result,) = drain(beside)
    assert result.error is None


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss", "bloom"])
def test_pages_that_a_broken_session_leaves_do_not_harm_the_next(make_engine, family: str):
    engine = make_engine(family, kv_tokens=32)
    poison = torch.full((20, WIDTH), torch.nan)
    for name, hidden in (("bad", poison), ("good", tokens(20))):
        open_session(engine, name)
        submit(engine, name, 0, hidden)
        (result,) = drain(engine)
        engine.close(name)
    assert result.error is None


def test_results_may_be_written_to_and_hold_no_more_than_themselves(make_engine):
    engine = make_engine()
    for name in "ab":
        open_session(engine, name)
        submit(engine, name, 0, tokens(2))
    for result in drain(engine):
        result.hidden.add_(1)
        assert result.hidden.untyped_storage().nbytes() == 2 * WIDTH * 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_steps_may_come_in_any_floating_dtype_and_results_are_in_the_models(make_engine, dtype: torch.dtype):
    engine = make_engine(dtype=torch.bfloat16)
    for name in "ab":
        open_session(engine, name)
    submit(engine, "a", 0, tokens(3).to(dtype))
    submit(engine, "b", 0, tokens(3))
    assert {result.hidden.dtype for result in drain(engine)} == {torch.bfloat16}
