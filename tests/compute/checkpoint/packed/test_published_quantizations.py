"""`quantization_config` as published models have it: each is read as the numbers it stands for, or refused by name.

The objects are those of the models that the names say, without fields that only name files of their makers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from peerd.compute.checkpoint.opening import open_checkpoint
from peerd.compute.checkpoint.packed.packing import packing_of
from peerd.compute.errors import UnsupportedModelError
from peerd.compute.families.lookup import FAMILIES
from tests.compute import published_formats
from tests.compute.published_formats import FORMATS

TinyCheckpoint = Callable[[str], Path]


def deepseek(**more: Any) -> dict[str, Any]:
    return {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    } | more


def compressed(form: str, activations: dict[str, Any] | None = None, **weights: Any) -> dict[str, Any]:
    """As llm-compressor writes it."""
    common = {"actorder": None, "block_structure": None, "dynamic": False, "observer": "minmax", "observer_kwargs": {}}
    group = {
        "input_activations": activations,
        "output_activations": None,
        "targets": ["Linear"],
        "weights": common | {"group_size": None, "strategy": "channel", "symmetric": True} | weights,
    }
    return {
        "config_groups": {"group_0": group},
        "format": form,
        "global_compression_ratio": None,
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }


def by_token(bits: int, kind: str) -> dict[str, Any]:
    return {"dynamic": True, "num_bits": bits, "strategy": "token", "symmetric": True, "type": kind, "observer": None}


def bitsandbytes(**more: Any) -> dict[str, Any]:
    return {
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": None,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    } | more


def awq(**more: Any) -> dict[str, Any]:
    return {"bits": 4, "group_size": 128, "quant_method": "awq", "version": "gemm", "zero_point": True} | more


def gptq(**more: Any) -> dict[str, Any]:
    said = {"bits": 4, "group_size": 128, "damp_percent": 0.01, "desc_act": False, "sym": True, "true_sequential": True}
    return said | {"quant_method": "gptq"} | more


WITH_ZEROS = {"num_bits": 4, "type": "int", "group_size": 128, "strategy": "group", "symmetric": False}
FP4 = {"num_bits": 4, "type": "float", "group_size": 16, "strategy": "tensor_group"}
#: The model -> its quantization, what peerd calls it, and the writer of `FORMATS` whose layout it has.
READ: dict[str, tuple[dict[str, Any], str, str]] = {
    "DeepSeek-V3": (deepseek(), "fp8", "fp8 by blocks"),
    "DeepSeek-V3.1": (deepseek(scale_fmt="ue8m0"), "fp8", "fp8 by blocks"),
    "Qwen3-8B-FP8": (deepseek(modules_to_not_convert=["lm_head", "model.layers.0.mlp.gate"]), "fp8", "fp8 by blocks"),
    "MiniMax-M2": (
        deepseek(fmt="float8_e4m3fn", modules_to_not_convert=["gate", "e_score_correction_bias", "lm_head"]),
        "fp8",
        "fp8 by blocks",
    ),
    "Ministral-3-8B-Instruct": (
        {"activation_scheme": "static", "dequantize": False, "quant_method": "fp8", "weight_block_size": None},
        "fp8",
        "fp8 by matrix",
    ),
    "Llama-3.1-405B-Instruct-FP8": (
        {"activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"], "quant_method": "fbgemm_fp8"},
        "fp8",
        "fbgemm fp8",
    ),
    "Llama-3.3-70B-Instruct-FP8-dynamic": (
        compressed("float-quantized", by_token(8, "float"), num_bits=8, type="float"),
        "compressed-tensors float-quantized",
        "compressed fp8",
    ),
    "Qwen3-32B-FP8-dynamic": (
        compressed("float-quantized", by_token(8, "float"), num_bits=8, type="float") | {"version": "0.10.2"},
        "compressed-tensors float-quantized",
        "compressed fp8",
    ),
    "Meta-Llama-3.1-8B-Instruct-quantized.w8a8": (
        compressed("int-quantized", by_token(8, "int"), num_bits=8, type="int"),
        "compressed-tensors int-quantized",
        "compressed int8",
    ),
    "gemma-3-12b-it-quantized.w8a8": (
        compressed("int-quantized", by_token(8, "int"), num_bits=8, type="int")
        | {"ignore": ["re:.*lm_head", "re:vision_tower.*"]},
        "compressed-tensors int-quantized",
        "compressed int8",
    ),
    "Meta-Llama-3.1-8B-Instruct-quantized.w4a16": (
        compressed("pack-quantized", **WITH_ZEROS | {"actorder": "weight"}),
        "compressed-tensors pack-quantized",
        "compressed int4 zeros",
    ),
    "Kimi-K2-Thinking": (
        compressed("pack-quantized", **WITH_ZEROS | {"group_size": 32, "symmetric": True})
        | {"ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*"]},
        "compressed-tensors pack-quantized",
        "compressed int4",
    ),
    "Meta-Llama-3.1-8B-quantized.w8a16": (
        compressed("pack-quantized", num_bits=8, type="int"),
        "compressed-tensors pack-quantized",
        "compressed packed int8",
    ),
    "Qwen3-32B-NVFP4": (
        compressed("nvfp4-pack-quantized", {**FP4, "dynamic": "local"}, **FP4)
        | {"sparsity_config": {}, "transform_config": {}},
        "compressed-tensors nvfp4-pack-quantized",
        "compressed nvfp4",
    ),
    "Llama-3.3-70B-Instruct-NVFP4A16": (
        compressed("nvfp4-pack-quantized", **FP4),
        "compressed-tensors nvfp4-pack-quantized",
        "compressed nvfp4",
    ),
    "Qwen2.5-7B-Instruct-AWQ": (awq(modules_to_not_convert=None), "awq", "awq"),
    "Meta-Llama-3.1-8B-Instruct-AWQ-INT4": (
        awq(backend="autoawq", do_fuse=False, exllama_config=None, fuse_max_seq_len=None),
        "awq",
        "awq",
    ),
    "Qwen2.5-7B-Instruct-GPTQ-Int4": (
        gptq(batch_size=1, block_name_to_quantize=None, exllama_config={"version": 1}, use_exllama=True),
        "gptq",
        "gptq",
    ),
    "Mistral-7B-Instruct-v0.2-GPTQ": (gptq(damp_percent=0.1, desc_act=True), "gptq", "gptq shuffled"),
    "QwQ-32B-GPTQ of GPTQModel": (
        gptq(static_groups=False, lm_head=False, checkpoint_format="gptq_v2", pack_dtype="int32", meta={"mse": 0.0}),
        "gptq",
        "gptq v2",
    ),
    "Llama-3.2-1B-Instruct-bnb-4bit": (bitsandbytes(), "bitsandbytes nf4", "bitsandbytes nf4"),
    "an OPT of the first bitsandbytes": (
        bitsandbytes(bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=False, bnb_4bit_compute_dtype="float32"),
        "bitsandbytes fp4",
        "bitsandbytes fp4",
    ),
    "a Llama in LLM.int8": (
        bitsandbytes(load_in_4bit=False, load_in_8bit=True, bnb_4bit_quant_type="fp4"),
        "bitsandbytes int8",
        "bitsandbytes int8",
    ),
}
#: The model -> its quantization, and what the refusal says.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "Llama-3.1-8B-Instruct-FP4 of NVIDIA": (
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"], "producer": {"name": "modelopt"}},
        "quantized by modelopt, which we do not read",
    ),
    "Llama-3.1-8B-Instruct-FP8 of AMD": ({"quant_method": "quark", "export": {}}, "quantized by quark"),
    "Qwen3-8B of AutoRound": (
        {"quant_method": "auto-round", "bits": 4, "packing_format": "auto_round:auto_gptq"},
        "quantized by auto-round",
    ),
    "a model of HQQ": ({"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4}}}, "by hqq"),
    "a model of torchao": ({"quant_method": "torchao", "quant_type": "int4_weight_only"}, "by torchao"),
    "an MLX model": ({"group_size": 64, "bits": 4}, "an unknown way"),
    "a model of two formats": (
        compressed("mixed-precision", num_bits=4, type="int"),
        "format is 'mixed-precision'; peerd reads float-quantized, int-quantized",
    ),
    "Llama-3.1-8B-2of4-W4A16": (compressed("marlin-24", num_bits=4, type="int"), "format is 'marlin-24'"),
    "a model that was rotated": (
        compressed("pack-quantized", **WITH_ZEROS) | {"transform_config": {"config_groups": {"R1": {}}}},
        "rotated by a transform_config",
    ),
    "an AWQ of another order": (awq(version="gemv"), "version is 'gemv'; peerd reads gemm"),
    "a GPTQ of three bits": (gptq(bits=3), "bits is 3; peerd reads 2, 4, 8"),
    "an nf4 of FSDP's": (bitsandbytes(bnb_4bit_quant_storage="bfloat16"), "quant_storage is 'bfloat16'"),
}


@pytest.fixture(scope="module")
def in_blocks_of_128() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(published_formats, "FP8_BLOCK", (128, 128))
        yield


def opened(source: Path, folder: Path, quantization: dict[str, Any], write: Any = None) -> Any:
    """A checkpoint whose block 5 has queries in this format, and the queries that it stands for."""
    folder.mkdir()
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    tensors, name = load_file(source / "model.safetensors"), "model.layers.5.self_attn.q_proj.weight"
    pieces, plain = write(name, tensors.pop(name)) if write else ({}, None)
    save_file({key: each.contiguous() for key, each in {**tensors, **pieces}.items()}, folder / "model.safetensors")
    return open_checkpoint(folder), plain


@pytest.mark.usefixtures("in_blocks_of_128")
@pytest.mark.parametrize("model", READ)
def test_a_published_quantization_is_read(tiny_checkpoint: TinyCheckpoint, tmp_path: Path, model: str) -> None:
    quantization, name, written = READ[model]
    checkpoint, plain = opened(tiny_checkpoint("llama"), tmp_path / "model", quantization, FORMATS[written][0])
    with checkpoint:
        assert checkpoint.packing == name
        ((_, got),) = checkpoint.read(["layers.5.self_attn.q_proj.weight"])
        torch.testing.assert_close(got, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("model", REFUSED)
def test_another_is_refused_when_it_is_opened(tiny_checkpoint: TinyCheckpoint, tmp_path: Path, model: str) -> None:
    quantization, reason = REFUSED[model]
    with pytest.raises(UnsupportedModelError, match=reason):
        opened(tiny_checkpoint("llama"), tmp_path / "model", quantization)


@pytest.mark.parametrize("left_plain", [["model.layers.*.self_attn", "model.embed_tokens", "lm_head"], None])
def test_the_experts_of_gpt_oss_are_read(left_plain: list[str] | None) -> None:
    """As published, and as copies of it have it. `test_packed.py` reads their numbers."""
    packing = packing_of({"quant_method": "mxfp4", "modules_to_not_convert": left_plain}, FAMILIES["gpt_oss"], "here")
    assert packing is not None
    assert packing.name == "mxfp4"
