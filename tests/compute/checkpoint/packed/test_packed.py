"""Models in publishers' quantized formats compute what Transformers computes with the dequantized numbers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from peerd.compute.checkpoint.checkpoint import Checkpoint
from peerd.compute.checkpoint.opening import open_checkpoint
from peerd.compute.engine.capacity import span_budget
from peerd.compute.errors import CheckpointError, UnsupportedModelError
from peerd.compute.model.head import load_head
from peerd.compute.model.span_model import load_span
from peerd.protocol.span import Span
from tests.compute.published_formats import (
    FORMATS,
    MXFP4_CONFIG,
    Write,
    config_text,
    fp8_blocks,
    fp8_whole,
    gptq,
    int8_rows,
    mxfp4,
)

TinyCheckpoint = Callable[[str], Path]
Tensors = dict[str, torch.Tensor]


def is_linear(name: str) -> bool:
    return "_proj.weight" in name or ".experts." in name


def save(source: Path, target: Path, tensors: Tensors, quantization: dict[str, object] | None = None) -> Path:
    """A checkpoint like `source` with other tensors."""
    target.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(config_text(config, quantization) if quantization else json.dumps(config))
    return target


def quantized(source: Path, write: Write, wanted: Callable[[str], bool] = is_linear) -> tuple[Tensors, Tensors]:
    """The tensors of `source` with some quantized, and the plain ones that they stand for."""
    stored: Tensors = {}
    plain: Tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        pieces, plain[name] = write(name, tensor) if wanted(name) else ({name: tensor}, tensor)
        stored |= pieces
    assert stored.keys() != plain.keys()
    return stored, plain


def check_equal_to_transformers(checkpoint: Checkpoint, plain: Path) -> None:
    """The checkpoint, cut at 3 and 7, gives the logits of Transformers' model of the plain weights."""
    from transformers import AutoModelForCausalLM

    tokens = torch.randint(3, 90, (2, 20), generator=torch.Generator().manual_seed(0))
    whole = AutoModelForCausalLM.from_pretrained(plain, attn_implementation="eager").eval()
    with torch.no_grad():
        expected = whole(tokens).logits
    head = load_head(checkpoint, dtype=torch.float32)
    hidden = head.embed(tokens.flatten()).view(*tokens.shape, -1)
    for span in (Span(0, 3), Span(3, 7), Span(7, 8)):
        with torch.no_grad():
            hidden = load_span(checkpoint, span, dtype=torch.float32, attention="eager").forward_no_cache(hidden)
    torch.testing.assert_close(head.logits(hidden.flatten(0, 1)).view(expected.shape), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FORMATS)
def test_a_published_format_is_read_as_the_numbers_that_it_stands_for(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, name: str
) -> None:
    write, quantization = FORMATS[name]
    source = tiny_checkpoint("llama")
    stored, plain = quantized(source, write)
    with (
        open_checkpoint(save(source, tmp_path / "packed", stored, quantization)) as packed,
        open_checkpoint(save(source, tmp_path / "plain", plain)) as unpacked,
    ):
        assert packed.packing
        assert packed.names_of_block(5) == unpacked.names_of_block(5)
        names = unpacked.names_of_block(5)
        for (parameter, got), (_, expected) in zip(packed.read(names), unpacked.read(names), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6, msg=parameter)
        check_equal_to_transformers(packed, tmp_path / "plain")


@pytest.mark.parametrize("name", ["fp8 by blocks", "compressed int8", "awq", "bitsandbytes nf4"])
def test_experts_that_are_stored_one_by_one_are_read_from_a_published_format(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, name: str
) -> None:
    write, quantization = FORMATS[name]
    source = tiny_checkpoint("mixtral")
    stored, plain = quantized(source, write)
    with open_checkpoint(save(source, tmp_path / "packed", stored, quantization)) as packed:
        check_equal_to_transformers(packed, save(source, tmp_path / "plain", plain))
        matrices = list(packed.read_slices("layers.3.mlp.experts.gate_up_proj"))
        ((_, whole),) = packed.read(["layers.3.mlp.experts.gate_up_proj"])
        assert torch.equal(torch.stack(matrices), whole)


