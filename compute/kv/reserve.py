"""What one session may take of the KV pool, and how much of the pool it is expected to need.

A row takes a page when its positions come to it, so a session that asked for a long row and says little leaves the
rest to others. Which sessions may open is decided by what all are expected to need: twice the most that each has had,
and never more than it asked for. So the pool runs out of pages only after its sessions have together doubled. What a
session then computes again, because it gave its pages up, is no more than what was computed meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence

from peerd.compute.errors import NoRoomError
from peerd.compute.kv.layout import Demand, pages_for
from peerd.compute.kv.page_pool import PagePool
from peerd.compute.kv.page_table import PageStock

#: How many times the pages that a session has had, or begins with, it is expected to need.
GROWTH = 2


def expected_sets(rows: int, demands: Sequence[Demand], groups: int, used: int | None) -> int:
    """How many page sets a session is expected to need that had, or begins with, `used` pages; None: all that it asked
    for.

    Running states take their pages at once and never grow.
    """
    fixed = rows * sum(demand.groups * demand.pages_per_row for demand in demands if demand.keep.running)
    most = rows * sum(demand.groups * demand.pages_per_row for demand in demands if not demand.keep.running)
    return pages_for(fixed + (most if used is None else min(most, GROWTH * used)), groups)


class PageReserve:
    """One session's pages: up to what `demands` say for each of `rows` rows.

    begins_with: how many pages it fills soon; None if that is unknown. Raises NoRoomError if it is expected to need
    more than is free, and then changes nothing.
    """

    def __init__(self, pool: PagePool, rows: int, demands: Sequence[Demand], begins_with: int | None = None) -> None:
        self._pool = pool
        self._rows = rows
        self._demands = tuple(demands)
        self._begins_with = begins_with
        self._used = self._peak = 0
        self._sets = expected_sets(rows, demands, pool.groups, begins_with)
        if self._sets > pool.free_sets:
            wanted, free = self._sets * pool.page_tokens, pool.free_tokens
            raise NoRoomError(f"{wanted} KV tokens wanted, {free} free", free)
        pool.commit(self._sets)
        #: By retention rule.
        self.stocks = tuple(
            PageStock(pool, demand.groups, demand.pages_per_row, self._count_used)
            for demand in demands
            if not demand.keep.running
        )
        running = sum(demand.pages_per_row for demand in demands if demand.keep.running)
        #: The pages of running states, by row; empty if no block has one.
        self.states = [pool.take_run(running) for _ in range(rows)] if running else []

    def __repr__(self) -> str:
        return f"<PageReserve {self.tokens} tokens {self.stocks}>"

    @property
    def tokens(self) -> int:
        """KV tokens that the session is expected to need."""
        return self._sets * self._pool.page_tokens

    @property
    def used_pages(self) -> int:
        """The pool's pages that it has, those of running states included."""
        return self._used + sum(map(len, self.states))

    @property
    def unused_pages(self) -> int:
        """The pool's pages that nobody holds."""
        return self._pool.free_pages

    def close(self) -> None:
        """Return all pages to the pool."""
        for stock in self.stocks:
            stock.close()
        for pages in self.states:
            self._pool.give_back(pages)
        self._pool.commit(-self._sets)
        self._sets = 0
        self.stocks, self.states = (), []

    def _count_used(self, pages: int) -> None:
        self._used += pages
        if self._used > self._peak:
            self._peak = self._used
            sets = expected_sets(self._rows, self._demands, self._pool.groups, max(self._peak, self._begins_with or 0))
            self._pool.commit(sets - self._sets)
            self._sets = sets
