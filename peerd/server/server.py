"""Serves spans: admits sessions, gives their streams to them, and frees everything that they held.

Admission, lingering and draining are here. In `sessions`, `hosted_session.py` runs a session, `session_streams.py`
feeds it from the streams beside its control stream, and `evictions.py` ends it when it holds KV without using it. A
session outlives its control stream by some seconds, because a client's connection may come back, but nothing may
outlive the session. So every session is a task in the server's nursery, and the handlers of its streams only feed it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import trio

from peerd.exchange.first_message import first_message
from peerd.exchange.refusals import finish, refuse
from peerd.meters import Meters
from peerd.net.connection.peer_connection import CLOSED
from peerd.net.connections import Connections, Stream
from peerd.net.containment import Containment
from peerd.net.limits.owners import Owner
from peerd.net.limits.rates import Rates
from peerd.protocol.errors import (
    ConnectionLost,
    Draining,
    InternalError,
    PeerdError,
    RemoteProtocolError,
    UnsupportedFeature,
)
from peerd.protocol.identity import PeerId
from peerd.protocol.messages.adapters import ADAPTER_PROTOCOL
from peerd.protocol.messages.session import (
    INFER_PROTOCOL,
    LINK_PROTOCOL,
    PROGRESS_PROTOCOL,
    Failure,
    OpenSession,
)
from peerd.protocol.messages.span_training import SPAN_PROTOCOL
from peerd.protocol.messages.training import PASS_PROTOCOL, Begin
from peerd.server.served_spans import ServedSpan, ServedSpans
from peerd.server.sessions.acknowledged import Acknowledged, OnReceipt
from peerd.server.sessions.evictions import Evictions
from peerd.server.sessions.hosted_session import HostedSession
from peerd.server.sessions.next_hop import open_link
from peerd.server.sessions.session_streams import SessionStreams, serve_control
from peerd.server.sessions.session_table import HostedSessions, SessionKey
from peerd.server.step_meter import StepMeter
from peerd.server.training.lane import PassSpan
from peerd.server.training.lanes import PassServer
from peerd.server.training.span_trainings import SpanTrainings

# A client whose connection broke may come back to its session for this long (spec/sessions/session.md).
LINGER_S = 15.0
# How often the server dials next hops for one client. Failovers of an honest client need fewer dials, and connected
# hops need none.
DIALS_A_SECOND = 4 / 60
DIALS_AT_ONCE = 16
PAUSED = "this peer serves nobody at the moment: its owner uses the machine"


def _equal(_peer_id: PeerId) -> float:
    return 1.0


class Server:
    """Serves spans to sessions. `run` owns engines and sessions; `handlers` go to the connections."""

    def __init__(
        self, now: Callable[[], float], containment: Containment | None = None, meters: Meters | None = None
    ) -> None:
        self.draining = False
        #: Whether nothing new is accepted from others until it is False again. Our own programs are served.
        self.paused = False
        self._own: PeerId | None = None
        self._stopped = False
        self._now = now
        self._containment = containment or Containment()
        self._meters = meters or Meters()
        self._spans = ServedSpans(self._containment)
        self._sessions = HostedSessions(now)
        self._evictions = Evictions(self._sessions, self._spans)
        # The limit on dials of next hops that clients name.
        self._dials = Rates(DIALS_A_SECOND, DIALS_AT_ONCE, network_factor=4)
        self._attached = trio.Event()
        self.passes = PassServer(self._find_passes)
        self.trainings = SpanTrainings()
        streams = SessionStreams(self._sessions, lambda: self._connections.peer_id)
        self.handlers = {
            INFER_PROTOCOL: self._handle_control,
            LINK_PROTOCOL: streams.handle_link,
            PASS_PROTOCOL: self.passes.handle,
            SPAN_PROTOCOL: self.trainings.handle,
            ADAPTER_PROTOCOL: streams.handle_upload,
            PROGRESS_PROTOCOL: streams.handle_ask,
        }

    def __repr__(self) -> str:
        return f"<Server {' '.join(str(served.span) for served in self.spans)} sessions={len(self._sessions)}>"

    @property
    def spans(self) -> tuple[ServedSpan, ...]:
        """The spans that are served here, also those that accept no new sessions."""
        return self._spans.all

    @property
    def sessions(self) -> int:
        """How many sessions hold KV here."""
        return len(self._sessions)

    def attach(
        self,
        connections: Connections,
        weight_of: Callable[[PeerId], float] = _equal,
        on_receipt: OnReceipt | None = None,
    ) -> None:
        """Dial next hops over these connections. Streams that came before have waited for this.

        weight_of: how much of our devices a client gets, for what it gave us; 1 for a stranger.
        on_receipt: takes the clients' valid receipts; None asks for none.
        """
        self._connections = connections
        self._own = connections.peer_id
        self._weight_of = weight_of
        self._on_receipt = on_receipt
        self._attached.set()

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run engines and sessions until cancelled. Streams that are still open then are told that we leave."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            try:
                await self._containment.keep_running(self._evictions.run, what="taking back unused KV")
            finally:
                # Before the nursery waits for the sessions: meanwhile it takes no new tasks.
                self.draining = self._stopped = True

    def serve(self, served: ServedSpan) -> None:
        """Accept sessions on one more span from now on."""
        served.task.admission.on_wanted.append(self._evictions.look)
        served.task.on_short.append(self._evictions.look)
        served.task.meter = StepMeter(self._meters)
        self._spans.start(served, self._nursery)

    def lent_tokens(self, served: ServedSpan) -> int:
        """The KV tokens of a span's sessions that others get as soon as they wait for them."""
        return self._evictions.lent_tokens(served.task)

    def is_leaving(self, served: ServedSpan) -> bool:
        """Whether the span accepts no new sessions."""
        return self.draining or self.paused or self._spans.is_leaving(served.task)

    def refuse(self, served: ServedSpan) -> None:
        """Accept no new sessions on one span; the others go on. `resume` takes that back."""
        self._spans.refuse(served)

    def resume(self, served: ServedSpan) -> None:
        """Accept sessions on the span again."""
        self._spans.resume(served)

    async def wait_unused(self, served: ServedSpan, timeout_s: float, *, spared: PeerId | None = None) -> None:
        """Wait until the sessions of a span that refuses new ones have ended, at most `timeout_s`.

        spared: the client whose sessions are not waited for, if any.
        """
        for session in self._sessions.on(served.task, spared=spared):
            # As in `drain`, absent clients are not waited for.
            if session.admitted and session.client.control is None:
                session.close()
        with trio.move_on_after(timeout_s):
            await self._sessions.wait_unused(served.task, spared=spared)

    async def withdraw(self, served: ServedSpan) -> None:
        """Stop serving a span: end its sessions and lanes, whose clients go elsewhere, and its engine's task.

        This is finished even if cancelled; it waits at most for one batch or one turn of training. Afterwards nothing
        here uses the engine, except handlers that send their last messages, for at most 2 s.
        """
        self.refuse(served)
        with trio.CancelScope(shield=True):
            for session in self._sessions.on(served.task):
                session.client.tell(Failure.of(Draining("this peer no longer serves these blocks")))
                session.close()
            await self._sessions.wait_unused(served.task)
            await self.passes.end_lanes(served.task)
            await self.trainings.end(served.task)
            await self._spans.stop(served)

    async def drain(self, timeout_s: float) -> None:
        """Refuse new sessions and wait for the others to end, at most `timeout_s`.

        Sessions of absent clients are closed at once: when such a client came back, we would be gone.
        """
        self.draining = True
        with trio.move_on_after(timeout_s):
            for session in self._sessions:
                if session.client.control is None:
                    session.close()
                await session.wait_closed()

    async def pause(self, timeout_s: float) -> None:
        """Accept nothing new from others while `paused`, and wait at most `timeout_s` for what is under way.

        The clients of what is left are then told to go on elsewhere; their sessions lose no token there. Our own
        sessions and lanes go on.
        """
        self.paused = True
        until = trio.current_time() + timeout_s
        for served in self.spans:
            await self.wait_unused(served, max(0.0, until - trio.current_time()), spared=self._own)
            for session in self._sessions.on(served.task, spared=self._own):
                session.client.tell(Failure.of(Draining(PAUSED)))
                session.close()
            await self.passes.end_lanes(served.task, spared=self._own)
            await self.trainings.end(served.task)

    # Control streams.

    async def _handle_control(self, stream: Stream) -> None:
        """Serve a client's control stream: `open` first, then steps and routes until it ends."""
        await self._attached.wait()
        try:
            opening = await first_message(stream, (OpenSession,))
            session = await self._admit(stream, opening)
        except PeerdError as error:
            await refuse(stream, Failure.of, error)
            return
        except trio.EndOfChannel:
            return
        try:
            with session.attach(stream):
                await serve_control(stream, session)
            # The session ended before its stream did; the client was told why.
            await finish(stream)
        except ConnectionLost:
            self._linger(session, stream)
        except PeerdError as error:
            session.close()
            await refuse(stream, Failure.of, error)
        except (trio.EndOfChannel, trio.ClosedResourceError):
            # The client has finished, or the session gave the client up because it left its answers unread.
            session.close()
        except trio.Cancelled:
            self._linger(session, stream)
            raise

    async def _admit(self, stream: Stream, opening: OpenSession) -> HostedSession:
        key = (stream.peer, opening.session, opening.hop)
        known = self._sessions.get(key)
        if known is not None:
            if known.client.control is not None or not known.admitted:
                raise RemoteProtocolError("this session is open already")
            return known
        ip = stream.connection.accountable_ip
        owner = Owner.at(stream.peer, ip, self._weight_of(stream.peer))
        served = self._check(owner, opening)
        session = HostedSession(
            opening,
            owner,
            served.task,
            partial(
                open_link,
                self._connections,
                opening.session,
                now=self._now,
                may_dial=lambda: self._dials.may(owner, trio.current_time()),
                policy=self._connections.strangers_policy.named_from(ip),
            ),
            served.adapter_room,
            self._receipts(owner, opening),
            served.head,
        )
        # It is in the table before it is admitted, so that a client cannot open the same session twice while it waits.
        self._sessions.add(key, session)
        try:
            await session.admit()
        except BaseException:
            self._sessions.forget(key)
            session.close()
            raise
        rests = self._rests_for(owner.peer_id)
        if self._stopped or rests or self._spans.is_leaving(served.task):
            session.release()
            session.close()
            self._sessions.forget(key)
            if rests:
                raise Draining(PAUSED)
            raise Draining(
                "this peer is leaving" if self._stopped else "this peer is about to stop serving these blocks"
            )
        await self._nursery.start(self._host, key, session)
        self._sessions.arrived()
        return session

    def _receipts(self, owner: Owner, opening: OpenSession) -> Acknowledged | None:
        if self._on_receipt is None:
            return None
        return Acknowledged(opening, owner.peer_id, self._connections.peer_id, self._on_receipt)

    def _rests_for(self, peer: PeerId) -> bool:
        """Whether a peer is refused because our owner uses the machine. The owner's own programs are not."""
        return self.paused and peer != self._own

    def _check(self, owner: Owner, opening: OpenSession) -> ServedSpan:
        """Refuse an `open` that cannot succeed however long it waits. Raises CallerError, Overloaded or Draining."""
        if self.draining:
            raise Draining("this peer is leaving")
        if self._rests_for(owner.peer_id):
            raise Draining(PAUSED)
        self._sessions.check_room(owner)
        return self._spans.for_session(opening)

    def _find_passes(self, peer: PeerId, begin: Begin) -> PassSpan:
        """The span that runs the training passes which a peer's lane asks for. Raises CallerError, Draining."""
        if self.draining:
            raise Draining("this peer is leaving")
        if self._rests_for(peer):
            raise Draining(PAUSED)
        served = self._spans.find(begin.model, begin.start, begin.end, adapter=begin.adapter)
        if served.task.engine.passes is None:
            raise UnsupportedFeature("this peer does not train")
        return PassSpan(served.max_length, served.task, served.task.engine.passes)

    async def _host(
        self, key: SessionKey, session: HostedSession, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        try:
            with self._containment.around("a session", session.owner.peer_id):
                await session.run(task_status)
                return
            session.client.tell(Failure.of(InternalError("a bug ended the session")))
        finally:
            session.close()
            session.release()
            self._sessions.forget(key)

    def _linger(self, session: HostedSession, stream: Stream) -> None:
        """The connection broke: keep the session for a while, unless its client has come back already."""
        if session.client.control is not stream or self._stopped:
            return
        session.client.detach()
        if self.draining or self._spans.is_leaving(session.task) or stream.connection.farewell == CLOSED:
            session.close()
        else:
            contained = partial(self._containment.contained, what="a session whose client is away")
            self._nursery.start_soon(contained, self._close_unless_back, session, session.client.visits)

    async def _close_unless_back(self, session: HostedSession, visits: int) -> None:
        with trio.move_on_after(LINGER_S):
            await session.wait_closed()
        if session.client.visits == visits:
            session.close()