def test_experts_in_mxfp4_are_read_as_gpt_oss_publishes_them(tmp_path: Path) -> None:
    from transformers import GptOssConfig, GptOssForCausalLM
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    config = GptOssConfig(
        num_hidden_layers=8,
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=96,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(3)
    model = GptOssForCausalLM(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(tmp_path / "source")
    stored, plain = quantized(tmp_path / "source", mxfp4, lambda name: name.endswith(("up_proj", "down_proj")))
    name = "model.layers.2.mlp.experts.down_proj"
    blocks, scales = stored[f"{name}_blocks"], stored[f"{name}_scales"]
    own = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    torch.testing.assert_close(own, plain[name], rtol=0, atol=0)
    with open_checkpoint(save(tmp_path / "source", tmp_path / "packed", stored, MXFP4_CONFIG)) as packed:
        check_equal_to_transformers(packed, save(tmp_path / "source", tmp_path / "plain", plain))


def test_fp8_is_dequantized_as_transformers_does(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    source = tiny_checkpoint("llama")
    # Transformers asks that blocks fit the matrix: here they do.
    stored, _ = quantized(source, fp8_blocks, lambda name: "q_proj" in name)
    with open_checkpoint(save(source, tmp_path / "p", stored, FORMATS["fp8 by blocks"][1])) as checkpoint:
        name = "layers.4.self_attn.q_proj.weight"
        ((_, got),) = checkpoint.read([name], torch.bfloat16)
    pieces = {"weight": stored[f"model.{name}"], "weight_scale_inv": stored[f"model.{name}_scale_inv"]}
    (expected,) = Fp8Dequantize(None).convert(pieces).values()
    # Transformers 5.18 returns a list of one.
    assert torch.equal(got, (expected[0] if isinstance(expected, list) else expected).bfloat16())


def test_a_quantized_layer_may_be_quantized_again(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    source = tiny_checkpoint("mixtral")
    stored, plain = quantized(source, fp8_blocks)
    with (
        open_checkpoint(save(source, tmp_path / "packed", stored, FORMATS["fp8 by blocks"][1])) as packed,
        open_checkpoint(save(source, tmp_path / "plain", plain)) as unpacked,
    ):
        once, again = (load_span(each, Span(2, 4), quantize="int8", dtype=torch.float32) for each in (unpacked, packed))
    hidden = torch.randn(1, 9, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(again.forward_no_cache(hidden), once.forward_no_cache(hidden), rtol=1e-3, atol=1e-3)


def test_reading_a_block_reads_its_pieces_only(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    source = tiny_checkpoint("llama")
    stored, _ = quantized(source, gptq)
    with open_checkpoint(save(source, tmp_path / "p", stored, FORMATS["gptq"][1])) as checkpoint:
        before = checkpoint.bytes_read
        load_span(checkpoint, Span(7, 8))
        wanted = sum(tensor.nbytes for name, tensor in stored.items() if ".layers.7." in name)
        assert checkpoint.bytes_read - before == wanted


def test_two_copies_of_packed_weights_have_one_digest_and_other_scales_another(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    source = tiny_checkpoint("llama")
    stored, _ = quantized(source, fp8_whole)
    stored["model.layers.0.self_attn.q_proj.weight_scale_inv"] *= 2
    digests = []
    for turn, tensors in enumerate((quantized(source, fp8_whole)[0], quantized(source, fp8_whole)[0], stored)):
        with open_checkpoint(save(source, tmp_path / str(turn), tensors, FORMATS["fp8 by matrix"][1])) as checkpoint:
            digests.append(checkpoint.block_digest(0))
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize(
    ("quantization", "reason"),
    [
        ({"quant_method": "aqlm"}, "quantized by aqlm, which we do not read"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quantized by modelopt"),
        ({"bits": 4}, "an unknown way"),
        ("int4", "is 'int4', not an object"),
        ({"quant_method": "gptq", "bits": 3}, "bits is 3"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'"),
        ({"quant_method": "awq", "version": "gemv"}, "version is 'gemv'"),
        ({"quant_method": "compressed-tensors", "format": "marlin-24"}, "format is 'marlin-24'"),
        (
            {"quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "frozen"},
            "quantization_status is 'frozen'",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "float-quantized",
                "sparsity_config": {"format": "sparse-24-bitmask"},
            },
            "sparse too",
        ),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "weight_block_size"),
    ],
)
def test_what_is_not_read_is_refused_when_it_is_opened(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, quantization: object, reason: str
) -> None:
    copied = Path(shutil.copytree(tiny_checkpoint("llama"), tmp_path / "copied"))
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    with pytest.raises(UnsupportedModelError, match=reason):
        open_checkpoint(copied)


def damaged(stored: Tensors, name: str) -> dict[str, Tensors]:
    """Ways in which the pieces of one parameter can contradict each other, for `gptq`."""
    stem = f"model.layers.3.{name}"
    words, scales, groups = stored[f"{stem}.qweight"], stored[f"{stem}.scales"], stored[f"{stem}.g_idx"]
    return {
        "has no zero": {key: value for key, value in stored.items() if key != f"{stem}.qzeros"},
        "qzeros of another width": stored | {f"{stem}.qzeros": stored[f"{stem}.qzeros"][:, :1]},
        "words of floats": stored | {f"{stem}.qweight": words.float()},
        "too few scales": stored | {f"{stem}.scales": scales[:, :3]},
        "groups beyond the last": stored | {f"{stem}.g_idx": groups + 100},
        "other rows": stored | {f"{stem}.qweight": words[:-1]},
    }


@pytest.mark.parametrize("damage", range(6))
def test_pieces_that_contradict_each_other_are_refused_with_the_tensors_name(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, damage: int
) -> None:
    source = tiny_checkpoint("llama")
    stored, _ = quantized(source, gptq)
    tensors = list(damaged(stored, "mlp.up_proj").values())[damage]
    with (
        open_checkpoint(save(source, tmp_path / "p", tensors, FORMATS["gptq"][1])) as checkpoint,
        pytest.raises(CheckpointError, match=r"layers\.3\.mlp\.up_proj"),
    ):
        load_span(checkpoint, Span(0, 8))


def test_columns_in_groups_of_no_order_are_not_taken_for_groups_in_order(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    source = tiny_checkpoint("llama")
    stored, _ = quantized(source, int8_rows)
    stem = "model.layers.0.mlp.up_proj"
    width = stored[f"{stem}.weight"].shape[1]
    stored[f"{stem}.weight_g_idx"] = torch.arange(width, dtype=torch.int32).flip(0)
    config = {"quant_method": "compressed-tensors", "format": "int-quantized"}
    with (
        open_checkpoint(save(source, tmp_path / "p", stored, config)) as checkpoint,
        pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.up_proj.*weight_g_idx"),
    ):
        load_span(checkpoint, Span(0, 1))


def test_quantized_weights_that_the_configuration_does_not_tell_of_are_refused(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    source = tiny_checkpoint("llama")
    stored, _ = quantized(source, int8_rows)
    with pytest.raises(UnsupportedModelError, match=r"weight_scale belongs to quantized weights"):
        open_checkpoint(save(source, tmp_path / "scales", stored))
    scaled, _ = quantized(source, fp8_blocks)
    with pytest.raises(UnsupportedModelError, match=r"weight_scale_inv belongs to quantized weights"):
        open_checkpoint(save(source, tmp_path / "inverse scales", scaled))
    without = {name: tensor for name, tensor in stored.items() if not name.endswith("_scale")}
    with (
        open_checkpoint(save(source, tmp_path / "integers", without)) as checkpoint,
        pytest.raises(CheckpointError, match=r"layers\.0\.\S+ is stored as int8"),
    ):
        load_span(checkpoint, Span(0, 1))
    stored, _ = quantized(source, fp8_whole)
    without = {name: tensor for name, tensor in stored.items() if not name.endswith("_scale_inv")}
    with (
        open_checkpoint(save(source, tmp_path / "fp8", without, FORMATS["fp8 by matrix"][1])) as checkpoint,
        pytest.raises(CheckpointError, match=r"layers\.0\.\S+ is stored as float8_e4m3fn"),
    ):
        load_span(checkpoint, Span(0, 1))


@pytest.mark.parametrize("kept", ["quantization_config", "compression_config"])
def test_a_quantization_that_stands_in_the_outer_configuration_counts(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, kept: str
) -> None:
    source = tiny_checkpoint("llama")
    write, quantization = FORMATS["compressed int8"]
    stored, plain = quantized(source, write)
    target = save(source, tmp_path / "nested", {f"language_model.{name}": part for name, part in stored.items()})
    text = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({"model_type": "llava", "text_config": text, kept: quantization}))
    with open_checkpoint(target) as nested:
        check_equal_to_transformers(nested, save(source, tmp_path / "plain", plain))


@pytest.mark.parametrize("name", ["fp8 by blocks", "gptq", "bitsandbytes nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_block_takes_what_was_said_before_it_was_read(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    write, quantization = FORMATS[name]
    source = tiny_checkpoint("llama")
    with open_checkpoint(save(source, tmp_path / "p", quantized(source, write)[0], quantization)) as checkpoint:
        said = span_budget(checkpoint, Span(2, 5), dtype, batch_tokens=16).blocks
        layers = load_span(checkpoint, Span(2, 5), dtype=dtype).layers
    assert said == sum(tensor.nbytes for layer in layers for tensor in layer.state_dict().values())
    assert {tensor.dtype for layer in layers for tensor in layer.state_dict().values()} == {dtype}
