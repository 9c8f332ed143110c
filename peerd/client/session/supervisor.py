"""Keeps a chain open under a session: repairs it, and gives every hop the steps that it lacks.

Everything that goes wrong comes to `report` as a value (`troubles.py`). Its effect on the chain is noted at once, so
that an opening that is under way starts over with the chain as it is now. Work that follows waits in one queue, and one
task does it, the most urgent first: that is decided here, and done in `repairs.py`. `hop_messages.py` reads what hops
say; `mender.py` chooses the peers that replace a dead hop; `first_hop.py` sends the first hop what it lacks. A hop can
die between any two messages, also while another death is being repaired: so every hop takes a step's number only once,
whichever peer sends it again (spec/sessions/session.md, "When a hop dies").
"""

from __future__ import annotations

import logging

import trio

from peerd.client.finding.candidates import MAX_FAULTS_WITHOUT_ANSWER
from peerd.client.session.acknowledging import Acknowledging
from peerd.client.session.bridges import Bridges
from peerd.client.session.first_hop import FirstHop
from peerd.client.session.hop_messages import HopMessages
from peerd.client.session.hops.control_stream import ControlStream
from peerd.client.session.live_chain import MAX_NUMBERS, LiveChain
from peerd.client.session.mender import ChainMender, NumbersUsedUp, SessionSpec, SessionTools
from peerd.client.session.pace_watch import PaceWatch
from peerd.client.session.progress import StepProgress
from peerd.client.session.repairs import Repairs
from peerd.client.session.step_log import Pending, StepLog
from peerd.client.session.troubles import (
    Behind,
    BridgeIdle,
    Consequences,
    Fatal,
    Hole,
    HopHangs,
    LinkBroken,
    News,
    NoAnswer,
    Queued,
    consequences_of,
    ends_chain,
    most_urgent,
    still_stands,
)
from peerd.protocol.errors import Overloaded, PeerdError, Unresponsive
from peerd.protocol.rows import PREFILL_POSITIONS
from peerd.protocol.span import Span

log = logging.getLogger(__name__)

# Room for a chain of new hops: beyond it a new session begins, whose numbers are all free.
_FEW_NUMBERS = MAX_NUMBERS // 8


