"""Gradients flow through quantized blocks: they are those of the weights that the blocks compute with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from peerd.compute.attention.attention import register_attention
from peerd.compute.checkpoint.opening import open_checkpoint
from peerd.compute.engine.engine import Engine
from peerd.compute.model.span_model import load_span
from peerd.compute.training.pass_input import PassInput
from peerd.protocol.span import Span
from tests.compute.device_turns import device_turns

WIDTH = 32
ROWS = (9, 6)
BLOCKS = Span(0, 3)


@pytest.mark.parametrize("quantize", ["int8", "nf4"])
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_quantized_blocks_gradient_predicts_its_own_change(
    tiny_checkpoint: Callable[[str], Path], name: str, quantize: str
):
    with open_checkpoint(tiny_checkpoint(name)) as checkpoint:
        model = load_span(checkpoint, BLOCKS, dtype=torch.float32, attention=register_attention(), quantize=quantize)
    runner = Engine(model, kv_tokens=64).passes
    assert runner is not None
    runner.measure()
    generator = torch.Generator().manual_seed(0)
    hidden, grad, way = (torch.randn(sum(ROWS), WIDTH, generator=generator) for _ in range(3))

    def forward(inputs: torch.Tensor) -> float:
        given = PassInput(BLOCKS, ROWS, inputs)
        work = runner.forward(given, runner.plan(given))
        device_turns([work])
        return float((work.output.double() * grad.double()).sum())

    given = PassInput(BLOCKS, ROWS, hidden)
    work = runner.backward(given, runner.plan(given), grad)
    device_turns([work])
    step = 1e-3
    measured = (forward(hidden + step * way) - forward(hidden - step * way)) / (2 * step)
    assert float((work.grad * way).sum()) == pytest.approx(measured, rel=0.05, abs=0.5)
