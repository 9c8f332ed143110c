"""Keys and values that a program puts before a text, as peft's prefix tuning does: a `DynamicCache` that is filled.

The same prefix stands before every row. Servers put it in the place of the keys and values of as many first positions
(spec/training/training.md), so rows are sent with that many zeros in front.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from peerd.protocol.span import Span

# Rows that a program has computed from the same parameters differ by rounding at most.
_ROUNDINGS = 8


@dataclass(frozen=True, slots=True, eq=False)
class Prefix:
    """`blocks[n]`: keys and values of block n, each `[length, width of all key heads]`; gradients flow to them."""

    length: int
    blocks: tuple[tuple[torch.Tensor, torch.Tensor], ...]

    def within(self, span: Span) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """The keys and values of the span's blocks."""
        return {block: self.blocks[block] for block in range(span.start, span.end)}

    def space(self, width: int) -> torch.Tensor:
        """Hidden states for the prefix's positions, `[length, width]`: nothing reads them."""
        return torch.zeros(self.length, width)


def length_of(cache: Any) -> int:
    """How many positions a program's cache holds. Raises ValueError if it holds running states of local blocks."""
    layers = getattr(cache, "layers", ())
    if any(any(getattr(layer, "has_previous_state", {}).values()) for layer in layers):
        raise ValueError(
            "this cache holds running states of local blocks, which servers cannot take over: pass an empty"
            " DynamicCache, and the whole text"
        )
    # Layers with a running state alone do not count positions.
    return max((int(layer.get_seq_length()) for layer in layers if hasattr(layer, "get_seq_length")), default=0)


def prefix_of(cache: Any, blocks: int) -> tuple[Prefix, int]:
    """The prefix in a filled `DynamicCache`, and for how many rows it stands. Raises ValueError."""
    filled = [(layer.keys, layer.values) for layer in cache.layers if hasattr(layer, "keys") and layer.get_seq_length()]
    if len(filled) != blocks or any(each.shape[2] != filled[0][0].shape[2] for pair in filled for each in pair):
        raise ValueError(
            f"a cache with keys and values of {len(filled)} blocks, or of different lengths: remote blocks take the"
            f" same number of positions for each of {blocks}. Use LoraConfig or PromptTuningConfig for such a model"
        )
    pairs = tuple((_shared(keys), _shared(values)) for keys, values in filled)
    return Prefix(filled[0][0].shape[2], pairs), filled[0][0].shape[0]


def _shared(rows: torch.Tensor) -> torch.Tensor:
    """What all rows of `[rows, heads, positions, width]` have in common, `[positions, heads * width]`.

    The first row gets the gradient of all of them. So rows that a program trains apart from each other are unequal
    after the first step, and are refused.
    """
    first = rows[0]
    values = rows.detach()
    allowed = _ROUNDINGS * torch.finfo(rows.dtype).eps * float(values.abs().amax())
    if bool(((values - values[:1]).abs() > allowed).any()):
        raise ValueError(
            "this cache holds keys and values of local blocks that differ from row to row: remote blocks take the same"
            " for all rows, as peft's PrefixTuning makes them. Pass an empty DynamicCache, or one row at a time"
        )
    return first.transpose(0, 1).flatten(1)
