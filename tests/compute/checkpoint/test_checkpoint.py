"""Checkpoints give exactly the tensors that a span needs, and clear errors."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peerd.compute.checkpoint.opening import open_checkpoint
from peerd.compute.checkpoint.safetensors_file import SafetensorsFile
from peerd.compute.errors import CheckpointError, UnsupportedModelError
from peerd.compute.families.lookup import FAMILIES
from peerd.compute.model.span_model import load_span
from peerd.protocol.span import Span
from tests.compute.tiny_families import tiny_model

TinyCheckpoint = Callable[[str], Path]


@pytest.fixture
def sharded(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> Path:
    """The tiny llama in several shards."""
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(tiny_checkpoint("llama")).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 4
    return tmp_path


@pytest.fixture
def copied(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> Path:
    """A copy of the tiny llama that a test may damage."""
    return Path(shutil.copytree(tiny_checkpoint("llama"), tmp_path / "copied"))


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def write_safetensors(path: Path, header: object, data: bytes = b"") -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def test_a_checkpoint_says_what_it_is(tiny_checkpoint: TinyCheckpoint) -> None:
    with open_checkpoint(tiny_checkpoint("llama")) as checkpoint:
        assert checkpoint.block_count == 8
        assert checkpoint.hidden_size == 32
        assert checkpoint.max_length == 512
        assert checkpoint.dtype == torch.float32
        assert checkpoint.generation_config.eos_token_id == 2
        assert "layers.7.mlp.down_proj.weight" in checkpoint.names_of_block(7)
        with pytest.raises(IndexError, match="blocks 0 to 7"):
            checkpoint.names_of_block(8)
    with open_checkpoint(tiny_checkpoint("bloom")) as checkpoint:
        assert checkpoint.max_length is None


def test_opening_block_7_reads_block_7s_bytes_only(tiny_checkpoint: TinyCheckpoint, tiny_name: str) -> None:
    with open_checkpoint(tiny_checkpoint(tiny_name)) as checkpoint:
        before = checkpoint.bytes_read
        span = load_span(checkpoint, Span(7, 8))
        assert checkpoint.bytes_read - before == sum(tensor.nbytes for tensor in span.layers[0].state_dict().values())


def test_a_span_needs_only_the_shards_that_hold_it(sharded: Path) -> None:
    index = json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"]
    wanted = {shard for name, shard in index.items() if name.startswith("model.layers.7.")}
    for shard in set(index.values()) - wanted:
        (sharded / shard).unlink()
    with open_checkpoint(sharded) as checkpoint:
        load_span(checkpoint, Span(7, 8))
        with pytest.raises(CheckpointError, match=r"\.safetensors: cannot be opened"):
            load_span(checkpoint, Span(0, 1))


def test_shards_and_one_file_hold_the_same_blocks(tiny_checkpoint: TinyCheckpoint, sharded: Path) -> None:
    with open_checkpoint(tiny_checkpoint("llama")) as one, open_checkpoint(sharded) as many:
        assert [one.block_digest(block) for block in range(8)] == [many.block_digest(block) for block in range(8)]


def test_experts_are_read_fused_whether_stored_fused_or_not(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    source = tiny_checkpoint("mixtral")
    assert any(".experts.3.w3." in name for name in load_file(source / "model.safetensors")), "stored one by one"
    shutil.copy(source / "config.json", tmp_path)
    fused = AutoModelForCausalLM.from_pretrained(source).state_dict()
    save_file({name: tensor.contiguous() for name, tensor in fused.items()}, tmp_path / "model.safetensors")
    with open_checkpoint(source) as one_by_one, open_checkpoint(tmp_path) as together:
        names = one_by_one.names_of_block(3)
        assert "layers.3.mlp.experts.gate_up_proj" in names
        for (name, first), (_, second) in zip(one_by_one.read(names), together.read(names), strict=True):
            assert torch.equal(first, second), name


def test_a_missing_expert_is_named(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = tiny_checkpoint("mixtral")
    shutil.copy(source / "config.json", tmp_path)
    tensors = load_file(source / "model.safetensors")
    del tensors[next(name for name in tensors if ".layers.5." in name and ".experts.2.w1." in name)]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.5\.mlp\.experts\.gate_up_proj is incomplete: expert 2"):
        open_checkpoint(tmp_path)


def test_the_thinker_of_a_model_that_speaks_is_found(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = tmp_path / "thinker"
    tiny_model(FAMILIES["qwen2_5_omni_text"]).save_pretrained(source)
    thinker = {"text_config": json.loads((source / "config.json").read_text()), "model_type": "qwen2_5_omni_thinker"}
    whole = {"model_type": "qwen2_5_omni", "thinker_config": thinker, "talker_config": {}, "dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    tensors = {f"thinker.{name}": tensor for name, tensor in load_file(source / "model.safetensors").items()}
    tensors["thinker.lm_head.weight"] = torch.ones(96, 32)
    spoken = {"talker.model.layers.0.mlp.down_proj.weight": torch.zeros(2, 2)}
    save_file(tensors | spoken, tmp_path / "model.safetensors")
    with open_checkpoint(source) as alone, open_checkpoint(tmp_path) as inside:
        assert inside.dtype == torch.bfloat16
        assert inside.names_of_block(3) == alone.names_of_block(3)
        for (name, first), (_, second) in zip(
            *(each.read(alone.names_of_block(3)) for each in (alone, inside)), strict=True
        ):
            assert torch.equal(first, second), name
        assert not alone.has("lm_head.weight")
        assert inside.has("lm_head.weight")


def test_the_language_part_of_a_larger_model_is_found(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = tiny_checkpoint("gemma3_text")
    config = json.loads((source / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": config}))
    tensors = {f"language_model.{name}": tensor for name, tensor in load_file(source / "model.safetensors").items()}
    tensors["vision_tower.encoder.layers.0.weight"] = torch.zeros(2)
    save_file(tensors, tmp_path / "model.safetensors")
    with open_checkpoint(source) as plain, open_checkpoint(tmp_path) as larger:
        assert larger.names_of_block(3) == plain.names_of_block(3)
        load_span(larger, Span(3, 4))


def test_a_missing_tensor_is_named(copied: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(copied / "model.safetensors")
    del tensors["model.layers.4.self_attn.k_proj.weight"]
    save_file(tensors, copied / "model.safetensors")
    with open_checkpoint(copied) as checkpoint:
        load_span(checkpoint, Span(0, 4))
        with pytest.raises(CheckpointError, match=r"copied: tensor layers\.4\.self_attn\.k_proj\.weight is missing"):
            load_span(checkpoint, Span(2, 6))


def test_a_tensor_of_another_shape_than_configured_is_named(copied: Path) -> None:
    edit_config(copied, intermediate_size=40)
    with open_checkpoint(copied) as checkpoint, pytest.raises(CheckpointError, match="the configuration says"):
        load_span(checkpoint, Span(0, 1))


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 9, 200, 3000, 20000, -4, -1])
def test_a_truncated_file_is_one_clear_error(copied: Path, keep: int) -> None:
    path = copied / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: (truncated|its header)"):
        open_checkpoint(copied)


def test_a_file_truncated_after_it_was_opened_is_an_error_too(copied: Path) -> None:
    with open_checkpoint(copied) as checkpoint:
        path = copied / "model.safetensors"
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size // 2)
        with pytest.raises(CheckpointError, match="truncated: model"):
            load_span(checkpoint, Span(0, 8))


def test_what_is_accepted_is_said_for_any_other_path(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"")
    for path in (tmp_path / "absent", tmp_path / "model.bin", "no name"):
        with pytest.raises(CheckpointError, match=r"a directory with config\.json and safetensors, or a \.gguf file"):
            open_checkpoint(path)


def test_pickled_weights_are_never_read(copied: Path) -> None:
    (copied / "model.safetensors").rename(copied / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="never read"):
        open_checkpoint(copied)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "gemma3n_text"}, "share KV"),
        ({"model_type": "rwkv"}, "rwkv cannot be cut into spans: its decoder scales"),
        ({"model_type": None}, "None is not one"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized by gptq"),
    ],
)
def test_what_cannot_run_is_refused_with_the_reason(copied: Path, changes: dict[str, Any], reason: str) -> None:
    edit_config(copied, **changes)
    with pytest.raises(UnsupportedModelError, match=reason):
        open_checkpoint(copied)


@pytest.mark.parametrize("field", ["num_hidden_layers", "hidden_size", "num_attention_heads"])
@pytest.mark.parametrize("value", [0, -1, 2**40, "8", None])
def test_an_absurd_size_is_refused(copied: Path, field: str, value: object) -> None:
    edit_config(copied, **{field: value})
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_checkpoint(copied)


def test_a_configuration_that_contradicts_itself_is_an_error(copied: Path) -> None:
    edit_config(copied, pad_token_id=100_000)
    with open_checkpoint(copied) as checkpoint, pytest.raises(CheckpointError, match="can be built"):
        load_span(checkpoint, Span(0, 1))


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": ' * 100_000])
def test_a_config_that_is_no_json_object_is_refused(copied: Path, text: str) -> None:
    (copied / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_checkpoint(copied)


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", 7])
def test_an_index_may_name_no_file_outside_its_folder(copied: Path, shard: object) -> None:
    (copied / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.layers.0.w": shard}}))
    with pytest.raises(CheckpointError, match="no shard's name"):
        open_checkpoint(copied)


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        [],
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 12]}},
        {"a": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 16]}},
        {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 16]}},
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}},
        {"a": {"dtype": "F32", "shape": [4.0], "data_offsets": [0, 16]}},
        {"a": {"shape": [4], "data_offsets": [0, 16]}},
        {"a": 3},
        {
            "a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
            "b": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]},
        },
    ],
)
def test_a_malformed_safetensors_header_is_refused(tmp_path: Path, header: object) -> None:
    path = write_safetensors(tmp_path / "bad.safetensors", header, bytes(16))
    with pytest.raises(CheckpointError, match=r"bad\.safetensors"):
        SafetensorsFile(path)


def test_a_header_longer_than_the_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.safetensors"
    path.write_bytes(struct.pack("<Q", 2**62) + bytes(100))
    with pytest.raises(CheckpointError, match="its header claims"):
        SafetensorsFile(path)


@settings(max_examples=150, deadline=None)
@given(position=st.integers(0, 400), value=st.integers(0, 255))
def test_a_damaged_header_never_breaks_the_reader(tmp_path_factory: Any, position: int, value: int) -> None:
    from safetensors.torch import save

    raw = bytearray(save({"one": torch.ones(3, 4), "two": torch.zeros(5, dtype=torch.bfloat16)}, {"k": "v"}))
    raw[position % len(raw)] = value
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    path.write_bytes(raw)
    try:
        with SafetensorsFile(path) as file:
            for name in file.tensors:
                file.read(name)
    except CheckpointError:
        pass
