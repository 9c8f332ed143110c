"""KV memory in pages: who owns which, and which rows share one.

Knows page numbers; knows no tensors. A session reserves at opening all pages it could ever need, so a
row that grows is never refused, and the free count is exact at any moment. Rows of a session share
pages by reference count until one of them writes. The difficulty is locality: a row whose pages lie
side by side can be read without a gather, so each row has a home, a run of neighbouring pages where
the pool has one, and takes its pages there.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from peerd.compute.engine_errors import NoRoomError
from peerd.compute.steps import PageCopy

_FREE = b"\x01"


class PagePool:
    """All pages of one span. Not thread-safe: the main thread alone touches it."""

    def __init__(self, pages: int, page_tokens: int) -> None:
        if pages < 1 or page_tokens < 1:
            raise ValueError(f"a pool has at least one page of one token, not {pages} of {page_tokens}")
        self.pages = pages
        self.page_tokens = page_tokens
        self.free_pages = pages
        # One byte a page: finding a run of n free pages is a search for n ones.
        self._map = bytearray(_FREE * pages)

    def __repr__(self) -> str:
        return f"<PagePool {self.free_pages} of {self.pages} pages free, {self.page_tokens} tokens each>"

    def pages_for(self, tokens: int) -> int:
        """Pages that hold `tokens` positions of one row."""
        return -(-tokens // self.page_tokens)

    def reserve(self, rows: int, pages_per_row: int) -> PageReserve:
        """Take `rows * pages_per_row` pages. Raises NoRoomError, and then takes none."""
        if rows * pages_per_row > self.free_pages:
            free_tokens = self.free_pages * self.page_tokens
            wanted = rows * pages_per_row * self.page_tokens
            raise NoRoomError(f"{wanted} KV tokens wanted, {free_tokens} free", free_tokens)
        return PageReserve(self, [self._take_home(pages_per_row) for _ in range(rows)])

    def give_back(self, homes: Sequence[Sequence[int]]) -> None:
        """Free the pages of a reserve."""
        for home in homes:
            for page in home:
                self._map[page] = 1
            self.free_pages += len(home)

    def _take_home(self, count: int) -> Sequence[int]:
        start = self._map.find(_FREE * count)
        home = range(start, start + count) if start >= 0 else self._scattered(count)
        for page in home:
            self._map[page] = 0
        self.free_pages -= count
        return home

    def _scattered(self, count: int) -> list[int]:
        pages = []
        page = -1
        for _ in range(count):
            page = self._map.index(_FREE, page + 1)
            pages.append(page)
        return pages


class PageReserve:
    """One session's pages, and how many of its rows hold each."""

    def __init__(self, pool: PagePool, homes: list[Sequence[int]]) -> None:
        self.page_tokens = pool.page_tokens
        self._pool = pool
        self._homes = homes
        self._free = {page for home in homes for page in home}
        self._holders: dict[int, int] = {}

    def __repr__(self) -> str:
        return f"<PageReserve {len(self._holders)} pages in use, {len(self._free)} not>"

    @property
    def used_pages(self) -> int:
        return len(self._holders)

    def take(self, row: int, index: int) -> int:
        """A page for the row's `index`-th place: the one at its home where nobody holds it."""
        page = self._homes[row][index]
        if page in self._free:
            self._free.remove(page)
        else:
            page = self._free.pop()
        self._holders[page] = 1
        return page

    def hold(self, page: int) -> None:
        """One more row has the page."""
        self._holders[page] += 1

    def drop(self, page: int) -> None:
        """One row less has the page."""
        self._holders[page] -= 1
        if not self._holders[page]:
            del self._holders[page]
            self._free.add(page)

    def is_shared(self, page: int) -> bool:
        return self._holders[page] > 1

    def close(self) -> None:
        """Return all pages to the pool."""
        self._pool.give_back(self._homes)
        self._homes = []


class PageTable:
    """One row's cache: its length in positions and the pages that hold them."""

    def __init__(self, reserve: PageReserve, row: int) -> None:
        self.length = 0
        self._reserve = reserve
        self._row = row
        self._pages: list[int] = []
        self._side_by_side = True

    def __repr__(self) -> str:
        return f"<PageTable row={self._row} length={self.length} pages={self._pages}>"

    def snapshot(self) -> Sequence[int]:
        """The row's pages in order: a `range` where they lie side by side, else a tuple."""
        if self._side_by_side and self._pages:
            return range(self._pages[0], self._pages[0] + len(self._pages))
        return tuple(self._pages)

    def cut(self, length: int) -> None:
        """Forget the positions from `length` on."""
        if length >= self.length:
            return
        self.length = length
        keep = -(-length // self._reserve.page_tokens)
        for page in self._pages[keep:]:
            self._reserve.drop(page)
        del self._pages[keep:]
        self._side_by_side = self._side_by_side or _side_by_side(self._pages)

    def grow(self, count: int) -> list[PageCopy]:
        """Make room to write `count` positions at the end. Returns the copies that this needs first."""
        size = self._reserve.page_tokens
        copies = []
        last = len(self._pages) - 1
        # Only the last page can hold both old positions, which others may share, and new ones.
        if self.length % size and self._reserve.is_shared(self._pages[last]):
            fresh = self._reserve.take(self._row, last)
            copies.append(PageCopy(self._pages[last], fresh))
            self._reserve.drop(self._pages[last])
            self._pages[last] = fresh
            self._side_by_side = _side_by_side(self._pages)
        self.length += count
        while len(self._pages) * size < self.length:
            page = self._reserve.take(self._row, len(self._pages))
            self._side_by_side = self._side_by_side and (not self._pages or page == self._pages[-1] + 1)
            self._pages.append(page)
        return copies

    def become(self, source: PageTable, length: int) -> None:
        """Share the first `length` positions of `source` in place of what this row had."""
        pages = source._pages[: -(-length // self._reserve.page_tokens)]
        for page in pages:
            self._reserve.hold(page)
        self.cut(0)
        self._pages = pages
        self.length = length
        self._side_by_side = _side_by_side(pages)


def _side_by_side(pages: list[int]) -> bool:
    return all(after == before + 1 for before, after in pairwise(pages))
