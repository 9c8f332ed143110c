"""One row's cache in all blocks of a span, and how far back the row can still be cut.

That depends on the blocks that keep only the last positions. `floor` is the length down to which a row may be cut
anywhere. It rises with the row, to `rollback_room(max_rollback)` positions behind the longest length that the row has
had. Below the floor a row may be cut only if no block has lost anything that the next position sees; it may always be
cut to 0. Pages that blocks no longer need are given back only after a batch has ended, so that a step that failed in
the batch can be undone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from peerd.compute.kv.layout import Demand, rollback_room
from peerd.compute.kv.page_table import PageTable
from peerd.compute.kv.reserve import PageReserve
from peerd.compute.steps import PageCopy, RowPages, StateCopy, StateHome


class RowState(NamedTuple):
    """A row's length and its floor."""

    length: int = 0
    floor: int = 0


class Retention:
    """What a session's rows keep; it is the same for each row."""

    def __init__(self, demands: Sequence[Demand], max_rollback: int) -> None:
        self._keeps = tuple(demand.keep for demand in demands)
        self._limited = tuple(keep for keep in self._keeps if keep.reach is not None)
        #: How many positions from its end a row can certainly be cut.
        self.room = rollback_room(max_rollback)
        #: Whether some blocks keep running states.
        self.has_states = any(keep.running for keep in self._keeps)

    @property
    def keeps_everything(self) -> bool:
        """Whether rows may be cut at any length at any time."""
        return not self._limited

    def allows_cut(self, state: RowState, length: int) -> bool:
        """Whether a row in this state can go on from `length`, which is not more than its length."""
        if length >= state.floor or not length:
            return True
        return all(keep.first_seen(length) >= keep.first_seen(state.floor) for keep in self._limited)

    def after(self, state: RowState, start: int, end: int) -> RowState:
        """The row's state after it was cut at `start` and grew to `end`."""
        if not self._limited:
            return RowState(end)
        return RowState(end, max(state.floor if start else 0, end - self.room, 0))

    def first_needed(self, floor: int) -> tuple[int, ...]:
        """For each retention rule with pages, the first position that a row with this floor needs."""
        return tuple(keep.first_seen(floor) for keep in self._keeps if not keep.running)


class RowCache:
    """One row of a session: a page table for each retention rule."""

    def __init__(self, reserve: PageReserve, row: int, retention: Retention) -> None:
        self.floor = 0
        #: Where the row keeps running states; None if no block has one.
        self.state_home = StateHome(reserve.states[row], retention.room) if reserve.states else None
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
        """For each retention rule, how many pages the row holds or shares."""
        return [table.held_pages for table in self._tables]

    def snapshot(self) -> Sequence[RowPages]:
        """The row's pages, by group. The caller must not change them."""
        if len(self._tables) == 1:
            return self._tables[0].snapshot()
        return [pages for table in self._tables for pages in table.snapshot()]

    def cut(self, length: int) -> None:
        """Forget the positions from `length` on, or all of them if the row could not go on from what is left."""
        if length >= self.length:
            return
        if not length or not self._retention.allows_cut(self.state, length):
            length = self.floor = 0
        for table in self._tables:
            table.cut(length)

    def pages_to_grow(self, count: int) -> int:
        """How many of the pool's pages `grow` would take."""
        return sum(table.pages_to_grow(count) for table in self._tables)

    def grow(self, count: int) -> list[PageCopy]:
        """Make room to write `count` positions at the end. Returns the copies that this needs first."""
        if len(self._tables) == 1:
            return self._tables[0].grow(count)
        return [copy for table in self._tables for copy in table.grow(count)]

    def become(self, source: RowCache, length: int) -> list[StateCopy]:
        """Share the first `length` positions of `source` in place of what this row had. Returns the copies of running
        states that this needs first.
        """
        for table, other in zip(self._tables, source._tables, strict=True):
            table.become(other, length)
        self.floor = source.floor if length else 0
        if self.state_home is None or source.state_home is None or source is self or not length:
            return []
        return [StateCopy(source.state_home, self.state_home)]

    def settle(self) -> None:
        """Give back the pages that no promised rollback needs. Call it only while no batch uses the row."""
        floor = self._retention.after(self.state, self.length, self.length).floor
        if floor > self.floor:
            self.floor = floor
            for table, position in zip(self._tables, self._retention.first_needed(floor), strict=True):
                table.forget_before(position)
