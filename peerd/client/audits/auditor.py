"""Chooses which answers of a client are audited, and audits them in the background, one after the other.

Whether an answer is audited is decided by chance when its session begins, and nobody else learns it before the answer
is complete. An audit never competes with the user: it waits while a session of the user uses the servers that it needs,
and gives up where they are full.
"""

from __future__ import annotations

import logging
import random
from collections import Counter, deque
from collections.abc import Awaitable, Callable

import torch
import trio

from peerd.client.audits.audit import Audit, AuditTools, End, Outcome
from peerd.client.audits.case import Case
from peerd.client.audits.open_case import OpenCase
from peerd.client.audits.others import Others, Planner
from peerd.client.audits.policy import AuditPolicy
from peerd.client.audits.prefills import Prefills
from peerd.client.audits.replay_audit import ReplayAudit, hop_to_check, positions_before
from peerd.client.audits.replays import Replays
from peerd.client.audits.transcript import Transcript
from peerd.client.finding.served_by import ServedBy
from peerd.client.session.opener import ChainOpener, Terms
from peerd.client.session.session import Session
from peerd.client.session.step_log import OnAnswer
from peerd.compute.audits.distance import MIN_POSITIONS
from peerd.compute.audits.thresholds import own_thresholds
from peerd.protocol.identity import PeerId
from peerd.protocol.messages.session import Step
from peerd.protocol.span import Span
from peerd.routing.audits.suspects import Suspects
from peerd.routing.directory.standing import StandingOf

log = logging.getLogger(__name__)

# Everything that one audit may take: a search asks for some ten prefills.
AUDIT_S = 600.0
# How many answers wait for their audit, at most. In a busy client the oldest is dropped: chance chose it as well.
MAX_WAITING = 4
# The hidden states that are kept of an answer until it was audited.
MAX_BYTES = 64 * 2**20
# Seconds between an answer and its audit, at most: an audit that always follows at once is easily told from a session.
MAX_DELAY_S = 30.0
# Of a longer chain the hops behind this one are checked by whole answers only.
MAX_HOPS = 16

Convict = Callable[[PeerId, str], Awaitable[None]]
"""Avoids a peer for a day, because of what the text says."""


