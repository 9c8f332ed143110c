"""Takes KV back from sessions that hold it without using it: after minutes, or within seconds while others wait."""

from __future__ import annotations

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


class Evictions:
    """Ends unused sessions, whose clients are told why. `run` does the work."""

    def __init__(self, sessions: HostedSessions, spans: ServedSpans) -> None:
        self._sessions = sessions
        self._spans = spans
        # Set when a request has waited for KV in vain.
        self._wanted = trio.Event()

    async def run(self) -> None:
        """End unused sessions until cancelled."""
        while True:
            self._wanted = trio.Event()
            with trio.move_on_after(WANTED_ROUND_S if self._is_room_wanted() else EVICTION_ROUND_S):
                await self._wanted.wait()
            # In functions of their own: a session in a variable here would keep its engine in memory while we sleep.
            self._take_back_unused()
            self._end_idle()

    def look(self) -> None:
        """Look for unused sessions at once, because a request has waited for KV in vain."""
        self._wanted.set()

    def lent_tokens(self, task: EngineTask) -> int:
        """The KV tokens of sessions that would be ended if others waited for memory."""
        return sum(session.tokens for session in self._sessions.on(task) if self._is_unused(session))

    @staticmethod
    def _is_unused(session: HostedSession) -> bool:
        return session.admitted and session.unused_s() >= (LENT_S if session.has_begun else NEVER_USED_S)

    def _is_room_wanted(self) -> bool:
        return any(task.admission.wanted_tokens for task in self._spans.tasks)

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
                unused_s = session.unused_s()
                session.client.tell(
                    Failure.of(Evicted(f"the session was idle for {unused_s:.0f} s while others wait for memory"))
                )
                session.close()

    def _end_idle(self) -> None:
        for session in self._sessions:
            if session.admitted and trio.current_time() - session.last_used >= IDLE_S:
                session.client.tell(Failure.of(Evicted(f"the session was idle for {IDLE_S:g} s")))
                session.close()
