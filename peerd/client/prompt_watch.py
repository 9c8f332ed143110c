"""Finds out, for a trace, how long each hop takes for its part of a prompt.

A prompt's results go from hop to hop, so the client sees only when the last one has finished. Hops answer the question
how far they are (spec/sessions/session.md, "Progress") without using their device; so this asks each of them every
tenth of a second. Only answers that are traced are watched.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from peerd.client.finding.served_by import ServedBy
from peerd.trio_tools import open_tasks

if TYPE_CHECKING:
    from peerd.client.session.session import Session
    from peerd.meters import AnswerTrace

# A prompt that takes less needs no looking into.
LOOK_S = 0.1


@dataclass(slots=True)
class _Part:
    """What was seen of one hop: since when it had a step of the prompt, and which it has done since when."""

    began: float
    done: int
    since: float


@asynccontextmanager
async def watching_prompt(session: Session, trace: AnswerTrace | None) -> AsyncIterator[None]:
    """While the block computes a prompt, watch the hops; then tell the trace. Without a trace this does nothing."""
    if trace is None:
        yield
        return
    async with open_tasks() as tasks:
        watch = _PromptWatch(session)
        tasks.start_soon(watch.run)
        yield
    watch.tell(trace)


class _PromptWatch:
    def __init__(self, session: Session) -> None:
        self._session = session
        self._first, self._last = session.log.asked + 1, 0
        self._looked = trio.current_time()
        self._parts: dict[tuple[int, ServedBy], _Part] = {}

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            await trio.sleep(LOOK_S)
            self._last = self._session.log.asked
            answers = await self._session.how_far(LOOK_S)
            before, self._looked = self._looked, trio.current_time()
            for number, (hop, progress) in enumerate(answers):
                if progress is None or progress.taken < self._first:
                    continue
                part = self._parts.setdefault((number, hop), _Part(before, 0, before))
                if progress.done > part.done:
                    part.done, part.since = progress.done, self._looked

    def tell(self, trace: AnswerTrace) -> None:
        """Tell the trace when each hop began and ended. One that was not seen to end has ended by now."""
        now = trio.current_time()
        for (number, hop), part in self._parts.items():
            ended = part.since if part.done >= self._last else now
            trace.prompt(number, (str(hop.peer), str(hop.span)), now - part.began, ended - part.began)
