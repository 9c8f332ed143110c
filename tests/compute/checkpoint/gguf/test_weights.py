"""Every way in which GGUF stores numbers is read as its own package reads it, a few rows at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from peerd.compute.checkpoint.gguf import weights as gguf_weights
from peerd.compute.checkpoint.gguf.split import GgufFiles
from peerd.compute.checkpoint.gguf.weights import GgufWeights
from peerd.compute.checkpoint.opening import open_checkpoint
from peerd.compute.errors import CheckpointError, UnsupportedModelError
from peerd.compute.model.head import load_head
from tests.compute.gguf_models import TINY, tiny_config, tiny_model
from tests.compute.gguf_writer import metadata_of, stored_tensors, write_gguf, write_model

ROWS, COLUMNS = 7, 512
KINDS = sorted(
    (kind for kind in gguf.GGMLQuantizationType if kind in gguf.quants._type_traits or kind.name in ("F32", "F16")),
    key=lambda kind: kind.name,
)


def write_bytes(path: Path, kind: gguf.GGMLQuantizationType) -> np.ndarray[Any, Any]:
    """One tensor of ROWS x COLUMNS numbers in any bits there can be: its bytes, uint8 [ROWS, bytes a row]."""
    values, size = gguf.GGML_QUANT_SIZES[kind]
    stored = np.random.default_rng(0).integers(0, 256, (ROWS, COLUMNS // values * size), dtype=np.uint8)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("t", stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


def weights_of(path: Path) -> GgufWeights:
    from transformers.modeling_gguf_pytorch_utils import TensorProcessor

    return GgufWeights(GgufFiles(path), {"t": ("t",)}, {"t": "t"}, TensorProcessor(config={}))


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")  # of bits at random
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_each_kind_of_storage_is_read_in_runs_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: gguf.GGMLQuantizationType
) -> None:
    monkeypatch.setattr(gguf_weights, "RUN_VALUES", 2 * COLUMNS)
    stored = write_bytes(tmp_path / "tiny.gguf", kind)
    plain = {"F32": np.float32, "F16": np.float16}.get(kind.name)
    expected = gguf.quants.dequantize(stored if plain is None else stored.view(plain), kind)
    values = weights_of(tmp_path / "tiny.gguf").read("t")
    assert values.dtype == torch.float32
    assert values.shape == (ROWS, COLUMNS)
    np.testing.assert_array_equal(values.numpy(), expected.astype(np.float32))


def test_a_kind_of_storage_that_nobody_reads_is_refused_by_name(tmp_path: Path) -> None:
    write_bytes(tmp_path / "tiny.gguf", gguf.GGMLQuantizationType.Q8_1)
    with pytest.raises(UnsupportedModelError, match="tensor t is stored as Q8_1"):
        weights_of(tmp_path / "tiny.gguf").read("t")


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q5_1", "MXFP4"])
def test_a_quantized_file_gives_the_values_that_it_holds(tmp_path: Path, kind: str) -> None:
    """Those of the embedding, which no processor changes."""
    model = tiny_model(tiny_config("llama"))
    number = gguf.GGMLQuantizationType[kind]
    write_model(tmp_path / "tiny.gguf", "llama", model, number)
    values = dict(stored_tensors("llama", model))["token_embd.weight"]
    held = gguf.quants.dequantize(gguf.quants.quantize(values, number), number)
    with open_checkpoint(tmp_path / "tiny.gguf") as checkpoint:
        np.testing.assert_array_equal(load_head(checkpoint).embedding_weight.numpy(), held)


def written(path: Path, name: str, **changed: Any) -> Path:
    """A tiny model with some of its tensors changed."""
    model = tiny_model(tiny_config(name))
    architecture = TINY[name][0]
    tensors = {**dict(stored_tensors(architecture, model)), **changed}
    write_gguf(path / "tiny.gguf", architecture, metadata_of(architecture, model.config), tensors)
    return path / "tiny.gguf"


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "mixtral", "minimax_m2"])
@pytest.mark.parametrize("leaf", ["gate_up_proj", "down_proj"])
def test_experts_are_read_one_by_one_as_they_are_together(tmp_path: Path, name: str, leaf: str) -> None:
    with open_checkpoint(written(tmp_path, name)) as checkpoint:
        parameter = f"layers.2.mlp.experts.{leaf}"
        ((_, whole),) = checkpoint.read([parameter])
        before = checkpoint.bytes_read
        slices = checkpoint.read_slices(parameter)
        assert torch.equal(next(slices), whole[0])
        assert checkpoint.bytes_read - before == whole[0].nbytes
        assert torch.equal(torch.stack([whole[0], *slices]), whole)


def test_experts_of_different_shapes_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path, "mixtral", **{"blk.1.ffn_up_exps.weight": np.ones((3, 48, 32))})
    with (
        open_checkpoint(path) as checkpoint,
        pytest.raises(CheckpointError, match=r"blk\.1\.ffn_gate_exps\.weight and blk\.1\.ffn_up_exps\.weight differ"),
    ):
        list(checkpoint.read(["layers.1.mlp.experts.gate_up_proj"]))


@pytest.mark.parametrize(
    ("name", "stored", "parameter"),
    [
        ("llama", "blk.1.attn_q.weight", "layers.1.self_attn.q_proj.weight"),
        ("bloom", "blk.1.attn_qkv.weight", "h.1.self_attention.query_key_value.weight"),
        ("falcon_grouped", "blk.1.attn_qkv.weight", "h.1.self_attention.query_key_value.weight"),
    ],
)
def test_a_tensor_that_cannot_be_put_in_order_is_named(tmp_path: Path, name: str, stored: str, parameter: str) -> None:
    path = written(tmp_path, name, **{stored: np.ones((7, 32))})
    with (
        open_checkpoint(path) as checkpoint,
        pytest.raises(CheckpointError, match=rf"tensor {stored} has shape \[7, 32\]"),
    ):
        list(checkpoint.read([parameter]))
