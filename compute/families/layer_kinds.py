"""Reads from the configuration what each block's attention caches, and which positions it may see.

The mask rule comes from the block's type, never from the arguments of a forward. Configurations do not say what
Transformers caches nor, in some families, the shape of the cache; these families have functions here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peerd.compute.errors import UnsupportedModelError
from peerd.compute.families.lookup import family_named
from peerd.compute.families.running_state import RunningState, running_state

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_Shape = tuple[int, int, int]  # heads, width of a key, width of a value


@dataclass(frozen=True, slots=True)
class LayerKind:
    """One block's attention. A query at position q sees a key at k only if k <= q, and

    with `window`: q - k < window (the query itself counts);
    with `chunk`: q // chunk == k // chunk.

    For each position the cache holds `kv_heads` keys of `key_dim` values, and as many values of width `value_dim`. If
    `latent`, these are one compressed key and its rotary part, which the block's attention module expands (MLA).

    A block with a running `state` keeps that of each row; if it has no attention beside it, `kv_heads` is 0. A block
    that is only a feed-forward keeps neither.
    """

    window: int | None
    chunk: int | None
    kv_heads: int
    key_dim: int
    value_dim: int
    latent: bool = False
    state: RunningState | None = None

    @property
    def values_per_token(self) -> int:
        """How many numbers the cache holds for one position."""
        return self.kv_heads * (self.key_dim + self.value_dim)


def layer_kinds(config: PreTrainedConfig) -> tuple[LayerKind, ...]:
    """The kind of every block of the model, in order. Raises UnsupportedModelError for an unknown type of block."""
    family = family_named(config.model_type)
    types = _types(config)
    rules = {
        "full_attention": (None, None),
        "sliding_attention": (getattr(config, "sliding_window", None), None),
        # GPT-Neo's names.
        "global": (None, None),
        "local": (getattr(config, "window_size", None), None),
        "chunked_attention": (None, getattr(config, "attention_chunk_size", None)),
        # Attention beside a running state.
        "hybrid": (None, None),
    }
    states = {layer_type: running_state(config, layer_type) for layer_type in types}
    known = (rules.keys() - _RUNNING_STATES) | _FEED_FORWARDS
    if unknown := {layer_type for layer_type in set(types) - known if states[layer_type] is None}:
        _refuse(config, sorted(unknown))
    kinds = []
    for layer_type in types:
        if layer_type not in rules:
            kinds.append(LayerKind(None, None, 0, 0, 0, state=states[layer_type]))
            continue
        # A model without the attention interface masks in its own code, and needs all positions.
        window, chunk = rules[layer_type] if family.attention_interface else (None, None)
        heads, key_dim, value_dim = _shape(config, layer_type)
        kinds.append(LayerKind(window, chunk, heads, key_dim, value_dim, family.latent, states[layer_type]))
    return tuple(kinds)


def _types(config: PreTrainedConfig) -> list[str]:
    types = getattr(config, "layer_types", None) or getattr(config, "attention_layers", None)
    if types is not None:
        return list(types)
    slides = family_named(config.model_type).uniform_window and getattr(config, "sliding_window", None)
    return ["sliding_attention" if slides else "full_attention"] * int(config.num_hidden_layers)


def _refuse(config: PreTrainedConfig, types: list[str]) -> None:
    listed = ", ".join(types)
    if state := [name for name in types if name in _RUNNING_STATES]:
        raise UnsupportedModelError(
            f"{config.model_type} has blocks of type {listed}: {state[0]} keeps a running state of a kind that peerd "
            "does not keep yet"
        )
    raise UnsupportedModelError(f"{config.model_type} has blocks of type {listed}")


# Transformers' names of blocks that are only a feed-forward, or only experts.
_FEED_FORWARDS = frozenset({"mlp", "moe"})
# Its names of blocks that keep a running state, beside keys and values or without any.
_RUNNING_STATES = frozenset({"linear_attention", "mamba", "conv", "recurrent", "hybrid", "hybrid_sliding"})


def _shape(config: Any, layer_type: str) -> _Shape:
    if family_named(config.model_type).latent:
        return 1, int(config.kv_lora_rank), int(config.qk_rope_head_dim)
    if own := _OWN_SHAPES.get(config.model_type):
        return own(config, layer_type)
    heads = int(config.num_attention_heads)
    width = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    return int(getattr(config, "num_key_value_heads", None) or heads), width, width


def _all_heads(config: Any, _: str) -> _Shape:
    """Families whose heads share no keys, even if their configurations state key heads."""
    width = int(config.hidden_size // config.num_attention_heads)
    return int(config.num_attention_heads), width, width


def _falcon(config: Any, layer_type: str) -> _Shape:
    heads, width, _width = _all_heads(config, layer_type)
    if config.new_decoder_architecture:
        return int(config.num_kv_heads), width, width
    return (1 if config.multi_query else heads), width, width


def _gpt_bigcode(config: Any, layer_type: str) -> _Shape:
    heads, width, _width = _all_heads(config, layer_type)
    return (1 if config.multi_query else heads), width, width


def _mimo(config: Any, layer_type: str) -> _Shape:
    shared = int(config.num_key_value_heads) * (2 if layer_type == "sliding_attention" else 1)
    return shared, int(config.head_dim), int(config.v_head_dim)


_SHARE_NO_KEYS = (
    "biogpt",
    "bloom",
    "codegen",
    "gpt2",
    "gpt_neo",
    "gpt_neox",
    "gpt_neox_japanese",
    "gptj",
    "mpt",
    "opt",
    "persimmon",
    "xglm",
)
_OWN_SHAPES: dict[str, Callable[[Any, str], _Shape]] = {
    **dict.fromkeys(_SHARE_NO_KEYS, _all_heads),
    "falcon": _falcon,
    "gpt_bigcode": _gpt_bigcode,
    "mimo_v2_flash": _mimo,
}