class Auditor:
    """The audits of one model's answers. `run` does the work.

    counts: of sessions, how many were chosen ("chosen"), how many of those could not be audited ("too short" and so
    on), and how the audits ended, by `End`'s values.
    """

    def __init__(
        self,
        policy: AuditPolicy,
        planner: Planner,
        opener: ChainOpener,
        standing: StandingOf,
        convict: Convict,
        rng: random.Random,
        width: int,
    ) -> None:
        self.counts: Counter[str] = Counter()
        #: With which probability an answer is audited.
        self.probability = policy.probability
        self.prefills = Prefills(opener, rng, width, self._in_use)
        #: The last outcome, for those who look.
        self.last: Outcome | None = None
        thresholds = policy.thresholds or own_thresholds()
        self._tools = AuditTools(Others(planner, standing), self.prefills, thresholds, Suspects(), self._in_use)
        #: How the checks of single hops ended, as `counts`; and what they computed.
        self.replay_counts: Counter[str] = Counter()
        self.replays = Replays(opener, width, self._in_use)
        self._opener = opener
        self._width = width
        self._convict = convict
        self._rng = rng
        self._sessions: set[Session] = set()
        self._waiting: deque[Case] = deque(maxlen=MAX_WAITING)
        self._open: deque[ReplayAudit] = deque(maxlen=MAX_WAITING)
        self._came = trio.Event()
        self._is_busy = False
        self._rested = trio.lowlevel.ParkingLot()

    def __repr__(self) -> str:
        return f"<Auditor of 1 in {1 / self.probability if self.probability else 0:g}: {dict(self.counts)}>"

    def watch(self, session: Session, blocks: Span, terms: Terms) -> None:
        """Note a session of the user's that begins, or goes on after a rest, and decide whether its answer will be
        audited.
        """
        self._sessions.add(session)
        losses = session.failovers + session.reopened
        transcript: Transcript | None = None
        if self._rng.random() < self.probability:
            self.counts["chosen"] += 1
            # Chance also decides which of several answers to one prompt.
            transcript = Transcript(session.log.sent, MAX_BYTES, self._rng)

        def ended() -> None:
            self._sessions.discard(session)
            if transcript is None:
                return
            if session.failovers + session.reopened > losses or not _covers(session.chain, blocks):
                # Part of the answer is another server's, which may be gone by now.
                self.counts["servers changed"] += 1
            else:
                self._take(session, transcript, blocks, terms)

        check = self._hop_check(session, terms)

        def answered(step: Step, result: torch.Tensor) -> None:
            for note in (transcript.note if transcript is not None else None, check):
                if note is not None:
                    note(step, result)

        session.observe(answered if transcript is not None or check is not None else None, ended)

    def _hop_check(self, session: Session, terms: Terms) -> OnAnswer | None:
        """Decide whether a hop of the session will be checked while it is in use; the result takes its answers."""
        chance = self._rng.random()
        # Other servers must not get the user's own weights; and what a lossy codec makes of results is not compared.
        is_possible = terms.are_sketched and terms.own_adapter is None and terms.codec == "exact"
        if not is_possible or hop_to_check(chance, self.probability, MAX_HOPS) is None:
            return None
        case = OpenCase(session, terms, Transcript(session.log.sent, MAX_BYTES), self._width)
        wanted: int | None = positions_before(self._rng)

        def note(step: Step, result: torch.Tensor) -> None:
            nonlocal wanted
            case.note(step, result)
            if wanted is None or session.log.positions < wanted:
                return
            at = hop_to_check(chance, self.probability, len(session.chain))
            if at is not None and not case.is_ripe(at):
                return
            wanted = None
            if at is not None:
                self.replay_counts["chosen"] += 1
                self._open.append(ReplayAudit(case, at, terms, self._tools, self.replays, self._opener))
                self._came.set()

        return note

    def _take(self, session: Session, transcript: Transcript, blocks: Span, terms: Terms) -> None:
        """Put an answer in line for its audit, if it can be audited."""
        text = transcript.text()
        if text is None or len(text.positions) < MIN_POSITIONS:
            why = "too short"
        elif terms.own_adapter is not None:
            # Other servers must not get the user's own weights.
            why = "own adapter"
        elif text.inputs.nbytes + text.results.nbytes > MAX_BYTES or len(text.inputs) <= text.positions[-1]:
            why = "too long"
        else:
            if len(self._waiting) == MAX_WAITING:
                self.counts["too many waiting"] += 1
            self._waiting.append(Case(blocks, terms, text.inputs, text.positions, text.results, session.chain))
            self._came.set()
            return
        self.counts[why] += 1

    async def run(self) -> None:
        """Audit the chosen answers, until cancelled."""
        while True:
            while not self._waiting and not self._open:
                self._is_busy = False
                self._rested.unpark_all()
                self._came = trio.Event()
                await self._came.wait()
            self._is_busy = True
            if self._open:
                # First, because its session may end.
                await self._carry_out(self._open.popleft(), self.replay_counts)
                continue
            case = self._waiting.popleft()
            await trio.sleep(self._rng.uniform(0, MAX_DELAY_S))
            await self._carry_out(Audit(case, self._tools), self.counts)

    async def wait_done(self) -> None:
        """Wait until no answer waits for its audit."""
        while self._waiting or self._open or self._is_busy:
            await self._rested.park()

    async def _carry_out(self, audit: Audit | ReplayAudit, counts: Counter[str]) -> None:
        outcome = Outcome(End.UNFINISHED, f"no end within {AUDIT_S:g} s")
        with trio.move_on_after(AUDIT_S):
            outcome = await audit.run()
        counts[outcome.end.value] += 1
        self.last = outcome
        level = logging.WARNING if outcome.end in (End.CONVICTED, End.UNEXPLAINED) else logging.DEBUG
        log.log(level, "an audit ended: %s, %s", outcome.end.value, outcome.why)
        for peer in outcome.convicted:
            await self._convict(peer, f"an audit found that it computes something else: {outcome.why}")

    def _in_use(self) -> frozenset[PeerId]:
        return frozenset(hop.peer for session in self._sessions for hop in session.chain)


def _covers(chain: tuple[ServedBy, ...], blocks: Span) -> bool:
    """Whether a chain has no holes."""
    ends = [blocks.start, *(served.span.end for served in chain)]
    return ends[-1] == blocks.end and all(served.span.start == end for served, end in zip(chain, ends, strict=False))
