"""An embedding whose table stays in the checkpoint's file: only the rows that are looked up are read.

A client that computes no logits needs a row of the table for each token, and the table of a large vocabulary takes
hundreds of megabytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.func import functional_call

from peerd.compute.errors import CheckpointError

if TYPE_CHECKING:
    from peerd.compute.checkpoint.weights import ReadRows


class StoredEmbedding(nn.Module):
    """Looks rows up by `rows`. What else `embedding` does to them, such as a scale, it still does."""

    def __init__(self, embedding: nn.Embedding, rows: ReadRows) -> None:
        super().__init__()
        self.num_embeddings = embedding.num_embeddings
        self._rows = rows
        self._inner = embedding
        # It numbers a row of the whole table; only training reads it.
        embedding.padding_idx = None
        empty = torch.empty(0, embedding.embedding_dim, dtype=embedding.weight.dtype)
        embedding.weight = nn.Parameter(empty, requires_grad=False)

    @property
    def weight(self) -> torch.Tensor:
        """The part of the table that is in memory: no rows."""
        return self._inner.weight

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Token ids, int64 [n], to [n, width]. Raises CheckpointError if the file cannot be read."""
        ids = token_ids.tolist()
        place_of = {token_id: place for place, token_id in enumerate(dict.fromkeys(ids))}
        table = self._rows(list(place_of))
        if table.shape[1] != self._inner.embedding_dim:
            raise CheckpointError(f"an embedding has {table.shape[1]} columns, not {self._inner.embedding_dim}")
        places = torch.tensor([place_of[token_id] for token_id in ids], dtype=torch.long)
        weights = {"weight": table.to(self.weight.dtype)}
        result: torch.Tensor = functional_call(self._inner, weights, (places,))
        return result
