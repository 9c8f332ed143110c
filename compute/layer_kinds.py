"""What a block's attention keeps and which positions it may see, read off the configuration.

The mask rule comes from the block's type, never from what a forward happens to pass along. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from peerd.compute.errors import UnsupportedModel
from peerd.compute.families import family_named

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True, slots=True)
class LayerKind:
    """One block's attention. A query at position q sees a key at k only if k <= q, and

    with `window`: q - k < window (the query itself counts);
    with `chunk`: q // chunk == k // chunk.

    The cache holds, a position, `kv_heads` keys of `key_dim` values and as many values of `value_dim`.
    """

    window: int | None
    chunk: int | None
    kv_heads: int
    key_dim: int
    value_dim: int

    @property
    def values_per_token(self) -> int:
        """How many numbers the cache holds for one position."""
        return self.kv_heads * (self.key_dim + self.value_dim)


def layer_kinds(config: PreTrainedConfig) -> tuple[LayerKind, ...]:
    """One kind for every block of the model, in order. Raises UnsupportedModel for a type of block not known here."""
    heads = int(config.num_attention_heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    width = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    return tuple(
        LayerKind(window, chunk, kv_heads, key_dim=width, value_dim=width) for window, chunk in _mask_rules(config)
    )


def _mask_rules(config: PreTrainedConfig) -> list[tuple[int | None, int | None]]:
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if types is None:
        slides = family_named(config.model_type).uniform_window
        return [(window if slides else None, None)] * config.num_hidden_layers
    rules = {
        "full_attention": (None, None),
        "sliding_attention": (window, None),
        "chunked_attention": (None, getattr(config, "attention_chunk_size", None)),
    }
    if unknown := set(types) - set(rules):
        raise UnsupportedModel(f"{config.model_type} has blocks of type {', '.join(sorted(unknown))}")
    return [rules[kind] for kind in types]
