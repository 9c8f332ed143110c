"""Watches one session's pace: when a step is late, asks every hop how far it is, and reports hops that hang.

`routing/failures/suspicion.py` interprets the answers. A hop under load must still answer; only a frozen hop may stay
silent. So the question has a stream of its own, with priority over all other traffic, and a hop answers it without
using its device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import trio

from peerd.client.session.hops.control_stream import ControlStream
from peerd.client.session.live_chain import LiveChain
from peerd.client.session.opener import ChainOpener
from peerd.client.session.progress import StepProgress
from peerd.client.session.troubles import HopHangs, LinkBroken, News, NoAnswer
from peerd.protocol.errors import Overloaded, PeerdError
from peerd.protocol.identity import PeerId
from peerd.protocol.messages.session import Progress
from peerd.routing.failures.pace import FLOOR_S
from peerd.routing.failures.suspicion import Finding, Hung, Stuck, Suspicion

# An answer takes a round trip, and the time until a hop's process gets the CPU on a machine under load.
ANSWER_S = 0.5
# A hop that has not answered after this long counts as failed: no working hop is that slow to answer.
SILENT_S = 4.0
# A step of 128 positions takes a minute on a slow machine. No honest hop computes longer than this.
STEP_DEADLINE_S = 180.0


class FailureListener(Protocol):
    """Hears which peers broke a promise: the finder."""

    def failed(self, peer: PeerId) -> None: ...


class PaceWatch:
    """The watch of one session; `run` is its task. It only reads `progress`; its news goes to `report`."""

    def __init__(
        self, progress: StepProgress, opener: ChainOpener, finder: FailureListener, report: Callable[[News], None]
    ) -> None:
        self._progress = progress
        self._opener = opener
        self._finder = finder
        self._report = report

    async def run(self) -> None:
        """Watch until cancelled."""
        progress = self._progress
        async with trio.open_nursery() as nursery:
            self._questions = nursery
            while True:
                if not progress.is_working:
                    await progress.changed.park()
                    continue
                with trio.move_on_at(progress.working_since + progress.late_after_s):
                    await progress.changed.park()
                    continue
                # The answer may have come in the very turn in which the time was over.
                if progress.is_working:
                    await self._look_into()

    async def _look_into(self) -> None:
        """Examine a late step repeatedly, until it is answered or there is something to report."""
        progress, chain = self._progress, self._progress.chain
        seq, since = progress.oldest_seq, progress.working_since
        assert seq is not None
        suspicion = Suspicion(seq, since)

        def is_same() -> bool:
            """Whether we still wait for the same step from the same hops."""
            return (
                progress.is_working
                and progress.oldest_seq == seq
                and progress.chain is chain
                and progress.working_since == since
            )

        while is_same():
            hops = chain.controls
            reports = await self._ask(chain, hops)
            if not is_same() or chain.controls != hops:
                return
            expected_s = progress.expected_s
            if expected_s is not None:
                expected_s = max(expected_s, FLOOR_S)
            now = trio.current_time()
            found = suspicion.look(reports, now, expected_s)
            for news in _news(found, hops, seq, now - since):
                self._report(news)
            pause_s = ANSWER_S if found is None or not progress.is_working else progress.late_after_s
            with trio.move_on_after(pause_s):
                await progress.changed.park()

    async def _ask(self, chain: LiveChain, hops: Sequence[ControlStream]) -> list[Progress | None]:
        """Each hop's progress, or None if the hop stays silent."""
        answers: dict[int, Progress] = {}
        done = trio.Event()

        async def ask(index: int) -> None:
            hop = hops[index]
            with trio.move_on_after(SILENT_S):
                try:
                    answers[index] = await self._opener.ask(chain, hop)
                except (PeerdError, trio.ClosedResourceError):
                    # If the control stream ended too, its reader reports that. Such a hop is not silent.
                    answers[index] = _UNKNOWN
                if len(answers) == len(hops):
                    done.set()
                return
            self._finder.failed(hop.hop.peer_id)

        for index in range(len(hops)):
            self._questions.start_soon(partial(ask, index))
        with trio.move_on_after(ANSWER_S):
            await done.wait()
        return [answers.get(index) for index in range(len(hops))]


def _news(found: Finding | None, hops: Sequence[ControlStream], seq: int, waited_s: float) -> list[News]:
    """The news about step `seq`, which is late after `waited_s` seconds."""
    if isinstance(found, Hung):
        return [HopHangs(hops[index], seq) for index in found.hops]
    if isinstance(found, Stuck):
        return [LinkBroken(hops[found.upstream])]
    if waited_s >= STEP_DEADLINE_S:
        return [NoAnswer(Overloaded(f"no answer within {STEP_DEADLINE_S:g} s"))]
    return []


# Stands for the answer of a hop that cannot say: it counts as having done its part.
_UNKNOWN = Progress(taken=2**32 - 1, done=2**32 - 1, turns=0)
