"""Hands out KV memory in pages: which row owns which pages, and which rows share one.

Only page numbers occur here, no tensors. When a session opens, it reserves all pages that it could ever need, so a row
that grows is never refused, and the count of free pages is exact at any moment. Rows of a session share pages, with
reference counts, until one of them writes. A row that keeps only its last positions gives pages back at its beginning
and takes pages at its end.

A row whose pages lie side by side can be read without a gather. So each row has a home, a run of neighbouring pages if
the pool has one. It takes its pages there, and begins again at the home's start when it outgrows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from peerd.compute.errors import NoRoomError
from peerd.compute.kv.layout import Demand, pages_for
from peerd.compute.steps import PageCopy, RowPages

_FREE = b"\x01"


class PagePool:
    """All pages of one span, committed in sets of one page a group. Only the main thread uses it."""

    def __init__(self, sets: int, page_tokens: int, groups: int = 1) -> None:
        if sets < 1 or page_tokens < 1:
            raise ValueError(f"a pool has at least one page of one token, not {sets} of {page_tokens}")
        self.page_tokens = page_tokens
        self.groups = groups
        self.sets = self.free_sets = sets
        # One byte a page: finding a run of n free pages is a search for n ones.
        self._map = bytearray(_FREE * (sets * groups))

    def __repr__(self) -> str:
        return f"<PagePool {self.free_tokens} of {self.total_tokens} tokens free, {self.page_tokens} a page>"

    @property
    def pages(self) -> int:
        return len(self._map)

    @property
    def total_tokens(self) -> int:
        return self.sets * self.page_tokens

    @property
    def free_tokens(self) -> int:
        return self.free_sets * self.page_tokens

    def reserve(self, rows: int, demands: Sequence[Demand]) -> PageReserve:
        """Take what `demands` say for each of `rows` rows. Raises NoRoomError, and then takes nothing."""
        wanted = pages_for(rows * sum(demand.groups * demand.pages_per_row for demand in demands), self.groups)
        if wanted > self.free_sets:
            free, tokens = self.free_tokens, wanted * self.page_tokens
            raise NoRoomError(f"{tokens} KV tokens wanted, {free} free", free)
        self.free_sets -= wanted
        stocks, states = [], []
        for demand in demands:
            homes = [[self._take_home(demand.pages_per_row) for _ in range(rows)] for _ in range(demand.groups)]
            if demand.keep.running:
                states = homes[0]
            else:
                stocks.append(PageStock(self.page_tokens, homes))
        return PageReserve(self, wanted, tuple(stocks), states)

    def give_back(self, sets: int, homes: Sequence[Sequence[int]]) -> None:
        """Free what a reserve took: its page sets and the pages of its `homes`."""
        for home in homes:
            for page in home:
                self._map[page] = 1
        self.free_sets += sets

    def _take_home(self, count: int) -> Sequence[int]:
        start = self._map.find(_FREE * count)
        home = range(start, start + count) if start >= 0 else self._scattered(count)
        for page in home:
            self._map[page] = 0
        return home

    def _scattered(self, count: int) -> list[int]:
        pages = []
        page = -1
        for _ in range(count):
            page = self._map.index(_FREE, page + 1)
            pages.append(page)
        return pages


class PageReserve:
    """One session's pages: a stock for each retention rule, and for each row the pages of its running states."""

    def __init__(
        self, pool: PagePool, sets: int, stocks: tuple[PageStock, ...], states: Sequence[Sequence[int]] = ()
    ) -> None:
        self.stocks = stocks
        #: By row; empty if no block has a running state.
        self.states = states
        self._pool = pool
        self._sets = sets

    def __repr__(self) -> str:
        return f"<PageReserve {self._sets} sets {self.stocks}>"

    def close(self) -> None:
        """Return all pages to the pool."""
        self._pool.give_back(self._sets, [*(home for stock in self.stocks for home in stock.homes), *self.states])
        self._sets = 0
        self.stocks, self.states = (), ()


