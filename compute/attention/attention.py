"""Attention over the KV pool, for unmodified Transformers models.

On a CPU, this is the only code that reads the cache. Each attention module of a span carries a `BlockAttention` with
the block's mask rule and the view of the running batch; Transformers calls it through a function registered with
`AttentionInterface`. No mask function is registered under that name, so Transformers builds no mask. Without a batch
in view (forward and training) the same rules hold over whole sequences.

30 blocks times 16 sessions call this for every token, so cost matters. What is the same in all blocks is computed
once for each batch, keys are read as views if pages lie side by side, and query heads that share a key head are
multiplied with it as one matrix, without copies of the key.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from peerd.compute.attention.latent import LatentAttention
from peerd.compute.attention.own_attention import KeyBias
from peerd.compute.attention.prefix import BatchPrefix, replace_first
from peerd.compute.families.layer_kinds import LayerKind
from peerd.compute.kv.pool import KVPool, KVWriter, RowSlots
from peerd.compute.steps import Segment
from peerd.compute.transformers_compat import refuse_unknown

_NAME = "peerd"
_ATTRIBUTE = "peerd_block_attention"


class Visible:
    """The keys of a row that some consecutive queries see: those from `start` on, under `mask`.

    `mask` is None if every query sees all of them; `causal` is set if queries and keys lie on the same positions.
    """

    __slots__ = ("causal", "mask", "start")

    def __init__(self, kind: LayerKind, first: int, end: int, device: torch.device) -> None:
        self.start = 0
        if kind.window is not None:
            self.start = max(first - kind.window + 1, 0)
        elif kind.chunk is not None:
            self.start = first // kind.chunk * kind.chunk
        self.causal = False
        self.mask: torch.Tensor | None = None
        if end - first == 1:
            return
        limited = (kind.window is not None and kind.window < end) or (kind.chunk is not None and kind.chunk < end)
        if first == 0 and not limited:
            self.causal = True
        else:
            self.mask = _mask(kind, first, self.start, end, device)


def _mask(kind: LayerKind, first: int, start: int, end: int, device: torch.device) -> torch.Tensor:
    """True where the query at `first..end` (rows) sees the key at `start..end` (columns)."""
    queries = torch.arange(first, end, device=device)[:, None]
    keys = torch.arange(start, end, device=device)
    mask = keys <= queries
    if kind.window is not None:
        mask &= queries - keys < kind.window
    if kind.chunk is not None:
        mask &= queries // kind.chunk == keys // kind.chunk
    return mask


class BatchView:
    """One batch as attention sees it; also the KV cache to which the model writes."""

    # Transformers reads this of any cache.
    is_compileable = False
    # Our attention makes its own masks; a decoder's other uses of a cache are the same for every batch.
    needs_mask = False

    def __init__(self, pool: KVPool, segments: Sequence[Segment], prefix: BatchPrefix | None = None) -> None:
        self.pool = pool
        self._prefix = prefix
        self.segments = segments
        #: By group of blocks, then by segment.
        self.rows = [[pool.slots(segment, group) for segment in segments] for group in range(pool.layout.groups)]
        self._writers = [KVWriter(rows, segments, pool.device) for rows in self.rows]
        self._visible: dict[tuple[int | None, int | None], list[Visible]] = {}
        self._lags: torch.Tensor | None = None

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, kwargs: Mapping[str, Any] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cache a block's new keys and values, `[1, kv_heads, positions, width]`. Attention reads the pool itself."""
        if self._prefix is not None:
            keys, values = self._prefix.put(layer, keys, values)
        writer = self._writers[self.pool.layout.group_of[layer]]
        writer.write(self.pool.keys[layer], keys[0])
        writer.write(self.pool.values[layer], values[0])
        return keys, values

    def get_seq_length(self, layer: int | None = None) -> int | torch.Tensor:
        """Answers Transformers' question where positions start: 0, since ours are passed explicitly.

        An attention module that asks for its own block (Llama 4) counts on from the answer to scale its queries. So
        for each position of the batch it gets the difference between the position and its index in the batch.
        """
        if layer is None:
            return 0
        if self._lags is None:
            ends = itertools.accumulate(segment.count for segment in self.segments)
            lags = [(segment.end - end, segment.count) for segment, end in zip(self.segments, ends, strict=True)]
            values, counts = torch.tensor(lags, device=self.pool.device).unbind(1)
            self._lags = values.repeat_interleave(counts)
        return self._lags

    def get_mask_sizes(self, _length: int, _layer: int) -> tuple[int, int]:
        """Answers Transformers' question how large a mask to make: none, since attention makes its own."""
        return 0, 0

    def get_query_offset(self, _layer: int) -> int:
        """Answers Transformers' question where a mask begins."""
        return 0

    def visible(self, kind: LayerKind) -> list[Visible]:
        """The keys that each segment sees in blocks of this kind."""
        rule = (kind.window, kind.chunk)
        found = self._visible.get(rule)
        if found is None:
            found = [Visible(kind, segment.start, segment.end, self.pool.device) for segment in self.segments]
            self._visible[rule] = found
        return found


