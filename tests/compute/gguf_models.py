"""Tiny models of each architecture that GGUF files are read of."""

from __future__ import annotations

import copy
from typing import Any

BLOCKS = 8
_COMMON: dict[str, Any] = {
    "num_hidden_layers": BLOCKS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16}
_YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16}
_MIXED = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"] * 2
_CONVOLVED = ["conv", "conv", "full_attention", "conv"] * 2
_ROUTED = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 2,
}
_LATENT = {
    **_ROUTED,
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}

#: Name of a tiny model -> GGUF's architecture, the family, and what its configuration has beside the common fields.
TINY: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bloom": ("bloom", "bloom", {}),
    "falcon": ("falcon", "falcon", {}),
    "falcon_grouped": ("falcon", "falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon_11b": (
        "falcon",
        "falcon",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1, "ffn_hidden_size": 80},
    ),
    "cohere": ("command-r", "cohere", {"use_qk_norm": True, "logit_scale": 0.3}),
    "cohere2": ("cohere2", "cohere2", {"sliding_window": 16, "logit_scale": 0.3}),
    "deepseek_v2": ("deepseek2", "deepseek_v2", {**_LATENT, "q_lora_rank": 24, "routed_scaling_factor": 3.0}),
    "deepseek_v2_grouped": (
        "deepseek2",
        "deepseek_v2",
        {**_LATENT, "q_lora_rank": None, "n_group": 2, "topk_group": 1, "topk_method": "group_limited_greedy"},
    ),
    "deepseek_v3": (
        "deepseek2",
        "deepseek_v3",
        {
            **_LATENT,
            "q_lora_rank": 24,
            "n_group": 2,
            "topk_group": 1,
            "routed_scaling_factor": 2.5,
            "rope_parameters": {**_YARN, "mscale": 0.7, "mscale_all_dim": 0.7},
        },
    ),
    "exaone4": ("exaone4", "exaone4", {"head_dim": 16, "sliding_window": None, "layer_types": ["full_attention"] * 8}),
    "exaone4_windows": ("exaone4", "exaone4", {"head_dim": 16, "sliding_window": 16, "layer_types": _MIXED}),
    "gemma": ("gemma", "gemma", {"head_dim": 16}),
    "glm4": ("glm4", "glm4", {"head_dim": 16, "partial_rotary_factor": 0.25}),
    "glm4_moe": ("glm4moe", "glm4_moe", {**_ROUTED, "head_dim": 16, "use_qk_norm": True, "attention_bias": True}),
    "lfm2": ("lfm2", "lfm2", {"layer_types": _CONVOLVED, "conv_bias": True, "block_multiple_of": 8, "norm_eps": 1e-3}),
    "lfm2_moe": ("lfm2moe", "lfm2_moe", {**_EXPERTS, "layer_types": _CONVOLVED, "num_dense_layers": 2}),
    "llama4": (
        "llama4",
        "llama4_text",
        {**_EXPERTS, "head_dim": 16, "interleave_moe_layer_step": 2, "intermediate_size_mlp": 40, "use_qk_norm": True},
    ),
    # Llama 4 Scout scales by steps: its two factors are equal.
    "llama4_scout": (
        "llama4",
        "llama4_text",
        {
            **_EXPERTS,
            "head_dim": 16,
            "intermediate_size_mlp": 40,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 16.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
            },
        },
    ),
    "mistral3": ("mistral3", "mistral", {"head_dim": 16, "sliding_window": None}),
    "ministral3": (
        "mistral3",
        "ministral3",
        {
            "head_dim": 16,
            "rope_parameters": {**_YARN, "mscale": 1.0, "mscale_all_dim": 0.8, "llama_4_scaling_beta": 0.5},
        },
    ),
    "olmo2": ("olmo2", "olmo2", {}),
    "olmo3": (
        "olmo2",
        "olmo3",
        {
            "sliding_window": 16,
            "layer_types": _MIXED,
            "rope_parameters": {
                "full_attention": {**_YARN, "attention_factor": 1.2},
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            },
        },
    ),
    "granite": (
        "granite",
        "granite",
        {
            "attention_multiplier": 0.2,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.3,
            "logits_scaling": 4.0,
        },
    ),
    "smollm3": ("smollm3", "smollm3", {}),
    "gemma2": (
        "gemma2",
        "gemma2",
        {**_GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "rope_parameters": None},
    ),
    "gemma3": ("gemma3", "gemma3_text", {**_GEMMA, "rope_parameters": None}),
    "gemma3_linear": (
        "gemma3",
        "gemma3_text",
        {
            **_GEMMA,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
            },
        },
    ),
    "gpt2": ("gpt2", "gpt2", {"n_inner": 80}),
    "gpt_oss": (
        "gpt-oss",
        "gpt_oss",
        {
            **_EXPERTS,
            "head_dim": 16,
            "sliding_window": 16,
            "rope_parameters": {**_YARN, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False},
        },
    ),
    "llama": ("llama", "llama", {"head_dim": 16}),
    "llama_biased": ("llama", "llama", {"attention_bias": True, "tie_word_embeddings": True}),
    "minimax_m2": ("minimax-m2", "minimax_m2", {**_EXPERTS, "head_dim": 16, "rotary_dim": 8, "rope_parameters": None}),
    "mixtral": ("llama", "mixtral", {**_EXPERTS, "head_dim": 16}),
    "nemotron": ("nemotron", "nemotron", {"head_dim": 16, "partial_rotary_factor": 0.25, "norm_eps": 1e-3}),
    "phi3": ("phi3", "phi3", {"sliding_window": 16}),
    "qwen2": ("qwen2", "qwen2", {}),
    "qwen2_moe": ("qwen2moe", "qwen2_moe", {**_EXPERTS, "shared_expert_intermediate_size": 40}),
    "qwen2_yarn": ("qwen2", "qwen2", {"rope_parameters": _YARN}),
    "qwen3": ("qwen3", "qwen3", {"head_dim": 16}),
    "qwen3_moe": ("qwen3moe", "qwen3_moe", {**_EXPERTS, "head_dim": 16, "norm_topk_prob": True}),
    "stablelm": ("stablelm", "stablelm", {"use_qkv_bias": True, "partial_rotary_factor": 0.5}),
    "stablelm_parallel": ("stablelm", "stablelm", {"use_parallel_residual": True}),
    "starcoder2": ("starcoder2", "starcoder2", {}),
}


def tiny_config(name: str) -> Any:
    """The configuration of a tiny model."""
    from peerd.compute.families.lookup import family_named

    _, model_type, more = TINY[name]
    kind: Any = family_named(model_type).config_type()
    known = set(kind.__dataclass_fields__) | set(kind.attribute_map)
    # A configuration writes into the dictionaries that it is given.
    fields = copy.deepcopy({**{key: value for key, value in _COMMON.items() if key in known}, **more})
    # None takes a common field away; of others it is the value.
    return kind(**{key: value for key, value in fields.items() if value is not None or key not in _COMMON})


def tiny_model(config: Any) -> Any:
    """A model of random weights, large enough that every part matters."""
    import torch

    from peerd.compute.families.lookup import family_named

    torch.manual_seed(7)
    causal: Any = family_named(config.model_type).causal_type()
    model = causal(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.ndim > 1 else 0.1))
    return model
