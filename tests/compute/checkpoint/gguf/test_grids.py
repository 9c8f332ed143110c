"""GGUF's quantized tensors as integers: the values that `gguf` dequantizes, and the rows that processors move."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from peerd.compute.checkpoint.gguf.grids import bits_of, codes_of, is_exact
from peerd.compute.checkpoint.opening import open_checkpoint
from peerd.compute.errors import CheckpointError, UnsupportedModelError
from peerd.compute.model.span_model import load_span
from peerd.compute.model.stored_as import packing_notes
from peerd.compute.quantized.modules import QuantizedLinear, QuantizedStack, matrices_in
from peerd.protocol.span import Span
from tests.compute.gguf_models import TINY, tiny_config, tiny_model
from tests.compute.gguf_writer import metadata_of, stored_tensors, write_gguf, write_model
from tests.compute.plain_weights import with_weights_of

EXACT = {
    Type.Q4_0: 4,
    Type.Q4_1: 4,
    Type.Q5_0: 8,
    Type.Q5_1: 8,
    Type.Q8_0: 8,
    Type.Q4_K: 4,
    Type.Q5_K: 8,
}
# Where a block's fp16 numbers lie: random bytes there would be infinities.
HALVES = {Type.Q4_1: 2, Type.Q5_1: 2, Type.Q4_K: 2, Type.Q5_K: 2}


def random_rows(kind: Type, rows: int = 6, columns: int = 512) -> NDArray[np.uint8]:
    """Rows of random blocks, which use every bit pattern of codes and nested scales."""
    size, width = gguf.GGML_QUANT_SIZES[kind]
    random = np.random.default_rng(0)
    blocks = random.integers(0, 256, (rows * columns // size, width), dtype=np.uint8)
    scales = random.uniform(-0.1, 0.1, (len(blocks), HALVES.get(kind, 1))).astype(np.float16)
    if kind == Type.Q6_K:
        blocks[:, -2:] = scales.view(np.uint8)
    else:
        blocks[:, : scales.shape[1] * 2] = scales.view(np.uint8)
    return blocks.reshape(rows, -1)


@pytest.mark.parametrize("kind", EXACT)
def test_codes_scales_and_zeros_give_the_values_of_the_file(kind: Type) -> None:
    data = random_rows(kind)
    before = data.copy()
    own = codes_of(data, kind, EXACT[kind])
    assert bits_of(kind) == EXACT[kind]
    assert int(own.codes.max()) < 1 << EXACT[kind]
    wide = (each.repeat_interleave(32, dim=1) for each in (own.scales, own.zeros))
    values = next(wide) * own.codes + next(wide)
    wanted = torch.from_numpy(gguf.quants.dequantize(data, kind))
    torch.testing.assert_close(values, wanted, rtol=1e-5, atol=1e-5)
    assert np.array_equal(data, before)
    assert is_exact(kind)


def test_a_type_with_scales_for_sixteen_values_is_rounded_to_eight_bits() -> None:
    data = random_rows(Type.Q6_K)
    own = codes_of(data, Type.Q6_K, 8)
    assert bits_of(Type.Q6_K) == 8
    assert not is_exact(Type.Q6_K)
    wide = (each.repeat_interleave(32, dim=1) for each in (own.scales, own.zeros))
    values = next(wide) * own.codes + next(wide)
    wanted = torch.from_numpy(gguf.quants.dequantize(data, Type.Q6_K))
    assert (values - wanted).norm() <= 0.005 * wanted.norm()


@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.BF16])
def test_plain_numbers_have_no_codes(kind: Type) -> None:
    assert bits_of(kind) is None


def written(folder: Path, name: str, kind: Type) -> Path:
    path = folder / "tiny.gguf"
    write_model(path, TINY[name][0], tiny_model(tiny_config(name)), kind)
    return path


@pytest.mark.parametrize("name", sorted(TINY))
def test_every_architecture_has_its_rows_in_the_models_order(tmp_path: Path, name: str) -> None:
    path = written(tmp_path, name, Type.Q8_0)
    with open_checkpoint(path) as checkpoint:
        packed = load_span(checkpoint, Span(2, 5), quantize="packed")
        plain = load_span(checkpoint, Span(2, 5))
        again = with_weights_of(packed, load_span(checkpoint, Span(2, 5)))
        assert any(True for _ in matrices_in(packed))
        for parameter, value in plain.named_parameters():
            error = (again.get_parameter(parameter) - value).norm()
            assert error <= 0.005 * value.norm(), parameter
        hidden = torch.randn(1, 9, 32, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            found, wanted = packed.forward_no_cache(hidden), again.forward_no_cache(hidden)
        assert (found - wanted).norm() <= 0.03 * (wanted - hidden).norm()


def test_a_matrix_whose_rows_are_no_whole_groups_stays_plain(tmp_path: Path) -> None:
    with open_checkpoint(written(tmp_path, "llama", Type.Q4_1)) as checkpoint:
        packed = load_span(checkpoint, Span(0, 2), quantize="packed")
        assert isinstance(packed.layers[0].get_submodule("mlp.up_proj"), QuantizedLinear)
        assert isinstance(packed.layers[0].get_submodule("mlp.down_proj"), torch.nn.Linear)
        notes = packing_notes(checkpoint, 0, packed.layers, "packed")
    assert notes == ["not stored as integers in groups, so kept plain: mlp.down_proj.weight"]


def test_experts_stay_packed(tmp_path: Path) -> None:
    with open_checkpoint(written(tmp_path, "qwen3_moe", Type.Q4_0)) as checkpoint:
        packed = load_span(checkpoint, Span(0, 1), quantize="packed")
    stack = packed.layers[0].get_submodule("mlp.experts.gate_up_proj")
    assert isinstance(stack, QuantizedStack)
    assert repr(stack.form) == "int4 in groups of 32"


def test_parts_of_one_parameter_may_be_stored_in_different_types(tmp_path: Path) -> None:
    model = tiny_model(tiny_config("qwen3_moe"))
    path = tmp_path / "tiny.gguf"
    write_gguf(
        path,
        "qwen3moe",
        metadata_of("qwen3moe", model.config),
        dict(stored_tensors("qwen3moe", model)),
        kind_of=lambda name: Type.Q8_0 if "gate_exps" in name else Type.Q4_1,
    )
    with open_checkpoint(path) as checkpoint:
        packed, plain = (load_span(checkpoint, Span(0, 1), quantize=quantize) for quantize in ("packed", "none"))
        experts = packed.layers[0].get_submodule("mlp.experts.gate_up_proj")
        wanted = plain.layers[0].get_parameter("mlp.experts.gate_up_proj")
    assert isinstance(experts, QuantizedStack)
    assert repr(experts.form) == "int8 in groups of 32"
    found = torch.stack([matrix.dequantize() for matrix in experts])
    assert (found - wanted).norm() <= 0.005 * wanted.norm()


def test_a_file_that_ends_within_a_packed_tensor_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, "llama", Type.Q4_1)
    with open_checkpoint(path) as checkpoint:
        path.write_bytes(path.read_bytes()[:-4000])
        with pytest.raises(CheckpointError, match="truncated"):
            load_span(checkpoint, Span(0, 8), quantize="packed")


def test_a_packed_matrix_of_another_shape_than_the_configurations_is_refused(tmp_path: Path) -> None:
    model = tiny_model(tiny_config("llama"))
    tensors = dict(stored_tensors("llama", model))
    tensors["blk.1.ffn_up.weight"] = np.ones((40, 32), dtype=np.float32)
    path = tmp_path / "tiny.gguf"
    write_gguf(path, "llama", metadata_of("llama", model.config), tensors, Type.Q4_1)
    with (
        open_checkpoint(path) as checkpoint,
        pytest.raises(
            CheckpointError, match=r"up_proj\.weight has shape \[40, 32\], the configuration says \[48, 32\]"
        ),
    ):
        load_span(checkpoint, Span(0, 2), quantize="packed")


def test_a_packed_type_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, "llama", Type.Q4_1)

    def unknown(*_: object) -> None:
        raise NotImplementedError

    monkeypatch.setattr("peerd.compute.checkpoint.gguf.code_rows.codes_of", unknown)
    with (
        open_checkpoint(path) as checkpoint,
        pytest.raises(UnsupportedModelError, match=r"tensor blk\.0\.\w+\.weight is stored as Q4_1"),
    ):
        load_span(checkpoint, Span(0, 1), quantize="packed")
