"""Spans of packed weights: cut, batched, adapted and trained through, they compute what their dequantized weights do.

Where the arithmetic around the weights is tested, products are by slices in float32, which rounds nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gguf import GGMLQuantizationType as Type
from torch import nn

from peerd.compute.adapters.lora import LoraPair
from peerd.compute.attention.attention import register_attention
from peerd.compute.checkpoint.checkpoint import Checkpoint
from peerd.compute.checkpoint.opening import open_checkpoint
from peerd.compute.engine.capacity import block_bytes, block_costs, fits
from peerd.compute.engine.engine import Engine
from peerd.compute.engine.self_test import check_span
from peerd.compute.errors import UnsupportedModelError
from peerd.compute.model.head import load_head
from peerd.compute.model.span_model import SpanModel, load_span
from peerd.compute.model.stored_as import forms_of, has_grids
from peerd.compute.quantized import group_matrix, product_choice
from peerd.compute.quantized.group_matrix import Choice
from peerd.compute.quantized.groups import Grid
from peerd.compute.quantized.modules import matrices_in
from peerd.compute.steps import EngineStep
from peerd.compute.training.pass_input import PassInput
from peerd.protocol.rows import RowSlice, SessionSize
from peerd.protocol.span import Span
from tests.compute.device_turns import device_turns
from tests.compute.engine_chain import LENGTH, Chain, Part, Reference
from tests.compute.gguf_models import TINY, tiny_config, tiny_model
from tests.compute.gguf_writer import write_model
from tests.compute.plain_weights import with_weights_of

WHOLE = Span(0, 8)
WIDTH = 32


@pytest.fixture(params=["llama", "qwen3_moe", "bloom"])
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Checkpoint]:
    path = tmp_path / "tiny.gguf"
    write_model(path, TINY[request.param][0], tiny_model(tiny_config(request.param)), Type.Q4_1)
    with open_checkpoint(path) as opened:
        yield opened


@pytest.fixture
def by_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_matrix, "has_kernel", lambda _: False)
    monkeypatch.setattr(product_choice, "choice_for", lambda _: Choice(0))


@pytest.fixture
def by_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product_choice, "choice_for", lambda _: Choice(1 << 20))


def packed(checkpoint: Checkpoint, span: Span = WHOLE) -> SpanModel:
    return load_span(checkpoint, span, attention=register_attention(), quantize="packed")


def dequantized(checkpoint: Checkpoint, span: Span = WHOLE) -> SpanModel:
    plain = load_span(checkpoint, span, attention="eager")
    return with_weights_of(load_span(checkpoint, span, attention="eager", quantize="packed"), plain)


@pytest.fixture
def whole(checkpoint: Checkpoint) -> Reference:
    inputs = torch.randn(3, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return Reference(checkpoint, inputs, dequantized(checkpoint).forward_no_cache(inputs))


@pytest.mark.usefixtures("by_slices")
def test_cut_spans_with_ragged_batches_and_rollback_equal_the_dequantized_model(whole: Reference) -> None:
    chain = Chain(whole, quantize="packed")
    chain.open("a", max_rows=2)
    chain.open("b")
    chain.check(Part("a", 0, 0, 0, 20), Part("a", 1, 1, 0, 11), Part("b", 0, 2, 0, 5))
    chain.check(Part("b", 0, 2, 5, 9), Part("a", 1, 1, 11, 1), Part("a", 0, 0, 20, 1))
    # Steps back by six positions.
    chain.check(Part("b", 0, 2, 8, 7))
    chain.check(Part("b", 0, 2, 15, 1), Part("a", 0, 0, 21, 3))


@pytest.mark.usefixtures("by_kernel")
def test_the_kernel_computes_the_same_but_for_its_rounding(whole: Reference) -> None:
    chain = Chain(whole, quantize="packed")
    chain.open("a")
    chain.open("b")
    found = torch.cat(chain.run(Part("a", 0, 0, 0, 20), Part("b", 0, 2, 0, 20)))
    wanted, inputs = whole.outputs[[0, 2], :20].flatten(0, 1), whole.inputs[[0, 2], :20].flatten(0, 1)
    error = (found - wanted).norm(dim=1) / (wanted - inputs).norm(dim=1)
    # Where two experts suit a position almost equally well, rounding may choose between them.
    assert error.quantile(0.75) <= 0.05


@pytest.mark.usefixtures("by_kernel")
def test_packed_blocks_predict_what_the_files_own_values_predict(checkpoint: Checkpoint) -> None:
    head = load_head(checkpoint)
    ids = torch.randint(3, 96, (64,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden = head.embed(ids)[None]
        wanted, found = (
            head.logits(load_span(checkpoint, WHOLE, quantize=quantize).forward_no_cache(hidden)[0]).log_softmax(-1)
            for quantize in ("none", "packed")
        )
    # Logits of random weights are far apart by chance only: a real model's are compared in test_quality.py.
    assert F.kl_div(found, wanted, log_target=True, reduction="batchmean") <= 0.01
    assert (found.argmax(-1) == wanted.argmax(-1)).float().mean() >= 0.9


def test_a_block_takes_to_the_byte_what_was_predicted(checkpoint: Checkpoint) -> None:
    span = packed(checkpoint)
    sizes = [sum(tensor.nbytes for tensor in layer.state_dict().values()) for layer in span.layers]
    assert [cost.n_bytes for cost in block_costs(checkpoint, torch.float32, "packed")] == sizes
    assert block_bytes(checkpoint, torch.float32, "packed") == max(sizes)


def test_more_packed_blocks_fit(checkpoint: Checkpoint) -> None:
    plain, small = (block_costs(checkpoint, torch.float32, quantize)[0] for quantize in ("none", "packed"))
    assert small.n_bytes < plain.n_bytes
    room = 220 << 20
    settings = {"dtype": torch.float32, "batch_tokens": 16, "kv_tokens": 16}
    assert fits(checkpoint, room, quantize="packed", **settings) >= fits(checkpoint, room, **settings) >= 0


@pytest.mark.usefixtures("by_kernel")
def test_the_self_test_passes_sound_blocks_and_finds_broken_ones(checkpoint: Checkpoint) -> None:
    model = packed(checkpoint, Span(1, 4))
    check_span(Engine(model, kv_tokens=256, page_tokens=4), model, "packed")
    broken = packed(checkpoint, Span(1, 4))
    for matrix in matrices_in(broken):
        turns = iter(range(1000))
        plain = matrix.multiply
        # Each product is another: as if a kernel read past its weights.
        matrix.multiply = lambda x, plain=plain, turns=turns: plain(x) * (1 + next(turns) % 2)  # type: ignore[method-assign]
    with pytest.raises(UnsupportedModelError, match="computes something else"):
        check_span(Engine(broken, kv_tokens=256, page_tokens=4), broken, "packed")


@pytest.mark.usefixtures("by_slices")
def test_gradients_through_a_span_are_those_of_its_dequantized_weights(checkpoint: Checkpoint) -> None:
    runner = Engine(packed(checkpoint, Span(0, 3)), kv_tokens=64).passes
    assert runner is not None
    runner.measure()
    hidden, gradient = torch.randn(2, 15, WIDTH, generator=torch.Generator().manual_seed(2))
    given = PassInput(Span(0, 3), (15,), hidden)
    work = runner.backward(given, runner.plan(given), gradient)
    device_turns([work])
    inputs = hidden[None].clone().requires_grad_()
    dequantized(checkpoint, Span(0, 3)).forward_no_cache(inputs).backward(gradient[None])
    assert inputs.grad is not None
    torch.testing.assert_close(work.grad, inputs.grad[0], rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("by_slices")
def test_an_adapter_is_added_beside_packed_layers(checkpoint: Checkpoint) -> None:
    span = Span(0, 2)
    model = packed(checkpoint, span)
    name = next(name for name, module in model.layers[1].named_modules() if hasattr(module, "in_features"))
    layer = model.layers[1].get_submodule(name)
    random = torch.Generator().manual_seed(3)
    a, b = torch.randn(2, layer.in_features, generator=random), torch.randn(layer.out_features, 2, generator=random)
    engine = Engine(model, kv_tokens=64)
    engine.load_adapter("lora", {(1, name): LoraPair(a, b, 0.3)})
    hidden = torch.randn(9, WIDTH, generator=random)

    plain = dequantized(checkpoint, span)
    weight = plain.layers[1].get_submodule(name).get_parameter("weight").data
    weight += 0.3 * (b @ a).t() if weight.shape != (layer.out_features, layer.in_features) else 0.3 * (b @ a)
    with torch.no_grad():
        wanted = plain.forward_no_cache(hidden[None])[0]
    engine.open("s", SessionSize(9), adapter="lora")
    engine.submit(EngineStep("s", 0, (), (RowSlice(0, 0, 9),), hidden))
    batch = engine.plan()
    assert batch is not None
    (result,) = engine.collect(batch, engine.run(batch))
    assert result.hidden is not None
    torch.testing.assert_close(result.hidden, wanted, rtol=1e-3, atol=1e-3)


def test_the_weight_that_latent_attention_multiplies_by_stays_plain() -> None:
    block = nn.Module()
    block.self_attn = nn.Module()
    block.self_attn.kv_b_proj, block.self_attn.o_proj = nn.Linear(64, 32), nn.Linear(64, 32)
    everywhere: Any = SimpleNamespace(grid=lambda name: Grid(4, 32, True, "awq"))
    assert list(forms_of(block, everywhere, "layers.0.", "packed")) == ["self_attn.o_proj.weight"]


def test_a_file_of_plain_numbers_has_nothing_to_keep_packed(tmp_path: Path) -> None:
    path = tmp_path / "plain.gguf"
    write_model(path, "llama", tiny_model(tiny_config("llama")), Type.F16)
    with open_checkpoint(path) as checkpoint:
        assert not has_grids(checkpoint)
        assert not list(matrices_in(packed(checkpoint, Span(0, 1))))