class PageStock:
    """A session's pages in the groups with one retention rule, and how many of its rows hold each page.

    A page here stands for one page of the pool in each of these groups. The pages are numbered from 0: first the home
    of row 0, then the home of row 1, and so on.
    """

    def __init__(self, page_tokens: int, homes: list[list[Sequence[int]]]) -> None:
        self.page_tokens = page_tokens
        #: By group, then by row.
        self._homes = homes
        self._per_row = len(homes[0][0])
        self._free = set(range(len(homes[0]) * self._per_row))
        self._holders: dict[int, int] = {}
        self._flat: list[list[int]] | None = None

    def __repr__(self) -> str:
        return f"<PageStock {len(self._holders)} pages in use, {len(self._free)} not>"

    @property
    def used_pages(self) -> int:
        return len(self._holders)

    @property
    def homes(self) -> list[Sequence[int]]:
        """The pool's pages that this stock took."""
        return [home for homes in self._homes for home in homes]

    def take(self, row: int, index: int) -> int:
        """Take a page for the row's `index`-th place: the one at its home if that is free, else any free one."""
        page = row * self._per_row + index % self._per_row
        if page in self._free:
            self._free.remove(page)
        else:
            page = self._free.pop()
        self._holders[page] = 1
        return page

    def hold(self, page: int) -> None:
        """Count one more row that holds the page."""
        self._holders[page] += 1

    def drop(self, page: int) -> None:
        """Count one row less that holds the page."""
        self._holders[page] -= 1
        if not self._holders[page]:
            del self._holders[page]
            self._free.add(page)

    def is_shared(self, page: int) -> bool:
        return self._holders[page] > 1

    def in_pool(self, pages: Sequence[int]) -> list[Sequence[int]]:
        """The pool's pages for each group: as a `range` if they lie side by side, else as a tuple."""
        if not pages:
            return [()] * len(self._homes)
        first, count = pages[0], len(pages)
        row, offset = divmod(first, self._per_row)
        in_order = pages[-1] == first + count - 1 and list(pages) == list(range(first, first + count))
        if in_order and offset + count <= self._per_row:
            homes = [group[row][offset : offset + count] for group in self._homes]
            return [home if isinstance(home, range) else tuple(home) for home in homes]
        if self._flat is None:
            self._flat = [list(chain.from_iterable(group)) for group in self._homes]
        return [tuple(group[page] for page in pages) for group in self._flat]

    def copies(self, source: int, target: int) -> list[PageCopy]:
        """The copies that make page `target` equal to page `source` in every group."""
        found = self.in_pool((source,)), self.in_pool((target,))
        return [PageCopy(before[0], after[0]) for before, after in zip(*found, strict=True)]


class PageTable:
    """One row's pages in one stock: the row's length in positions, and the pages that hold the last of them."""

    def __init__(self, stock: PageStock, row: int) -> None:
        self.length = 0
        self._stock = stock
        self._row = row
        self._first = 0
        self._pages: list[int] = []
        self._snapshot: list[RowPages] | None = None

    def __repr__(self) -> str:
        return f"<PageTable row={self._row} length={self.length} pages={self._pages} from the {self._first}th>"

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

    def grow(self, count: int) -> list[PageCopy]:
        """Make room to write `count` positions at the end. Returns the copies that this needs first."""
        stock, size = self._stock, self._stock.page_tokens
        copies: list[PageCopy] = []
        # Only the last page can hold both old positions, which others may share, and new ones.
        if self.length % size and stock.is_shared(self._pages[-1]):
            shared = self._pages[-1]
            self._pages[-1] = stock.take(self._row, self._first + len(self._pages) - 1)
            copies = stock.copies(shared, self._pages[-1])
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
            self._stock.hold(page)
        self._forget_from(0)
        self._pages = pages
        self._first = first if length else 0
        self.length = length

    def _forget_from(self, index: int) -> None:
        for page in self._pages[index:]:
            self._stock.drop(page)
        del self._pages[index:]
        self._snapshot = None
