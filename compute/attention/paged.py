"""Attention of one query for each row over a paged cache, for all rows at once, as a decode needs it.

Two implementations give the same numbers. The plain one gathers every row's keys into one padded tensor: it runs
anywhere, and the other is tested against it. The Triton kernel (`paged_kernel`) reads the pages where they lie.
Neither loops over rows, and neither reads a slot that its row does not see: a stale NaN of another session would
survive any mask.

A step that adds several positions to a row counts as several rows here, each with its own length.
"""

from __future__ import annotations

import torch

from peerd.compute.attention.paged_rows import PagedRows
from peerd.compute.device.has_triton import has_kernel


def paged_decode(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    rows: PagedRows,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    slopes: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of `query` `[rows, heads, key_dim]` over a pool's `keys` and `values`, `[kv_heads, slots, width]`.

    Query heads that share a key head are neighbours. `softcap` caps scores; `sinks` `[heads]` take a share of each
    head's weight; `slopes` `[heads]` are ALiBi's, whose bias is 0 at the query's own position. Returns `[rows,
    heads, value_dim]` in the dtype of `values`.
    """
    if query.device.type == "cuda" and has_kernel():
        from peerd.compute.attention.paged_kernel import paged_decode_kernel

        return paged_decode_kernel(query, keys, values, rows, scale=scale, softcap=softcap, sinks=sinks, slopes=slopes)
    return paged_decode_plain(query, keys, values, rows, scale=scale, softcap=softcap, sinks=sinks, slopes=slopes)


def paged_decode_plain(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    rows: PagedRows,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    slopes: torch.Tensor | None = None,
) -> torch.Tensor:
    """`paged_decode` with torch's own operations. Takes memory for a padded copy of all keys and values."""
    count, heads, width = query.shape
    kv_heads = keys.shape[0]
    positions = torch.arange(rows.max_tokens, device=query.device)
    seen = (positions >= rows.first[:, None]) & (positions < rows.lengths[:, None])
    # Positions that a row does not see are read from slot 0 and masked later: their table entries may hold any number.
    pages = rows.table.repeat_interleave(rows.page_tokens, dim=1)
    slots = torch.where(seen, pages * rows.page_tokens + positions % rows.page_tokens, 0).flatten()
    row_keys = keys.index_select(1, slots).view(kv_heads, count, -1, width).transpose(0, 1)
    row_values = values.index_select(1, slots).view(kv_heads, count, positions.shape[0], -1).transpose(0, 1)
    row_values = row_values.masked_fill(~seen[:, None, :, None], 0.0)

    packed = query.view(count, kv_heads, -1, width)
    scores = (packed @ row_keys.transpose(2, 3)).view(count, heads, -1).float() * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if slopes is not None:
        scores = scores + slopes.float()[:, None] * (positions - rows.lengths[:, None] + 1)[:, None, :]
    scores = scores.masked_fill(~seen[:, None, :], -torch.inf)
    # A finite minimum, because a row that sees nothing has no largest score.
    top = scores.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
    if sinks is not None:
        top = torch.maximum(top, sinks.float()[None, :, None])
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks.float()[None, :, None] - top)
    weights = weights / total.masked_fill(total == 0, 1.0)
    packed_weights = weights.to(values.dtype).view(count, kv_heads, heads // kv_heads, -1)
    return (packed_weights @ row_values).view(count, heads, -1)
