"""Blocks of a model that is far too large for this machine take almost no memory here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from peerd.compute.families.meta_build import build_on_meta
from peerd.facade.blocks import Call, RemoteBlocks, make_remote, plan_runs
from peerd.facade.weights import RemoteWeight
from peerd.protocol.span import Span

pytestmark = pytest.mark.slow

MIB = 1 << 20


class Blocks:
    """Runs no span: gives hidden states back, and keeps which spans were asked for."""

    def __init__(self) -> None:
        self.asked: list[Span] = []

    def run(self, call: Call, span: Span, hidden: torch.Tensor) -> torch.Tensor:
        self.asked.append(span)
        return hidden


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def layers_of_70b(blocks: int = 80) -> tuple[RemoteBlocks, Blocks]:
    config = LlamaConfig(
        num_hidden_layers=blocks,
        hidden_size=8192,
        intermediate_size=28672,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=1000,
    )
    model: Any = build_on_meta(LlamaForCausalLM, config, torch.bfloat16)
    swarm = Blocks()
    return make_remote(model.model.layers, swarm), swarm


def use(layers: RemoteBlocks, peft: Any) -> None:
    """What programs do to all weights of a model."""
    layers.float()
    layers.half()
    layers.to(torch.bfloat16)
    peft.prepare_model_for_kbit_training(layers, use_gradient_checkpointing=False)


def test_the_blocks_of_a_70b_model_take_little_memory_whatever_libraries_do_to_them() -> None:
    peft = pytest.importorskip("peft")
    # What is loaded and compiled at the first use of all this is not the blocks'.
    use(layers_of_70b(1)[0], peft)
    before = resident_bytes()
    layers, _ = layers_of_70b()
    assert sum(parameter.numel() for parameter in layers.parameters()) > 60e9
    use(layers, peft)
    assert {parameter.dtype for parameter in layers.parameters()} == {torch.float32}
    assert all(isinstance(parameter, RemoteWeight) for parameter in layers.parameters())
    assert not layers.state_dict()
    assert resident_bytes() - before < 100 * MIB


def test_a_plain_forward_is_one_run_and_what_looks_between_blocks_cuts_it() -> None:
    layers, swarm = layers_of_70b()
    hidden = torch.zeros(1, 2, 8)
    layers(hidden)
    layers[3:7](hidden)
    assert layers[:80] is layers
    assert len(layers[:79]) == 79
    assert swarm.asked == [Span(0, 80), Span(3, 7)]
    handle = layers[9].register_forward_hook(lambda *_: None)
    layers[20].register_forward_pre_hook(lambda *_: None)
    blocks = list(layers)
    assert plan_runs(blocks) == [Span(0, 10), Span(10, 20), Span(20, 80)]
    handle.remove()
    assert plan_runs(blocks) == [Span(0, 20), Span(20, 80)]
    assert plan_runs(blocks, {0, 40, 80}) == [Span(0, 20), Span(20, 40), Span(40, 80)]
    assert len(plan_runs(blocks, range(81))) == 80
    mixed = [*blocks[:2], nn.Identity(), *blocks[2:4], *blocks[3:5]]
    assert plan_runs(mixed) == [Span(0, 2), Span(2, 4), Span(3, 5)]


def test_blocks_may_be_repeated_skipped_and_reordered() -> None:
    layers, swarm = layers_of_70b()
    RemoteBlocks([layers[0], layers[2], layers[3], layers[3], layers[1]])(torch.zeros(1, 2, 8))
    assert swarm.asked == [Span(0, 1), Span(2, 4), Span(3, 4), Span(1, 2)]


def test_a_weight_gives_its_shape_and_refuses_arithmetic() -> None:
    weight = nn.Parameter(RemoteWeight((2, 3), torch.bfloat16), requires_grad=False)
    assert (weight.shape, weight.dtype, weight.numel()) == ((2, 3), torch.bfloat16, 6)
    assert weight.float().dtype is torch.float32
    assert isinstance(weight.detach().clone(), RemoteWeight)
    assert torch.equal(torch.zeros_like(weight), torch.zeros(2, 3, dtype=torch.bfloat16))
    for compute in (lambda: weight @ weight.T, lambda: weight.sum(), lambda: weight.numpy()):
        with pytest.raises((RuntimeError, TypeError)):
            compute()
