"""Writes a Transformers model as llama.cpp's converter does: its metadata, its names, its order of values.

It follows the converter's rules and not our reader, so that an error in either shows as a difference from the model
that was written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from tests.compute.gguf_rules import Array, Stored, experts_apart, latents_apart, own_metadata


def metadata_of(architecture: str, config: Any) -> dict[str, Any]:
    """What the converter writes for this configuration, `None`s left out."""
    stated = getattr(config, "rope_parameters", None) or {}
    rope = stated.get("full_attention", stated)
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    fields = {
        "block_count": config.num_hidden_layers,
        "context_length": getattr(config, "max_position_embeddings", None),
        "embedding_length": config.hidden_size,
        "feed_forward_length": _first(config, "ffn_hidden_size", "intermediate_size", "n_inner"),
        "attention.head_count": heads,
        "attention.head_count_kv": _kv_heads(config),
        "attention.key_length": getattr(config, "head_dim", None),
        "attention.value_length": getattr(config, "head_dim", None),
        "attention.layer_norm_rms_epsilon": getattr(config, "rms_norm_eps", None),
        "attention.layer_norm_epsilon": _first(
            config, "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"
        ),
        "attn_logit_softcapping": getattr(config, "attn_logit_softcapping", None),
        "final_logit_softcapping": getattr(config, "final_logit_softcapping", None),
        "rope.freq_base": rope.get("rope_theta"),
        "rope.freq_base_swa": stated.get("sliding_attention", {}).get("rope_theta"),
        "attention.scale": getattr(config, "attention_multiplier", None),
        "embedding_scale": getattr(config, "embedding_multiplier", None),
        "residual_scale": getattr(config, "residual_multiplier", None),
        "logit_scale": getattr(config, "logits_scaling", None),
        "rope.dimension_count": int(width * rope.get("partial_rotary_factor", 1.0)),
        "expert_count": _first(config, "num_local_experts", "num_experts"),
        "expert_used_count": getattr(config, "num_experts_per_tok", None),
        "expert_feed_forward_length": getattr(config, "moe_intermediate_size", None),
        "expert_shared_feed_forward_length": getattr(config, "shared_expert_intermediate_size", None),
        "vocab_size": config.vocab_size,
        "tokenizer.ggml.padding_token_id": config.pad_token_id,
        "tokenizer.ggml.eos_token_id": config.eos_token_id,
        **_rope_scaling(rope),
    }
    if architecture in ("gemma2", "gemma3", "gpt-oss", "phi3"):
        fields["attention.sliding_window"] = config.sliding_window
    if architecture in ("gpt-oss", "minimax-m2"):
        fields["expert_feed_forward_length"] = config.intermediate_size
    if architecture == "minimax-m2":
        fields["expert_gating_func"] = 2
    if architecture == "phi3" and rope.get("rope_type") == "longrope":
        scale = config.max_position_embeddings / rope["original_max_position_embeddings"]
        fields["rope.scaling.attn_factor"] = float(
            np.sqrt(1 + np.log(scale) / np.log(rope["original_max_position_embeddings"]))
        )
        fields["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    fields |= own_metadata(architecture, config)
    return {key: value for key, value in fields.items() if value is not None}


def _rope_scaling(rope: Mapping[str, Any]) -> dict[str, Any]:
    if rope.get("rope_type") == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": rope["factor"]}
    if rope.get("rope_type") != "yarn":
        return {}
    return {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": rope["factor"],
        "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
        "rope.scaling.yarn_beta_fast": rope.get("beta_fast"),
        "rope.scaling.yarn_beta_slow": rope.get("beta_slow"),
        "rope.scaling.yarn_attn_factor": rope.get("attention_factor"),
    }


def _kv_heads(config: Any) -> int | None:
    if config.model_type == "falcon":
        return int(config.num_kv_heads) if config.new_decoder_architecture else 1
    heads: int | None = getattr(config, "num_key_value_heads", None)
    return heads


def _first(config: Any, *names: str) -> Any:
    return next((getattr(config, name) for name in names if getattr(config, name, None) is not None), None)


def stored_tensors(architecture: str, model: Any) -> Stored:
    """Every tensor of the file: its name, and its values in the converter's order."""
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, model.config.num_hidden_layers)
    prefix = f"{model.base_model_prefix}."
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        values = tensor.float().numpy()
        if ".experts." in name:
            yield from experts_apart(name, values, architecture)
            continue
        if name.endswith(".kv_b_proj.weight"):
            yield from latents_apart(name, values, model.config)
            continue
        stem, _, suffix = name.rpartition(".")
        if suffix not in ("weight", "bias"):
            # As the converter names parameters that are no part of a layer.
            stem, suffix = {
                "sinks": (name, "weight"),
                "expert_bias": (name, "bias"),
                "e_score_correction_bias": (f"{stem}.e_score_correction", "bias"),
            }[suffix]
        stored = names.get_name(stem) or names.get_name(stem.removeprefix(prefix))
        assert stored, name
        reorder = _REORDERED.get(architecture)
        yield f"{stored}.{suffix}", values if reorder is None else reorder(name, values, model.config)
    yield from _rope_tensors(architecture, model.config)


