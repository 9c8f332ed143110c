"""Opens checkpoints and downloads their missing files in worker threads, so that the event loop is not blocked.

A thread that waits for the hub notices a cancellation only with the next bytes, or after ten seconds of silence. So a
cancelled caller does not wait for it: the thread ends by itself, and what it downloaded is kept for the next time.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from peerd.compute.checkpoint.hub.settings import HubSettings, Transfer, Watch
from peerd.compute.device.sizes import format_size
from peerd.compute.transformers_compat import untested_release

if TYPE_CHECKING:
    from peerd.compute.checkpoint.checkpoint import Checkpoint
    from peerd.protocol.span import Span

log = logging.getLogger(__name__)

# Often enough to see progress, and seldom enough for a log that is kept.
LOG_EVERY_S = 30.0


class Checkpoints:
    """Opens the models of one peer."""

    def __init__(self, settings: HubSettings) -> None:
        self._settings = settings
        self._said_untested = False

    @asynccontextmanager
    async def open(self, model: str | Path, revision: str | None = None) -> AsyncIterator[Checkpoint]:
        """A checkpoint, from this machine or the hub, open until the block ends. Raises CheckpointError."""
        self._say_untested()

        def open_it() -> Checkpoint:
            from peerd.compute.checkpoint.opening import open_checkpoint

            checkpoint = open_checkpoint(model, revision=revision, hub=hub)
            try:
                trio.from_thread.check_cancelled()
            except BaseException:
                checkpoint.close()
                raise
            return checkpoint

        hub = self.settings
        with await trio.to_thread.run_sync(open_it, abandon_on_cancel=True) as checkpoint:
            yield checkpoint

    @asynccontextmanager
    async def open_draft_head(self, source: str | Path) -> AsyncIterator[Path | None]:
        """The folder of a draft head, from this machine or the hub; None if `source` is a model. Raises
        CheckpointError.
        """
        hub, opened = self.settings, ExitStack()

        def open_it() -> Path | None:
            from peerd.compute.drafting.files import open_draft_folder

            return opened.enter_context(open_draft_folder(source, hub))

        with opened:
            yield await trio.to_thread.run_sync(open_it)

    @property
    def settings(self) -> HubSettings:
        """How to fetch something else from the hub, in a worker thread: a caller that is cancelled ends it."""
        return replace(self._settings, watch=_until_cancelled(_logged(self._settings.watch)))

    def _say_untested(self) -> None:
        """Warn once if the installed release of Transformers was not tested."""
        if not self._said_untested and (warning := untested_release()) is not None:
            log.warning("%s", warning)
        self._said_untested = True


async def fetch_span(checkpoint: Checkpoint, span: Span) -> None:
    """Download the span's files to this machine. Raises CheckpointError."""
    await trio.to_thread.run_sync(checkpoint.fetch_span, span, abandon_on_cancel=True)


async def fetch_head(checkpoint: Checkpoint) -> None:
    """Download the head's files to this machine. Raises CheckpointError."""
    await trio.to_thread.run_sync(checkpoint.fetch_head, abandon_on_cancel=True)


def _until_cancelled(watch: Watch) -> Watch:
    """A watch that stops the transfer when the caller that waits for this thread is cancelled."""

    def watched(transfer: Transfer) -> None:
        trio.from_thread.check_cancelled()
        watch(transfer)

    return watched


def _logged(watch: Watch, now: Callable[[], float] = time.monotonic) -> Watch:
    """A watch that logs when a transfer begins and ends, and sometimes in between."""
    state = _LogState(now)

    def watched(transfer: Transfer) -> None:
        if transfer.total_bytes:
            state.see(transfer)
        watch(transfer)

    return watched


class _LogState:
    """What was logged about the transfer that is going on."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._total = 0
        self._started = self._logged = 0.0
        self._done_at_start = 0

    def see(self, transfer: Transfer) -> None:
        now, done, total = self._now(), transfer.done_bytes, transfer.total_bytes
        if done == total:
            # If the transfer was complete when we first saw it, it was too short to be worth a line.
            if self._total:
                log.info("fetched %s of %s in %.1f s", format_size(total), transfer.name, now - self._started)
            self._total = 0
        elif total != self._total:
            self._total, self._started, self._logged, self._done_at_start = total, now, now, done
            log.info("fetching %s of %s", format_size(total), transfer.name)
        elif now - self._logged >= LOG_EVERY_S:
            self._logged = now
            rate = (done - self._done_at_start) / (now - self._started)
            so_far = f"{format_size(done)} of {format_size(total)}, {format_size(int(rate))}/s"
            log.info("fetching %s: %s", transfer.name, so_far)
