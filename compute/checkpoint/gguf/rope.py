"""Reads a GGUF file's scaling of rotary embeddings as Transformers' `rope_scaling`.

Transformers ignores this part of a GGUF file. A file states frequencies, but a configuration states the rule behind
them. Llama 3's rule is recognised: its published parameters must give every stored frequency. Any other list is passed
on as a list of factors. A scaling that is stated incompletely is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peerd.compute.checkpoint.gguf.architectures import Architecture
from peerd.compute.checkpoint.gguf.split import GgufFiles
from peerd.compute.errors import CheckpointError, UnsupportedModelError

# Llama 3.1 to 3.3 and EXAONE 4 were published with the first of these bands of turns over the original length, in which
# frequencies are divided by a part of the factor; Llama 4 Scout with the second, which is empty. llama.cpp stores the
# resulting divisors.
_LLAMA3_BANDS = ((1.0, 4.0), (1.0, 1.0))
_LLAMA3_LENGTH = 8192
_FACTORS = "rope_freqs.weight"
_LONG, _SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
# What `yarn_log_multiplier` is multiplied by to give YaRN's `mscale_all_dim`: llama.cpp's converter writes a tenth of
# that for DeepSeek, and all of it for Mistral. No other architecture of ours has the field.
_LOG_MULTIPLIERS = {"deepseek2": 10.0, "mistral3": 1.0}


def rope_fields(file: GgufFiles, architecture: Architecture, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a configuration about how rotary embeddings are scaled; none if they are not. Raises
    CheckpointError or UnsupportedModelError if that cannot be read exactly.
    """
    name = architecture.name
    scaling = _scaling(file, name, fields)
    if architecture.rope_by_kind:
        return {"rope_parameters": _by_kind(file, name, fields, scaling)}
    if scaling is None:
        return {}
    if name == "gpt-oss":
        # Published GPT-OSS files leave out that their corrections are not rounded.
        scaling["truncate"] = False
    if architecture.model_type == "ministral3":
        scaling["llama_4_scaling_beta"] = file.metadata.get(f"{name}.attention.temperature_scale")
    more: dict[str, Any] = {"rope_scaling": scaling}
    if scaling["rope_type"] == "longrope":
        # Phi's configuration has the original length here, and looks for it nowhere else.
        more["original_max_position_embeddings"] = scaling["original_max_position_embeddings"]
    return more


def _by_kind(
    file: GgufFiles, name: str, fields: Mapping[str, Any], scaling: dict[str, Any] | None
) -> dict[str, dict[str, Any]]:
    """The rotary embeddings of blocks that see the whole text, and of those with a window."""
    base = fields.get("rope_theta", 10000.0)
    plain = {"rope_type": "default", "rope_theta": file.metadata.get(f"{name}.rope.freq_base_swa", base)}
    full = {"rope_theta": base, **(scaling or {"rope_type": "default"})}
    return {"full_attention": full, "sliding_attention": plain}


def _scaling(file: GgufFiles, architecture: str, fields: Mapping[str, Any]) -> dict[str, Any] | None:
    """The scaling, or None if there is none."""
    stated = _Stated(file, f"{architecture}.rope.scaling.")
    kind = stated.get("type", "none")
    if _LONG in file.tensors and _SHORT in file.tensors:
        return _by_lists(stated, _factors(file, _SHORT), _factors(file, _LONG))
    if kind == "linear" or (kind == "none" and file.metadata.get(f"{architecture}.rope.scale_linear")):
        factor = stated.get("factor", file.metadata.get(f"{architecture}.rope.scale_linear"))
        return {"rope_type": "linear", "factor": stated.number(factor, "factor")}
    if kind == "yarn":
        return _yarn(stated, _LOG_MULTIPLIERS.get(architecture))
    if kind != "none":
        raise UnsupportedModelError(f"{file.path}: its RoPE is scaled ({kind}), which GGUF states incompletely")
    return _llama3(file, architecture, fields) if _FACTORS in file.tensors else None


def head_width(fields: Mapping[str, Any]) -> int:
    """The width of a head according to these fields of a configuration; 0 if they are not sizes."""
    width, heads = (fields.get(name) for name in ("hidden_size", "num_attention_heads"))
    if isinstance(own := fields.get("head_dim"), int) and own > 0:
        return own
    return width // heads if isinstance(width, int) and isinstance(heads, int) and heads > 0 else 0


