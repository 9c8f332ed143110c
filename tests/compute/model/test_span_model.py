"""A chain of spans computes what the whole model computes, in every family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from peerd.compute.checkpoint.checkpoint import Checkpoint
from peerd.compute.checkpoint.opening import open_checkpoint
from peerd.compute.model.head import load_head
from peerd.compute.model.span_model import SpanModel, load_span
from peerd.protocol.span import Span

TinyCheckpoint = Callable[[str], Path]

CUTS = (Span(0, 3), Span(3, 7), Span(7, 8))


def whole_model(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path).eval()


def token_ids(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 128, (length,), generator=torch.Generator().manual_seed(seed))


def through(chain: list[SpanModel], hidden: torch.Tensor, max_length: int | None = None) -> torch.Tensor:
    with torch.no_grad():
        for span in chain:
            hidden = span.forward_no_cache(hidden, max_length)
    return hidden


def load_chain(checkpoint: Checkpoint) -> list[SpanModel]:
    return [load_span(checkpoint, span) for span in CUTS]


def test_a_chain_cut_at_3_and_7_gives_the_whole_models_logits(tiny_checkpoint: TinyCheckpoint, tiny_name: str) -> None:
    path = tiny_checkpoint(tiny_name)
    ids = token_ids(40)
    with torch.no_grad():
        expected = whole_model(path)(ids[None]).logits[0]
    with open_checkpoint(path) as checkpoint:
        head = load_head(checkpoint)
        hidden = through(load_chain(checkpoint), head.embed(ids)[None])[0]
    logits = head.logits(hidden)
    assert expected.std() > 0.05, "a model whose logits are all alike would prove nothing"
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_a_span_steps_through_a_cache_as_it_runs_without(tiny_checkpoint: TinyCheckpoint, tiny_name: str) -> None:
    from transformers import DynamicCache

    with open_checkpoint(tiny_checkpoint(tiny_name)) as checkpoint:
        span = load_span(checkpoint, Span(3, 7))
    hidden = torch.randn(1, 24, checkpoint.hidden_size, generator=torch.Generator().manual_seed(1))
    cache = DynamicCache(config=span.config)
    with torch.no_grad():
        expected = span.forward_no_cache(hidden)
        pieces = []
        for start, end in ((0, 19), (19, 20), (20, 24)):
            positions = torch.arange(start, end)[None]
            pieces.append(span(hidden[:, start:end], positions, cache, rope_lengths=24))
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, atol=1e-4, rtol=1e-4)


def test_gradients_flow_to_the_input_and_weights_stay_frozen(tiny_checkpoint: TinyCheckpoint) -> None:
    with open_checkpoint(tiny_checkpoint("llama")) as checkpoint:
        span = load_span(checkpoint, Span(2, 4))
    hidden = torch.randn(1, 5, checkpoint.hidden_size, requires_grad=True)
    span.forward_no_cache(hidden).square().sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in span.parameters())


def test_a_span_holds_its_blocks_and_nothing_else(tiny_checkpoint: TinyCheckpoint, tiny_name: str) -> None:
    with open_checkpoint(tiny_checkpoint(tiny_name)) as checkpoint:
        span = load_span(checkpoint, Span(3, 7), dtype=torch.bfloat16)
    prefix = f"decoder.{checkpoint.family.layers}."
    assert len(span.layers) == len(span.kinds) == 4
    assert all(name.startswith(prefix) for name, _ in span.named_parameters())
    assert {parameter.dtype for parameter in span.parameters()} == {torch.bfloat16}
    numbers = {module.layer_idx for module in span.modules() if hasattr(module, "layer_idx")}
    assert numbers == {0, 1, 2, 3}


def test_kinds_say_where_windows_are(tiny_checkpoint: TinyCheckpoint) -> None:
    def windows(name: str) -> list[int | None]:
        with open_checkpoint(tiny_checkpoint(name)) as checkpoint:
            return [kind.window for kind in load_span(checkpoint, Span(2, 6)).kinds]

    assert windows("llama") == [None] * 4
    assert windows("mistral") == [16] * 4
    assert windows("gemma3_text") == [16, 16, 16, None]
    assert windows("qwen3") == [None, None, None, 16]


def test_a_span_says_what_its_cache_holds(tiny_checkpoint: TinyCheckpoint) -> None:
    with open_checkpoint(tiny_checkpoint("llama")) as checkpoint:
        kind = load_span(checkpoint, Span(0, 1)).kinds[0]
    assert (kind.kv_heads, kind.key_dim, kind.value_dim, kind.values_per_token) == (2, 16, 16, 64)


@pytest.mark.parametrize("name", ["llama_dynamic", "phi3_longrope"])
@pytest.mark.parametrize("length", [20, 60])
def test_a_declared_length_equal_to_the_sequence_is_transformers_own_scaling(
    tiny_checkpoint: TinyCheckpoint, name: str, length: int
) -> None:
    path = tiny_checkpoint(name)
    ids = token_ids(length)
    with open_checkpoint(path) as checkpoint:
        head, chain = load_head(checkpoint), load_chain(checkpoint)
    with torch.no_grad():
        expected = whole_model(path)(ids[None]).logits[0]
    logits = head.logits(through(chain, head.embed(ids)[None], max_length=length)[0])
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama_dynamic", "phi3_longrope"])
def test_a_neighbours_declared_length_changes_nothing(tiny_checkpoint: TinyCheckpoint, name: str) -> None:
    with open_checkpoint(tiny_checkpoint(name)) as checkpoint:
        span = load_span(checkpoint, Span(3, 7))
    assert span.follows_length
    hidden = torch.randn(3, 20, checkpoint.hidden_size, generator=torch.Generator().manual_seed(1))
    positions = torch.arange(20).expand(3, 20)
    lengths = [20, 50, 100]
    with torch.no_grad():
        together = span(hidden, positions, rope_lengths=torch.tensor(lengths)[:, None])
        alone = [span.forward_no_cache(row[None], length) for row, length in zip(hidden, lengths, strict=True)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(alone[0], span.forward_no_cache(hidden[:1], 100), atol=1e-3)


def test_a_span_beyond_the_models_end_is_refused(tiny_checkpoint: TinyCheckpoint) -> None:
    with open_checkpoint(tiny_checkpoint("llama")) as checkpoint, pytest.raises(IndexError, match="8 blocks"):
        load_span(checkpoint, Span(7, 9))


def test_loading_tells_of_each_block(tiny_checkpoint: TinyCheckpoint) -> None:
    heard: list[int] = []
    with open_checkpoint(tiny_checkpoint("llama")) as checkpoint:
        load_span(checkpoint, Span(3, 6), on_block=heard.append)
    assert heard == [3, 4, 5]
