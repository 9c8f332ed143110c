"""The sessions that a server hosts, by owner, id and hop number, and which session a ticket opens.

A peer that has learnt a session's id may open its own session with the same id, and a ticket may arrive before the
`open` of its session. So a ticket is checked against every session with that id, and a ticket without a session waits
for a moment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import trio

from peerd.net.limits.owners import Owner, Tally
from peerd.protocol.errors import Overloaded, TicketRefused
from peerd.protocol.identity import PeerId
from peerd.protocol.messages.session import Link
from peerd.protocol.messages.tickets import Ticket, open_ticket
from peerd.server.engine_task import EngineTask
from peerd.server.sessions.hosted_session import HostedSession

# A ticket may arrive before the client's `open`, since both travel at the same time.
LINK_PATIENCE_S = 10.0
# The limits on sessions of one peer, and of one network, whatever their size: each costs tasks and buffers beside its
# tokens.
MAX_SESSIONS_A_PEER = 64
MAX_SESSIONS_A_NETWORK = 256

SessionKey = tuple[PeerId, bytes, int]
"""The client, its session's id, and the hop's number."""


class HostedSessions:
    """A table of sessions. `now` returns unix seconds, by which tickets expire."""

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
        """The sessions at this moment: they may come and go while the caller iterates."""
        return iter(list(self._sessions.values()))

    def get(self, key: SessionKey) -> HostedSession | None:
        """The session, admitted or not."""
        return self._sessions.get(key)

    def admitted(self, key: SessionKey) -> HostedSession | None:
        """The session if it holds KV, else None."""
        session = self._sessions.get(key)
        return session if session is not None and session.admitted else None

    def check_room(self, owner: Owner) -> None:
        """Raise Overloaded if the owner, or its network, has as many sessions as it may have."""
        limits = {"a_peer": MAX_SESSIONS_A_PEER, "a_network": MAX_SESSIONS_A_NETWORK}
        if not self.tally().has_room(owner, 1, **limits):
            raise Overloaded(
                f"{MAX_SESSIONS_A_PEER} sessions of yours, or {MAX_SESSIONS_A_NETWORK} of your network, are open here"
            )

    def tally(self) -> Tally:
        """How many sessions each owner has."""
        tally = Tally()
        for session in self._sessions.values():
            tally.add(session.owner, 1)
        return tally

    def on(self, task: EngineTask, *, spared: PeerId | None = None) -> list[HostedSession]:
        """The sessions that use this engine, but for those of one client, if it is named."""
        return [one for one in self._sessions.values() if one.task is task and one.owner.peer_id != spared]

    def add(self, key: SessionKey, session: HostedSession) -> None:
        """Add a session, so that it cannot be opened twice."""
        self._sessions[key] = session

    def arrived(self) -> None:
        """Wake the links that wait for a session, because one was admitted."""
        self._arrival.unpark_all()

    def forget(self, key: SessionKey) -> None:
        """Remove a session that has ended."""
        del self._sessions[key]
        self._departure.unpark_all()

    async def wait_unused(self, task: EngineTask, *, spared: PeerId | None = None) -> None:
        """Wait until no session uses this engine, but for those of one client, if it is named."""
        while self.on(task, spared=spared):
            await self._departure.park()

    async def of_link(self, link: Link, sender: PeerId, receiver: PeerId) -> tuple[HostedSession, int]:
        """The session that a ticket opens, and the link's epoch. Waits a little for the session's `open`.

        sender, receiver: the two ends of the link. Raises TicketRefused.
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
        """The session that a ticket opens and its epoch, or the reason why there is none yet. Raises TicketRefused."""
        refusal = ""
        for (owner, session_id, hop), session in self._sessions.items():
            if session_id != link.session or not session.admitted:
                continue
            try:
                ticket = open_ticket(link.ticket, owner=owner, now=self._now())
            except TicketRefused as error:
                # This may be another peer's session with the same id: look further.
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
