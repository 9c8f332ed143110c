"""The engine: sessions of many clients on one span, run as batches. Synchronous; it knows no trio.

The main thread opens sessions, submits steps, plans batches and collects them; a device thread runs
one batch at a time and is alone in touching the span's tensors. What each side may call is the
contract that makes locks unnecessary: everything but `run`, `forward`, `load_adapter` and `unload_adapter` is
the main thread's, and those four never run between the planning of a batch and its collection.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable

import torch

from peerd.compute.adapters.file import AdapterFile
from peerd.compute.adapters.lora import Lora
from peerd.compute.engine.runner import SpanRunner
from peerd.compute.engine.scheduler import Scheduler
from peerd.compute.errors import UnknownAdapterError
from peerd.compute.kv.layout import BATCH_TOKENS, PAGE_TOKENS, KVLayout, lay_out
from peerd.compute.kv.pages import PagePool
from peerd.compute.model.span_model import SpanModel
from peerd.compute.steps import Batch, BatchOutput, EngineStep, StepResult
from peerd.compute.training.memory import PassMemory
from peerd.compute.training.passes import PassRunner
from peerd.protocol.rows import Drop, Fork, RowSlice
from peerd.protocol.span import Span

__all__ = ["BaseEngine", "Batch", "BatchOutput", "Drop", "Engine", "EngineStep", "Fork", "RowSlice", "StepResult"]

# Memory for training where nobody says how much: 1024 positions through 30 blocks of 1024, with what a forward leaves.
PASS_BYTES = 2**30


# Adapters whose names begin so belong to one session each: nobody else is told of them.
PRIVATE = "~"


class BaseEngine(ABC):
    """All of an engine but the arithmetic."""

    def __init__(
        self, span: Span, hidden_size: int, layout: KVLayout, *, kv_tokens: int, page_tokens: int, batch_tokens: int
    ) -> None:
        self.span = span
        self.hidden_size = hidden_size
        # Positions that went through the blocks with a cache, replays included.
        self.positions_computed = 0
        self.batches_run = 0
        #: Training passes over this engine's span; None where the engine cannot train.
        self.passes: PassRunner | None = None
        self._pool = PagePool(layout.page_sets(kv_tokens, page_tokens), page_tokens, layout.groups)
        self._scheduler = Scheduler(span, hidden_size, layout, self._pool, batch_tokens)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._scheduler!r}>"

    @property
    def total_tokens(self) -> int:
        """KV tokens of the pool (`kv_layout`)."""
        return self._pool.total_tokens

    @property
    def free_tokens(self) -> int:
        """KV tokens that no session has committed."""
        return self._pool.free_tokens

    @property
    def free_length(self) -> int:
        """Positions that a new session of one row could commit now; more than KV tokens where blocks have windows."""
        return self._scheduler.free_length

    def tokens_wanted(self, *, blocks: Span | None = None, max_length: int, max_rows: int, max_rollback: int) -> int:
        """What `open` with the same arguments commits."""
        return self._scheduler.tokens_wanted(max_length, max_rows, max_rollback)

    def open(
        self,
        session: Hashable,
        *,
        blocks: Span | None = None,
        max_length: int,
        max_rows: int,
        max_rollback: int,
        owner: Hashable = None,
        adapter: str = "",
    ) -> None:
        """Commit KV for `max_rows` rows of `max_length` positions; `blocks` (default all) are those it runs.

        `owner` is whose session it is: batches are fair among owners. `adapter` names one of the engine's adapters.
        Blocks with windows or chunks keep what they see and `max_rollback` positions more, and a little for steps that
        are sent again after a failure (`kept_back`): a row can be cut or forked so far behind the longest that it
        was. Further back a step is a gap, and such a fork invalid. Where all blocks keep everything, so do rows.
        Raises NoRoomError, ContextTooLongError (even an empty pool could not hold it), InvalidStepError,
        UnknownAdapterError.
        """
        self._check_adapter(adapter)
        self._scheduler.open(
            session, blocks or self.span, max_length, max_rows, max_rollback, owner=owner, adapter=adapter
        )

    def close(self, session: Hashable) -> None:
        """Forget the session and its queued steps; pages in a running batch are freed when it is collected."""
        self._scheduler.close(session)

    def use_adapter(self, session: Hashable, adapter: str) -> None:
        """Put a session that has not begun under one of the engine's adapters. Raises UnknownAdapterError."""
        self._check_adapter(adapter)
        self._scheduler.use_adapter(session, adapter)

    def uses_adapter(self, adapter: str) -> bool:
        """Whether an open session is under it."""
        return self._scheduler.uses_adapter(adapter)

    def _check_adapter(self, adapter: str) -> None:
        if adapter and adapter not in self.adapters:
            there = ", ".join(sorted(name for name in self.adapters if not name.startswith(PRIVATE))) or "none"
            raise UnknownAdapterError(f"there is no adapter {adapter!r} here; there is {there}")

    def lengths(self, session: Hashable) -> dict[int, int]:
        """Cached positions of each row that has any, once the running batch has ended."""
        return self._scheduler.lengths(session)

    def check(self, step: EngineStep) -> None:
        """Whether `step` can follow what is queued.

        Raises StepGapError, ContextTooLongError, InvalidStepError; KeyError where the session is not open.
        """
        self._scheduler.check(step)

    def submit(self, step: EngineStep) -> None:
        """Queue a step. A slice that starts below its row's length cuts the row there. Raises what `check` raises."""
        self._scheduler.submit(step)

    def hold(self, session: Hashable, held: bool) -> None:
        """A held session is left out of batches; its steps stay queued."""
        self._scheduler.hold(session, held)

    def ready(self) -> bool:
        """Whether `plan` would return a batch."""
        return self._scheduler.is_ready

    def plan(self) -> Batch | None:
        """The next batch, or None. It must be run and collected before another is planned."""
        return self._scheduler.plan()

    def collect(self, batch: Batch, output: BatchOutput) -> list[StepResult]:
        """Take the batch back; returns the results of the steps that ended with it.

        A step whose result is not finite fails, with every later step of its session that was queued; its
        rows are cut where it began. Nobody else notices.
        """
        self.positions_computed += batch.positions
        self.batches_run += 1
        return self._scheduler.collect(output)

    @property
    @abstractmethod
    def adapters(self) -> frozenset[str]:
        """The names of the adapters that sessions may ask for. Any thread."""

    @abstractmethod
    def load_adapter(self, name: str, lora: Lora) -> None:
        """Have one more adapter, while sessions run. Device thread. Raises AdapterError where it does not fit."""

    @abstractmethod
    def unload_adapter(self, name: str) -> None:
        """Forget an adapter that no session uses any more. Device thread."""

    @abstractmethod
    def run(self, batch: Batch) -> BatchOutput:
        """Run a planned batch. Device thread."""

    @abstractmethod
    def forward(self, hidden: torch.Tensor, blocks: Span | None = None) -> torch.Tensor:
        """Run sequences `[batch, positions, hidden_size]` from position 0, without a cache. Device thread."""