class _Stated:
    """The metadata under one prefix."""

    def __init__(self, file: GgufFiles, prefix: str) -> None:
        self.path = file.path
        self._file = file
        self._prefix = prefix

    def get(self, key: str, default: Any = None) -> Any:
        return self._file.metadata.get(self._prefix + key, default)

    def number(self, value: Any, key: str) -> float:
        if not isinstance(value, int | float) or not 0 < value < math.inf:
            raise UnsupportedModelError(f"{self.path}: its RoPE is scaled, and {self._prefix}{key} is {value!r}")
        return float(value)

    def original_length(self) -> int:
        return int(self.number(self.get("original_context_length"), "original_context_length"))


def _yarn(stated: _Stated, log_multiplier: float | None) -> dict[str, Any]:
    said = stated.get("yarn_log_multiplier")
    unread = ["yarn_ext_factor"] if log_multiplier else ["yarn_ext_factor", "yarn_log_multiplier"]
    for key in unread:
        if stated.get(key) is not None:
            raise UnsupportedModelError(f"{stated.path}: its RoPE is scaled (yarn) with {key}, which we do not read")
    scaling: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": stated.number(stated.get("factor"), "factor"),
        "original_max_position_embeddings": stated.original_length(),
    }
    optional = {"yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow", "yarn_attn_factor": "attention_factor"}
    scaling |= {
        name: stated.number(stated.get(key), key) for key, name in optional.items() if stated.get(key) is not None
    }
    if log_multiplier and said is not None:
        # Rounded, because a file has it in fp32.
        everywhere = round(log_multiplier * stated.number(said, "yarn_log_multiplier"), 6)
        # Files do not state `mscale`. All DeepSeeks have the same as `mscale_all_dim`, and all Mistrals have 1.
        scaling |= {"mscale_all_dim": everywhere, "mscale": everywhere if log_multiplier > 1 else 1.0}
    return scaling


def _by_lists(stated: _Stated, short: list[float], long: list[float]) -> dict[str, Any]:
    """Phi's scaling: one list of factors up to the original length, another one beyond it."""
    return {
        "rope_type": "longrope",
        "short_factor": short,
        "long_factor": long,
        "original_max_position_embeddings": stated.original_length(),
        "attention_factor": stated.number(stated.get("attn_factor"), "attn_factor"),
    }


def _llama3(file: GgufFiles, architecture: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    factors = _factors(file, _FACTORS)
    half = head_width(fields) // 2
    if len(factors) != half:
        raise CheckpointError(f"{file.path}: tensor {_FACTORS} has {len(factors)} values, a head's half is {half}")
    found = np.array(factors)
    # The slowest frequencies are divided by the whole factor.
    factor = round(max(factors), 3)
    base = float(fields.get("rope_theta", 10000.0))
    for low, high in _LLAMA3_BANDS:
        if np.allclose(found, _llama3_factors(len(factors), base, factor, low, high), rtol=1e-5, atol=0):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": _LLAMA3_LENGTH,
            }
    if architecture == "llama4":
        raise UnsupportedModelError(f"{file.path}: its RoPE is scaled by factors that follow no rule which we know")
    length = fields.get("max_position_embeddings")
    if not isinstance(length, int):
        raise CheckpointError(f"{file.path}: its RoPE is scaled, and its context length is {length!r}")
    # The list does not depend on the length, so both entries are the same.
    return {
        "rope_type": "longrope",
        "short_factor": factors,
        "long_factor": factors,
        "original_max_position_embeddings": length,
        "attention_factor": 1.0,
    }


def _llama3_factors(count: int, base: float, factor: float, low: float, high: float) -> NDArray[np.float64]:
    """The divisors that Llama 3's rule gives for `count` frequencies."""
    turns = _LLAMA3_LENGTH * base ** (-np.arange(count) / count) / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0) if high > low else (turns > low).astype(np.float64)
    return 1 / ((1 - smooth) / factor + smooth)


def _factors(file: GgufFiles, name: str) -> list[float]:
    """A small tensor's values. Raises CheckpointError unless they can divide frequencies."""
    tensor = file.tensors[name]
    if tensor.kind.name != "F32" or len(tensor.shape) != 1:
        raise CheckpointError(f"{file.path}: tensor {name} is {tensor.kind.name} of shape {list(tensor.shape)}")
    values = file.read_rows(tensor, 0, 1).view(np.float32)[0]
    if not (np.isfinite(values).all() and (values > 0).all()):
        raise CheckpointError(f"{file.path}: tensor {name} has values that are no factors")
    return [float(value) for value in values]
