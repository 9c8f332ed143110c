"""The engine: runs many clients' sessions on one span as batches. Synchronous, without trio.

The main thread opens sessions, submits steps, plans batches and collects them. A device thread runs one batch at a
time and alone touches the span's tensors. No locks are needed, because each side keeps to its calls: `run`,
`forward`, `load_adapter` and `unload_adapter` belong to the device thread, everything else to the main thread, and
those four never run between the planning of a batch and its collection (except the `run` of that batch).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable

import torch

from peerd.compute.adapters.file import AdapterFile
from peerd.compute.adapters.lora import Lora
from peerd.compute.device.free_memory import give_back_memory
from peerd.compute.engine.runner import SpanRunner
from peerd.compute.engine.scheduler import Scheduler
from peerd.compute.errors import UnknownAdapterError
from peerd.compute.kv.layout import BATCH_TOKENS, PAGE_TOKENS, KVLayout, lay_out
from peerd.compute.kv.page_pool import PagePool
from peerd.compute.model.span_model import SpanModel
from peerd.compute.steps import Batch, BatchOutput, EngineStep, StepResult
from peerd.compute.training.memory import PassMemory
from peerd.compute.training.passes import PassRunner
from peerd.protocol.rows import Drop, Fork, RowSlice, SessionSize
from peerd.protocol.span import Span

__all__ = ["BaseEngine", "Batch", "BatchOutput", "Drop", "Engine", "EngineStep", "Fork", "RowSlice", "StepResult"]

# Memory for training if the operator gives no number: 1024 positions through 30 blocks of width 1024, with a tape.
PASS_BYTES = 2**30


# Adapters whose names begin like this belong to one session each, and are not named to other clients.
PRIVATE = "~"


class BaseEngine(ABC):
    """An engine without the arithmetic."""

    def __init__(
        self, span: Span, hidden_size: int, layout: KVLayout, *, kv_tokens: int, page_tokens: int, batch_tokens: int
    ) -> None:
        self.span = span
        self.hidden_size = hidden_size
        # Positions that went through the blocks with a cache, replays included.
        self.positions_computed = 0
        self.batches_run = 0
        #: The most positions of a batch.
        self.batch_tokens = batch_tokens
        #: Training passes over this engine's span; None if the engine cannot train.
        self.passes: PassRunner | None = None
        self._pool = PagePool(layout.page_sets(kv_tokens, page_tokens), page_tokens, layout.groups)
        self._scheduler = Scheduler(span, hidden_size, layout, self._pool, batch_tokens)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._scheduler!r}>"

    @property
    def total_tokens(self) -> int:
        """KV tokens of the pool (`kv.layout`)."""
        return self._pool.total_tokens

    @property
    def free_tokens(self) -> int:
        """KV tokens that no session is expected to need."""
        return self._pool.free_tokens

    @property
    def free_length(self) -> int:
        """Positions that a new session of one row could commit now; more than the free KV tokens if blocks have
        windows.
        """
        return self._scheduler.free_length

    def tokens_wanted(self, size: SessionSize) -> int:
        """The KV tokens that a session of this size is expected to need when it opens: all that it asks for, or twice
        the texts with which it begins, if it says how long they are.
        """
        return self._scheduler.tokens_wanted(size)

    def tokens_of(self, session: Hashable) -> int:
        """The KV tokens that an open session is expected to need: once it has begun, twice the most that it has had."""
        return self._scheduler.tokens_of(session)

    @property
    def short(self) -> list[Hashable]:
        """The sessions whose steps wait because the pool has no pages left: other sessions must end first."""
        return self._scheduler.short

    @property
    def missing_pages(self) -> int:
        """How many of the pool's pages must become free until all sessions that are `short` can run."""
        return self._scheduler.missing_pages

    @property
    def total_pages(self) -> int:
        """The pool's pages."""
        return self._pool.pages

    def pages_of(self, session: Hashable) -> int:
        """How many of the pool's pages an open session has."""
        return self._scheduler.pages_of(session)

    def open(
        self,
        session: Hashable,
        size: SessionSize,
        *,
        blocks: Span | None = None,
        owner: Hashable = None,
        weight: float = 1.0,
        adapter: str = "",
    ) -> None:
        """Open a session of at most this size; `blocks` (default all) are those that it uses. It takes KV as its
        positions come, and waits in the queue where there is none left (`short`).

        owner: the client; batches are fair among owners. weight: how many times the share of an owner of weight 1 it
            gets.
        adapter: one of the engine's adapters; "" for none.

        Blocks with windows or chunks keep the positions that they see, `max_rollback` more, and a few for steps that
        are sent again after a failure (`rollback_room`). A row can be cut or forked that far behind its greatest
        length. Further back a step is a gap, and a fork is invalid. If all blocks keep everything, there is no such
        limit. Raises NoRoomError, ContextTooLongError (even an empty pool could not hold it), InvalidStepError,
        UnknownAdapterError.
        """
        self._check_adapter(adapter)
        self._scheduler.open(session, size, blocks=blocks or self.span, owner=owner, weight=weight, adapter=adapter)

    def close(self, session: Hashable) -> None:
        """Forget the session and its queued steps. Pages that a running batch uses are freed when it is collected."""
        self._scheduler.close(session)

    def use_adapter(self, session: Hashable, adapter: str) -> None:
        """Set the adapter of a session that has not begun. Raises UnknownAdapterError."""
        self._check_adapter(adapter)
        self._scheduler.use_adapter(session, adapter)

    def uses_adapter(self, adapter: str) -> bool:
        """Whether an open session uses the adapter."""
        return self._scheduler.uses_adapter(adapter)

    def _check_adapter(self, adapter: str) -> None:
        if adapter and adapter not in self.adapters:
            there = ", ".join(sorted(name for name in self.adapters if not name.startswith(PRIVATE))) or "none"
            raise UnknownAdapterError(f"there is no adapter {adapter!r} here; there is {there}")

    def lengths(self, session: Hashable) -> dict[int, int]:
        """Cached positions of each row that has any, including those that the running batch adds."""
        return self._scheduler.lengths(session)

    def check(self, step: EngineStep) -> None:
        """Raise an error if `step` cannot follow the queued steps.

        Raises StepGapError, ContextTooLongError, InvalidStepError; KeyError if the session is not open.
        """
        self._scheduler.check(step)

    def submit(self, step: EngineStep) -> None:
        """Queue a step. A slice that starts below its row's length cuts the row there. Raises what `check` raises."""
        self._scheduler.submit(step)

    def hold(self, session: Hashable, held: bool) -> None:
        """Leave the session out of batches while `held`; its steps stay queued."""
        self._scheduler.hold(session, held)

    def ready(self) -> bool:
        """Whether `plan` would return a batch."""
        return self._scheduler.is_ready

    def plan(self) -> Batch | None:
        """The next batch, or None. It must be run and collected before another is planned."""
        return self._scheduler.plan()

    def collect(self, batch: Batch, output: BatchOutput) -> list[StepResult]:
        """Take a batch's output; returns the results of the steps that ended with it.

        A step whose result is not finite fails, together with every queued later step of its session; its rows are
        cut where it began. Other sessions are not affected.
        """
        self.positions_computed += batch.positions
        self.batches_run += 1
        return self._scheduler.collect(output)

    @property
    @abstractmethod
    def adapters(self) -> frozenset[str]:
        """The names of the adapters that sessions may ask for. Any thread may read it."""

    @abstractmethod
    def load_adapter(self, name: str, lora: Lora) -> None:
        """Load one more adapter, between two batches. Device thread. Raises AdapterError if it does not fit."""

    @abstractmethod
    def unload_adapter(self, name: str) -> None:
        """Forget an adapter that no session uses any more. Device thread."""

    @abstractmethod
    def run(self, batch: Batch) -> BatchOutput:
        """Run a planned batch. Device thread."""

    def give_back(self) -> None:
        """Return unused memory to the device. Device thread."""
        give_back_memory("cpu")

    def works(self) -> bool:
        """Whether the blocks compute a position of zeros, which a lost device does not. Device thread."""
        try:
            return bool(self.forward(torch.zeros(1, 1, self.hidden_size)).isfinite().all())
        except Exception:
            # The reason does not matter: the caller has already seen the failure.
            return False

    @abstractmethod
    def forward(self, hidden: torch.Tensor, blocks: Span | None = None) -> torch.Tensor:
        """Run sequences `[batch, positions, hidden_size]` from position 0, without a cache. Device thread."""