class Supervisor:
    """A chain over `spec.blocks` for the steps in `log`. `run` owns its tasks."""

    def __init__(self, tools: SessionTools, spec: SessionSpec, log: StepLog) -> None:
        # How often open hops were given up, so that the whole chain had to compute the past again.
        self.reopened = 0
        self._finder = tools.finder
        self._opener = tools.opener
        self._spec = spec
        self._log = log
        self._first = FirstHop(log, spec.terms, tools.opener.connections.meters)
        self._mender = ChainMender(tools, spec)
        self._acknowledging = Acknowledging(tools.opener.identity, spec.terms.model)
        self.progress = StepProgress(log, self._new_chain())
        # Work that cannot be seen from the chain itself, as an ordered set.
        self._queue: dict[Queued, None] = {}
        self._faults_without_answer = 0
        # The last step that was sent while no other was under way.
        self._alone = 0
        self._is_woken = False
        self._woken = trio.lowlevel.ParkingLot()

    def __repr__(self) -> str:
        return f"<Supervisor {self.progress} {len(self._queue)} troubles>"

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep a chain open while there is something to send on it, until cancelled."""
        try:
            async with trio.open_nursery() as nursery:
                self._bridges = Bridges(self._opener, nursery, self.report, self._log, self._spec.width)
                self._messages = HopMessages(
                    self.progress, self._log, self._spec.width, self._mender, self._bridges, self.report, self._answered
                )
                self._repairs = Repairs(
                    self.progress,
                    self._log,
                    self._first,
                    self._mender,
                    self._opener,
                    nursery,
                    self._messages.read,
                    self.report,
                    lambda control: self._acknowledging.leave(self.chain, control),
                )
                task_status.started()
                nursery.start_soon(PaceWatch(self.progress, self._opener, self._finder, self.report).run)
                await self._keep_open()
        finally:
            self._acknowledging.close(self.chain)

    @property
    def failovers(self) -> int:
        """How many hops were replaced after the first chain was complete, because they died or were slow."""
        return self.progress.failovers

    @property
    def replayed_positions(self) -> int:
        """How many positions were sent again, so that replacements catch up with the hops that they replace."""
        return self._first.replayed_positions + self.progress.replayed_by_hops

    @property
    def chain(self) -> LiveChain:
        return self.progress.chain

    @property
    def changed(self) -> trio.lowlevel.ParkingLot:
        """Unparked when steps were answered or given up, and when the chain was replaced."""
        return self.progress.changed

    @property
    def max_steps(self) -> int:
        """How many steps may be unanswered at a time: the least that any hop grants."""
        granted = [control.opened.max_steps for control in self.chain.controls]
        return min(granted, default=self._spec.terms.max_steps)

    @property
    def step_positions(self) -> int:
        """Into steps of how many positions a long prompt is cut: the least that any hop asks for."""
        return min((control.opened.step_positions for control in self.chain.controls), default=PREFILL_POSITIONS)

    @property
    def epoch(self) -> int:
        """The number of the newest route."""
        return self.chain.epoch

    def submit(self, pending: Pending) -> None:
        """Send a step that is in the log, now or as soon as the chain is ready."""
        if len(self._log.pending) == 1:
            self.progress.started()
            self._alone = pending.step.seq
        if self.progress.is_ready:
            self._first.send(pending)
            self._repairs.send_draws()
        else:
            self._wake()

    def _answered(self, control: ControlStream, positions: int) -> None:
        """Note that a hop has answered a pending step of so many positions."""
        self._faults_without_answer = 0
        self._finder.succeeded(control.hop.peer_id)
        self._note_speed(positions)
        self._mender.answered(self.chain)
        self._acknowledging.answered(self.chain, positions)

    def _note_speed(self, positions: int) -> None:
        """Note what every hop must have been able to compute in the time that the chain took for the answered step.

        Only of a step that was sent while no other was under way: of several, answers that are held back and come
        together would show more than there was.
        """
        seconds = trio.current_time() - self.progress.working_since
        if self._log.answered == self._alone and seconds > 0 and not self.progress.replaying:
            for control in self.chain.controls:
                self._finder.shown(control.hop.peer_id, positions * len(control.hop.span) / seconds)

    # What went wrong, and what follows from it.

    def report(self, news: News | Fatal) -> None:
        """Note that something went wrong. The hops' messages, the pace watch and the bridges all report here."""
        if isinstance(news, Fatal):
            self._queue[news] = None
            self._wake()
            return
        hop = None if isinstance(news, NoAnswer) else news.hop
        if hop is not None and hop not in self.chain:
            return
        if isinstance(news, LinkBroken) and self.chain.route(news.hop).is_bridged:
            self._bridge_is_stuck(news.hop)
            return
        consequences = consequences_of(news)
        if isinstance(news, HopHangs | LinkBroken | BridgeIdle):
            if not still_stands(news, self.chain, self.progress.oldest_seq):
                return
            self._queue[news] = None
        else:
            self._note(consequences, hop, news.error)
        if self._log.pending or not consequences.waits_for_work:
            self._wake()

    def _bridge_is_stuck(self, upstream: ControlStream) -> None:
        """Handle a bridge that carries nothing from one end to the other: one of the two hops says something untrue."""
        seq = self.progress.oldest_seq
        if seq is None:
            return
        hop = self._bridges.stuck_at(self.chain, upstream, seq, self.progress.late_after_s / 2)
        if hop is not None:
            self._mender.lapses.note(Unresponsive(f"{hop.hop.peer_id} holds step {seq} back"), hop.hop.peer_id)
            self.report(HopHangs(hop, seq))

    def _note(self, consequences: Consequences, hop: ControlStream | None, error: PeerdError) -> None:
        """Carry out what follows at once."""
        if hop is not None and consequences.is_blamed:
            self._finder.failed(hop.hop.peer_id)
        if hop is not None and consequences.is_avoided:
            self._mender.candidates.avoid(hop.hop.peer_id, trio.current_time())
        if hop is not None and consequences.drops_hop:
            log.info("lost %s for blocks %s: %s", hop.hop.peer_id, hop.hop.span, error)
            self.chain.drop(hop)
            self.progress.is_ready = False
            self._count_fault(error)
        if consequences.drops_all:
            self._start_anew()
            self._count_fault(error)

    def _count_fault(self, error: PeerdError) -> None:
        self._faults_without_answer += 1
        if self._faults_without_answer > MAX_FAULTS_WITHOUT_ANSWER:
            self._queue[Fatal(error)] = None

    def _start_anew(self) -> None:
        """Close every hop, and begin again from the answered state."""
        self.reopened += self.progress.has_stood and bool(self.chain.controls)
        self.chain.close()
        self._log.start_anew()
        self.progress.chain = self._new_chain()
        self.progress.is_ready = False

    def _give_up(self, error: PeerdError) -> None:
        """Fail the pending steps. Open hops keep their KV for the next step, if their state still agrees with the
        log.
        """
        self._log.fail(error)
        if self._log.is_forked:
            self._rest_without_chain()
        self.progress.changed.unpark_all()

    def _rest_without_chain(self) -> None:
        """Open no chain before the next step, which then finds a new one."""
        self._start_anew()
        self._faults_without_answer = 0
        self._is_woken = False

    def _new_chain(self) -> LiveChain:
        return LiveChain(self._opener.new_session(), self._spec.blocks)

    # Recovery.

    def _wake(self) -> None:
        """Wake the recovery task, which looks for work."""
        self._is_woken = True
        self._woken.unpark_all()

    async def _keep_open(self) -> None:
        while True:
            while not self._is_woken:
                await self._woken.park()
            self._is_woken = False
            try:
                await self._recover()
            except PeerdError as error:
                self._fail(error)

    def _fail(self, error: PeerdError) -> None:
        """Fail the pending steps, because nothing more can be done for them."""
        self._faults_without_answer = 0
        self._mender.refusals.clear()
        self._queue = {trouble: None for trouble in self._queue if not isinstance(trouble, Fatal)}
        if ends_chain(error):
            self._rest_without_chain()
        self._give_up(error)

    async def _recover(self) -> None:
        """Work on one trouble after another, the most urgent first, until there is none. Raises the error that fails
        the steps.
        """
        while True:
            trouble = most_urgent(self._queue, self.chain.holes, is_ready=self.progress.is_ready)
            if trouble is None:
                return
            if isinstance(trouble, Queued):
                del self._queue[trouble]
            match trouble:
                case Fatal(error):
                    raise error
                case Hole(blocks):
                    await self._fill(blocks)
                case Behind():
                    await self._repairs.catch_up()
                case _ if not still_stands(trouble, self.chain, self.progress.oldest_seq):
                    pass
                case LinkBroken(upstream):
                    await self._bridges.build(self.chain, upstream)
                case HopHangs():
                    await self._repairs.overtake(trouble)
                case BridgeIdle():
                    await self._repairs.replan(trouble)

    async def _fill(self, hole: Span) -> None:
        self.progress.is_ready = False
        if not self.chain.has_numbers(_FEW_NUMBERS):
            self._renumber()
            hole = self.chain.holes[0]
        chain = self.chain
        try:
            await self._repairs.fill(hole)
        except NumbersUsedUp:
            if chain is self.chain:
                self._renumber()

    def _renumber(self) -> None:
        """Begin a new session, with all numbers free."""
        self._start_anew()
        self._count_fault(Overloaded("this session has no numbers left for new hops"))
