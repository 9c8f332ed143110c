"""Turns a published `config.json` into Transformers' configuration of the language model, or refuses it.

A model that also processes images or sound describes its language model in `text_config`. Publishers leave some fields
about the language model in the outer object: its dtype, whether its head is tied, and how its weights are quantized. A
field that would make our blocks compute something else than the published model is refused, with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from peerd.compute.errors import CheckpointError, UnsupportedModelError
from peerd.compute.families.family import Family
from peerd.compute.families.lookup import FAMILIES
from peerd.protocol.span import MAX_BLOCKS

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Fields for the way in which weights are quantized. The second is an old name (neuralmagic), the third is MLX's.
_QUANTIZATION_FIELDS = ("quantization_config", "compression_config", "quantization")
_DTYPE_FIELDS = ("dtype", "torch_dtype")
# What families call the number of their blocks.
_BLOCK_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
# For these ropes `factor` multiplies the length, which a configuration may state unscaled. For all other ropes, and
# where blocks have ropes of several kinds (Gemma 3), `max_position_embeddings` is the scaled length.
_LENGTHENING = ("yarn", "dynamic", "linear")


def text_config(published: Mapping[str, Any]) -> dict[str, Any]:
    """The language model's part of a configuration that also describes, say, a vision tower."""
    if isinstance(thinker := published.get("thinker_config"), dict):
        # Of a model that also speaks: the thinker hears, sees and writes.
        outer = {name: published[name] for name in (*_QUANTIZATION_FIELDS, *_DTYPE_FIELDS) if published.get(name)}
        return text_config(thinker | outer)
    text = published.get("text_config")
    if not isinstance(text, dict) and f"{published.get('model_type')}_text" in FAMILIES:
        # The first Qwen-VL models have the fields of both parts side by side.
        return {**published, "model_type": f"{published['model_type']}_text"}
    if published.get("model_type") in FAMILIES or not isinstance(text, dict):
        return dict(published)
    # The LM head belongs to the whole model, so the outer field decides; `head.py` also checks which tensors are
    # stored.
    tied = published.get("tie_word_embeddings", True)
    whole = {"tie_word_embeddings": tied}
    for fields in (_QUANTIZATION_FIELDS, _DTYPE_FIELDS):
        for field in fields:
            if published.get(field) is not None:
                # The outer value replaces the inner one, even if the two use different names of the field.
                text = {name: value for name, value in text.items() if name not in fields}
                whole[field] = published[field]
    return {"model_type": f"{published.get('model_type')}_text"} | text | whole


def quantization_of(fields: Mapping[str, Any], where: object) -> Mapping[str, Any] | None:
    """The configuration's fields about quantized weights; None if the weights are not quantized. Raises
    UnsupportedModelError.
    """
    for field in _QUANTIZATION_FIELDS:
        value = fields.get(field)
        if not value:
            continue
        if not isinstance(value, dict):
            raise UnsupportedModelError(f"{where}: {field} is {value!r}, not an object")
        return {"quant_method": "mlx" if field == "quantization" else "an unknown way"} | value
    return None


def make_config(family: Family, fields: Mapping[str, Any], where: object) -> PreTrainedConfig:
    """The family's configuration, made of published fields. Raises CheckpointError or UnsupportedModelError that names
    `where`.
    """
    from huggingface_hub.errors import StrictDataclassError

    # Some classes list all blocks while they are made: billions of them would take all memory.
    for name in _BLOCK_COUNTS:
        if isinstance(count := fields.get(name), int) and count > MAX_BLOCKS:
            raise CheckpointError(f"{where}: {name} is {count}; peerd serves models of up to {MAX_BLOCKS} blocks")
    # With these fields Transformers would look for the package that quantized the weights.
    plain = {name: value for name, value in fields.items() if name not in _QUANTIZATION_FIELDS}
    try:
        kind: Any = family.config_type()
        # Transformers writes an infinite number as a JSON object; this decodes it.
        config: PreTrainedConfig = kind.from_dict(kind._decode_special_floats(plain))
    except (StrictDataclassError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(f"{where}: is no valid {family.model_type} configuration: {error}") from error
    if not hasattr(config, "tie_word_embeddings"):
        # Some text models leave it to the model around them, whose field `text_config` has copied.
        config.tie_word_embeddings = False
    _check_config(config, where)
    return config


def longest_length(config: PreTrainedConfig) -> int | None:
    """How many positions the model was made for; None where its position scheme has no limit (ALiBi)."""
    stated = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    if stated is None or not isinstance(rope, dict) or rope.get("rope_type") not in _LENGTHENING:
        return None if stated is None else int(stated)
    original = rope.get("original_max_position_embeddings") or stated
    return max(int(stated), int(original * (rope.get("factor") or 1)))


def _check_config(config: PreTrainedConfig, where: object) -> None:
    """Raise, with the reason, if these blocks cannot run."""
    for field, most in (("num_hidden_layers", MAX_BLOCKS), ("hidden_size", 2**20), ("num_attention_heads", 2**20)):
        # A model without attention has no heads.
        value = getattr(config, field, 1)
        if not isinstance(value, int) or not 0 < value <= most:
            raise CheckpointError(f"{where}: {field} is {value!r}")
    sees_later = getattr(config, "use_bidirectional_attention", None) or getattr(config, "is_causal", None) is False
    if sees_later:
        raise UnsupportedModelError(f"{where}: its blocks attend to later positions")
