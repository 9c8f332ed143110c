"""Takes the span in a slot out of service, and loads a span there: another one, or the same one again.

Loading fails for many reasons that pass: no memory, no network, a lost device. Then the slot announces nothing, and
loading is tried again after ever longer pauses. `Reloader` does this if the device under a span has failed.
"""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable
from random import Random
from typing import Protocol

import torch
import trio

from peerd.compute.errors import CheckpointError
from peerd.net.containment import Containment
from peerd.protocol.errors import PeerdError
from peerd.protocol.span import Span
from peerd.server.served_spans import ServedSpan
from peerd.spans.first_choice import Announcing
from peerd.spans.loading import LoadedSpan
from peerd.spans.slots import Slot

log = logging.getLogger(__name__)

# The retries if a span that was served cannot be loaded again.
FIRST_RETRY_S = 60.0
MAX_RETRY_S = 1800.0
# The time for handlers that still send their last messages to release the old engine: twice what they may take.
LET_GO_S = 5.0
LET_GO_LOOKS = 10

# Failures of loading that may not occur another time or with another span.
LOAD_ERRORS = (CheckpointError, PeerdError, OSError, MemoryError, torch.OutOfMemoryError)
# If a span was served for this long before its device failed, it is loaded again at once.
STEADY_S = 600.0


class Loading(Protocol):
    """Loads spans of the model that is served: `SpanLoader`."""

    async def on_disk(self) -> frozenset[int]: ...

    async def fetch(self, span: Span) -> None: ...

    async def load(self, span: Span) -> tuple[ServedSpan, LoadedSpan]: ...

    async def free(self) -> None: ...


class Hosting(Protocol):
    """Serves sessions on spans: `Server`."""

    @property
    def sessions(self) -> int: ...

    @property
    def paused(self) -> bool: ...

    def serve(self, served: ServedSpan) -> None: ...

    def refuse(self, served: ServedSpan) -> None: ...

    def resume(self, served: ServedSpan) -> None: ...

    async def wait_unused(self, served: ServedSpan, timeout_s: float) -> None: ...

    async def withdraw(self, served: ServedSpan) -> None: ...


class SpanSwap:
    """Empties one slot and fills it. Hold `lock` while calling its methods."""

    def __init__(
        self,
        slot: Slot,
        loader: Loading,
        server: Hosting,
        discovery: Announcing,
        random: Random,
        containment: Containment | None = None,
    ) -> None:
        self.lock = trio.Lock()
        self._slot = slot
        self._loader = loader
        self._server = server
        self._discovery = discovery
        self._random = random
        self._containment = containment or Containment()

    def _say(self, goal: Span | None) -> None:
        self._slot.intended = goal
        self._discovery.announce_soon()

    async def vacate(self) -> None:
        """Free the old engine. Only handlers that send their last messages may still use it."""
        assert self._slot.served is not None
        engine = weakref.ref(self._slot.served.task.engine)
        self._slot.vacate()
        self._discovery.announce_soon()
        for _ in range(LET_GO_LOOKS):
            if not _alive(engine):
                break
            await trio.sleep(LET_GO_S / LET_GO_LOOKS)
        else:
            log.warning("the old blocks are still in memory: loading others may fail")
        await self._loader.free()

    async def load(self, span: Span) -> str | None:
        """Load, serve and announce a span. Returns the reason if it fails, else None."""
        self._say(span)
        try:
            served, loaded = await self._loader.load(span)
            # There is no await from here on: the span is served and announced, or neither.
            self._slot.fill(served, loaded)
        except LOAD_ERRORS as error:
            # Kept as text: the exception itself would keep everything that was loaded in memory.
            failure = str(error) or type(error).__name__
        except Exception as error:
            # A lost device raises many kinds of errors. None of them may cost us the connections and the other spans.
            self._containment.contain(error, "loading blocks")
            failure = f"{type(error).__name__}: {error}"
        else:
            self._server.serve(served)
            self._discovery.announce_soon()
            return None
        await self._loader.free()
        return failure

    async def load_again(self, span: Span) -> None:
        """Load the old span again, with as many attempts as it takes."""
        retry_s = FIRST_RETRY_S
        while (failure := await self.load(span)) is not None:
            # Others must not wait for this span.
            self._say(None)
            log.warning("serving nothing: cannot load blocks %s either: %s; trying again", span, failure)
            await trio.sleep(retry_s * self._random.uniform(0.8, 1.2))
            retry_s = min(2 * retry_s, MAX_RETRY_S)
        log.info("serving blocks %s again", span)


class Reloader:
    """Loads the span in one slot again whenever its device has failed. `run` it once, in a nursery; `stop` ends it."""

    def __init__(self, slot: Slot, swap: SpanSwap, server: Hosting, random: Random) -> None:
        self.swap = swap
        self._slot = slot
        self._server = server
        self._random = random
        self._scope = trio.CancelScope()
        self._stopped = False

    def stop(self) -> None:
        """Load nothing from now on."""
        self._stopped = True
        self._scope.cancel()

    async def run(self) -> None:
        """Load again whenever needed, until `stop`. May be started again where it failed."""
        pause_s = 0.0
        with trio.CancelScope() as self._scope:
            while not self._stopped:
                began = trio.current_time()
                await self._slot.wait_broken()
                if trio.current_time() - began >= STEADY_S:
                    pause_s = 0.0
                async with self.swap.lock:
                    if self._slot.is_broken:
                        await self._reload(pause_s)
                        pause_s = min(max(2 * pause_s, FIRST_RETRY_S), MAX_RETRY_S)

    async def _reload(self, pause_s: float) -> None:
        served = self._slot.served
        assert served is not None
        span, why = served.span, served.task.health.broken
        log.error("blocks %s are out of service: %s; loading them again in %.0f s", span, why, pause_s)
        await self._server.withdraw(served)
        # Nothing may keep the engine in memory while its successor is loaded.
        del served
        await self.swap.vacate()
        await trio.sleep(pause_s * self._random.uniform(0.8, 1.2))
        if await self.swap.load(span) is not None:
            await self.swap.load_again(span)
        else:
            log.info("serving blocks %s again", span)


def _alive(engine: Callable[[], object]) -> bool:
    # Models contain reference cycles, so only the garbage collector frees them soon.
    if engine() is not None:
        gc.collect()
    return engine() is not None
