"""Attention over compressed latents gives the numbers of expanded keys and values, whichever way it goes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from peerd.compute.attention.latent import LatentAttention

HEADS, NOPE, ROPE, VALUE = 3, 6, 4, 5
LENGTH = 9
# Of a rank of 16, absorbing pays for fewer than 9 queries: 16 * 11 // (2 * 16 - 11) = 8.
RANK, FEW = 16, 8


class Attention(nn.Module):
    """What DeepSeek's module has of it, in Transformers' own words."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.kv_lora_rank, self.qk_nope_head_dim, self.v_head_dim = rank, NOPE, VALUE
        self.kv_b_proj = nn.Linear(rank, HEADS * (NOPE + VALUE), bias=False)
        self.expanded = 0

    def expand_kv(self, latents: torch.Tensor, rotary: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.expanded += 1
        both = self.kv_b_proj(latents).view(1, latents.shape[2], HEADS, NOPE + VALUE).transpose(1, 2)
        keys, values = both.split([NOPE, VALUE], dim=-1)
        return torch.cat((keys, rotary.expand(-1, HEADS, -1, -1)), dim=-1), values


def plain(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    output = F.scaled_dot_product_attention(query, keys, values, scale=0.3, enable_gqa=True)
    return output.transpose(1, 2)


@pytest.fixture
def inputs() -> Callable[[int], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    def make(count: int, rank: int = RANK) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(count)
        shapes = (HEADS, count, NOPE + ROPE), (1, LENGTH, rank), (1, LENGTH, ROPE)
        query, latents, rotary = (torch.randn(1, *shape, generator=generator) for shape in shapes)
        return query, latents, rotary

    return make


@pytest.mark.parametrize(("count", "expands"), [(1, False), (FEW, False), (FEW + 1, True)])
@torch.no_grad()
def test_few_queries_meet_the_latents_themselves_and_many_the_expanded_keys(
    inputs: Callable[..., tuple[torch.Tensor, ...]], count: int, expands: bool
) -> None:
    module = Attention(RANK)
    query, latents, rotary = inputs(count)
    result = LatentAttention(module)(query, latents, rotary, plain)
    assert bool(module.expanded) == expands
    expected = plain(query, *module.expand_kv(latents, rotary))
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_latents_narrower_than_keys_are_never_expanded(inputs: Callable[..., tuple[torch.Tensor, ...]]) -> None:
    module = Attention(rank=4)
    query, latents, rotary = inputs(50, 4)
    result = LatentAttention(module)(query, latents, rotary, plain)
    assert not module.expanded
    torch.testing.assert_close(result, plain(query, *module.expand_kv(latents, rotary)), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_layer_that_is_more_than_a_weight_is_only_asked_for_its_product(
    inputs: Callable[..., tuple[torch.Tensor, ...]],
) -> None:
    """Quantized, or with an adapter: its weight alone would not be what it computes."""

    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    module = Attention(RANK)
    module.kv_b_proj = Doubled(RANK, HEADS * (NOPE + VALUE), bias=False)
    query, latents, rotary = inputs(1)
    result = LatentAttention(module)(query, latents, rotary, plain)
    torch.testing.assert_close(result, plain(query, *module.expand_kv(latents, rotary)), rtol=1e-5, atol=1e-5)
