"""Takes KV back from sessions: from unused ones after minutes, or within seconds while others wait; and from the
youngest where the pool has no pages left for older ones.

The pool promises more than it has (`compute/kv/reserve.py`), since a client can have everything computed again
elsewhere. The older of two sessions keeps its pages, so nobody gets anything by opening sessions and letting them grow;
but a client, or a network, that has more than half of all pages in several sessions gives of these first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import trio

from peerd.protocol.errors import Evicted
from peerd.protocol.messages.session import Failure
from peerd.server.engine_task import EngineTask
from peerd.server.served_spans import ServedSpans
from peerd.server.sessions.hosted_session import HostedSession
from peerd.server.sessions.session_table import HostedSessions

# A session that sends nothing for this long gives its pages to others.
IDLE_S = 300.0
EVICTION_ROUND_S = 10.0
# While others wait for memory, a session that has sent nothing for this long gives its pages back. One that was opened
# and never used gives them back sooner, because an honest client's first step follows its `open`.
LENT_S = 15.0
NEVER_USED_S = 5.0
WANTED_ROUND_S = 1.0
# Steps wait this long for pages that sessions leave by themselves, before a younger session gives its pages up.
SHORT_S = 1.0


class Evictions:
    """Ends unused sessions, whose clients are told why. `run` does the work."""

    def __init__(self, sessions: HostedSessions, spans: ServedSpans) -> None:
        self._sessions = sessions
        self._spans = spans
        # Set when a request has waited for KV in vain, or steps begin to wait for pages.
        self._wanted = trio.Event()

    async def run(self) -> None:
        """End unused sessions until cancelled."""
        while True:
            self._wanted = trio.Event()
            with trio.move_on_after(WANTED_ROUND_S if self._is_room_wanted() else EVICTION_ROUND_S):
                await self._wanted.wait()
            # In functions of their own: a session in a variable here would keep its engine in memory while we sleep.
            self._take_back_unused()
            self._make_pages()
            self._end_idle()

    def look(self) -> None:
        """Look for KV to take back at once, because a request has waited for it in vain, or a step waits for pages."""
        self._wanted.set()

    def lent_tokens(self, task: EngineTask) -> int:
        """The KV tokens of sessions that would be ended if others waited for memory."""
        return sum(session.tokens for session in self._sessions.on(task) if self._is_unused(session))

    @staticmethod
    def _is_unused(session: HostedSession) -> bool:
        return session.admitted and session.unused_s() >= (LENT_S if session.has_begun else NEVER_USED_S)

    def _is_room_wanted(self) -> bool:
        return any(task.admission.wanted_tokens or task.short_since is not None for task in self._spans.tasks)

    def _take_back_unused(self) -> None:
        """End sessions that hold KV without using it, the longest unused first, until the waiting requests would
        fit.
        """
        for task in self._spans.tasks:
            missing = task.admission.wanted_tokens
            for session in sorted(self._sessions.on(task), key=HostedSession.unused_s, reverse=True):
                if missing <= 0 or not self._is_unused(session):
                    continue
                missing -= session.tokens
                _evict(session, f"the session was idle for {session.unused_s():.0f} s while others wait for memory")

    def _make_pages(self) -> None:
        """End sessions until there are pages for the steps that wait: unused ones, the youngest first, since they have
        least to compute again. After a while also one that is in use.
        """
        for task in self._spans.tasks:
            if task.short_since is None:
                continue
            missing = task.engine.missing_pages
            youngest_first = self._youngest_first(task)
            for session in filter(self._is_unused, youngest_first):
                if missing <= 0:
                    break
                if pages := task.engine.pages_of(session):
                    missing -= pages
                    _evict(session, f"the session was idle for {session.unused_s():.0f} s while others need its memory")
            if missing > 0 and trio.current_time() - task.short_since >= SHORT_S:
                for session in _giving(task, youngest_first):
                    _evict(session, "memory ran out, and sessions of others that are older need it")
                    break

    def _youngest_first(self, task: EngineTask) -> list[HostedSession]:
        """The admitted sessions, the last one first."""
        age = {session: number for number, session in enumerate(task.tenants)}
        admitted = [session for session in self._sessions.on(task) if session.admitted and session in age]
        return sorted(admitted, key=age.__getitem__, reverse=True)

    def _end_idle(self) -> None:
        for session in self._sessions:
            if session.admitted and trio.current_time() - session.last_used >= IDLE_S:
                _evict(session, f"the session was idle for {IDLE_S:g} s")


def _evict(session: HostedSession, why: str) -> None:
    session.client.tell(Failure.of(Evicted(why)))
    session.close()


def _giving(task: EngineTask, youngest_first: list[HostedSession]) -> Iterator[HostedSession]:
    """The sessions that give their pages up for older ones whose steps wait, first those of an owner that has too
    many, if another owner waits.
    """
    waiting = set(task.engine.short)
    ages = [age for age, session in enumerate(youngest_first) if session in waiting]
    pages = {session: task.engine.pages_of(session) for session in youngest_first}
    held = Counter[str]()
    for session in youngest_first:
        held[session.owner.share] += pages[session]
    for share, most in held.most_common(1):
        own = [session for session in youngest_first if session.owner.share == share and pages[session]]
        if 2 * most > task.engine.total_pages and any(youngest_first[age].owner.share != share for age in ages):
            yield from own[:-1]
    # A step waits for younger sessions only.
    yield from filter(pages.__getitem__, youngest_first[: max(ages, default=0)])
