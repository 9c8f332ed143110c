"""Tensor processors that undo what llama.cpp's converter did, for architectures that Transformers has none for.

They are called like Transformers' own: with one stored tensor at a time, in any order, and parts of one parameter are
collected in `parsed_parameters`. Transformers' GPT-OSS processor expects names that no published file has, and it has
no processor for Falcon's grouped heads or for experts in a llama file.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch

from peerd.compute.transformers_compat import gguf_reader

_reader = gguf_reader()
TensorProcessor: Any = _reader.TensorProcessor
_GPT_OSS_EXPERTS = re.compile(r"blk\.\d+\.ffn_(gate|up|down)_exps\.(weight|bias)")


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
        gathered, names = kwargs["parsed_parameters"]["tensors"], kwargs["tensor_key_mapping"]
        parameter = names[name if name in names else name.removesuffix(".weight")]
        if match[1] == "down":
            gathered[parameter] = values.contiguous()
        else:
            shape = (*values.shape[:-1], 2 * values.shape[-1])
            whole = gathered.setdefault(parameter, torch.empty(shape))
            whole[..., 0 if match[1] == "gate" else 1 :: 2] = values
        # The name is None because the tensor was already collected above.
        return _reader.GGUFTensor(weights, None, {})
