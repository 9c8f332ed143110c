"""Which pages of a span's KV memory are free, and which a row takes next. Only page numbers occur here, no tensors.

A row whose pages lie side by side can be read without a gather. So each row has a home, a run of neighbouring pages
that it fills from the start. Others take pages of a home only if no page is free elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence

# A page's state, one byte a page: finding a run of n free pages is a search for n such bytes.
_FREE, _HOME = b"\x01", b"\x02"


class PagePool:
    """All pages of one span, counted in sets of one page a group. Only the main thread uses it."""

    def __init__(self, sets: int, page_tokens: int, groups: int = 1) -> None:
        if sets < 1 or page_tokens < 1:
            raise ValueError(f"a pool has at least one page of one token, not {sets} of {page_tokens}")
        self.page_tokens = page_tokens
        self.groups = groups
        self.sets = sets
        #: Pages that hold nothing now.
        self.free_pages = sets * groups
        self._committed_sets = 0
        self._map = bytearray(_FREE * (sets * groups))

    def __repr__(self) -> str:
        free = f"{self.free_tokens} of {self.total_tokens} tokens free, {self.page_tokens} a page"
        return f"<PagePool {free}, {self.free_pages} of {self.pages} pages unused>"

    @property
    def pages(self) -> int:
        return len(self._map)

    @property
    def total_tokens(self) -> int:
        return self.sets * self.page_tokens

    @property
    def free_sets(self) -> int:
        """Page sets that no session is expected to need."""
        return max(0, self.sets - self._committed_sets)

    @property
    def free_tokens(self) -> int:
        """KV tokens that no session is expected to need."""
        return self.free_sets * self.page_tokens

    def commit(self, sets: int) -> None:
        """Count so many sets more, or less, as needed."""
        self._committed_sets += sets

    def find_home(self, count: int) -> range:
        """Neighbouring pages for a row that may need `count`: as many as there are, first those of nobody's home."""
        while count:
            start = self._map.find(_FREE * count)
            if start >= 0:
                self._map[start : start + count] = _HOME * count
                return range(start, start + count)
            # The ends of homes are what their rows come to last.
            start = self._map.rfind(_HOME * count)
            if start >= 0:
                return range(start, start + count)
            count //= 2
        return range(0)

    def leave_home(self, home: range) -> None:
        """Let others have what the home's row has not taken."""
        self._map[home.start : home.stop] = self._map[home.start : home.stop].replace(_HOME, _FREE)

    def take(self, wanted: int | None) -> int:
        """Take a page: the wanted one if it is unused, else one of nobody's home, else any. At least one must be
        unused.
        """
        if wanted is None or not self._map[wanted]:
            wanted = self._map.find(_FREE)
            if wanted < 0:
                wanted = self._map.rfind(_HOME)
        assert wanted >= 0, "the caller checks free_pages"
        self._map[wanted] = 0
        self.free_pages -= 1
        return wanted

    def take_run(self, count: int) -> Sequence[int]:
        """Take so many pages, neighbours if there are such."""
        home = self.find_home(count)
        whole = len(home) == count
        pages = [self.take(home[index] if whole else None) for index in range(count)]
        if not whole:
            self.leave_home(home)
        return home if whole else pages

    def give_back(self, pages: Sequence[int]) -> None:
        """Free these pages."""
        for page in pages:
            self._map[page] = 1
        self.free_pages += len(pages)
