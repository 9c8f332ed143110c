"""Checks a loaded span before it is announced: with a KV cache its blocks must compute what they compute without.

A release of Transformers, a kernel or a driver can break a family without an error: the server would answer with
nonsense, and no client could tell. So some positions run through one block of each kind, whole and in pieces, alone and
beside another session, over the cache that sessions will use; then through the whole span, to see that every block
writes its cache and gives finite numbers. It costs some eight forwards of a block and two of the span.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import torch

from peerd.compute.engine.engine import Engine
from peerd.compute.errors import EngineError, NonFiniteError, NoRoomError, UnsupportedModelError
from peerd.compute.model.span_model import SpanModel
from peerd.compute.quantized.formats import PACKED
from peerd.compute.steps import EngineStep
from peerd.protocol.rows import RowSlice, SessionSize
from peerd.protocol.span import Span

# A prompt, two tokens, and a prompt that follows them, with these numbers of positions.
_PIECES = (3, 1, 1, 3)
_LENGTH = sum(_PIECES)
# As small as embeddings are, so that most of the output comes from the block, and rounding hides nothing.
_SCALE = 0.05
# How far two ways of computing the same may differ, relative to what the block adds. Over all families, quantized or
# not, the largest differences were 2e-6, 3e-3 and 2e-2; a cache that was not written gave 0.1 to 1e16. Packed weights
# are multiplied in bfloat16 whatever the dtype.
_BOUNDS = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
# The exceptions of code that is called in a way for which it was not written, or on a device on which it does not work.
_BROKEN = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)


def check_span(engine: Engine, model: SpanModel, quantize: str) -> None:
    """Raise UnsupportedModelError, with a message of one line, if the engine computes this model wrongly.

    Call it before the engine is in use; it leaves the engine as it was. Blocks the thread for milliseconds to a second.
    """
    counted = engine.positions_computed, engine.batches_run
    bound = _BOUNDS[torch.bfloat16 if quantize == PACKED else model.dtype]
    try:
        for block in _one_of_each_kind(model):
            blocks = Span(block, block + 1)
            _check_blocks(engine, model, blocks, bound)
            if blocks != engine.span:
                engine.forget_part(blocks)
        _check_writing(engine)
    except _Wrong as wrong:
        raise UnsupportedModelError(_line(model, quantize, str(wrong))) from wrong.__cause__
    except _BROKEN as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UnsupportedModelError(_line(model, quantize, f"its blocks raise {reason}")) from error
    finally:
        engine.positions_computed, engine.batches_run = counted


class _Wrong(Exception):
    """What differs; the message is for the operator."""


def _line(model: SpanModel, quantize: str, what: str) -> str:
    dtype = str(model.dtype).removeprefix("torch.")
    with_what = f"Transformers {version('transformers')}, torch {torch.__version__}, {dtype}"
    if quantize != "none":
        with_what += f", {quantize}"
    return f"{model.family.model_type} cannot be served with {with_what} on {model.device}: {what}"


def _one_of_each_kind(model: SpanModel) -> list[int]:
    """The first block of each kind. A kind is given by what the block keeps, and by its modules."""
    first: dict[Any, int] = {}
    for number, (layer, kind) in enumerate(zip(model.layers, model.kinds, strict=True)):
        made_of = tuple(type(module).__name__ for module in layer.modules())
        first.setdefault((kind, made_of), model.span.start + number)
    return sorted(first.values())


def _check_blocks(engine: Engine, model: SpanModel, blocks: Span, bound: float) -> None:
    """Compare the outputs of some blocks with the KV cache and without it. Raises _Wrong."""
    random = torch.Generator().manual_seed(0)
    length = min(_LENGTH, engine.total_tokens)
    hidden = torch.randn(2, length, engine.hidden_size, generator=random) * _SCALE
    expected = engine.forward(hidden, blocks)
    if not expected.isfinite().all():
        raise _Wrong(_not_finite(blocks, model.dtype))
    added = expected.float() - hidden.to(model.dtype).float()
    experts = any("expert" in name for name, _ in model.layers[blocks.start - model.span.start].named_modules())
    for how, pieces, rows in (("whole", (length,), 1), ("in pieces", _cut(length), 2)):
        with _Sessions(engine, blocks, length).opened(rows) as sessions:
            got = sessions.run(hidden, pieces)
        for row, outputs in enumerate(got):
            error = _differs(torch.cat(outputs), expected[row], added[row])
            # Where two experts suit a position almost equally well, rounding may choose between them.
            worst = float(error.sort(descending=True).values[length // 4 if experts else 0])
            if not worst <= bound:
                beside = f" beside {len(got) - 1} other session" if len(got) > 1 else ""
                raise _Wrong(
                    f"block {blocks.start} computes something else with its KV cache than without ({how}{beside}: "
                    f"relative error {worst:.2g}, rounding makes at most {bound:g})"
                )


def _differs(got: torch.Tensor, expected: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
    """For each position how large the difference is beside what blocks add, which is about alike for all of them.

    What they add may be so little that rounding the sum is most of the difference: it never counts as more than that.
    """
    rounding = torch.finfo(expected.dtype).eps / _BOUNDS[expected.dtype]
    size = max(added.norm(dim=-1).mean(), rounding * expected.float().norm(dim=-1).mean())
    error: torch.Tensor = (got.float() - expected.float()).norm(dim=-1) / size
    return error


def _check_writing(engine: Engine) -> None:
    """Run some positions through the whole span: every block must write its cache. Raises _Wrong."""
    length = min(_LENGTH, engine.total_tokens)
    hidden = torch.randn(1, length, engine.hidden_size, generator=torch.Generator().manual_seed(1)) * _SCALE
    with _Sessions(engine, engine.span, length).opened(1) as sessions:
        sessions.run(hidden, _cut(length)[:2])


def _cut(length: int) -> tuple[int, ...]:
    """Cut this many positions into pieces. If the pool is too small for all pieces, each has one position."""
    return _PIECES if length == _LENGTH else (1,) * length


def _not_finite(blocks: Span, dtype: torch.dtype) -> str:
    remedy = "its weights may be damaged"
    if dtype == torch.float16:
        remedy = "numbers in it end at 65504: serve with --dtype bfloat16"
    return f"blocks {blocks} give NaN or infinity in {str(dtype).removeprefix('torch.')}: {remedy}"


class _Sessions:
    """Some sessions over the same blocks, which run their steps in the same batches."""

    def __init__(self, engine: Engine, blocks: Span, length: int) -> None:
        self._engine = engine
        self._blocks = blocks
        self._length = length
        self._names: list[object] = []

    @contextmanager
    def opened(self, count: int) -> Iterator[_Sessions]:
        """Open `count` sessions, or as many as fit, and close them at the end."""
        try:
            for _ in range(count):
                name = object()
                size = SessionSize(self._length, prompt_length=self._length)
                try:
                    self._engine.open(name, size, blocks=self._blocks, owner=name)
                except NoRoomError:
                    if not self._names:
                        raise
                    break
                self._names.append(name)
            yield self
        finally:
            for name in self._names:
                self._engine.close(name)

    def run(self, hidden: torch.Tensor, pieces: Sequence[int]) -> list[list[torch.Tensor]]:
        """Run `hidden` `[sessions, positions, hidden_size]` piece by piece. Returns the outputs of each session."""
        outputs: list[list[torch.Tensor]] = [[] for _ in self._names]
        start = 0
        for seq, count in enumerate(pieces):
            for row, name in enumerate(self._names):
                new = hidden[row, start : start + count]
                self._engine.submit(EngineStep(name, seq, (), (RowSlice(0, start, count),), new))
            for name, output in self._results():
                outputs[self._names.index(name)].append(output)
            start += count
        return outputs

    def _results(self) -> Iterator[tuple[object, torch.Tensor]]:
        while (batch := self._engine.plan()) is not None:
            self._engine.mark_unwritten(batch)
            output = self._engine.run(batch)
            unwritten = self._engine.unwritten(batch)
            results = self._engine.collect(batch, output)
            if unwritten:
                raise _Wrong(f"block {unwritten[0]} does not write its KV cache")
            for result in results:
                if result.error is not None:
                    raise _Wrong(self._why(result.error)) from result.error
                assert result.hidden is not None
                yield result.session, result.hidden

    def _why(self, error: EngineError) -> str:
        if isinstance(error, NonFiniteError):
            return _not_finite(self._blocks, self._engine.dtype)
        return str(error)