class RowView:
    """One segment of one row, as the cache of a model whose attention cannot be replaced (DiffLlama, Doge, XGLM)."""

    is_compileable = False
    is_sliding = (False,)

    def __init__(self, pool: KVPool, segment: Segment) -> None:
        self._pool = pool
        self._segment = segment
        self._row: RowSlots = pool.slots(segment, 0)
        self._writer = KVWriter([self._row], [segment], pool.device)

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, kwargs: Mapping[str, Any] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cache a block's new keys and values; returns the whole row's, `[1, kv_heads, length, width]`."""
        self._writer.write(self._pool.keys[layer], keys[0])
        self._writer.write(self._pool.values[layer], values[0])
        return self._row.read(self._pool.keys[layer], 0)[None], self._row.read(self._pool.values[layer], 0)[None]

    def get_seq_length(self, _layer: int = 0) -> int:
        """Positions cached before this segment."""
        return self._segment.start

    def get_query_offset(self, _layer: int = 0) -> int:
        """The first new position."""
        return self._segment.start

    def get_mask_sizes(self, _query_length: int, _layer: int) -> tuple[int, int]:
        """The number of keys that `update` returns, and the position of the first."""
        return self._segment.end, 0


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


class Scores:
    """How a model turns products of query and key into weights."""

    __slots__ = ("bias", "scaling", "sinks", "softcap")

    def __init__(
        self,
        scaling: float | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
        bias: KeyBias | None = None,
    ) -> None:
        self.bias = bias
        self.scaling = scaling
        self.softcap = softcap
        self.sinks = sinks


def attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, visible: Visible, scores: Scores
) -> torch.Tensor:
    """Attention of `query` `[b, heads, n, width]` over `keys` and `values` `[b, kv_heads, m, ...]`.

    Returns `[b, n, heads, value_dim]`.
    """
    batch, heads, count, width = query.shape
    kv_heads = keys.shape[1]
    if scores.softcap is not None or scores.sinks is not None:
        output = _attend_in_steps(query, keys, values, visible, scores)
    elif scores.bias is not None:
        output = _attend_with_bias(query, keys, values, visible, scores, scores.bias)
    elif count == 1:
        # Query heads that share a key head take the place of several queries: one product, no copies.
        packed = query.reshape(batch, kv_heads, heads // kv_heads, width)
        output = F.scaled_dot_product_attention(packed, keys, values, scale=scores.scaling)
    else:
        output = F.scaled_dot_product_attention(
            query,
            keys,
            values,
            attn_mask=visible.mask,
            is_causal=visible.causal,
            scale=scores.scaling,
            enable_gqa=heads != kv_heads,
        )
    return output.reshape(batch, heads, count, -1).transpose(1, 2)


def _attend_with_bias(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, visible: Visible, scores: Scores, bias: KeyBias
) -> torch.Tensor:
    """Attention with a bias on each key's score (ALiBi)."""
    _, heads, count, _ = query.shape
    kv_heads, length = keys.shape[1], keys.shape[2]
    added = bias(visible.start, visible.start + length).to(query.dtype)[None, :, None]
    mask = visible.mask
    if visible.causal:
        mask = torch.ones(count, length, dtype=torch.bool, device=query.device).tril()
    if mask is not None:
        added = added.masked_fill(~mask, -torch.inf)
    return F.scaled_dot_product_attention(
        query, keys, values, attn_mask=added, scale=scores.scaling, enable_gqa=heads != kv_heads
    )


def _attend_in_steps(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, visible: Visible, scores: Scores
) -> torch.Tensor:
    """Attention whose scores are capped, or share their weight with a sink, which fused kernels cannot compute."""
    batch, heads, count, width = query.shape
    kv_heads, length = keys.shape[1], keys.shape[2]
    packed = query.reshape(batch, kv_heads, -1, width)
    scaling = width**-0.5 if scores.scaling is None else scores.scaling
    products = (packed @ keys.transpose(2, 3)).view(batch, heads, count, length) * scaling
    if scores.softcap is not None:
        products = torch.tanh(products / scores.softcap) * scores.softcap
    mask = visible.mask
    if visible.causal:
        mask = torch.ones(count, length, dtype=torch.bool, device=query.device).tril()
    if mask is not None:
        products = products.masked_fill(~mask, -torch.inf)
    if scores.sinks is not None:
        sinks = scores.sinks.to(products.dtype).view(1, heads, 1, 1).expand(batch, heads, count, 1)
        products = torch.cat([products, sinks], dim=-1)
    weights = products.softmax(-1, dtype=torch.float32)[..., :length].to(values.dtype)
    return weights.reshape(batch, kv_heads, -1, length) @ values


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
