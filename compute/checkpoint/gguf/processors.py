"""Tensor processors that undo what llama.cpp's converter did, for architectures that Transformers has none for.

They are called like Transformers' own: with one stored tensor at a time, in any order, and parts of one parameter are
collected in `parsed_parameters`. Transformers' GPT-OSS processor expects names that no published file has, and it has
no processor for Falcon's grouped heads, for experts in a llama file, or for DeepSeek's latents.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from peerd.compute.transformers_compat import gguf_reader

_reader = gguf_reader()
TensorProcessor: Any = _reader.TensorProcessor
_CORRECTION = re.compile(r"model\.layers\.(\d+)\.mlp\.gate\.e_score_correction_bias")
_EXPERTS = re.compile(r"model\.layers\.(\d+)\.feed_forward\.experts\.(gate_up_proj|down_proj)")
_GPT_OSS_EXPERTS = re.compile(r"blk\.\d+\.ffn_(gate|up|down)_exps\.(weight|bias)")


def _gathered(name: str, arguments: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], str]:
    """Where the parts of parameters are collected, and the parameter that the stored tensor `name` is a part of.

    Parameters without a layer, such as fused experts, are named without the stored name's ending.
    """
    names = arguments["tensor_key_mapping"]
    return arguments["parsed_parameters"]["tensors"], names[name if name in names else name.removesuffix(".weight")]


class MixtralProcessor(TensorProcessor):  # type: ignore[misc]  # looked up as it runs
    """Reads queries and keys like llama, and experts like Qwen."""

    def __init__(self, config: Any = None) -> None:
        super().__init__(config=config)
        self._llama = _reader.LlamaTensorProcessor(config=config)
        self._experts = _reader.Qwen2MoeTensorProcessor(config=config)

    def perform_fallback_tensor_mapping(self, *arguments: Any) -> None:
        self._experts.perform_fallback_tensor_mapping(*arguments)

    def process(self, weights: Any, name: str, **kwargs: Any) -> Any:
        owner = self._experts if "_exps." in name else self._llama
        return owner.process(weights, name, **kwargs)


class FalconProcessor(TensorProcessor):  # type: ignore[misc]
    """Puts each group's queries, keys and values together again: GGUF stores all queries, then all keys, then all
    values.
    """

    def process(self, weights: Any, name: str, **kwargs: Any) -> Any:
        if ".attn_qkv." in name:
            heads, groups = self.config["num_attention_heads"], self.config["num_kv_heads"]
            width = weights.shape[0] // (heads + 2 * groups)
            query, key, value = np.split(weights, (heads * width, (heads + groups) * width))
            parts = [part.reshape(groups, -1, *weights.shape[1:]) for part in (query, key, value)]
            weights = np.concatenate(parts, axis=1).reshape(weights.shape)
        return _reader.GGUFTensor(weights, name, {})


class GptOssProcessor(TensorProcessor):  # type: ignore[misc]
    """Interleaves the experts' gate and up matrices into one, and transposes the experts' matrices."""

    def perform_fallback_tensor_mapping(self, names: Any, suffix: str, qual_name: str, hf_name: str) -> None:
        block = hf_name.removeprefix("model.layers.").partition(".")[0]
        stored = {
            "gate_up_proj": ("ffn_gate_exps.weight", "ffn_up_exps.weight"),
            "gate_up_proj_bias": ("ffn_gate_exps.bias", "ffn_up_exps.bias"),
            "down_proj": ("ffn_down_exps.weight",),
            "down_proj_bias": ("ffn_down_exps.bias",),
        }
        if ".experts." in hf_name:
            for leaf in stored.get(hf_name.rpartition(".")[2], ()):
                names[f"blk.{block}.{leaf}"] = qual_name + hf_name

    def process(self, weights: Any, name: str, **kwargs: Any) -> Any:
        match = _GPT_OSS_EXPERTS.fullmatch(name)
        if match is None:
            return _reader.GGUFTensor(weights, name, {})
        values = torch.from_numpy(np.ascontiguousarray(weights))
        if match[2] == "weight":
            values = values.mT
        gathered, parameter = _gathered(name, kwargs)
        if match[1] == "down":
            gathered[parameter] = values.contiguous()
        else:
            shape = (*values.shape[:-1], 2 * values.shape[-1])
            whole = gathered.setdefault(parameter, torch.empty(shape))
            whole[..., 0 if match[1] == "gate" else 1 :: 2] = values
        # The name is None because the tensor was already collected above.
        return _reader.GGUFTensor(weights, None, {})


class ExpertsProcessor(TensorProcessor):  # type: ignore[misc]
    """Reads experts like Qwen, and the corrections with which routers choose among them."""

    def __init__(self, config: Any = None) -> None:
        super().__init__(config=config)
        self._experts = _reader.Qwen2MoeTensorProcessor(config=config)

    def perform_fallback_tensor_mapping(self, names: Any, suffix: str, qual_name: str, hf_name: str) -> None:
        if match := _CORRECTION.fullmatch(hf_name):
            names[f"blk.{match[1]}.exp_probs_b.bias"] = qual_name + hf_name
        else:
            self._experts.perform_fallback_tensor_mapping(names, suffix, qual_name, hf_name)

    def process(self, weights: Any, name: str, **kwargs: Any) -> Any:
        return self._experts.process(weights, name, **kwargs)


class DeepseekProcessor(ExpertsProcessor):
    """Joins the two halves of the matrix that makes keys and values of latents.

    llama.cpp stores them apart, one matrix a head, and the keys' transposed; older files have the whole matrix.
    """

    def adapt_names(self, names: dict[str, str], stored: Container[str]) -> dict[str, str]:
        """These names with the halves in the place of the whole matrix where the file has halves."""
        found: dict[str, str] = {}
        for name, parameter in names.items():
            halves = [name.replace(".attn_kv_b.", f".attn_{part}_b.") for part in "kv"]
            apart = halves[0] != name and any(half in stored for half in halves)
            found |= dict.fromkeys(halves if apart else [name], parameter)
        return found

    def process(self, weights: Any, name: str, **kwargs: Any) -> Any:
        half = next((part for part in "kv" if f".attn_{part}_b." in name), None)
        if half is None:
            return super().process(weights, name, **kwargs)
        keys, values = self.config["qk_nope_head_dim"], self.config["v_head_dim"]
        matrices = torch.from_numpy(np.ascontiguousarray(weights))
        matrices = matrices.mT if half == "k" else matrices
        shape = (matrices.shape[0], keys + values, matrices.shape[2])
        gathered, parameter = _gathered(name, kwargs)
        whole = gathered.setdefault(parameter, torch.empty(shape[0] * shape[1], shape[2])).view(shape)
        own = whole[:, :keys] if half == "k" else whole[:, keys:]
        if matrices.shape != own.shape:
            raise ValueError(f"{name} has {matrices.shape[1]} rows a head, not {own.shape[1]}")
        own.copy_(matrices)
        return _reader.GGUFTensor(weights, None, {})


class Lfm2MoeProcessor(TensorProcessor):  # type: ignore[misc]
    """Reads experts like Qwen, and the kernels of convolutions, which GGUF has without their axis of one."""

    def __init__(self, config: Any = None) -> None:
        super().__init__(config=config)
        self._experts = _reader.Qwen2MoeTensorProcessor(config=config)
        self._convolutions = _reader.Lfm2TensorProcessor(config=config)

    def perform_fallback_tensor_mapping(self, names: Any, suffix: str, qual_name: str, hf_name: str) -> None:
        if match := _EXPERTS.fullmatch(hf_name):
            for part in ("gate", "up") if match[2] == "gate_up_proj" else ("down",):
                names[f"blk.{match[1]}.ffn_{part}_exps"] = qual_name + hf_name

    def adapt_names(self, names: dict[str, str], stored: Container[str]) -> dict[str, str]:
        """These names, with the ending of the corrections of routers."""
        return {f"{name}.bias" if name.endswith(".exp_probs_b") else name: each for name, each in names.items()}

    def process(self, weights: Any, name: str, **kwargs: Any) -> Any:
        owner = self._experts if "_exps." in name else self._convolutions
        return owner.process(weights, name, **kwargs)


class Llama4Processor(TensorProcessor):  # type: ignore[misc]
    """Transposes the experts' matrices, and puts their gate and up matrices side by side."""

    def perform_fallback_tensor_mapping(self, names: Any, suffix: str, qual_name: str, hf_name: str) -> None:
        if match := _EXPERTS.fullmatch(hf_name):
            for part in ("gate", "up") if match[2] == "gate_up_proj" else ("down",):
                names[f"blk.{match[1]}.ffn_{part}_exps.weight"] = qual_name + hf_name

    def process(self, weights: Any, name: str, **kwargs: Any) -> Any:
        if "_exps." not in name:
            return _reader.GGUFTensor(weights, name, {})
        values = torch.from_numpy(np.ascontiguousarray(weights)).mT
        gathered, parameter = _gathered(name, kwargs)
        if ".ffn_down_exps." in name:
            gathered[parameter] = values.contiguous()
        else:
            width = values.shape[-1]
            whole = gathered.setdefault(parameter, torch.empty(*values.shape[:-1], 2 * width))
            (whole[..., :width] if ".ffn_gate_exps." in name else whole[..., width:]).copy_(values)
        return _reader.GGUFTensor(weights, None, {})


#: Our processors, by the family.
OURS: Mapping[str, Any] = MappingProxyType(
    {
        "deepseek_v2": DeepseekProcessor,
        "deepseek_v3": DeepseekProcessor,
        "falcon": FalconProcessor,
        "glm4_moe": ExpertsProcessor,
        "gpt_oss": GptOssProcessor,
        "lfm2_moe": Lfm2MoeProcessor,
        "llama4_text": Llama4Processor,
        "mixtral": MixtralProcessor,
    }
)
