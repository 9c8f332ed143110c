"""Attention over compressed latents (MLA), which DeepSeek's families keep in the cache.

For each position the cache holds one latent and one rotary part for all heads. There are two ways to attend over
them. Expanding makes keys and values of every cached position for every head, as Transformers does: cheap for many
queries. Absorbing multiplies the queries instead, which then meet the latents as if all heads shared one key: cheap
for few queries, as in every decode. Both give the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class LatentAttention:
    """One block's attention over its cached latents, computed with the weights of `module`."""

    def __init__(self, module: Any) -> None:
        self._module = module
        rank, nope, value = int(module.kv_lora_rank), int(module.qk_nope_head_dim), int(module.v_head_dim)
        self._nope, self._value = nope, value
        # For each cached position, expanding costs `rank * (nope + value)` a head once, and saves each query `2 * rank
        # - nope - value` compared with meeting the latents.
        dearer = 2 * rank - nope - value
        self._few = rank * (nope + value) // dearer if dearer > 0 else None

    def __call__(
        self, query: torch.Tensor, latents: torch.Tensor, rotary: torch.Tensor, attend: Attend
    ) -> torch.Tensor:
        """`query` `[1, heads, n, nope + rope]` over `latents` `[1, 1, m, rank]` and `rotary` `[1, 1, m, rope]`.

        `attend` computes plain attention for a query, keys and values. Returns `[1, n, heads, value_dim]`.
        """
        project = self._module.kv_b_proj
        # A layer that is not plain (quantized, or with an adapter) can only be asked for its product.
        plain = type(project) is nn.Linear and not project._forward_hooks
        if plain and (self._few is None or query.shape[2] <= self._few):
            return self._absorb(project.weight, query, latents, rotary, attend)
        keys, values = self._module.expand_kv(latents, rotary)
        return attend(query, keys, values)

    def _absorb(
        self, weight: torch.Tensor, query: torch.Tensor, latents: torch.Tensor, rotary: torch.Tensor, attend: Attend
    ) -> torch.Tensor:
        # [heads, nope, rank] makes keys of latents, [heads, value, rank] values.
        by_head = weight.view(query.shape[1], self._nope + self._value, -1)
        to_key, to_value = by_head[:, : self._nope], by_head[:, self._nope :]
        absorbed = torch.cat((query[..., : self._nope] @ to_key, query[..., self._nope :]), dim=-1)
        output = attend(absorbed, torch.cat((latents, rotary), dim=-1), latents)
        return torch.einsum("bnhr,hvr->bnhv", output, to_value)
