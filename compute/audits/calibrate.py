"""Measures how far apart honest servers are, by their numerics: the table of `thresholds.py`.

Each class of numerics runs the same texts through a chain of spans, in two ways: as a prefill, alone, as an audit does,
and over a KV cache, a prompt and then token after token, all texts in one batch, as answers are made. Every pair of
classes and ways is compared, in windows as short as the shortest answer that is audited. The limit is two and
a half times the largest distance that was seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations_with_replacement, product
from typing import Any

import torch

from peerd.compute.attention.attention import register_attention
from peerd.compute.audits.distance import FIRST_POSITION, MIN_POSITIONS, distance
from peerd.compute.audits.thresholds import Numerics, Thresholds
from peerd.compute.checkpoint.checkpoint import Checkpoint
from peerd.compute.engine.engine import BaseEngine, Engine
from peerd.compute.kv.layout import PAGE_TOKENS
from peerd.compute.llamacpp.library import is_usable
from peerd.compute.llamacpp.loading import load_llama_engine
from peerd.compute.llamacpp.supported import why_not
from peerd.compute.model.span_model import load_span
from peerd.compute.model.stored_as import has_grids
from peerd.compute.steps import EngineStep
from peerd.protocol.rows import RowSlice, SessionSize
from peerd.protocol.span import Span

#: What peers serve of any model: every dtype that a CPU computes fast enough, with every quantization.
CLASSES = tuple(
    Numerics(dtype, quantization) for quantization in ("none", "int8", "nf4") for dtype in ("float32", "bfloat16")
)
#: What they serve beside these of a model that is published as integers in groups.
PACKED_CLASSES = (Numerics("float32", "packed"), Numerics("bfloat16", "packed"))
#: And what llama.cpp computes of a GGUF file.
LLAMACPP_CLASS = Numerics("float32", "llamacpp")
# Two short texts do not show the largest distance that there is. With a margin of 1.5, limits of two texts raised
# 35 false alarms in 100,000 simulated audits of a third one; with 2, two, the larger of which 2.5 would have let pass.
MARGIN = 2.5
# The prompt of a text; the rest is decoded.
PROMPT = 32
# The positions in a batch, as in a server.
BATCH = 512

Way = tuple[Numerics, bool]
"""A class, and whether it decodes over a cache."""


@dataclass(eq=False)
class Measured:
    """Outputs `[rows, positions, width]` at the end of each span, from the texts' embeddings.

    whole: by way, of chains whose spans all compute in that way. part: by class, of each span alone, as a prefill, for
    the same input. inputs: what entered the model, and that input of each span.
    """

    inputs: torch.Tensor
    whole: dict[Way, list[torch.Tensor]] = field(default_factory=dict)
    part: dict[Numerics, list[torch.Tensor]] = field(default_factory=dict)
    part_inputs: list[torch.Tensor] = field(default_factory=list)


def measure(
    checkpoint: Checkpoint,
    inputs: torch.Tensor,
    spans: Sequence[Span],
    classes: Sequence[Numerics] = CLASSES,
    on_span: Callable[[Numerics, Span], None] = lambda numerics, span: None,
) -> Measured:
    """Run embedded texts, `[rows, positions, width]`, through `spans`, one after the other, in every way.

    The first class is the one whose outputs are the parts' inputs. Between spans, hidden states are rounded to the
    checkpoint's dtype, as on the wire. `on_span` is called when a class has run a span.
    """
    found = Measured(inputs)
    reference = inputs
    for span in spans:
        found.part_inputs.append(reference)
        for numerics in classes:
            engine = _load(checkpoint, span, numerics, len(inputs) * (inputs.shape[1] + PAGE_TOKENS))
            alone = _sent(prefill(engine, reference), checkpoint)
            found.part.setdefault(numerics, []).append(alone)
            for decodes in (False, True):
                done = found.whole.setdefault((numerics, decodes), [])
                given = done[-1] if done else inputs
                if decodes:
                    done.append(_sent(decode(engine, given), checkpoint))
                else:
                    done.append(alone if given is reference else _sent(prefill(engine, given), checkpoint))
            on_span(numerics, span)
        reference = found.part[classes[0]][-1]
    return found


def _load(checkpoint: Checkpoint, span: Span, numerics: Numerics, kv_tokens: int) -> BaseEngine:
    if numerics == LLAMACPP_CLASS:
        return load_llama_engine(checkpoint, span, kv_tokens=kv_tokens, batch_tokens=BATCH)
    dtype: torch.dtype = getattr(torch, numerics.dtype)
    model = load_span(checkpoint, span, dtype=dtype, attention=register_attention(), quantize=numerics.quantization)
    return Engine(model, kv_tokens=kv_tokens, batch_tokens=BATCH)


def classes_of(checkpoint: Checkpoint) -> tuple[Numerics, ...]:
    """What peers serve of this model, as far as it can be measured here."""
    packed = PACKED_CLASSES if has_grids(checkpoint) else ()
    by_llamacpp = (LLAMACPP_CLASS,) if not why_not(checkpoint) and is_usable() else ()
    return (*CLASSES, *packed, *by_llamacpp)


def thresholds(found: Measured, made: Mapping[str, Any]) -> Thresholds:
    """The table that follows from what was measured."""
    whole = {
        pair: MARGIN
        * max(
            distance
            for one, other in product((False, True), repeat=2)
            if (first := (pair[0], one)) != (second := (pair[1], other))
            for at in range(len(found.part_inputs))
            for distance in windows(found.inputs, found.whole[first][at], found.whole[second][at])
        )
        for pair in combinations_with_replacement(found.part, 2)
    }
    part = {
        (one, other): max(
            whole[one, other] if one == other else 0.0,
            MARGIN
            * max(
                distance
                for given, first, second in zip(found.part_inputs, found.part[one], found.part[other], strict=True)
                for distance in windows(given, first, second)
            ),
        )
        for one, other in combinations_with_replacement(found.part, 2)
    }
    return Thresholds(_named(whole), _named(part), made)


def windows(inputs: torch.Tensor, one: torch.Tensor, other: torch.Tensor) -> Iterator[float]:
    """The distances of two outputs in windows of the least length, which overlap by half."""
    for given, first, second in zip(inputs, one, other, strict=True):
        for start in range(FIRST_POSITION, len(given) - MIN_POSITIONS + 1, MIN_POSITIONS // 2):
            part = slice(start, start + MIN_POSITIONS)
            yield distance(given[part], first[part], second[part])


def prefill(engine: BaseEngine, inputs: torch.Tensor) -> torch.Tensor:
    """The span's outputs for whole texts, each by itself."""
    length = inputs.shape[1]
    return torch.cat([_run(engine, row[None], [(0, length)]) for row in inputs])


