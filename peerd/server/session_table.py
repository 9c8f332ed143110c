"""The sessions that a server hosts, by owner, id and hop: who is there, and which one a ticket opens.

Knows sessions, tickets and who waits for a session to come or go; admits, runs and ends none. The difficulty is that
whoever has learnt a session's id may open one of his own under it, and that a ticket may overtake the `open` of the
session that it is for: so a ticket is held against each session of that id, and waited with for a moment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import trio

from peerd.net.owners import Tally
from peerd.protocol.errors import TicketRefused
from peerd.protocol.identity import PeerId
from peerd.protocol.messages.session import Link
from peerd.protocol.messages.tickets import Ticket, open_ticket
from peerd.server.engine_task import EngineTask
from peerd.server.hosted_session import HostedSession

# A ticket may overtake the client's `open`, since both travel at once.
LINK_PATIENCE_S = 10.0

SessionKey = tuple[PeerId, bytes, int]
"""The client, its session's id, and the hop's number."""


class HostedSessions:
    """A table of sessions. `now` gives unix seconds, by which tickets expire."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._sessions: dict[SessionKey, HostedSession] = {}
        self._arrival = trio.lowlevel.ParkingLot()
        self._departure = trio.lowlevel.ParkingLot()

    def __repr__(self) -> str:
        return f"<HostedSessions {len(self)}>"

    def __len__(self) -> int:
        return len(self._sessions)

    def __iter__(self) -> Iterator[HostedSession]:
        """Those of this moment: they may come and go meanwhile."""
        return iter(list(self._sessions.values()))

    def get(self, key: SessionKey) -> HostedSession | None:
        """The session, admitted or not."""
        return self._sessions.get(key)

    def admitted(self, key: SessionKey) -> HostedSession | None:
        """The session if it holds KV."""
        session = self._sessions.get(key)
        return session if session is not None and session.admitted else None

    def tally(self) -> Tally:
        """How many each owner has."""
        tally = Tally()
        for session in self._sessions.values():
            tally.add(session.owner, 1)
        return tally

    def on(self, task: EngineTask) -> list[HostedSession]:
        """Those that use an engine."""
        return [session for session in self._sessions.values() if session.task is task]

    def add(self, key: SessionKey, session: HostedSession) -> None:
        """It is known from now on, so that nobody opens it twice."""
        self._sessions[key] = session

    def arrived(self) -> None:
        """A session was admitted: links may wait for it."""
        self._arrival.unpark_all()

    def forget(self, key: SessionKey) -> None:
        """It has ended."""
        del self._sessions[key]
        self._departure.unpark_all()

    async def wait_unused(self, task: EngineTask) -> None:
        """Wait until no session uses an engine."""
        while self.on(task):
            await self._departure.park()

    async def of_link(self, link: Link, sender: PeerId, receiver: PeerId) -> tuple[HostedSession, int]:
        """The session that a ticket opens, and the link's epoch; waits for its `open` a little.

        sender, receiver: between whom the link was opened. Raises TicketRefused.
        """
        refusal = "no such session here"
        with trio.move_on_after(LINK_PATIENCE_S):
            while True:
                found = self._of_link_now(link, sender, receiver)
                if not isinstance(found, str):
                    return found
                refusal = found or refusal
                await self._arrival.park()
        raise TicketRefused(refusal)

    def _of_link_now(self, link: Link, sender: PeerId, receiver: PeerId) -> tuple[HostedSession, int] | str:
        """The session that a ticket opens and its epoch, or why there is none yet. Raises TicketRefused."""
        refusal = ""
        for (owner, session_id, hop), session in self._sessions.items():
            if session_id != link.session or not session.admitted:
                continue
            try:
                ticket = open_ticket(link.ticket, owner=owner, now=self._now())
            except TicketRefused as error:
                # Whoever has learnt a session's id may open one of his own under it: look further.
                refusal = str(error)
                continue
            if ticket.hop == hop and ticket.session == session_id:
                _check_ends(ticket, sender, receiver)
                return session, ticket.epoch
        return refusal


def _check_ends(ticket: Ticket, sender: PeerId, receiver: PeerId) -> None:
    if ticket.sender != sender:
        raise TicketRefused("the ticket names another sender")
    if ticket.receiver != receiver:
        raise TicketRefused("the ticket names another receiver")
