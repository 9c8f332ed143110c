"""What llama.cpp's converter writes in its own way for single architectures: metadata, and tensors taken apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float32]
Stored: TypeAlias = Iterator[tuple[str, Array]]


def own_metadata(architecture: str, config: Any) -> dict[str, Any]:
    """The metadata that this architecture has beside, or instead of, the common ones."""
    rule = _METADATA.get(architecture)
    return {} if rule is None else rule(config)


def _deepseek2(config: Any) -> dict[str, Any]:
    """To llama.cpp the model has one head of latents, whose widths stand where others have those of a head."""
    scale = config.rope_parameters.get("mscale_all_dim")
    return {
        **_routed(config),
        "attention.head_count_kv": 1,
        "attention.q_lora_rank": config.q_lora_rank,
        "attention.kv_lora_rank": config.kv_lora_rank,
        "attention.key_length": config.kv_lora_rank + config.qk_rope_head_dim,
        "attention.value_length": config.kv_lora_rank,
        "attention.key_length_mla": config.qk_nope_head_dim + config.qk_rope_head_dim,
        "attention.value_length_mla": config.v_head_dim,
        "expert_gating_func": 2 if config.model_type == "deepseek_v3" else 1,
        "rope.scaling.yarn_log_multiplier": None if scale is None else 0.1 * scale,
    }


def _glm4moe(config: Any) -> dict[str, Any]:
    return {**_routed(config), "expert_gating_func": 2}


def _routed(config: Any) -> dict[str, Any]:
    return {
        "leading_dense_block_count": config.first_k_dense_replace,
        "expert_shared_count": config.n_shared_experts,
        "expert_weights_scale": float(config.routed_scaling_factor),
        "expert_weights_norm": bool(config.norm_topk_prob),
        "expert_group_count": config.n_group,
        "expert_group_used_count": config.topk_group,
    }


def _llama4(config: Any) -> dict[str, Any]:
    return {
        "feed_forward_length": config.intermediate_size_mlp,
        "expert_feed_forward_length": config.intermediate_size,
        "interleave_moe_layer_step": config.interleave_moe_layer_step,
    }


def _mistral3(config: Any) -> dict[str, Any]:
    rope = config.rope_parameters
    return {
        "rope.scaling.yarn_log_multiplier": rope.get("mscale_all_dim"),
        "attention.temperature_scale": rope.get("llama_4_scaling_beta"),
    }


def _lfm2(config: Any) -> dict[str, Any]:
    """The feed-forward's width is that of its matrices, which an LFM2 computes from the one that it states."""
    width = config.intermediate_size
    if getattr(config, "block_auto_adjust_ff_dim", False):
        step, width = config.block_multiple_of, int(config.block_ffn_dim_multiplier * int(2 * width / 3))
        width = -(-width // step) * step
    heads = [config.num_key_value_heads if kind != "conv" else 0 for kind in config.layer_types]
    return {
        "feed_forward_length": width,
        "attention.head_count_kv": heads,
        "attention.layer_norm_epsilon": None,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "shortconv.l_cache": config.conv_L_cache,
        "leading_dense_block_count": getattr(config, "num_dense_layers", None),
    }


def _cohere(config: Any) -> dict[str, Any]:
    window = getattr(config, "sliding_window", None)
    return {"logit_scale": config.logit_scale, "rope.scaling.type": "none", "attention.sliding_window": window}


def _windowed(config: Any) -> dict[str, Any]:
    window = getattr(config, "sliding_window", None)
    if window is None:
        return {}
    pattern = [kind == "sliding_attention" for kind in config.layer_types]
    return {"attention.sliding_window": window, "attention.sliding_window_pattern": pattern}


_METADATA: Mapping[str, Callable[[Any], dict[str, Any]]] = {
    "cohere2": _cohere,
    "command-r": _cohere,
    "deepseek2": _deepseek2,
    "exaone4": _windowed,
    "glm4moe": _glm4moe,
    "lfm2": _lfm2,
    "lfm2moe": _lfm2,
    "llama4": _llama4,
    "mistral3": _mistral3,
    "olmo2": _windowed,
}


def experts_apart(name: str, values: Array, architecture: str) -> Stored:
    """Gate and up of all experts apart, each matrix as a linear layer has it."""
    block, leaf = name.split(".")[2], name.rpartition(".")[2]
    kind = "bias" if leaf.endswith("_bias") else "weight"
    if architecture in ("gpt-oss", "llama4") and kind == "weight":
        values = values.swapaxes(-1, -2)
    if leaf.startswith("down_proj"):
        yield f"blk.{block}.ffn_down_exps.{kind}", values
        return
    gate, up = (values[:, ::2], values[:, 1::2]) if architecture == "gpt-oss" else np.split(values, 2, axis=1)
    yield f"blk.{block}.ffn_gate_exps.{kind}", gate
    yield f"blk.{block}.ffn_up_exps.{kind}", up


def latents_apart(name: str, values: Array, config: Any) -> Stored:
    """The matrix that makes keys and values of latents: one matrix a head, and the keys' transposed."""
    block = name.split(".")[2]
    by_head = values.reshape(config.num_attention_heads, -1, config.kv_lora_rank)
    keys, value_rows = np.split(by_head, [config.qk_nope_head_dim], axis=1)
    yield f"blk.{block}.attn_k_b.weight", keys.swapaxes(1, 2)
    yield f"blk.{block}.attn_v_b.weight", value_rows
