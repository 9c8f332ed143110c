"""What the blocks of a span keep of a row, and how they share one pool of pages.

A block with full attention keeps every position; one with a window or with chunks keeps what a query may
still see, `max_rollback` positions further back. Pure arithmetic on positions and counts. The difficulty is
that memory which one kind of block frees must serve the other. So a page is `page_tokens` positions of
`blocks_per_page` blocks, the same bytes for everybody: the span's blocks are split into groups of that many
that keep alike, and a row has pages of its own in every group.

A KV token, in which memory is committed and counted, is the memory of one position in every block. A row
of full attention takes one a position; a row in a span with windows takes fewer once it is longer than they.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from peerd.compute.families.layer_kinds import LayerKind

# Rows of a session seldom end on a page's border: half a page a row is lost. Smaller pages cost bookkeeping.
PAGE_TOKENS = 16
# A prefill of more positions is cut, so that whoever decodes beside it waits no longer than for these.
BATCH_TOKENS = 256
# After a failure a client sends again what was not answered, and whoever had computed it goes back: so many
# positions beyond `max_rollback`. Decodes fit; of a prefill under way a row starts again from nothing.
RESENT_POSITIONS = 64
# What one more group costs beside wasted memory: views and indices that each batch builds for it.
_GROUP_COST = 0.01
# At the lengths that windows are made for, a block with one keeps about so much of what the others do.
_LIMITED_SHARE = 0.25


@dataclass(frozen=True, slots=True)
class Keep:
    """Which positions of a row a block still needs; all of them where neither is set."""

    window: int | None = None
    chunk: int | None = None

    @property
    def reach(self) -> int | None:
        """How many positions before its own a query may see; None for all."""
        if self.window is not None:
            return self.window - 1
        return None if self.chunk is None else self.chunk - 1

    def first_seen(self, query: int) -> int:
        """The first position that the query at `query` sees, and with it every later one."""
        if self.window is not None:
            return max(query - self.window + 1, 0)
        return 0 if self.chunk is None else query // self.chunk * self.chunk


EVERYTHING = Keep()


@dataclass(frozen=True, slots=True)
class Demand:
    """What one kind of block wants for a session: `pages_per_row` in each of `groups` groups, kept by `keep`."""

    keep: Keep
    groups: int
    pages_per_row: int


@dataclass(frozen=True, slots=True)
class KVLayout:
    """How a span's blocks share pages. `group_of` and `place_of` go by the span's own numbers of blocks, from 0."""

    blocks_per_page: int
    #: Each way to keep, and how many groups keep so; groups are numbered in this order.
    kinds: tuple[tuple[Keep, int], ...]
    group_of: tuple[int, ...]
    place_of: tuple[int, ...]

    @property
    def groups(self) -> int:
        return sum(groups for _, groups in self.kinds)

    def page_sets(self, kv_tokens: int, page_tokens: int) -> int:
        """Sets of one page in every group that fit into the memory of `kv_tokens` positions of every block."""
        return kv_tokens * len(self.group_of) // (self.groups * self.blocks_per_page * page_tokens)

    def demands(self, max_length: int, max_rollback: int, batch_tokens: int, page_tokens: int) -> tuple[Demand, ...]:
        """What a row of a session wants of each kind. Who wants pages for all positions anyway keeps everything."""
        whole = pages_for(max_length, page_tokens)
        demands = []
        for keep, groups in self.kinds:
            pages = whole
            if keep.reach is not None:
                # Behind the longest rollback a query's whole reach, and before it what one batch adds.
                positions = keep.reach + kept_back(max_rollback) + batch_tokens
                pages = min(whole, pages_for(positions - 1, page_tokens) + 1)
            demands.append(Demand(EVERYTHING if pages == whole else keep, groups, pages))
        return tuple(demands)

    def sets_wanted(self, demands: Sequence[Demand], max_rows: int) -> int:
        """Whole sets that a session commits."""
        return pages_for(max_rows * sum(each.groups * each.pages_per_row for each in demands), self.groups)

    def tokens_wanted(
        self,
        *,
        max_length: int,
        max_rows: int = 1,
        max_rollback: int = 0,
        page_tokens: int = PAGE_TOKENS,
        batch_tokens: int = BATCH_TOKENS,
    ) -> int:
        """KV tokens that a session commits."""
        demands = self.demands(max_length, max_rollback, batch_tokens, page_tokens)
        return self.sets_wanted(demands, max_rows) * page_tokens

    def bytes_per_token(self, kinds: Sequence[LayerKind], itemsize: int) -> int:
        """Bytes of a KV token: of one position in every block, `kinds`, and of what pages have too many."""
        if self.groups == 1:
            return sum(kind.values_per_token for kind in kinds) * itemsize
        return self.groups * self.blocks_per_page * kinds[0].values_per_token * itemsize


def pages_for(count: int, size: int) -> int:
    """How many pages of `size` hold `count`."""
    return -(-count // size)


def kept_back(max_rollback: int) -> int:
    """How far back a row can be cut for certain."""
    return max_rollback + RESENT_POSITIONS


def lay_out(kinds: Sequence[LayerKind]) -> KVLayout:
    """The layout of a span of these blocks. Where their caches differ in shape all keep everything.

    A page of one could not serve another.
    """
    shapes = {(kind.kv_heads, kind.key_dim, kind.value_dim) for kind in kinds}
    if len(shapes) > 1:
        return group([EVERYTHING] * len(kinds))
    return group([Keep(kind.window, kind.chunk) for kind in kinds])


def group(keeps: Sequence[Keep]) -> KVLayout:
    """The layout of blocks that keep so."""
    counts = Counter(keeps)
    size = min(range(1, max(counts.values()) + 1), key=lambda size: (_cost(counts, size), -size))
    kinds = tuple((keep, pages_for(count, size)) for keep, count in counts.items())
    first_group: dict[Keep, int] = {}
    groups = 0
    for keep, own in kinds:
        first_group[keep] = groups
        groups += own
    seen = Counter[Keep]()
    group_of, place_of = [], []
    for keep in keeps:
        number, place = divmod(seen[keep], size)
        group_of.append(first_group[keep] + number)
        place_of.append(place)
        seen[keep] += 1
    return KVLayout(size, kinds, tuple(group_of), tuple(place_of))


def _cost(counts: Counter[Keep], size: int) -> float:
    """How bad pages of `size` blocks are: the share of memory that they waste, and what their number costs."""
    weights = {keep: 1.0 if keep.reach is None else _LIMITED_SHARE for keep in counts}
    needed = sum(weights[keep] * count for keep, count in counts.items())
    wasted = sum(weights[keep] * (-count % size) for keep, count in counts.items())
    return wasted / needed + _GROUP_COST * sum(pages_for(count, size) for count in counts.values())
