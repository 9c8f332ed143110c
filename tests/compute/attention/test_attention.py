"""Attention over pages against the plainest formula, for every rule that masks or scores."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from peerd.compute.attention.attention import SpanAttention, _attention_forward
from peerd.compute.attention.scores import for_every_head
from peerd.compute.attention.views import BatchView, RowView
from peerd.compute.engine.paged_views import MixedView
from peerd.compute.families.layer_kinds import LayerKind
from peerd.compute.kv.layout import lay_out
from peerd.compute.kv.pool import KVPool
from peerd.compute.steps import RowPages, Segment

HEADS, KV_HEADS, KEY_DIM, VALUE_DIM = 6, 2, 8, 5
SIZE = 4
LENGTH = 23
SCALING = 0.3

KINDS = {
    "full": LayerKind(None, None, KV_HEADS, KEY_DIM, VALUE_DIM),
    "window": LayerKind(5, None, KV_HEADS, KEY_DIM, VALUE_DIM),
    "window longer than the row": LayerKind(500, None, KV_HEADS, KEY_DIM, VALUE_DIM),
    "chunk": LayerKind(None, 6, KV_HEADS, KEY_DIM, VALUE_DIM),
}
SCORES = {"plain": {}, "softcap": {"softcap": 1.5}, "sinks": {"s_aux": torch.linspace(-1, 2, HEADS)}}
# For each batch, which positions of which row are new.
TURNS = (
    {0: (0, 7), 1: (0, 1)},
    {0: (7, 8), 1: (1, 14)},
    {0: (8, 22), 1: (14, 15)},
    {0: (22, 23)},
    {1: (15, 23)},
)


class Block(nn.Module):
    layer_idx = 0


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> LayerKind:
    return KINDS[request.param]


@pytest.fixture(params=SCORES)
def scores(request: pytest.FixtureRequest) -> dict:
    return SCORES[request.param]


def random_row(seed: int) -> SimpleNamespace:
    generator = torch.Generator().manual_seed(seed)
    return SimpleNamespace(
        query=torch.randn(1, HEADS, LENGTH, KEY_DIM, generator=generator),
        keys=torch.randn(1, KV_HEADS, LENGTH, KEY_DIM, generator=generator),
        values=torch.randn(1, KV_HEADS, LENGTH, VALUE_DIM, generator=generator),
    )


def by_the_formula(row: SimpleNamespace, kind: LayerKind, scores: dict) -> torch.Tensor:
    """`[positions, heads, value_dim]`."""
    keys, values = (each[0].repeat_interleave(HEADS // KV_HEADS, 0) for each in (row.keys, row.values))
    products = row.query[0] @ keys.transpose(1, 2) * SCALING
    if cap := scores.get("softcap"):
        products = torch.tanh(products / cap) * cap
    q, k = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
    hidden = k > q
    if kind.window:
        hidden = hidden | (q - k >= kind.window)
    if kind.chunk:
        hidden = hidden | (q // kind.chunk != k // kind.chunk)
    exponents = products.masked_fill(hidden, -torch.inf).exp()
    total = exponents.sum(-1, keepdim=True)
    if (sinks := scores.get("s_aux")) is not None:
        total = total + sinks.exp()[:, None, None]
    return (exponents / total @ values).transpose(0, 1)


def attend(module: nn.Module, query, keys, values, scores: dict) -> torch.Tensor:
    output, weights = _attention_forward(module, query, keys, values, None, scaling=SCALING, **scores)
    assert weights is None
    return output[0]


def test_rows_in_pages_and_parts_see_what_the_formula_says(kind: LayerKind, scores: dict):
    module = Block()
    owner = SpanAttention(nn.ModuleList([module]), [kind])
    pool = KVPool([kind], lay_out([kind]), 20, SIZE, device=torch.device("cpu"), dtype=torch.float32)
    # Slots that were never written must not matter, whatever an earlier session left there.
    pool.keys[0].fill_(torch.nan)
    pool.values[0].fill_(torch.nan)
    rows = [random_row(seed) for seed in range(2)]
    pages = [range(6, 12), (3, 15, 1, 0, 19, 5)]
    results: list[list[torch.Tensor]] = [[], []]
    for turn in TURNS:
        segments = [
            Segment(first, end - first, [RowPages(0, pages[row][: -(-end // SIZE)])], LENGTH)
            for row, (first, end) in turn.items()
        ]
        query, keys, values = (
            torch.cat([getattr(rows[row], name)[:, :, first:end] for row, (first, end) in turn.items()], dim=2)
            for name in ("query", "keys", "values")
        )
        owner.view = BatchView(pool, segments)
        owner.view.update(keys, values, 0)
        output = attend(module, query, keys, values, scores)
        for row, part in zip(turn, output.split([segment.count for segment in segments]), strict=True):
            results[row].append(part)
    for row, parts in zip(rows, results, strict=True):
        torch.testing.assert_close(torch.cat(parts), by_the_formula(row, kind, scores), rtol=1e-5, atol=1e-5)


def test_without_a_batch_whole_sequences_follow_the_same_rules(kind: LayerKind, scores: dict):
    module = Block()
    SpanAttention(nn.ModuleList([module]), [kind])
    row = random_row(3)
    result = attend(module, row.query, row.keys, row.values, scores)
    torch.testing.assert_close(result, by_the_formula(row, kind, scores), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["position_bias", "an_option_of_tomorrow"])
def test_what_attention_does_not_know_is_refused_rather_than_ignored(name: str):
    module = Block()
    SpanAttention(nn.ModuleList([module]), [KINDS["full"]])
    row = random_row(4)
    with pytest.raises(TypeError, match=f"passes {name}, which peerd does not know"):
        _attention_forward(module, row.query, row.keys, row.values, None, **{name: torch.zeros(1)})
    _attention_forward(module, row.query, row.keys, row.values, None, **{name: None}, dropout=0.0, use_cache=True)


@pytest.mark.parametrize("view", [BatchView, RowView, MixedView])
def test_a_cache_takes_no_argument_that_it_would_ignore(view: Any):
    with pytest.raises(TypeError, match="an_option_of_tomorrow"):
        view.update(None, None, None, 0, an_option_of_tomorrow=1)


def test_keys_repeated_for_every_head_give_what_shared_ones_give():
    query, mask = torch.randn(1, 6, 5, 8), torch.ones(5, 9, dtype=torch.bool).tril(4)
    keys, values = torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 4)
    shared = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, enable_gqa=True)
    own = for_every_head(keys, 6), for_every_head(values, 6)
    torch.testing.assert_close(F.scaled_dot_product_attention(query, *own, attn_mask=mask), shared)
