"""Which pages each row of a session holds, and which rows share one.

A row takes a page when its positions come to it. Rows share pages, with reference counts, until one of them writes. A
row that keeps only its last positions gives pages back at its beginning and takes pages at its end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from peerd.compute.kv.layout import pages_for
from peerd.compute.kv.page_pool import PagePool
from peerd.compute.steps import PageCopy, RowPages


class Page:
    """One page of the pool in each group with one retention rule, `at`, and how many rows hold it."""

    __slots__ = ("at", "holders")

    def __init__(self, at: tuple[int, ...]) -> None:
        self.at = at
        self.holders = 1


class PageStock:
    """Takes pages for a session's rows, in the `groups` groups with one retention rule.

    per_row: the most pages that a row has in a group. on_count: called with how many of the pool's pages were taken, or
    given back if negative.
    """

    def __init__(self, pool: PagePool, groups: int, per_row: int, on_count: Callable[[int], None]) -> None:
        self.page_tokens = pool.page_tokens
        self.groups = groups
        self.used_pages = 0
        self._pool = pool
        self._per_row = per_row
        self._on_count = on_count
        # By row, then by group.
        self._homes: dict[int, list[range]] = {}
        self._tables: list[PageTable] = []

    def __repr__(self) -> str:
        return f"<PageStock {self.used_pages} pages in {self.groups} groups>"

    def enlist(self, table: PageTable) -> None:
        """Note a row whose pages `close` gives back."""
        self._tables.append(table)

    def close(self) -> None:
        """Give all pages back."""
        for table in self._tables:
            table.cut(0)
        for homes in self._homes.values():
            for home in homes:
                self._pool.leave_home(home)

    def take(self, row: int, index: int) -> Page:
        """Take a page for the row's `index`-th place: the one at its home if that is unused, else any."""
        homes = self._homes.get(row)
        if homes is None:
            homes = self._homes[row] = [self._pool.find_home(self._per_row) for _ in range(self.groups)]
        wanted = [home[index % len(home)] if home else None for home in homes]
        self._count(1)
        return Page(tuple(map(self._pool.take, wanted)))

    def drop(self, page: Page) -> None:
        """Count one row less that holds the page."""
        page.holders -= 1
        if not page.holders:
            self._pool.give_back(page.at)
            self._count(-1)

    def in_pool(self, pages: Sequence[Page]) -> list[Sequence[int]]:
        """The pool's pages for each group: as a `range` if they lie side by side, else as a tuple."""
        if not pages:
            return [()] * self.groups
        return [_as_run(column) for column in zip(*(page.at for page in pages), strict=True)]

    def _count(self, pages: int) -> None:
        self.used_pages += pages
        self._on_count(pages * self.groups)


def _as_run(pages: tuple[int, ...]) -> Sequence[int]:
    run = range(pages[0], pages[0] + len(pages))
    return run if pages[-1] == run[-1] and pages == tuple(run) else pages


class PageTable:
    """One row's pages in one stock: the row's length in positions, and the pages that hold the last of them."""

    def __init__(self, stock: PageStock, row: int) -> None:
        self.length = 0
        self._stock = stock
        self._row = row
        self._first = 0
        self._pages: list[Page] = []
        self._snapshot: list[RowPages] | None = None
        stock.enlist(self)

    def __repr__(self) -> str:
        return f"<PageTable row={self._row} length={self.length} {len(self._pages)} pages from the {self._first}th>"

    @property
    def held_pages(self) -> int:
        return len(self._pages)

    def snapshot(self) -> list[RowPages]:
        """The row's pages in order, for each group. The caller must not change them."""
        if self._snapshot is None:
            first = self._first * self._stock.page_tokens
            self._snapshot = [RowPages(first, pages) for pages in self._stock.in_pool(self._pages)]
        return self._snapshot

    def cut(self, length: int) -> None:
        """Forget the positions from `length` on. The table must still hold those before `length` that are needed."""
        if length >= self.length:
            return
        self.length = length
        self._forget_from(max(pages_for(length, self._stock.page_tokens) - self._first, 0))
        if not length:
            self._first = 0

    def forget_before(self, position: int) -> None:
        """Give back the pages that hold only positions before `position`."""
        whole = min(position // self._stock.page_tokens - self._first, len(self._pages))
        if whole > 0:
            for page in self._pages[:whole]:
                self._stock.drop(page)
            del self._pages[:whole]
            self._first += whole
            self._snapshot = None

    def pages_to_grow(self, count: int) -> int:
        """How many of the pool's pages `grow` would take."""
        new = pages_for(self.length + count, self._stock.page_tokens) - self._first - len(self._pages)
        return (max(0, new) + self._ends_shared) * self._stock.groups

    def grow(self, count: int) -> list[PageCopy]:
        """Make room to write `count` positions at the end. Returns the copies that this needs first."""
        stock, size = self._stock, self._stock.page_tokens
        copies: list[PageCopy] = []
        if self._ends_shared:
            shared = self._pages[-1]
            own = self._pages[-1] = stock.take(self._row, self._first + len(self._pages) - 1)
            copies = [PageCopy(source, target) for source, target in zip(shared.at, own.at, strict=True)]
            stock.drop(shared)
            self._snapshot = None
        self.length += count
        while (index := self._first + len(self._pages)) * size < self.length:
            self._pages.append(stock.take(self._row, index))
            self._snapshot = None
        return copies

    def become(self, source: PageTable, length: int) -> None:
        """Replace this row by the first `length` positions of `source`, or what `source` keeps of them, and share its
        pages.
        """
        first = source._first
        pages = source._pages[: max(pages_for(length, self._stock.page_tokens) - first, 0)]
        for page in pages:
            page.holders += 1
        self._forget_from(0)
        self._pages = pages
        self._first = first if length else 0
        self.length = length

    @property
    def _ends_shared(self) -> bool:
        """Whether the last page, which is not full, is another row's too. Only such a page can hold both old positions,
        which others share, and new ones.
        """
        return bool(self.length % self._stock.page_tokens) and self._pages[-1].holders > 1

    def _forget_from(self, index: int) -> None:
        for page in self._pages[index:]:
            self._stock.drop(page)
        del self._pages[index:]
        self._snapshot = None
