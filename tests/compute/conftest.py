"""Tiny models of every supported architecture, with random weights, in the form in which Transformers saves them.

Each has 8 blocks, so that cuts at 3 and at 7 meet blocks of each type; windows are shorter than the tests' sequences;
widths of heads differ from hidden size / heads; no scaling factor is 1.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

TinyCheckpoint = Callable[[str], Path]

BLOCKS = 8
WINDOW = 16

_COMMON: dict[str, Any] = {
    "num_hidden_layers": BLOCKS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MIXED = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"] * 2
_LONG_FACTORS = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 5.0, 8.0]}

#: Name -> (Transformers' folder, class prefix, what its configuration has beside the common fields).
_TINY: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "Llama", {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    "llama_tied": ("llama", "Llama", {"tie_word_embeddings": True}),
    "llama_dynamic": (
        "llama",
        "Llama",
        {
            "max_position_embeddings": 32,
            "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 500.0},
        },
    ),
    "mistral": ("mistral", "Mistral", {"head_dim": 16, "sliding_window": WINDOW}),
    "mixtral": ("mixtral", "Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW}),
    "qwen2": ("qwen2", "Qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 4}),
    "qwen3": (
        "qwen3",
        "Qwen3",
        {"head_dim": 16, "sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 5},
    ),
    "qwen3_moe": (
        "qwen3_moe",
        "Qwen3Moe",
        {
            "head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
            "mlp_only_layers": [1, 5],
        },
    ),
    "gemma2": (
        "gemma2",
        "Gemma2",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 12,
            "sliding_window": WINDOW,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3_text": (
        "gemma3",
        "Gemma3",
        {"head_dim": 16, "query_pre_attn_scalar": 12, "sliding_window": WINDOW, "layer_types": _MIXED},
    ),
    "gpt_oss": (
        "gpt_oss",
        "GptOss",
        {
            "head_dim": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": WINDOW,
        },
    ),
    "smollm3": (
        "smollm3",
        "SmolLM3",
        {"use_sliding_window": True, "sliding_window": WINDOW, "no_rope_layer_interval": 3},
    ),
    "phi3": ("phi3", "Phi3", {"sliding_window": WINDOW}),
    "phi3_longrope": (
        "phi3",
        "Phi3",
        {
            "max_position_embeddings": 128,
            "original_max_position_embeddings": 32,
            "rope_parameters": {"rope_type": "longrope", "rope_theta": 500.0, **_LONG_FACTORS},
        },
    ),
    "olmo2": ("olmo2", "Olmo2", {}),
    "granite": (
        "granite",
        "Granite",
        {
            "embedding_multiplier": 12.0,
            "logits_scaling": 8.0,
            "residual_multiplier": 0.3,
            "attention_multiplier": 0.2,
        },
    ),
    "stablelm": ("stablelm", "StableLm", {"use_qkv_bias": True}),
    "starcoder2": ("starcoder2", "Starcoder2", {"sliding_window": WINDOW}),
    "cohere2": ("cohere2", "Cohere2", {"sliding_window": WINDOW, "logit_scale": 0.3}),
    # Bloom shares no key heads: it would ignore the common number, and layer_kinds would not.
    "bloom": ("bloom", "Bloom", {"num_key_value_heads": 4, "max_position_embeddings": None}),
}


@pytest.fixture(autouse=True)
def _own_cache_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Digests are cached in the user's cache folder: tests have a folder of their own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session", params=sorted(_TINY))
def tiny_name(request: pytest.FixtureRequest) -> str:
    """The name of each tiny model in turn, for `tiny_checkpoint`."""
    name: str = request.param
    return name


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoint:
    """Call it with a name (`llama`, `phi3_longrope`, ...) for that tiny model's directory, fp32. Don't change it."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            folder, prefix, more = _TINY[name]
            made[name] = tmp_path_factory.mktemp(name)
            _random_model(folder, prefix, more).save_pretrained(made[name])
        return made[name]

    return make


def _random_model(folder: str, prefix: str, more: dict[str, Any]) -> Any:
    from transformers.utils import logging

    logging.disable_progress_bar()
    package = f"transformers.models.{folder}"
    configuration = importlib.import_module(f"{package}.configuration_{folder}")
    config_name = "Gemma3TextConfig" if prefix == "Gemma3" else f"{prefix}Config"
    config = getattr(configuration, config_name)(**{**_COMMON, **more})
    modeling = importlib.import_module(f"{package}.modeling_{folder}")
    torch.manual_seed(7)
    model = getattr(modeling, f"{prefix}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Large enough that every part matters: the default 0.02 makes all logits nearly equal.
            spread = 0.2 if parameter.ndim > 1 else 0.1
            parameter.add_(torch.randn_like(parameter) * spread)
    return model
