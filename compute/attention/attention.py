"""Attention over the KV pool, for unmodified Transformers models.

On a CPU, this is the only code that reads the cache. Each attention module of a span carries a `BlockAttention` with
the block's mask rule and the view of the running batch; Transformers calls it through a function registered with
`AttentionInterface`. No mask function is registered under that name, so Transformers builds no mask. Without a batch
in view (forward and training) the same rules hold over whole sequences.

30 blocks times 16 sessions call this for every token, so cost matters: `views.py` and `scores.py` say how it is kept
low.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn

from peerd.compute.attention.latent import LatentAttention
from peerd.compute.attention.own_attention import KeyBias
from peerd.compute.attention.prefix import replace_first
from peerd.compute.attention.scores import Scores, Visible, attend
from peerd.compute.attention.views import BatchView
from peerd.compute.families.layer_kinds import LayerKind
from peerd.compute.transformers_compat import refuse_unknown

_NAME = "peerd"
_ATTRIBUTE = "peerd_block_attention"


class PagedView(Protocol):
    """A batch with its own attention over the pool (`engine.paged_views`)."""

    def attend(self, layer: int, kind: LayerKind, query: torch.Tensor, scores: Scores) -> torch.Tensor:
        """Attention of `query` `[1, heads, positions, width]` over one block's cache: `[1, positions, heads,
        value_dim]`.
        """
        ...


class SpanAttention:
    """Connects a span's attention modules with the running batch. One for each engine."""

    def __init__(self, layers: nn.ModuleList, kinds: Sequence[LayerKind]) -> None:
        self.view: BatchView | PagedView | None = None
        for layer, kind in zip(layers, kinds, strict=True):
            for module in layer.modules():
                layer_idx: Any = getattr(module, "layer_idx", None)
                if layer_idx is not None:
                    latent = LatentAttention(module) if kind.latent and hasattr(module, "expand_kv") else None
                    setattr(module, _ATTRIBUTE, BlockAttention(self, layer_idx, kind, latent))


class BlockAttention:
    """Attention of one block: over the running batch, or over whole sequences if there is none."""

    def __init__(
        self, owner: SpanAttention, layer: int, kind: LayerKind, latent: LatentAttention | None = None
    ) -> None:
        self._owner = owner
        self._layer = layer
        self._kind = kind
        self._latent = latent
        # A training pass puts its own keys and values here, for as long as it runs the block.
        self.prefix: Prefix = (None, None)

    def __call__(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scores: Scores) -> torch.Tensor:
        """`query`: `[batch, heads, positions, width]`. Returns `[batch, positions, heads, value_dim]`."""
        view = self._owner.view
        if view is None:
            visible = Visible(self._kind, 0, query.shape[2], query.device)
            keys, values = replace_first(keys, self.prefix[0]), replace_first(values, self.prefix[1])
            return attend(query, keys, values, visible, scores)
        if not isinstance(view, BatchView):
            return view.attend(self._layer, self._kind, query, scores)
        all_keys, all_values = view.pool.keys[self._layer], view.pool.values[self._layer]
        visibles = view.visible(self._kind)
        rows = view.rows[view.pool.layout.group_of[self._layer]]
        if len(visibles) == 1:
            visible, row = visibles[0], rows[0]
            return self._over_row(
                query,
                row.read(all_keys, visible.start)[None],
                row.read(all_values, visible.start)[None],
                visible,
                scores,
            )
        outputs = []
        offset = 0
        for segment, row, visible in zip(view.segments, rows, visibles, strict=True):
            own = query[:, :, offset : offset + segment.count]
            offset += segment.count
            row_keys, row_values = row.read(all_keys, visible.start)[None], row.read(all_values, visible.start)[None]
            outputs.append(self._over_row(own, row_keys, row_values, visible, scores))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    def _over_row(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, visible: Visible, scores: Scores
    ) -> torch.Tensor:
        """Attention of one row's new positions over its cached keys and values."""
        if self._latent is None:
            return attend(query, keys, values, visible, scores)
        if scores.scaling is None:
            scores = Scores(query.shape[-1] ** -0.5, scores.softcap, scores.sinks)
        return self._latent(query, keys, values, lambda q, k, v: attend(q, k, v, visible, scores))


Prefix = tuple[torch.Tensor | None, torch.Tensor | None]
"""Keys and values for the first positions of rows, each `[positions, width of all key heads]`, or None."""


@contextmanager
def with_prefix(layer: nn.Module, prefix: Prefix) -> Iterator[None]:
    """Inside this context, a block that runs over whole sequences has these keys and values at their beginning."""
    attentions: list[BlockAttention] = []
    if any(each is not None for each in prefix):
        attentions = [getattr(module, _ATTRIBUTE) for module in layer.modules() if hasattr(module, _ATTRIBUTE)]
    try:
        for each in attentions:
            each.prefix = prefix
        yield
    finally:
        for each in attentions:
            each.prefix = (None, None)


def _attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    key_bias: KeyBias | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """The function that Transformers' attention modules call. It gets no mask; the block's own is used."""
    assert attention_mask is None
    refuse_unknown(others)
    block: BlockAttention = getattr(module, _ATTRIBUTE)
    return block(query, key, value, Scores(scaling, softcap, s_aux, key_bias)), None


def register_attention() -> str:
    """Register this attention with Transformers. Returns the name for `load_span(..., attention=name)`."""
    # Imported here because importing Transformers takes seconds, which a process without a model need not wait for.
    from transformers import AttentionInterface

    AttentionInterface.register(_NAME, _attention_forward)
    return _NAME