class Engine(BaseEngine):
    """An engine over a loaded span, whose model was loaded with `attention=register_attention()`.

    kv_tokens: capacity of the KV pool, in positions of every block, rounded down to whole pages. The pool lies on
        the model's device in its dtype.
    batch_tokens: positions that a batch may have.
    pass_bytes: memory for training.
    paged: whether to compute attention for all rows at once, and decode in buffers of fixed shape; by default only
        on a GPU.

    Raises ValueError if the pool has no page.
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
            layout := lay_out(model.kinds, model.dtype.itemsize),
            kv_tokens=kv_tokens,
            page_tokens=page_tokens,
            batch_tokens=batch_tokens,
        )
        self._scheduler.dtype = model.dtype
        self._device = model.device
        self._runner = SpanRunner(model, layout, self._pool.pages, page_tokens, paged=paged)
        self.passes = PassRunner(model, self._runner.part, self._runner.adapters, PassMemory(pass_bytes))

    def warm_up(self) -> None:
        """Record CUDA graphs for decodes, on a GPU, so that the first session does not wait for them."""
        self._runner.warm_up()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the blocks compute."""
        return self._runner.dtype

    def give_back(self) -> None:
        give_back_memory(self._device)

    def mark_unwritten(self, batch: Batch) -> None:
        """Mark the slots of a batch's new positions in the KV cache as unwritten, before it runs. Device thread."""
        self._runner.mark_unwritten(batch)

    def unwritten(self, batch: Batch) -> list[int]:
        """The blocks that left some of these slots as they were, once the batch has run. Device thread."""
        return self._runner.unwritten(batch)

    def forget_part(self, blocks: Span) -> None:
        """Drop what was made to run these blocks of the span alone. Device thread."""
        self._runner.forget_part(blocks)

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
        """Load the weights that were read from a file for the span. Device thread. AdapterError also if some are
        missing.
        """
        self._runner.adapters.check_complete(file)
        self._runner.adapters.load(name, lora)

    def unload_adapter(self, name: str) -> None:
        self._runner.adapters.unload(name)
