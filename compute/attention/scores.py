"""The attention of queries over the keys that they see: mask rules, and what turns products into weights.

Query heads that share a key head are multiplied with it as one matrix, without copies of the key.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from peerd.compute.attention.own_attention import KeyBias
from peerd.compute.families.layer_kinds import LayerKind


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
        if visible.mask is not None and query.is_cuda:
            keys, values = for_every_head(keys, heads), for_every_head(values, heads)
        output = F.scaled_dot_product_attention(
            query,
            keys,
            values,
            attn_mask=visible.mask,
            is_causal=visible.causal,
            scale=scores.scaling,
            enable_gqa=heads != keys.shape[1],
        )
    return output.reshape(batch, heads, count, -1).transpose(1, 2)


def for_every_head(stored: torch.Tensor, heads: int) -> torch.Tensor:
    """Keys or values `[b, kv_heads, m, width]` repeated for each of `heads` query heads.

    Torch 2.13 has no kernel for GPUs of before Hopper that takes a mask and fewer key heads than query heads: it would
    compute all scores in fp32, gigabytes of them for a long text. With as many key heads its memory-efficient kernel
    takes the mask; the copies are of one block and one row.
    """
    return stored.repeat_interleave(heads // stored.shape[1], dim=1)


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