def decode(engine: BaseEngine, inputs: torch.Tensor) -> torch.Tensor:
    """The span's outputs for texts that come as a prompt and then position by position, in batches of all texts."""
    return _run(engine, inputs, [(0, PROMPT), *((at, at + 1) for at in range(PROMPT, inputs.shape[1]))])


def _run(engine: BaseEngine, inputs: torch.Tensor, pieces: Sequence[tuple[int, int]]) -> torch.Tensor:
    """Outputs for rows that come in these pieces, the same piece of all rows in one batch."""
    rows, length, _ = inputs.shape
    outputs: list[list[torch.Tensor]] = [[] for _ in range(rows)]
    for row in range(rows):
        engine.open(row, SessionSize(length), owner=row)
    for seq, (start, end) in enumerate(pieces):
        for row in range(rows):
            piece = RowSlice(0, start, end - start)
            engine.submit(EngineStep(row, seq, (), (piece,), inputs[row, start:end]))
        while (batch := engine.plan()) is not None:
            for result in engine.collect(batch, engine.run(batch)):
                if result.error is not None:
                    raise result.error
                assert isinstance(result.session, int)
                assert result.hidden is not None
                outputs[result.session].append(result.hidden.float())
    for row in range(rows):
        engine.close(row)
    return torch.stack([torch.cat(parts) for parts in outputs])


def _sent(hidden: torch.Tensor, checkpoint: Checkpoint) -> torch.Tensor:
    return hidden.to(checkpoint.dtype).float()


def _named(limits: Mapping[tuple[Numerics, Numerics], float]) -> dict[frozenset[str], float]:
    # Equal results are possible on one machine; on two, sums are added up in another order.
    return {frozenset(map(str, pair)): float(f"{max(limit, _LEAST):.3g}") for pair, limit in limits.items()}


# Rounding of float32, which grows along a model.
_LEAST = 1e-3
