"""Where the rows of a batch lie in the KV pages: what a paged attention is given."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, eq=False)
class PagedRows:
    """Where the keys of each query lie; shared by all blocks that keep the same pages.

    table: int32 `[rows, max_pages]`; entry i holds the page of positions `i * page_tokens` and on. Entries beyond
        what a row sees may hold any number.
    lengths: int32 `[rows]`: the query's own position + 1, or 0 for a padding row, whose result is 0.
    first: int32 `[rows]`: the first position that the query sees.
    """

    table: torch.Tensor
    lengths: torch.Tensor
    first: torch.Tensor
    page_tokens: int

    def __len__(self) -> int:
        return self.table.shape[0]

    @property
    def max_tokens(self) -> int:
        """How many positions the widest row could have."""
        return self.table.shape[1] * self.page_tokens
