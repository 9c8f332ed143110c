"""The spans that this peer serves, the tasks of their engines, and which span can serve a request."""

from __future__ import annotations

from dataclasses import dataclass, field

import trio

from peerd.net.containment import Containment
from peerd.protocol.encoding.tensors import CODECS
from peerd.protocol.errors import ContextTooLong, Draining, InvalidRequest, NotServed, UnsupportedFeature
from peerd.protocol.messages.adapters import OWN_ADAPTER
from peerd.protocol.messages.drawing import HEAD
from peerd.protocol.messages.session import FEATURES, OpenSession
from peerd.protocol.span import Span
from peerd.server.engine_task import EngineTask
from peerd.server.quotas import AdapterRoom
from peerd.server.served_head import ServedHead


@dataclass(frozen=True, slots=True)
class ServedSpan:
    """Blocks of one model that this peer serves, the engine that runs them, the memory for clients' own adapters, and
    the head, if it is served too.
    """

    model: bytes
    max_length: int
    task: EngineTask
    adapter_room: AdapterRoom = field(default_factory=AdapterRoom)
    #: What draws tokens here, where the span has the model's last block and the operator wants it.
    head: ServedHead | None = None

    @property
    def span(self) -> Span:
        return self.task.engine.span


class _Running:
    """The running task of one span's engine."""

    def __init__(self, served: ServedSpan, containment: Containment) -> None:
        self.leaving = False
        self._task = served.task
        self._head = served.head
        self._containment = containment
        self._scope = trio.CancelScope()
        self._ended = trio.Event()

    async def run(self) -> None:
        try:
            with self._scope:
                with self._containment.around("an engine's task"):
                    await self._run_parts()
                # Its sessions wait for nothing now: the host of the span withdraws it.
                self._task.break_down("a bug ended its engine's task")
                await trio.sleep_forever()
        finally:
            self._ended.set()

    async def _run_parts(self) -> None:
        """Run the engine, and the head if one is served, until one of them fails."""
        if self._head is None:
            await self._task.run()
            return
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._head.run)
            await self._task.run()

    async def stop(self) -> None:
        """End the task, after the batch that it runs."""
        self._scope.cancel()
        await self._ended.wait()


class ServedSpans:
    """The spans that a server serves, the tasks of their engines, and which of them accept new sessions."""

    def __init__(self, containment: Containment) -> None:
        self.all: tuple[ServedSpan, ...] = ()
        self._containment = containment
        self._running: dict[EngineTask, _Running] = {}

    def __repr__(self) -> str:
        return f"<ServedSpans {' '.join(str(served.span) for served in self.all)}>"

    @property
    def tasks(self) -> list[EngineTask]:
        """The tasks of all engines that run at this moment."""
        return list(self._running)

    def start(self, served: ServedSpan, nursery: trio.Nursery) -> None:
        """Run a span's engine in the nursery; sessions may be admitted from now on."""
        running = self._running[served.task] = _Running(served, self._containment)
        nursery.start_soon(running.run)
        self.all += (served,)

    async def stop(self, served: ServedSpan) -> None:
        """End a span's engine after the batch that it runs, and forget the span."""
        await self._running[served.task].stop()
        del self._running[served.task]
        self.all = tuple(other for other in self.all if other is not served)

    def refuse(self, served: ServedSpan) -> None:
        """Accept no new sessions on one span. `resume` takes that back."""
        self._running[served.task].leaving = True

    def resume(self, served: ServedSpan) -> None:
        """Accept sessions on the span again."""
        self._running[served.task].leaving = False

    def is_leaving(self, task: EngineTask) -> bool:
        """Whether the span of this engine accepts no new sessions, or is served no more."""
        running = self._running.get(task)
        return running is None or running.leaving

    def for_session(self, opening: OpenSession) -> ServedSpan:
        """The span that can serve a session. Raises NotServed, Draining, UnsupportedFeature, InvalidRequest,
        ContextTooLong.
        """
        missing = sorted(set(opening.needs) - FEATURES)
        if missing:
            raise UnsupportedFeature(f"this peer lacks {', '.join(missing)}")
        if opening.codec not in CODECS:
            raise UnsupportedFeature(f"codec {opening.codec!r} is not one of {', '.join(sorted(CODECS))}")
        if opening.adapter and OWN_ADAPTER in opening.needs:
            raise InvalidRequest("a session has an adapter of this peer or its client's own, not both")
        own = OWN_ADAPTER in opening.needs
        served = self.find(opening.model, opening.start, opening.end, adapter=opening.adapter, own_adapter=own)
        if HEAD in opening.needs:
            self._check_head(served, opening)
        if opening.max_length > served.max_length:
            # Some models look positions up in a table: beyond its end there is nothing to compute.
            raise ContextTooLong(f"{opening.max_length} positions: this model takes {served.max_length}")
        return served

    @staticmethod
    def _check_head(served: ServedSpan, opening: OpenSession) -> None:
        if served.head is None:
            raise UnsupportedFeature("this peer draws no tokens: it does not serve the model's head")
        if opening.next is not None or opening.end != served.span.end:
            raise InvalidRequest("only a last hop, behind the model's last block, draws tokens")

    def find(self, model: bytes, start: int, end: int, *, adapter: str = "", own_adapter: bool = False) -> ServedSpan:
        """The span that has these blocks and can run the adapter. Raises NotServed, Draining, UnsupportedFeature."""
        found = [
            served
            for served in self.all
            if served.model == model and served.span.start <= start < end <= served.span.end
        ]
        if not found:
            raise NotServed(f"blocks {start}:{end} of that model are not served here")
        found = [served for served in found if not self.is_leaving(served.task)]
        if not found:
            raise Draining(f"this peer is about to stop serving blocks {start}:{end}")
        for served in found:
            takes_it = not own_adapter or served.adapter_room.session_bytes > 0
            if takes_it and (not adapter or adapter in served.task.adapters):
                return served
        if not adapter:
            raise UnsupportedFeature("this peer accepts no uploaded adapters")
        there = ", ".join(sorted({name for served in found for name in served.task.adapters})) or "none"
        raise UnsupportedFeature(f"this peer has no adapter {adapter!r}; it has {there}")
