"""A Transformers cache whose keys and values are on servers.

Transformers counts *columns*: positions with padding, the same for all rows. A session has *rows* with their own
lengths, without padding. For each run of blocks the cache keeps one session and a table, which gives for each row of
the batch the session's row with its past. Reordering, repeating and cropping change only the table; the servers get the
effects with the next step, as forks, drops and an earlier start.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin, DynamicCache

from peerd.facade.backend import AnySession
from peerd.facade.lora import Pairs
from peerd.facade.prefix import Prefix, length_of, prefix_of
from peerd.protocol.rows import Drop, Fork
from peerd.protocol.span import Span

RunKey = tuple[int, Span]
"""A run of blocks in a forward: its number, from 0, and its span."""


class _View(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """The interface that Transformers expects from one layer of a cache."""

    is_sliding = False
    is_compileable = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, owner: RemoteCache) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._owner = weakref.ref(owner)

    def lazy_initialization(self, *_: Any) -> None:
        """Transformers calls this before the first update; remote blocks never update it."""

    def update(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("keys and values of remote blocks are on their servers")

    def get_seq_length(self) -> int:
        owner = self._owner()
        return owner.columns if owner is not None else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + int(query_length), 0

    def get_max_length(self) -> int:
        return -1


@dataclass(eq=False)
class Run:
    """The session of one run of blocks."""

    span: Span
    session: AnySession
    max_length: int
    max_rows: int
    max_rollback: int
    #: How long the text was with which the session began.
    prompt_length: int
    #: The LoRA pairs with which the session was opened; their state then, and that of the prompts.
    lora: Pairs
    states: list[object]
    #: Closes the session on every server.
    close: Callable[[], object]
    #: For each row of the batch, the session's row with its past. Several may share one until the next step.
    sources: list[int] = field(default_factory=list)


class RemoteCache(DynamicCache):
    """Made by the model. A `DynamicCache` of the program's own becomes one when it is first used: an empty one, or one
    with a prefix.
    """

    def __init__(self, blocks: int, *, max_length: int = 0, max_rollback: int = 0) -> None:
        self._setup(blocks, max_length, max_rollback)

    def _setup(self, blocks: int, max_length: int, max_rollback: int) -> None:
        self.layer_class_to_replicate = None
        self.offloading = False
        self.columns = 0
        #: Which of the columns behind the prefix are real, bool `[rows, columns]`; None: all of them.
        self.mask: torch.Tensor | None = None
        #: The position id that the caller gave to each row's first real position, int64 `[rows]`; -1 before there is
        #: one.
        self.shift: torch.Tensor | None = None
        self.rows = 0
        #: Keys and values with which the cache began. They are the first columns, and those that no step computes.
        self.prefix: Prefix | None = None
        self.runs: dict[RunKey, Run] = {}
        #: A lazy cache was not requested by the caller. It opens no session until the caller uses it for a second call,
        #: and keeps each run's input, `[rows, columns, width]`, from which a session is then filled.
        self.lazy = False
        self.inputs: dict[RunKey, torch.Tensor] = {}
        self.max_length, self.max_rollback = max_length, max_rollback
        self.lock = threading.Lock()
        self.layers = [_View(self)] * blocks

    @classmethod
    def adopt(cls, cache: Any, blocks: int, *, max_length: int = 0, max_rollback: int = 0) -> RemoteCache:
        """Turn a program's own DynamicCache into a remote one, in place. Raises TypeError, ValueError.

        If it is filled, all its rows must be the same: a prefix.
        """
        if isinstance(cache, cls):
            return cache
        if type(cache) is not DynamicCache:
            raise TypeError(
                f"a {type(cache).__name__} cannot hold the keys and values of remote blocks: leave the cache out, or"
                " pass an empty DynamicCache"
            )
        prefix, rows = prefix_of(cache, blocks) if length_of(cache) else (None, 0)
        remote: Any = cache
        remote.__class__ = cls
        remote._setup(blocks, max_length, max_rollback)
        result: RemoteCache = remote
        result.prefix, result.rows, result.columns = prefix, rows, prefix.length if prefix is not None else 0
        return result

    def __repr__(self) -> str:
        return f"<RemoteCache {self.rows} rows of {self.columns} columns, {list(self.runs.values())}>"

    def __iter__(self) -> Any:
        raise TypeError("keys and values of remote blocks are on their servers")

    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("a remote cache cannot be copied: use it, and crop it back")

    @property
    def prefix_length(self) -> int:
        """How many of the first columns are a prefix."""
        return 0 if self.prefix is None else self.prefix.length

    @property
    def computed(self) -> int:
        """How many columns were computed: all but those of the prefix."""
        return self.columns - self.prefix_length

    @property
    def batch_size(self) -> int:
        """The number of rows of the batch; -1 before the first step."""
        return self.rows or -1

    @property
    def is_initialized(self) -> bool:
        """Whether anything was computed."""
        return self.columns > 0

    def lengths(self) -> list[int]:
        """The number of real positions of each row that were computed."""
        if self.mask is None:
            return [self.computed] * self.rows
        return [int(length) for length in self.mask.sum(1)]

    def note(self, mask: torch.Tensor | None, rows: int, columns: int) -> None:
        """Note that these new columns were computed. `mask` is theirs."""
        if mask is not None or self.mask is not None:
            old = self.mask if self.mask is not None else torch.ones(rows, self.computed, dtype=torch.bool)
            new = mask if mask is not None else torch.ones(rows, columns, dtype=torch.bool)
            self.mask = torch.cat((old, new), 1)
        self.rows = rows
        self.columns += columns

    # What Transformers does to caches.

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest columns: `-n` removes n; a positive number (until Transformers 5.14) is the number that
        stays.
        """
        count = int(tokens_to_remove)
        columns = min(self.columns, count) if count > 0 else max(0, self.columns + count)
        computed = columns - self.prefix_length
        if computed < 0:
            raise ValueError(f"{columns} columns cut into the prefix of {self.prefix_length}: begin a new cache")
        if self.mask is not None:
            self.mask = self.mask[:, :computed]
        self.inputs = {key: hidden[:, :computed] for key, hidden in self.inputs.items()}
        self.columns = columns

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Let row i continue the past of row `beam_idx[i]`."""
        self._select(beam_idx.tolist())

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows, in this order; `indices` may be bool."""
        if indices.dtype is torch.bool:
            indices = indices.nonzero()[:, 0]
        self._select(indices.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times, one after the other."""
        self._select([row for row in range(self.rows) for _ in range(repeats)])

    def _select(self, indices: list[int]) -> None:
        if not self.columns:
            return
        for run in self.runs.values():
            run.sources = [run.sources[index] for index in indices]
        self.inputs = {key: hidden[indices] for key, hidden in self.inputs.items()}
        if self.mask is not None:
            self.mask = self.mask[indices]
        if self.shift is not None:
            self.shift = self.shift[indices]
        self.rows = len(indices)

    def reset(self) -> None:
        """Forget everything, and end the sessions."""
        for run in self.runs.values():
            run.close()
        self._setup(len(self.layers), self.max_length, self.max_rollback)

    def activate_past_recording(self) -> None:
        """Does nothing: everything can be cropped already, as far as `max_rollback` allows."""


def settle(
    sources: Sequence[int], lengths: Sequence[int], held: Collection[int], max_rows: int
) -> tuple[list[int], list[Fork | Drop]]:
    """Assign each row of the batch a session row of its own, and the operations that achieve this.

    sources: for each row of the batch, the session's row with its past, of which `lengths` positions count.
    held: the session's rows that hold anything.

    The first row of the batch that claims a session row keeps it; other rows fork it into a free one; session rows that
    no row claims are dropped. There are always enough if the batch has at most `max_rows` rows.
    """
    used = set(sources)
    free = (row for row in range(max_rows) if row not in used)
    taken: set[int] = set()
    rows: list[int] = []
    ops: list[Fork | Drop] = []
    for source, length in zip(sources, lengths, strict=True):
        if source not in taken:
            taken.add(source)
            rows.append(source)
            continue
        target = next(free)
        rows.append(target)
        taken.add(target)
        if length:
            ops.append(Fork(source, target, length))
    ops.extend(Drop(row) for row in sorted(set(held) - taken))
    return rows, ops
