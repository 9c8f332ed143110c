"""Keys and values that take the place of those of each row's first positions, as prefix tuning trains them.

Li and Liang, "Prefix-Tuning" (arXiv 2101.00190), put trained keys and values before a text in every block. Here a text
begins with as many positions that mean nothing: what the block computes for them is replaced before it is cached. So
positions, pages, forks and failovers need no other rules. The hidden states at these positions are of no use, and
nothing else reads them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from peerd.compute.families.layer_kinds import LayerKind

Place = tuple[int, torch.Tensor]
"""An index among a batch's positions, and `[positions, width of all key heads]` to put from there on."""


def widths_of_cache(kind: LayerKind, *, attention_interface: bool) -> tuple[int, int] | None:
    """The widths of a block's keys and of its values, all heads together; None if no prefix can replace them."""
    if kind.latent or not attention_interface:
        return None
    return kind.kv_heads * kind.key_dim, kind.kv_heads * kind.value_dim


def replace_first(computed: torch.Tensor, prefix: torch.Tensor | None) -> torch.Tensor:
    """`computed` `[rows, kv_heads, positions, width]` with a prefix `[P, kv_heads * width]` in its first P positions.

    Gradients flow to the prefix.
    """
    if prefix is None:
        return computed
    own = prefix.to(computed.dtype).view(len(prefix), computed.shape[1], -1).transpose(0, 1)
    return torch.cat((own.expand(len(computed), -1, -1, -1), computed[:, :, len(prefix) :]), 2)


class BatchPrefix:
    """The parts of prefixes that belong to one batch of sessions. Layers are numbered from 0 within the span."""

    def __init__(self, keys: Mapping[int, Sequence[Place]], values: Mapping[int, Sequence[Place]]) -> None:
        self._keys, self._values = keys, values

    def put(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One block's new keys and values, `[1, kv_heads, positions, width]`, as they are to be cached."""
        return _put(keys, self._keys.get(layer, ())), _put(values, self._values.get(layer, ()))


def _put(computed: torch.Tensor, places: Sequence[Place]) -> torch.Tensor:
    if not places:
        return computed
    # A copy, because it may be a view of a product that the module goes on using.
    computed = computed.clone()
    for first, own in places:
        by_head = own.view(len(own), computed.shape[1], -1).transpose(0, 1)
        computed[0, :, first : first + len(own)] = by_head
    return computed
