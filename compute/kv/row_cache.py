"""One row's cache in all blocks of a span, and how far back it can still be cut.

Blocks that keep only the last positions decide that: `floor` is the length from which on a row may be cut
anywhere. It rises with the row, to `kept_back(max_rollback)` positions behind the longest that the row has
been. Below it a row may be cut where no block misses anything that the next position sees, and always to 0.
What blocks no longer need is given back once a batch has ended, so a step that failed in it can be undone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from peerd.compute.kv.layout import Demand, kept_back
from peerd.compute.kv.pages import PageReserve, PageTable
from peerd.compute.steps import PageCopy, RowPages


class RowState(NamedTuple):
    """A row's length and its floor."""

    length: int = 0
    floor: int = 0


class Retention:
    """What a session's rows keep: the same for each of them."""

    def __init__(self, demands: Sequence[Demand], max_rollback: int) -> None:
        self._keeps = tuple(demand.keep for demand in demands)
        self._limited = tuple(keep for keep in self._keeps if keep.reach is not None)
        self._back = kept_back(max_rollback)

    @property
    def keeps_everything(self) -> bool:
        """Whether rows may be cut anywhere, ever."""
        return not self._limited

    def allows_cut(self, state: RowState, length: int) -> bool:
        """Whether such a row can go on from `length` positions, of those that it has."""
        if length >= state.floor or not length:
            return True
        return all(keep.first_seen(length) >= keep.first_seen(state.floor) for keep in self._limited)

    def after(self, state: RowState, start: int, end: int) -> RowState:
        """The row once it was cut at `start` and grew to `end`."""
        if not self._limited:
            return RowState(end)
        return RowState(end, max(state.floor if start else 0, end - self._back, 0))

    def first_needed(self, floor: int) -> tuple[int, ...]:
        """By kind of block the first position that a row with this floor needs."""
        return tuple(keep.first_seen(floor) for keep in self._keeps)


class RowCache:
    """One row of a session: a page table for each kind of block."""

    def __init__(self, reserve: PageReserve, row: int, retention: Retention) -> None:
        self.floor = 0
        self._tables = [PageTable(stock, row) for stock in reserve.stocks]
        self._retention = retention

    def __repr__(self) -> str:
        return f"<RowCache floor={self.floor} {self._tables}>"

    @property
    def length(self) -> int:
        return self._tables[0].length

    @property
    def state(self) -> RowState:
        return RowState(self.length, self.floor)

    @property
    def held_pages(self) -> list[int]:
        """Pages of each kind that the row holds or shares."""
        return [table.held_pages for table in self._tables]

    def snapshot(self) -> Sequence[RowPages]:
        """Where the row lies, by group. Not to be changed."""
        if len(self._tables) == 1:
            return self._tables[0].snapshot()
        return [pages for table in self._tables for pages in table.snapshot()]

    def cut(self, length: int) -> None:
        """Forget the positions from `length` on; all of them where what is left could not be gone on from."""
        if length >= self.length:
            return
        if not length or not self._retention.allows_cut(self.state, length):
            length = self.floor = 0
        for table in self._tables:
            table.cut(length)

    def grow(self, count: int) -> list[PageCopy]:
        """Make room to write `count` positions at the end. Returns the copies that this needs first."""
        if len(self._tables) == 1:
            return self._tables[0].grow(count)
        return [copy for table in self._tables for copy in table.grow(count)]

    def become(self, source: RowCache, length: int) -> None:
        """Share the first `length` positions of `source` in place of what this row had."""
        for table, other in zip(self._tables, source._tables, strict=True):
            table.become(other, length)
        self.floor = source.floor if length else 0

    def settle(self) -> None:
        """Give back what no rollback that was promised needs: nothing runs on this row."""
        floor = self._retention.after(self.state, self.length, self.length).floor
        if floor > self.floor:
            self.floor = floor
            for table, position in zip(self._tables, self._retention.first_needed(floor), strict=True):
                table.forget_before(position)
