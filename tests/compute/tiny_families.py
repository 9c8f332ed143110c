"""For every family of the table the configuration of a tiny model, which sets what differs from the common one.

Each has 8 blocks, so that cuts at 3 and 7 meet blocks of each type; windows and chunks are shorter than the tests'
sequences; widths of heads differ from hidden size / heads if a family allows it; no scaling factor is 1.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from peerd.compute.errors import UnsupportedModelError
from peerd.compute.families.family import Family
from peerd.compute.transformers_compat import before_newest_tested

BLOCKS = 8
WINDOW = 16

#: Given to each family whose configuration has such a field.
_COMMON: dict[str, Any] = {
    "num_hidden_layers": BLOCKS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "sliding_window": WINDOW,
    "attention_chunk_size": WINDOW,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "shared_expert_intermediate_size": 24,
    "norm_topk_prob": True,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.3,
    "attention_multiplier": 0.2,
    "logits_scaling": 4.0,
}
_MIXED = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"] * 2
_BY_TYPE = {
    "full_attention": {"rope_type": "default", "rope_theta": 500.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
}
_LATENT = {
    "num_key_value_heads": 4,
    "head_dim": 8,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}
_AXIAL = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "mrope_section": [2, 3, 3]}}
_NARROW = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "mrope_section": [2, 1, 1]}}
# Cuts at 3 and 7 leave spans with both kinds of blocks, and one of a single block without attention.
_CONVOLVED = ["conv", "conv", "full_attention", "conv"] * 2
_DELTA_NET = {
    "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"] * 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_conv_kernel_dim": 4,
}
_STATE_SPACE = {
    "mamba_n_heads": 4,
    "mamba_n_groups": 2,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
}
_KIMI_DELTA = {
    "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"] * 2,
    "linear_num_heads": 4,
    "linear_head_dim": 8,
}
_FEW_DENSE = {"mlp_layer_types": ["dense", "dense"] + ["sparse"] * 6}

#: What a family has beside the common fields; None takes a common one away. Those not here have nothing.
_OWN: dict[str, dict[str, Any]] = {
    "afmoe": {"mup_enabled": True, "num_dense_layers": 2, "layer_types": _MIXED},
    "aria_text": {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
    "axk1": {**_LATENT, "first_k_dense_replace": 1, "mlp_layer_types": ["dense"] + ["sparse"] * 7},
    "bailing_hybrid": {**_LATENT, **_KIMI_DELTA, **_FEW_DENSE},
    "bamba": {**_STATE_SPACE, "attn_layer_indices": [2, 6]},
    "beam": {"rope_parameters": None},
    "biogpt": {"head_dim": None},
    "codegen": {"rotary_dim": 4, "n_ctx": 64},
    "cohere": {"use_qk_norm": True, "logit_scale": 0.3},
    "cohere2": {"logit_scale": 0.3},
    "cohere_compass_text": {"layer_types": _MIXED, "rope_parameters": _BY_TYPE, "logit_scale": 0.3},
    "dbrx": {
        "d_model": 32,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 3.0, "rope_theta": 500.0},
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {**_LATENT, "first_k_dense_replace": 1},
    "deepseek_v3": {**_LATENT, "first_k_dense_replace": 1},
    "dots1": {"first_k_dense_replace": 1, "layer_types": _MIXED},
    "ernie4_5_moe": {"moe_k": 2, "moe_num_experts": 4, "moe_layer_start_index": 1, "moe_layer_interval": 2},
    "falcon": {"multi_query": True, "parallel_attn": True, "bias": True},
    "falcon_h1": {
        **_STATE_SPACE,
        "mamba_d_ssm": 48,
        "lm_head_multiplier": 0.7,
        "embedding_multiplier": 3.0,
        "mlp_multipliers": [0.8, 1.2],
        "key_multiplier": 1.5,
        "attention_out_multiplier": 0.9,
        "attention_in_multiplier": 1.1,
        "ssm_multipliers": [0.9, 1.1, 0.8, 1.2, 0.7],
        "ssm_in_multiplier": 1.3,
        "ssm_out_multiplier": 0.6,
    },
    "falcon_mamba": {"state_size": 4, "time_step_rank": 8},
    "gemma2": {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 12},
    "gemma3_text": {"query_pre_attn_scalar": 12, "layer_types": _MIXED, "rope_parameters": _BY_TYPE},
    "glm4_moe": {"first_k_dense_replace": 1, "use_qk_norm": True},
    "glm4v_text": _NARROW,
    # Only half of each head is turned.
    "glm4v_moe_text": {
        "first_k_dense_replace": 1,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 500.0,
            "partial_rotary_factor": 0.5,
            "mrope_section": [1, 1, 0],
        },
    },
    "glm4_moe_lite": {**_LATENT, **_FEW_DENSE, "rope_parameters": None},
    "gpt2": {"scale_attn_by_inverse_layer_idx": True},
    "gpt_neo": {"attention_types": [[["global", "local"], 4]], "window_size": WINDOW},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {
        **_STATE_SPACE,
        "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"] * 2,
        "shared_intermediate_size": 24,
    },
    # Rotary embeddings of two bases, and blocks without any.
    "granite_swa": {"layer_rope_theta": [500.0, 0, 50.0, 50.0] * 2},
    "granitemoe_swa": {"layer_rope_theta": [500.0, 0, 50.0, 50.0] * 2},
    "helium": {"head_dim": 8},
    "jamba": {
        "attn_layer_period": 4,
        "attn_layer_offset": 2,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 8,
    },
    "kimi_linear": {**_LATENT, **_KIMI_DELTA, **_FEW_DENSE},
    "laguna": {"layer_types": _MIXED, "num_attention_heads_per_layer": [4, 8] * 4, "rope_parameters": _BY_TYPE},
    "lfm2": {"layer_types": _CONVOLVED, "conv_L_cache": 3, "conv_bias": True, "block_multiple_of": 8},
    "lfm2_moe": {"layer_types": _CONVOLVED, "conv_L_cache": 3, "num_dense_layers": 2},
    "lfm3": {
        "layer_types": ["conv", "sliding_attention", "full_attention", "conv"] * 2,
        "conv_L_cache": 3,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
            "full_attention": {"rope_type": "proportional", "rope_theta": 500.0, "partial_rotary_factor": 0.5},
        },
    },
    "llama4_text": {
        "attn_temperature_tuning": True,
        "floor_scale": 4,
        "attn_scale": 0.5,
        "interleave_moe_layer_step": 2,
        "intermediate_size_mlp": 40,
    },
    "mamba": {"state_size": 4, "time_step_rank": 8},
    "mamba2": {"num_heads": 4, "n_groups": 2, "state_size": 8, "chunk_size": 8},
    "mellum": {"layer_types": _MIXED, "rope_parameters": _BY_TYPE},
    "mimo_v2_flash": {"layer_types": _MIXED, "v_head_dim": 12, "rope_parameters": None},
    "minicpm3": _LATENT,
    "mistral4": {
        **_LATENT,
        "first_k_dense_replace": 1,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 500.0,
            "factor": 4.0,
            "original_max_position_embeddings": 8,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.5,
        },
    },
    # Its queries grow after so few positions that the tests get there.
    "ministral3": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 500.0,
            "factor": 4.0,
            "original_max_position_embeddings": 8,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.5,
        }
    },
    "ministral": {"layer_types": _MIXED},
    # Feed-forwards and experts are blocks of their own; the last span is one.
    "nemotron_h": {
        "layers_block_type": [
            *("linear_attention", "moe", "full_attention", "linear_attention"),
            *("mlp", "linear_attention", "full_attention", "mlp"),
        ],
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "n_groups": 2,
        "ssm_state_size": 8,
        "chunk_size": 8,
        "moe_shared_expert_intermediate_size": 24,
        "moe_latent_size": 16,
        # Transformers keeps steps above this in a prompt, and not in a decode.
        "time_step_min": 1e-9,
    },
    "olmo3": {"layer_types": _MIXED},
    "olmo_hybrid": _DELTA_NET,
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 24},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 4},
    "qwen2_moe": {"use_sliding_window": True, "max_window_layers": 4, "mlp_only_layers": [1, 5]},
    "qwen2_vl_text": {"use_sliding_window": True, "max_window_layers": 4, **_NARROW},
    "qwen2_5_vl_text": {"use_sliding_window": True, "max_window_layers": 4, **_NARROW},
    "qwen2_5_omni_text": {"use_sliding_window": True, "max_window_layers": 4, **_NARROW},
    "qwen3_omni_moe_text": {**_AXIAL, "mlp_only_layers": [1, 5]},
    "qwen3_vl_text": _AXIAL,
    "qwen3_vl_moe_text": {**_AXIAL, "mlp_only_layers": [1, 5]},
    "sarvam_mla": {**_LATENT, "first_k_dense_replace": 1},
    "qwen3_next": {**_DELTA_NET, "partial_rotary_factor": 0.5, "mlp_only_layers": [1, 5], "decoder_sparse_step": 1},
    "qwen3_5_text": {**_DELTA_NET, **_AXIAL},
    "qwen3_5_moe_text": {**_DELTA_NET, **_AXIAL},
    "qwen3": {"use_sliding_window": True, "max_window_layers": 5},
    "qwen3_moe": {"mlp_only_layers": [1, 5]},
    "smollm3": {"use_sliding_window": True, "no_rope_layer_interval": 3, "layer_types": _MIXED},
    "solar_open": {"rope_parameters": None},
    "stablelm": {"use_qkv_bias": True},
    "xglm": {"ffn_dim": 48},
    "youtu": _LATENT,
}
#: More of a family's variants, each as good as a family to the tests: name -> family and fields.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom of 6 heads": ("bloom", {"hidden_size": 48, "num_attention_heads": 6}),
    "falcon of many queries": ("falcon", {"multi_query": False, "parallel_attn": False}),
    "falcon with alibi": ("falcon", {"alibi": True, "multi_query": True, "num_attention_heads": 4}),
    "falcon of the new architecture": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon with alibi of 6 heads": ("falcon", {"alibi": True, "hidden_size": 48, "num_attention_heads": 6}),
    "granite_swa with dynamic ropes": (
        "granite_swa",
        {
            "max_position_embeddings": 32,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 4.0},
            "layer_rope_theta": [500.0, 0, 50.0, 50.0] * 2,
        },
    ),
    "granitemoehybrid without states": (
        "granitemoehybrid",
        {
            **_OWN["granitemoehybrid"],
            "layer_types": ["full_attention"] * BLOCKS,
            "position_embedding_type": "rope",
        },
    ),
    "mpt of 6 heads": ("mpt", {"d_model": 48, "n_heads": 6, "attn_config": {"clip_qkv": 1.0, "softmax_scale": 0.4}}),
    "gpt_bigcode without shared keys": ("gpt_bigcode", {"multi_query": False}),
    "gpt_neox with a sequential residual": ("gpt_neox", {"use_parallel_residual": False}),
    "opt without projections": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "deepseek_v3 without compressed queries": ("deepseek_v3", {**_OWN["deepseek_v3"], "q_lora_rank": None}),
}


def or_skip(find: Callable[[], Any]) -> Any:
    """What `find` finds in Transformers. The test is skipped where an older release does not have the family yet.

    The newest release that peerd was tested with must have them all: there, one that is missing is a failure.
    """
    try:
        return find()
    except UnsupportedModelError as error:
        if before_newest_tested():
            pytest.skip(str(error))
        raise


def tiny_config(family: Family, fields: dict[str, Any] | None = None) -> Any:
    """A tiny model's configuration: of the family's own fields, or of others."""
    kind: Any = or_skip(family.config_type)
    own = _OWN.get(family.model_type, {}) if fields is None else fields
    known = set(kind.__dataclass_fields__) | set(kind.attribute_map)
    common = {name: value for name, value in _COMMON.items() if name in known}
    # Some configurations write into the dictionaries that they are given, which all families share here.
    return kind(**copy.deepcopy(common | own))


def tiny_model(family: Family, fields: dict[str, Any] | None = None) -> Any:
    """The whole causal model of such a configuration, with random weights, in fp32."""
    # Transformers' own choice (sdpa) supports neither capped scores nor sinks; its eager Falcon adds ALiBi twice.
    attention = None if family.model_type == "falcon" else "eager"
    torch.manual_seed(7)
    model = or_skip(family.causal_type)._from_config(tiny_config(family, fields), attn_implementation=attention).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Large enough that every part matters: the default 0.02 makes all logits nearly equal.
            parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.ndim > 1 else 0.1))
    return model
