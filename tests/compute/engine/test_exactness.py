"""Chained engines compute what the whole Transformers model computes, however work is cut and batched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from peerd.compute.checkpoint.opening import open_checkpoint
from peerd.compute.engine.engine import Engine, EngineStep
from peerd.compute.errors import StepGapError
from peerd.compute.families.layer_kinds import layer_kinds
from peerd.compute.transformers_compat import cache_argument
from peerd.protocol.rows import Fork, RowSlice, SessionSize
from peerd.protocol.span import Span
from tests.compute.engine_chain import LENGTH, TOLERANCE, Chain, Part, Reference

FAMILY_NAMES = ("llama", "qwen3", "mixtral", "gemma3_text", "gpt_oss", "smollm3", "bloom")
# What the tiny models' scaled ropes leave unscaled.
UNSCALED_LENGTH = 32
# Longer than window, rollback and batch together, so that windows move on.
LONG = 160


def open_reference(folder: Path, length: int = LENGTH) -> Reference:
    checkpoint = open_checkpoint(folder)
    family = checkpoint.family
    # Neither capped scores nor sinks are known to Transformers' sdpa.
    model = family.causal_type().from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    seen: list[torch.Tensor] = []
    decoder = model.base_model
    getattr(decoder, family.layers)[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    getattr(decoder, family.norm).register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    tokens = torch.randint(3, model.config.vocab_size, (3, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        decoder(input_ids=tokens)
    return Reference(checkpoint, *seen)


@pytest.fixture(scope="module")
def references(tiny_checkpoint: Callable[[str], Path]) -> Iterator[Callable[[str], Reference]]:
    found: dict[str, Reference] = {}

    def get(name: str) -> Reference:
        if name not in found:
            found[name] = open_reference(tiny_checkpoint(name))
        return found[name]

    yield get
    for reference in found.values():
        reference.checkpoint.close()


@pytest.fixture(params=FAMILY_NAMES)
def whole(request: pytest.FixtureRequest, references: Callable[[str], Reference]) -> Reference:
    return references(request.param)


def test_ragged_batches_equal_the_whole_model(references: Callable[[str], Reference], tiny_name: str):
    chain = Chain(references(tiny_name))
    chain.open("a", max_rows=2)
    chain.open("b")
    chain.check(Part("a", 0, 0, 0, 20), Part("a", 1, 1, 0, 11), Part("b", 0, 2, 0, 5))
    for turn in range(4):
        chain.check(Part("b", 0, 2, 5 + turn, 1), Part("a", 1, 1, 11 + turn, 1), Part("a", 0, 0, 20 + turn, 1))
    # A prefill beside a decode, and two positions at once.
    chain.check(Part("b", 0, 2, 9, 28), Part("a", 1, 1, 15, 2), Part("a", 0, 0, 24, 1))


def test_a_prefill_cut_into_chunks_equals_the_whole_model(whole: Reference):
    chain = Chain(whole, batch_tokens=7)
    chain.open("a")
    chain.open("b")
    chain.check(Part("a", 0, 0, 0, 37), Part("b", 0, 1, 0, 17))


def test_rolling_back_and_stepping_again_equals_the_whole_model(whole: Reference):
    chain = Chain(whole)
    chain.open("a")
    chain.check(Part("a", 0, 0, 0, 15))
    chain.run(Part("a", 0, 1, 15, 5))
    chain.check(Part("a", 0, 0, 13, 4))
    chain.run(Part("a", 0, 2, 3, 1))
    chain.check(Part("a", 0, 0, 2, 1), Part("a", 0, 0, 3, 20))


def test_a_forked_row_equals_the_whole_model(whole: Reference):
    chain = Chain(whole)
    chain.open("a", max_rows=3)
    chain.check(Part("a", 0, 0, 0, 14))
    chain.check(Part("a", 2, 0, 14, 3), ops=[Fork(0, 2, 14)])
    chain.run(Part("a", 2, 1, 17, 3))
    chain.check(Part("a", 0, 0, 14, 2), Part("a", 0, 0, 16, 1))


# All blocks with a window, some of them, and windows with sinks. Rows are cut by 4 at most.
@pytest.fixture(params=["mistral", "gemma3_text", "gpt_oss"])
def moving(request: pytest.FixtureRequest, tiny_checkpoint: Callable[[str], Path]) -> Iterator[Reference]:
    reference = open_reference(tiny_checkpoint(request.param), LONG)
    yield reference
    reference.checkpoint.close()


def test_rows_whose_windows_have_moved_on_equal_the_whole_model(moving: Reference):
    chain = Chain(moving, batch_tokens=24, kv_tokens=640)
    chain.open("a", max_length=LONG, max_rows=3, max_rollback=4)
    chain.open("b", max_length=LONG, max_rollback=4)
    # Only a span whose blocks all see everything keeps all positions.
    committed = [engine.tokens_wanted(SessionSize(LONG, max_rows=3, max_rollback=4)) for engine in chain.engines]
    assert [tokens < 3 * LONG for tokens in committed] == [_has_windows(moving, engine) for engine in chain.engines]
    chain.check(Part("a", 0, 0, 0, 130), Part("b", 0, 1, 0, 7))
    chain.check(Part("a", 0, 0, 130, 1), Part("b", 0, 1, 7, 120))
    # Each row forks, also within its last positions, and the copies go their own ways.
    chain.check(Part("a", 1, 0, 128, 4), ops=[Fork(0, 1, 128)])
    chain.check(Part("a", 2, 0, 131, 1), ops=[Fork(0, 2, 131)])
    chain.run(Part("a", 1, 2, 132, 3))
    chain.check(Part("a", 0, 0, 131, 20), Part("b", 0, 1, 127, 30), Part("a", 2, 0, 132, 2))
    # Back by what was promised, with other positions and then the right ones.
    chain.run(Part("a", 0, 1, 147, 2))
    chain.check(Part("a", 0, 0, 147, 9), Part("b", 0, 1, 153, 4))
    for turn in range(3):
        chain.check(Part("a", 0, 0, 156 + turn, 1), Part("b", 0, 1, 157 + turn, 1))


def test_a_row_cut_further_back_than_windows_keep_starts_again(moving: Reference):
    chain = Chain(moving, batch_tokens=24)
    chain.open("a", max_length=LONG, max_rollback=4)
    chain.check(Part("a", 0, 0, 0, 150))
    for engine in chain.engines:
        if _has_windows(moving, engine):
            with pytest.raises(StepGapError) as gap:
                engine.check(EngineStep("a", 9, (), (RowSlice(0, 60, 1),), moving.inputs[0, :1]))
            assert gap.value.have == {0: 0}
    chain.check(Part("a", 0, 0, 0, 100))


def _has_windows(whole: Reference, engine: Engine) -> bool:
    kinds = layer_kinds(whole.checkpoint.config)[engine.span.start : engine.span.end]
    return any(kind.window is not None for kind in kinds)


def test_a_part_of_a_span_equals_those_blocks(whole: Reference):
    split = Chain(whole, (Span(0, 5), Span(5, 8)))
    split.open("a")
    expected = split.run(Part("a", 0, 0, 0, 12))[0]
    chain = Chain(whole, (Span(0, 8), Span(3, 8)))
    for engine, blocks in zip(chain.engines, (Span(0, 5), Span(5, 8)), strict=True):
        engine.open("a", SessionSize(LENGTH, max_rollback=4), blocks=blocks)
    torch.testing.assert_close(chain.run(Part("a", 0, 0, 0, 12))[0], expected, **TOLERANCE)


def test_forward_without_a_cache_equals_the_whole_model(whole: Reference):
    chain = Chain(whole)
    hidden = whole.inputs
    for engine in chain.engines:
        hidden = engine.forward(hidden)
    torch.testing.assert_close(hidden, whole.outputs, **TOLERANCE)


@pytest.mark.parametrize("name", ["llama_dynamic", "phi3_longrope"])
def test_a_long_neighbour_changes_nothing_where_rope_follows_the_length(
    references: Callable[[str], Reference], name: str
):
    whole = references(name)

    def short(chain: Chain, *neighbours: Part) -> torch.Tensor:
        chain.open("short", prompt_length=UNSCALED_LENGTH)
        return chain.run(Part("short", 0, 0, 0, 10), *neighbours)[0]

    alone, beside = Chain(whole), Chain(whole)
    beside.open("long")
    result = short(beside, Part("long", 0, 1, 0, LENGTH))
    torch.testing.assert_close(result, short(alone), rtol=1e-5, atol=1e-5)
    # The long one is scaled as in Transformers, where the whole text comes at once.
    chain = Chain(whole)
    chain.open("long")
    chain.check(Part("long", 0, 0, 0, LENGTH))
    assert not torch.allclose(result, whole.outputs[0, :10], **TOLERANCE)


@pytest.mark.parametrize("name", ["llama_dynamic", "phi3_longrope"])
@pytest.mark.parametrize("prompt", [10, 30])
def test_ropes_follow_a_growing_answer_as_in_transformers_however_long_it_may_become(
    references: Callable[[str], Reference], tiny_checkpoint: Callable[[str], Path], name: str, prompt: int
):
    whole = references(name)
    pieces = [(0, prompt), *((position, position + 1) for position in range(prompt, LENGTH))]
    decoder = whole.checkpoint.family.decoder_type().from_pretrained(tiny_checkpoint(name), dtype=torch.float32).eval()
    decoder.norm = torch.nn.Identity()
    cache = {cache_argument(decoder.forward): DynamicCache(config=decoder.config)}
    with torch.no_grad():
        outputs = [decoder(inputs_embeds=whole.inputs[:1, start:end], **cache) for start, end in pieces]
    expected = torch.cat([output.last_hidden_state[0] for output in outputs])
    for length in (LENGTH, 4 * LENGTH):
        chain = Chain(whole)
        chain.open("a", max_length=length, prompt_length=prompt)
        # A hop may get the prompt in pieces.
        results = [chain.run(Part("a", 0, 0, start, end - start))[0] for start, end in [(0, 7), (7, prompt)]]
        results += [chain.run(Part("a", 0, 0, start, 1))[0] for start, _ in pieces[1:]]
        torch.testing.assert_close(torch.cat(results), expected, **TOLERANCE)