class Engine(BaseEngine):
    """An engine over a loaded span, whose model was loaded with `attention=register_attention()`.

    `kv_tokens`: capacity of the KV pool, in positions of every block, rounded down to whole pages; the pool lies on
    the model's device in its dtype. `batch_tokens`: positions a batch may have.
    `pass_bytes`: memory for training. `paged`: attend for all rows at once, and decode in buffers of fixed shape; by
    default on a GPU only. Raises ValueError for no pages.
    """

    def __init__(
        self,
        model: SpanModel,
        *,
        kv_tokens: int,
        page_tokens: int = PAGE_TOKENS,
        batch_tokens: int = BATCH_TOKENS,
        pass_bytes: int = PASS_BYTES,
        paged: bool | None = None,
    ) -> None:
        super().__init__(
            model.span,
            model.hidden_size,
            layout := lay_out(model.kinds),
            kv_tokens=kv_tokens,
            page_tokens=page_tokens,
            batch_tokens=batch_tokens,
        )
        self._scheduler.dtype = model.dtype
        self._runner = SpanRunner(model, layout, self._pool.pages, page_tokens, paged=paged)
        self.passes = PassRunner(model, self._runner.part, self._runner.adapters, PassMemory(pass_bytes))

    def warm_up(self) -> None:
        """Record CUDA graphs for decodes, where there is a GPU, before the first session has to wait for it."""
        self._runner.warm_up()

    def run(self, batch: Batch) -> BatchOutput:
        return self._runner.run(batch)

    def forward(self, hidden: torch.Tensor, blocks: Span | None = None) -> torch.Tensor:
        return self._runner.forward(hidden, blocks or self.span)

    @property
    def adapters(self) -> frozenset[str]:
        return self._runner.adapters.names

    def load_adapter(self, name: str, lora: Lora) -> None:
        self._runner.adapters.load(name, lora)

    def load_adapter_file(self, name: str, file: AdapterFile, lora: Lora) -> None:
        """Load what was read of a file for the span. Device thread. Raises AdapterError also where some is missing."""
        self._runner.adapters.check_complete(file)
        self._runner.adapters.load(name, lora)

    def unload_adapter(self, name: str) -> None:
        self._runner.adapters.unload(name)
