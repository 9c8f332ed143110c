"""Keeps a chain open under a session: hears its hops, and sees to it that each of them gets what it lacks.

Knows hops, faults and routes; what the first one lacks is `first_hop`'s, who takes a dead one's place
`chain_mender`'s, who hangs `pace_watch`'s, and what to do about a link `bridges`'. The difficulty is that a death can
come between any two messages, also while the last one is being mended. So whatever happens is noted as a hole, a slow
hop or a broken link, one task sees to these one by one until there are none, and every hop takes a step's number once,
whoever sends it again (spec/session.md, "When a hop dies").
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress

import trio

from peerd.client.session.bridges import Bridges
from peerd.client.session.control_stream import ControlStream
from peerd.client.session.first_hop import FirstHop
from peerd.client.session.live_chain import MAX_NUMBERS, LiveChain
from peerd.client.session.mender import ChainMender, Means, NumbersUsedUp, Wanted
from peerd.client.session.pace_watch import PaceWatch
from peerd.client.session.step_log import Pending, StepLog
from peerd.protocol.connection.frames import Priority
from peerd.protocol.encoding.schema import Message
from peerd.protocol.errors import (
    BadResult,
    CallerError,
    ConnectionLost,
    Evicted,
    LinkFailed,
    Overloaded,
    PeerdError,
    PeerFault,
    RelayLost,
    RemoteProtocolError,
)
from peerd.protocol.messages.session import MAX_STEP_POSITIONS, Failure, Gap, LinkDown, Output, Routed, Step
from peerd.protocol.span import Span
from peerd.routing.failures.pace import Pace

log = logging.getLogger(__name__)

# Faults in a row without one answer, after which there is no use in mending on.
MAX_BARREN_FAULTS = 8
# Peers that must say of one step that it overflows, where there are so many: one alone may be broken, or lie.
OVERFLOWS_BELIEVED = 2
# Room for a chain of new hops: beyond it a new session begins, whose numbers are all free.
_FEW_NUMBERS = MAX_NUMBERS // 8
BYTES_A_VALUE = 4


class ChainKeeper:
    """A chain over `wanted.blocks` for the steps in `log`. `run` owns its tasks.

    `changed` is unparked whenever steps were answered or given up, or the chain is another.
    """

    def __init__(self, means: Means, wanted: Wanted, log: StepLog) -> None:
        # Hops replaced since the chain first stood, whether dead or only slow.
        self.failovers = 0
        # How often hops that lived were given up, so that all of a chain had to compute the past again.
        self.reopened = 0
        self.changed = trio.lowlevel.ParkingLot()
        self.pace = Pace()
        # Since when the oldest step is being worked on: it was sent, or the one before it was answered.
        self.working_since = trio.current_time()
        self._finder = means.finder
        self._opener = means.opener
        self._wanted = wanted
        self._log = log
        self._first = FirstHop(log, wanted.terms)
        # Positions that hops sent again.
        self._replayed = 0
        self._mender = ChainMender(means, wanted)
        self._chain = LiveChain(self._opener.new_session(), wanted.blocks)
        # Whether there was a chain before, so that a hole is a loss; and whether steps may be sent.
        self._has_stood = False
        self._ready = False
        # Positions that new hops compute again before they come to what we wait for.
        self.replaying = 0
        # What is to be seen to, beside holes and bridges.
        self._slow: set[ControlStream] = set()
        self._fatal: PeerdError | None = None
        # Faults since the last answer.
        self._barren = 0
        self._alarm = trio.Event()

    def __repr__(self) -> str:
        return f"<ChainKeeper {self._chain} ready={self._ready}>"

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep a chain open whenever there is something to send on it, until cancelled."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                self._bridges = Bridges(self, self._opener, nursery)
                task_status.started()
                nursery.start_soon(PaceWatch(self, self._log, self._opener, self._finder).run)
                await self._keep_open()
        finally:
            self._chain.close()

    def describe(self) -> list[dict[str, object]]:
        """Who serves which blocks now; empty where no chain is open."""
        return self._chain.describe()

    @property
    def replayed_positions(self) -> int:
        """Positions that were sent again to bring replacements to where their predecessors stood."""
        return self._first.replayed_positions + self._replayed

    @property
    def chain(self) -> LiveChain:
        return self._chain

    @property
    def is_working(self) -> bool:
        """Whether a chain stands and owes us answers."""
        return self._ready and bool(self._log.pending)

    @property
    def max_steps(self) -> int:
        """Steps that may be unanswered at a time: what every hop grants."""
        granted = [control.opened.max_steps for control in self._chain.controls]
        return min(granted, default=self._wanted.terms.max_steps)

    @property
    def epoch(self) -> int:
        """The route's number."""
        return self._chain.epoch

    def submit(self, pending: Pending) -> None:
        """Send a step that is in the log, now or as soon as there is a chain."""
        if len(self._log.pending) == 1:
            self.working_since = trio.current_time()
            self.changed.unpark_all()
        if self._ready:
            self._first.send(pending)
        else:
            self._alarm.set()

    # What the hops say.

    async def _read(self, control: ControlStream) -> None:
        try:
            await control.read(self._on_message, MAX_STEP_POSITIONS * self._wanted.width * BYTES_A_VALUE)
        except trio.ClosedResourceError:
            return
        except PeerdError as error:
            self._fault(control, error)

    def _on_message(self, control: ControlStream, message: Message, body: memoryview) -> None:
        if control not in self._chain:
            return
        if isinstance(message, Output):
            self._on_output(control, message, body)
        elif isinstance(message, Failure):
            self._on_failure(control, message)
        elif isinstance(message, Routed):
            self._replayed += message.replayed
            self._bridges.routed(control, message)
        elif isinstance(message, LinkDown):
            self._bridges.link_down(control, message)
        elif isinstance(message, Step):
            self._bridges.pass_on(control, message, body)
        elif isinstance(message, Gap):
            # Its cache is not what we think it is: only a new chain is sure to agree with us.
            self._start_anew(Evicted(f"{control.hop.peer_id} has only {message.have}"))
        else:
            raise RemoteProtocolError(f"{message.TYPE} in the middle of a session")

    def _on_output(self, control: ControlStream, output: Output, body: memoryview) -> None:
        if output.seq not in self._log.pending:
            # Answered before, by a hop that this one replaced; or given up.
            return
        positions = self._log.pending[output.seq].step.positions
        self._log.answer(output, body, self._wanted.width)
        now = trio.current_time()
        if positions and not self.replaying:
            self.pace.took(positions, now - self.working_since)
        self.working_since = now
        self.replaying = 0
        self._barren = 0
        self._finder.succeeded(control.hop.peer_id)
        for peer in self._mender.overflowed:
            self._finder.failed(peer)
        self._mender.overflowed.clear()
        self.changed.unpark_all()

    def _on_failure(self, control: ControlStream, failure: Failure) -> None:
        error = failure.error
        if failure.seq is not None and isinstance(error, BadResult):
            self._overflowed(control, error)
        elif failure.seq is None or not isinstance(error, CallerError):
            self._fault(control, error)
        elif failure.seq in self._log.pending:
            # What was refused no other peer can mend; nor what was built on it.
            self._give_up(error)

    def _fault(self, control: ControlStream, error: PeerdError) -> None:
        """A hop ended its part of the session, or broke it: there is a hole in its place."""
        if control not in self._chain:
            return
        if isinstance(error, RelayLost):
            # The peer may be well, and another relay lead to it: it is as good as anybody for its own place.
            pass
        elif isinstance(error, PeerFault):
            self._finder.failed(control.hop.peer_id)
        elif not isinstance(error, Evicted):
            self._mender.avoid(control.hop.peer_id)
        if isinstance(error, CallerError):
            self._fatal = error
        self._lose(control, error)

    def _overflowed(self, control: ControlStream, error: BadResult) -> None:
        """A hop's blocks gave NaN or infinity, and it says so: another's may not, if they compute in another dtype.

        The peer is blamed only once another has answered; where two say the same, that is the answer.
        """
        if control not in self._chain:
            return
        self._mender.overflowed[control.hop.peer_id] = error
        self._lose(control, error)
        if len(self._mender.overflowed) >= OVERFLOWS_BELIEVED:
            self._fatal = error

    def _lose(self, control: ControlStream, error: PeerdError) -> None:
        log.info("lost %s for blocks %s: %s", control.hop.peer_id, control.hop.span, error)
        self._chain.drop(control)
        self._count_barren(error)
        self._ready = False
        # Who was evicted because nothing was asked for comes back when something is.
        if self._log.pending or not isinstance(error, Evicted):
            self._alarm.set()

    def _count_barren(self, error: PeerdError) -> None:
        self._barren += 1
        if self._barren > MAX_BARREN_FAULTS:
            self._fatal = error

    def _start_anew(self, error: PeerdError) -> None:
        """Give every hop up, and begin again from what was answered."""
        self.reopened += self._has_stood and bool(self._chain.controls)
        self._count_barren(error)
        self._chain.close()
        self._log.start_anew()
        self._chain = LiveChain(self._opener.new_session(), self._wanted.blocks)
        self._ready = False
        self._alarm.set()

    # What the watch and the bridges say.

    def alarm(self) -> None:
        """There is something to see to."""
        self._alarm.set()

    def overtake(self, control: ControlStream) -> None:
        """A hop hangs, or is too slow: replace it if anybody else can be had."""
        if control in self._chain:
            self._slow.add(control)
            self._alarm.set()

    def bridge(self, control: ControlStream) -> None:
        """What this hop sends does not arrive at the next."""
        self._bridges.stuck(control)

    def unreachable(self, control: ControlStream, error: Exception) -> None:
        """A hop that its neighbour cannot reach does not answer us either."""
        if control not in self._chain:
            return
        if isinstance(error, PeerFault):
            self._fault(control, error)
        else:
            self._mender.avoid(control.hop.peer_id)
            self._lose(control, LinkFailed(f"{control.hop.peer_id} cannot be reached: {error}"))

    def no_answer(self, seconds: float) -> None:
        """Nobody knows why a step was never answered."""
        self._start_anew(Overloaded(f"no answer within {seconds:g} s"))

    # Recovery.

    async def _keep_open(self) -> None:
        while True:
            await self._alarm.wait()
            self._alarm = trio.Event()
            try:
                await self._recover()
            except PeerdError as error:
                self._barren = 0
                self._fatal = None
                self._mender.overflowed.clear()
                if isinstance(error, CallerError | LinkFailed):
                    self._start_anew(error)
                    self._alarm = trio.Event()
                self._give_up(error)

    def _give_up(self, error: PeerdError) -> None:
        """Fail what is pending. Hops that live keep their KV for what is asked next, if they still agree with us."""
        self._log.fail(error)
        if self._log.is_forked:
            self._start_anew(error)
            self._alarm = trio.Event()
            self._barren = 0
        self.changed.unpark_all()

    async def _recover(self) -> None:
        """Fill holes, bridge links and overtake until there is nothing to see to, then send what is unsent."""
        while True:
            if self._fatal is not None:
                raise self._fatal
            if self._chain.holes:
                await self._fill(self._chain.holes[0])
            elif self._bridges.any_broken:
                await self._bridges.mend()
            elif not self._ready:
                await self._catch_up()
            elif self._slow:
                await self._overtake(self._slow.pop())
            elif self._bridges.any_doubted:
                await self._bridges.replan()
            else:
                return

    async def _fill(self, hole: Span) -> None:
        self._ready = False
        if not self._chain.has_numbers(_FEW_NUMBERS):
            self._start_anew(Overloaded("this session has no numbers left for new hops"))
            hole = self._chain.holes[0]
        chain = self._chain
        try:
            controls = await self._mender.fill(chain, hole)
        except NumbersUsedUp:
            if chain is self._chain:
                self._start_anew(Overloaded("this session has no numbers left for new hops"))
            return
        if chain is not self._chain:
            for control in controls:
                control.close()
            return
        chain.put(Span(hole.start, hole.end), controls)
        await self._adopt(controls)

    async def _overtake(self, slow: ControlStream) -> None:
        """Replace a hop that hangs, unless nobody else can be had now: then it is asked again."""
        since = self.working_since
        log.info("%s hangs with a step of blocks %s", slow.hop.peer_id, slow.hop.span)
        if await self.replace(slow, lambda: self.working_since == since):
            # Where all are slow, going from one to the next would only make them slower.
            self.pace.doubled()

    async def replace(self, control: ControlStream, is_still_wanted: Callable[[], bool]) -> bool:
        """Put others in the place of a hop that lives, without blame. False where nobody else can be had."""
        chain, span = self._chain, control.hop.span
        if control not in chain:
            return False
        controls = await self._mender.overtake(chain, span, [control.hop.peer_id])
        if controls is None:
            return False
        if chain is not self._chain or not is_still_wanted() or not chain.put(span, controls):
            for other in controls:
                other.close()
            return False
        self._mender.avoid(control.hop.peer_id)
        self._ready = False
        await self._adopt(controls)
        return True

    async def _adopt(self, controls: list[ControlStream]) -> None:
        """Hear new hops, and have whoever is before them push there."""
        for control in controls:
            self._nursery.start_soon(self._read, control)
        self.failovers += self._has_stood
        if self._has_stood:
            log.info("now in its place: %s", ", ".join(f"{each.hop.peer_id} for {each.hop.span}" for each in controls))
        self.replaying = self._log.positions
        before = self._chain.before(controls[0].hop.span.start)
        if before is not None:
            await self.route(before, controls[0])

    async def route(self, upstream: ControlStream, to: ControlStream) -> None:
        """Point a hop to its new next hop, which it brings to where that should stand."""
        upstream.route_epoch = self._chain.raise_epoch()
        upstream.is_bridged = upstream.is_bridge_wanted = False
        route = await self._opener.route(self._chain.session, upstream.route_epoch, upstream, to)
        # Where the stream breaks, its reader says so.
        with suppress(PeerFault, trio.ClosedResourceError):
            upstream.send_nowait(route, priority=Priority.CONTROL)

    async def _catch_up(self) -> None:
        """Let the first hop have all that was answered, if it is new, and what came after."""
        head = self._chain.controls[0]
        try:
            await self._first.bring_up(head, self._chain.epoch)
        except PeerFault as error:
            self._fault(head, error)
        except trio.ClosedResourceError:
            self._fault(head, ConnectionLost(f"the stream to {head.hop.peer_id} has ended"))
        if head not in self._chain or not self._chain.is_whole:
            return
        self._ready = True
        self._has_stood = True
        self.working_since = trio.current_time()
        self._first.send_unsent()
        self.changed.unpark_all()
