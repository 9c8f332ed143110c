"""Decides which positions of a row each block keeps, and how the blocks of a span share one pool of pages.

A block with full attention keeps every position. A block with a window or with chunks keeps what a query may still see,
`max_rollback` positions further back. All of it is arithmetic on positions and counts.

Memory that one kind of block frees must be usable by the other kinds. So every page has the same size in bytes:
`page_tokens` positions of `blocks_per_page` blocks. The span's blocks are split into groups of `blocks_per_page` blocks
with the same retention rule, and a row has its own pages in every group.

Memory is committed and counted in KV tokens: one KV token is the memory of one position in every block. A row with full
attention takes one KV token a position; a row in a span with windows takes fewer once it is longer than they.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from peerd.compute.families.layer_kinds import LayerKind
from peerd.compute.kv.state_layout import StateLayout

# The last page of a row is seldom full: on average half a page a row is lost. Smaller pages would cost bookkeeping.
PAGE_TOKENS = 16
# A longer prefill is cut into batches of this many positions, so that rows that decode beside it wait no longer than
# for one such batch.
BATCH_TOKENS = 256
# After a failure a client sends the unanswered steps again, and a hop that had computed them cuts its rows back: by up
# to this many positions more than `max_rollback`. That is enough for decodes; a row whose prefill was under way starts
# again from nothing.
RESENT_POSITIONS = 64
# What one more group costs beside wasted memory: the views and indices that each batch builds for it.
_GROUP_COST = 0.01
# At the lengths that windows are made for, a block with a window keeps about this share of what the other blocks keep.
_LIMITED_SHARE = 0.25


@dataclass(frozen=True, slots=True)
class Keep:
    """Which positions of a row a block still needs: all of them if neither `window` nor `chunk` is set.

    running: a running state, which stands for all positions before one, and takes the same memory for any length.
    """

    window: int | None = None
    chunk: int | None = None
    running: bool = False

    @property
    def reach(self) -> int | None:
        """How many positions before its own a query may see; None for all."""
        if self.running:
            return 0
        if self.window is not None:
            return self.window - 1
        return None if self.chunk is None else self.chunk - 1

    def first_seen(self, query: int) -> int:
        """The first position that the query at `query` sees; it sees all later ones up to its own."""
        if self.running:
            return query
        if self.window is not None:
            return max(query - self.window + 1, 0)
        return 0 if self.chunk is None else query // self.chunk * self.chunk


EVERYTHING = Keep()
RUNNING_STATE = Keep(running=True)


@dataclass(frozen=True, slots=True)
class Demand:
    """What the blocks with one retention rule, `keep`, need for a session: `pages_per_row` pages in each of `groups`
    groups.
    """

    keep: Keep
    groups: int
    pages_per_row: int


@dataclass(frozen=True, slots=True)
class KVLayout:
    """How a span's blocks share pages.

    `group_of` and `page_index_of` give a block's group and its index within the pages of that group; blocks
    are numbered from 0 within the span. Both are 0 for a block without keys and values, which uses neither.
    """

    blocks_per_page: int
    #: The retention rules, each with the number of groups that follow it; groups are numbered in this order.
    kinds: tuple[tuple[Keep, int], ...]
    group_of: tuple[int, ...]
    page_index_of: tuple[int, ...]
    #: How many blocks have keys and values. A span without any still has pages, as for one block.
    caching: int
    #: Where rows keep running states, which lie in the same pages; None if no block has one.
    states: StateLayout | None = None

    @property
    def groups(self) -> int:
        return sum(groups for _, groups in self.kinds)

    def page_sets(self, kv_tokens: int, page_tokens: int) -> int:
        """How many sets, of one page in every group, fit into the memory of `kv_tokens` KV tokens."""
        return kv_tokens * self.caching // (self.groups * self.blocks_per_page * page_tokens)

    def demands(self, max_length: int, max_rollback: int, batch_tokens: int, page_tokens: int) -> tuple[Demand, ...]:
        """What one row of a session needs of each kind of block. A kind that needs pages for all positions keeps
        everything.
        """
        whole = pages_for(max_length, page_tokens)
        demands = []
        for keep, groups in self.kinds:
            pages = whole
            if keep.reach is not None:
                # A query at the longest rollback needs its whole reach behind it, and one batch may be added in front.
                positions = keep.reach + rollback_room(max_rollback) + batch_tokens
                pages = min(whole, pages_for(positions - 1, page_tokens) + 1)
            demands.append(Demand(EVERYTHING if pages == whole else keep, groups, pages))
        if self.states is not None:
            places = self.states.places(rollback_room(max_rollback), page_tokens)
            demands.append(Demand(RUNNING_STATE, 1, places.pages))
        return tuple(demands)

    def sets_wanted(self, demands: Sequence[Demand], max_rows: int) -> int:
        """How many whole page sets a session commits."""
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
        """How many KV tokens a session commits."""
        demands = self.demands(max_length, max_rollback, batch_tokens, page_tokens)
        return self.sets_wanted(demands, max_rows) * page_tokens

    def state_tokens(self, *, max_rollback: int = 0, page_tokens: int = PAGE_TOKENS) -> int:
        """How many KV tokens the running states of one row take."""
        if self.states is None:
            return 0
        return pages_for(self.states.places(rollback_room(max_rollback), page_tokens).pages, self.groups) * page_tokens

    def bytes_per_token(self, kinds: Sequence[LayerKind], itemsize: int) -> int:
        """Bytes of a KV token: one position in every block, `kinds`, and the unused parts of incomplete groups."""
        shapes = pool_shapes(kinds, self)
        if self.groups == 1:
            return sum(shape.values_per_token for shape in shapes) * itemsize
        return self.groups * self.blocks_per_page * shapes[0].values_per_token * itemsize


def pages_for(count: int, size: int) -> int:
    """How many pages of `size` hold `count`."""
    return -(-count // size)


def rollback_room(max_rollback: int) -> int:
    """How many positions from its end a row can certainly be cut."""
    return max_rollback + RESENT_POSITIONS


def pool_shapes(kinds: Sequence[LayerKind], layout: KVLayout) -> list[LayerKind]:
    """For each index within a page a block that has it, which says the shapes of keys and of values.

    A span without keys and values has pages of the width of its states' inputs, for the states and for counting
    positions; one of feed-forwards alone counts positions in pages of one number each.
    """
    caching = {index: kind for index, kind in zip(layout.page_index_of, kinds, strict=True) if kind.kv_heads}
    if not caching:
        width = max((kind.state.width for kind in kinds if kind.state is not None), default=1)
        return [LayerKind(None, None, 1, width, 0)]
    return [caching[index] for index in range(layout.blocks_per_page)]


def lay_out(kinds: Sequence[LayerKind], itemsize: int = 4) -> KVLayout:
    """The page layout of a span of these blocks, computed in a dtype of `itemsize` bytes.

    If the shapes of their caches differ, all blocks keep everything: a page of one shape could not serve the other.
    """
    caching = [kind for kind in kinds if kind.kv_heads]
    shapes = {(kind.kv_heads, kind.key_dim, kind.value_dim) for kind in caching}
    whole = [EVERYTHING] * max(len(caching), 1)
    own = group(whole if len(shapes) != 1 else [Keep(kind.window, kind.chunk) for kind in caching])
    if all(kind.kv_heads and kind.state is None for kind in kinds):
        return own
    places = iter(zip(own.group_of, own.page_index_of, strict=True))
    group_of, page_index_of = zip(*(next(places) if kind.kv_heads else (0, 0) for kind in kinds), strict=True)
    layout = replace(own, group_of=group_of, page_index_of=page_index_of)
    if all(kind.state is None for kind in kinds):
        return layout
    matrices = [(shape.kv_heads, shape.key_dim) for shape in pool_shapes(kinds, layout)]
    matrices += [(shape.kv_heads, shape.value_dim) for shape in pool_shapes(kinds, layout)]
    return replace(layout, states=StateLayout(kinds, matrices, itemsize))


def group(keeps: Sequence[Keep]) -> KVLayout:
    """The page layout for blocks with these retention rules."""
    counts = Counter(keeps)
    size = min(range(1, max(counts.values()) + 1), key=lambda size: (_cost(counts, size), -size))
    kinds = tuple((keep, pages_for(count, size)) for keep, count in counts.items())
    first_group: dict[Keep, int] = {}
    groups = 0
    for keep, own in kinds:
        first_group[keep] = groups
        groups += own
    seen = Counter[Keep]()
    group_of, page_index_of = [], []
    for keep in keeps:
        number, page_index = divmod(seen[keep], size)
        group_of.append(first_group[keep] + number)
        page_index_of.append(page_index)
        seen[keep] += 1
    return KVLayout(size, kinds, tuple(group_of), tuple(page_index_of), len(keeps))


def _cost(counts: Counter[Keep], size: int) -> float:
    """How bad pages of `size` blocks are: the share of memory that they waste, plus the cost of the groups' number."""
    weights = {keep: 1.0 if keep.reach is None else _LIMITED_SHARE for keep in counts}
    needed = sum(weights[keep] * count for keep, count in counts.items())
    wasted = sum(weights[keep] * (-count % size) for keep, count in counts.items())
    return wasted / needed + _GROUP_COST * sum(pages_for(count, size) for count in counts.values())
