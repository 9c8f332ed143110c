"""A draft model: a small whole model in this process guesses the tokens of a large one that a swarm runs.

Its computations run in a worker thread, one at a time for all answers, so the event loop never waits for them. While
the servers compute a prompt, it reads the prompt too, and a few tokens are drafted to see how long one takes. A
cancelled answer's thread ends before its next token; nothing outlives `open_draft`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import trio

from peerd.checkpoints import fetch_head, fetch_span
from peerd.client.speculation.asking import guess
from peerd.client.speculation.confidence import Ask
from peerd.client.speculation.draft_times import DraftTimes
from peerd.client.speculation.drafts import Draft
from peerd.client.speculation.same_tokens import difference
from peerd.compute.checkpoint.tokenizer import load_tokenizer
from peerd.compute.engine.greedy_text import GreedyText, WholeModel, load_whole
from peerd.compute.errors import EngineError
from peerd.protocol.errors import InvalidRequest
from peerd.protocol.messages.session import MAX_LENGTH
from peerd.protocol.span import Span
from peerd.trio_tools import open_tasks

if TYPE_CHECKING:
    from peerd.compute.checkpoint.checkpoint import Checkpoint

log = logging.getLogger(__name__)

T = TypeVar("T")

# KV for all answers together: a long chat, or several short ones. An answer without room has no guesses of the model.
_POSITIONS = 16384
# Tokens that are drafted after the prompt to see how long each takes.
_TIMED = 3


@asynccontextmanager
async def open_draft(
    checkpoint: Checkpoint, tokenizer: Any, vocab_size: int, name: str, *, device: str = "cpu"
) -> AsyncIterator[DraftModel]:
    """Load a draft model for the model `name`, which has this tokenizer and so many embeddings.

    Raises CheckpointError, and InvalidRequest if their tokens differ, or if the draft model does not fit into memory.
    """
    await fetch_head(checkpoint)
    await fetch_span(checkpoint, Span(0, checkpoint.block_count))
    await trio.to_thread.run_sync(_check_tokens, checkpoint, tokenizer, vocab_size, name)
    model = await trio.to_thread.run_sync(_load, checkpoint, device)
    async with open_tasks() as tasks:
        yield DraftModel(model, vocab_size, tasks)


def _check_tokens(checkpoint: Checkpoint, tokenizer: Any, vocab_size: int, name: str) -> None:
    own = load_tokenizer(checkpoint)
    if (found := difference(tokenizer, vocab_size, own, checkpoint.config.vocab_size)) is not None:
        raise InvalidRequest(
            f"{checkpoint.name} cannot draft for {name}: {found}; choose a draft model with the same tokenizer"
        )


def _load(checkpoint: Checkpoint, device: str) -> WholeModel:
    if (place := torch.device(device)).type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise InvalidRequest(f"there is no {device} here for the draft model {checkpoint.name}: run it on cpu")
    longest = min(checkpoint.max_length or MAX_LENGTH, _POSITIONS)
    try:
        return load_whole(checkpoint, device=device, positions=_POSITIONS, max_length=longest)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise InvalidRequest(f"the draft model {checkpoint.name} does not fit into the memory of {device}") from error


class DraftModel:
    """Makes a drafter for each answer. `tasks` outlives them."""

    def __init__(self, model: WholeModel, vocab_size: int, tasks: trio.Nursery) -> None:
        self.times = DraftTimes()
        self._model = model
        self._known = min(vocab_size, model.vocab_size)
        self._tasks = tasks
        self._limiter = trio.CapacityLimiter(1)

    @property
    def free_positions(self) -> int:
        """How many more positions of KV answers may take."""
        return self._model.free_positions

    def drafter(self, prompt: Sequence[int], length: int) -> ModelDrafter:
        """A drafter for an answer that begins with `prompt` and has at most `length` tokens with it."""
        drafter = ModelDrafter(self._model, min(length, self._model.max_length), self._known, self._limiter, self.times)
        self._tasks.start_soon(drafter.run, tuple(prompt))
        return drafter


class ModelDrafter:
    """Guesses one answer's tokens. A `CostlyDrafter`; `run` reads the prompt and holds the KV until `end`."""

    def __init__(
        self, model: WholeModel, length: int, known: int, limiter: trio.CapacityLimiter, times: DraftTimes
    ) -> None:
        self._model = model
        self._length = length
        self._known = known
        self._limiter = limiter
        self._times = times
        self._text: GreedyText | None = None
        self._scope = trio.CancelScope()
        #: Whether the prompt has been read, and all has gone well since.
        self.ready = False
        #: How long the last proposal took to read what the text had gained in a long pause.
        self.reading_s = 0.0

    async def run(self, prompt: Sequence[int]) -> None:
        """Read the prompt, and hold the KV until the answer ends."""
        with self._scope:
            async with self._limiter:
                text = self._open()
            if text is None:
                return
            try:
                self._text = text
                self.ready = bool(await self._computing(self._read, text, prompt))
                await trio.sleep_forever()
            finally:
                self.ready = False
                # Its last computation may still run in a thread. It ends before the next token.
                with trio.CancelScope(shield=True):
                    async with self._limiter:
                        text.close()

    async def propose(self, text: Sequence[int], ask: Ask) -> Draft:
        """The most likely tokens, each after those before it. No more of them if the model failed."""
        if self._text is None or not self.ready:
            return Draft()
        found = await self._computing(guess, self._text, text, ask)
        draft, self.reading_s = found or (Draft(), 0.0)
        return draft

    def computed(self, start: int, hidden: torch.Tensor) -> None:
        """Do nothing: it reads the text itself."""

    def end(self) -> None:
        """Free the KV."""
        self.ready = False
        self._scope.cancel()

    def _open(self) -> GreedyText | None:
        try:
            return GreedyText(self._model, self._length, self._known)
        except EngineError as error:
            log.info("an answer has no draft model: %s", error)
            return None

    async def _computing(self, function: Callable[..., T], *arguments: object) -> T | None:
        """Call a function in a worker thread. If the model fails, the answer goes on without it: then None."""
        try:
            return await trio.to_thread.run_sync(function, *arguments, limiter=self._limiter)
        except EngineError as error:
            # The KV is for others.
            self.end()
            log.warning("the draft model failed, and the answer goes on without it: %s", error)
            return None

    def _read(self, text: GreedyText, prompt: Sequence[int]) -> bool:
        """Read the prompt, and see how long a token takes. Whether the text has room for it."""
        guesses = text.guesses(prompt, trio.from_thread.check_cancelled)
        if next(guesses, None) is None:
            return False
        began = time.perf_counter()
        if timed := sum(1 for _ in islice(guesses, _TIMED)):
            self._times.note(timed, time.perf_counter() - began)
        return True