def _rope_tensors(architecture: str, config: Any) -> Stored:
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        yield "rope_factors_long.weight", np.array(rope["long_factor"])
        yield "rope_factors_short.weight", np.array(rope["short_factor"])
    if rope.get("rope_type") == "llama3":
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        yield "rope_freqs.weight", np.array(_llama3_factors(width, rope))


def _llama3_factors(width: int, rope: Mapping[str, Any]) -> list[float]:
    low = rope["original_max_position_embeddings"] / rope["low_freq_factor"]
    high = rope["original_max_position_embeddings"] / rope["high_freq_factor"]
    factors = []
    for frequency in 1.0 / rope["rope_theta"] ** (np.arange(0, width, 2) / width):
        wavelength = 2 * np.pi / frequency
        if wavelength < high:
            factors.append(1.0)
        elif wavelength > low:
            factors.append(rope["factor"])
        else:
            span = rope["high_freq_factor"] - rope["low_freq_factor"]
            smooth = (rope["original_max_position_embeddings"] / wavelength - rope["low_freq_factor"]) / span
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return factors


def _llama(name: str, values: Array, config: Any) -> Array:
    """Halves of a rotary pair lie side by side."""
    if "q_proj" not in name and "k_proj" not in name:
        return values
    heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
    return values.reshape(heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def _shifted_norms(name: str, values: Array, _: Any) -> Array:
    return values + 1 if name.endswith("norm.weight") else values


def _bloom(name: str, values: Array, config: Any) -> Array:
    if "query_key_value" not in name:
        return values
    return values.reshape(config.n_head, 3, -1, *values.shape[1:]).swapaxes(0, 1).reshape(values.shape)


def _falcon(name: str, values: Array, config: Any) -> Array:
    """Each group's queries, its key and its value: gathered by kind."""
    if "query_key_value" not in name:
        return values
    heads, groups = config.num_attention_heads, _kv_heads(config) or 1
    by_group = values.reshape(groups, heads // groups + 2, -1, config.hidden_size)
    kinds = (by_group[:, :-2], by_group[:, -2], by_group[:, -1])
    return np.concatenate([kind.reshape(-1, config.hidden_size) for kind in kinds])


def _gpt2(name: str, values: Array, _: Any) -> Array:
    """Its linear maps are stored transposed."""
    linear = name.endswith((".c_attn.weight", ".c_fc.weight", ".c_proj.weight"))
    return values.T if linear else values


def _qwen2moe(name: str, values: Array, _: Any) -> Array:
    return values[0] if name.endswith("shared_expert_gate.weight") else values


def _lfm2(name: str, values: Array, _: Any) -> Array:
    return values[:, 0] if name.endswith("conv.conv.weight") else values


_REORDERED: Mapping[str, Callable[[str, Array, Any], Array]] = {
    "bloom": _bloom,
    "falcon": _falcon,
    "gemma": _shifted_norms,
    "gemma2": _shifted_norms,
    "gemma3": _shifted_norms,
    "gpt2": _gpt2,
    "granite": _llama,
    "lfm2": _lfm2,
    "lfm2moe": _lfm2,
    "llama": _llama,
    "mistral3": _llama,
    "nemotron": _shifted_norms,
    "qwen2moe": _qwen2moe,
    "smollm3": _llama,
}


def write_gguf(
    path: Path,
    architecture: str,
    metadata: Mapping[str, int | float | str | list[Any]],
    tensors: Mapping[str, Any],
    kind: gguf.GGMLQuantizationType | None = None,
    kind_of: Callable[[str], gguf.GGMLQuantizationType | None] | None = None,
) -> None:
    """Write a file, matrices as `kind`, or as `kind_of` says by name, where their rows allow it, all else in F32."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        full_key = key if key.startswith(("split", "tokenizer", "general")) else f"{architecture}.{key}"
        if isinstance(value, str):
            writer.add_string(full_key, value)
        elif isinstance(value, list):
            writer.add_array(full_key, value)
        elif isinstance(value, bool):
            writer.add_bool(full_key, value)
        elif isinstance(value, float):
            writer.add_float32(full_key, value)
        elif full_key == "split.count":
            writer.add_uint16(full_key, value)
        else:
            writer.add_uint32(full_key, value)
    for name, values in tensors.items():
        values = np.ascontiguousarray(values, dtype=np.float32)
        kind = kind_of(name) if kind_of is not None else kind
        if kind is not None and values.ndim > 1 and values.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0:
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_model(
    path: Path, architecture: str, model: Any, kind: gguf.GGMLQuantizationType | None = None, **more: Any
) -> None:
    """Write a whole model as one file."""
    metadata = {**metadata_of(architecture, model.config), **more}
    write_gguf(path, architecture, metadata, dict(stored_tensors(architecture, model)), kind)
