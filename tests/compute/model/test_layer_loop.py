"""Our loop over a decoder's layers gives bit by bit the result of the decoder's own forward, or is not used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from peerd.compute.attention.attention import register_attention
from peerd.compute.checkpoint.opening import open_checkpoint
from peerd.compute.engine.engine import Engine
from peerd.compute.model.layer_loop import LayerLoop
from peerd.compute.model.span_model import SpanModel, load_span
from peerd.compute.steps import EngineStep
from peerd.protocol.rows import RowSlice, SessionSize
from peerd.protocol.span import Span

SPAN = Span(2, 6)


def answers(model: SpanModel, *, with_loop: bool) -> torch.Tensor:
    """A prefill, a decode, and both again, now with what was learned."""
    engine = Engine(model, kv_tokens=128, page_tokens=4, batch_tokens=32)
    engine.open("s", SessionSize(48))
    generator = torch.Generator().manual_seed(0)
    start, outputs = 0, []
    for count in (20, 1, 3, 1, 5, 1):
        if not with_loop:
            model._loop = LayerLoop(model.decoder, model.layers)
        hidden = torch.randn(count, model.hidden_size, generator=generator)
        engine.submit(EngineStep("s", start, (), (RowSlice(0, start, count),), hidden))
        start += count
        while batch := engine.plan():
            outputs += [result.hidden for result in engine.collect(batch, engine.run(batch))]
    return torch.cat(outputs)


# Among them one rope for all blocks and one for each type, adapters of a declared length, experts, sinks.
@pytest.mark.parametrize(
    ("family", "learned"),
    [("llama", True), ("gemma3_text", True), ("llama_dynamic", True), ("gpt_oss", True), ("cohere2", True)],
)
def test_the_loop_gives_the_decoders_own_numbers(tiny_checkpoint: Callable[[str], Path], family: str, learned: bool):
    with open_checkpoint(tiny_checkpoint(family)) as checkpoint:
        model = load_span(checkpoint, SPAN, dtype=torch.float32, attention=register_attention())
    expected = answers(model, with_loop=False)
    assert torch.equal(answers(model, with_loop=True), expected)
    assert model._loop.learned == learned


class Layer(nn.Module):
    def forward(self, hidden: torch.Tensor, *, scale: float, **_: object) -> torch.Tensor:
        return hidden * scale


class Decoder(nn.Module):
    """One that loops over its layers, but for what `twist` does between them or tells them."""

    def __init__(self, twist: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.twist = twist

    def forward(self, hidden: torch.Tensor, positions: torch.Tensor, cache: object) -> torch.Tensor:
        layers = reversed(self.layers) if self.twist == "order" else self.layers
        scale = 2.0 + (self.twist == "length") * hidden.shape[1]
        for layer in layers:
            more = positions + 1 if self.twist == "made up" else positions
            hidden = layer(hidden, scale=scale, positions=more, cache=cache)
            if self.twist == "between":
                hidden = hidden * 1.5
        return hidden + 1 if self.twist == "after" else hidden


@pytest.mark.parametrize("twist", ["", "order", "length", "made up", "between", "after"])
def test_a_decoder_that_does_anything_else_goes_on_running_itself(twist: str):
    decoder = Decoder(twist)
    loop = LayerLoop(decoder, decoder.layers)
    cache = object()
    for count in (3, 1, 2, 1, 4):
        hidden, positions = torch.randn(1, count, 4), torch.arange(count)[None]
        expected = decoder(hidden, positions, cache)
        result = loop.run(lambda: decoder(hidden, positions, cache), hidden, positions, cache)  # noqa: B023 called now
        assert torch.equal(result, expected)
    assert loop.learned == (twist == "")
