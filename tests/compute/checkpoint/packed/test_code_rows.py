"""Matrices that stay packed are the numbers that their files stand for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from peerd.compute.checkpoint.opening import open_checkpoint
from peerd.compute.engine.capacity import block_bytes
from peerd.compute.errors import CheckpointError
from peerd.compute.model.span_model import load_span
from peerd.compute.quantized.modules import QuantizedLinear, matrices_in
from peerd.protocol.span import Span
from tests.compute import published_formats
from tests.compute.checkpoint.packed.test_packed import quantized, save
from tests.compute.published_formats import FORMATS

TinyCheckpoint = Callable[[str], Path]
GROUPED = ["awq", "gptq", "compressed int4 zeros", "compressed int8 zeros"]
BY_ROW = ["compressed packed int8", "compressed int8", "bitsandbytes int8"]


@pytest.fixture
def in_groups_of_32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(published_formats, "GROUP", 32)


def is_wide(name: str) -> bool:
    """Matrices whose rows are whole groups of 32."""
    return any(part in name for part in ("q_proj.weight", "o_proj.weight", "up_proj.weight"))


def written(source: Path, folder: Path, name: str) -> tuple[Path, dict[str, torch.Tensor]]:
    """A checkpoint with some matrices in a published format, and the numbers that it stands for."""
    write, quantization = FORMATS[name]
    stored, plain = quantized(source, write, is_wide)
    return save(source, folder / name, stored, quantization), plain


@pytest.mark.usefixtures("in_groups_of_32")
@pytest.mark.parametrize("name", [*GROUPED, *BY_ROW])
def test_packed_matrices_are_the_numbers_of_the_file(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, name: str
) -> None:
    path, plain = written(tiny_checkpoint("llama"), tmp_path, name)
    with open_checkpoint(path) as checkpoint:
        span = load_span(checkpoint, Span(3, 7), dtype=torch.float32, quantize="packed")
        sizes = [sum(tensor.nbytes for tensor in layer.state_dict().values()) for layer in span.layers]
        assert block_bytes(checkpoint, torch.float32, "packed") == max(sizes)
    found = {
        f"model.layers.{block}.{at}.weight": module.weight
        for block, layer in enumerate(span.layers, 3)
        for at, module in layer.named_modules()
        if isinstance(module, QuantizedLinear)
    }
    assert set(found) == {each for each in plain if is_wide(each) and int(each.split(".")[2]) in range(3, 7)}
    for parameter, weight in found.items():
        error = (weight - plain[parameter]).norm()
        assert error <= 0.005 * plain[parameter].norm(), parameter


@pytest.mark.usefixtures("in_groups_of_32")
@pytest.mark.parametrize("name", ["gptq shuffled", "gptq v2", "compressed int4", "compressed nvfp4", "compressed fp8"])
def test_what_is_on_no_grid_or_may_have_columns_in_any_order_is_dequantized(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, name: str
) -> None:
    path, _ = written(tiny_checkpoint("llama"), tmp_path, name)
    with open_checkpoint(path) as checkpoint:
        assert not list(matrices_in(load_span(checkpoint, Span(0, 1), dtype=torch.float32, quantize="packed")))


@pytest.mark.parametrize("name", GROUPED)
def test_groups_that_the_kernel_does_not_know_are_dequantized(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, name: str
) -> None:
    path, _ = written(tiny_checkpoint("llama"), tmp_path, name)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.grid("layers.0.self_attn.q_proj.weight") is None


@pytest.mark.usefixtures("in_groups_of_32")
def test_a_file_whose_columns_are_in_no_order_against_its_configuration_is_refused(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    source = tiny_checkpoint("llama")
    path, _ = written(source, tmp_path, "gptq")
    stored = load_file(path / "model.safetensors")
    stored["model.layers.0.self_attn.o_proj.g_idx"] = stored["model.layers.0.self_attn.o_proj.g_idx"].flip(0)
    lying = save(source, tmp_path / "lying", stored, FORMATS["gptq"][1])
    with (
        open_checkpoint(lying) as checkpoint,
        pytest.raises(CheckpointError, match=r"o_proj\.weight has groups of columns in no order.*--quantize none"),
    ):
        load_span(checkpoint, Span(0, 1), dtype=torch.float32, quantize="packed")
