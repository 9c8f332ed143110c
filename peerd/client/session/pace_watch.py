"""Watches one session's pace: asks every hop how far it is when a step is late, and says who is to be overtaken.

Knows time and questions; what answers mean is `routing.suspicion`'s, and what is done about it the keeper's. The
difficulty is asking in a way that a hop under load still answers, and a frozen one does not: on a stream of its
own, above all other traffic, answered without the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Protocol

import trio

from peerd.client.session.control_stream import ControlStream
from peerd.client.session.live_chain import LiveChain
from peerd.client.session.opener import ChainOpener
from peerd.client.session.step_log import StepLog
from peerd.protocol.errors import PeerdError
from peerd.protocol.identity import PeerId
from peerd.protocol.messages.session import Progress
from peerd.routing.failures.pace import FLOOR_S, Pace
from peerd.routing.failures.suspicion import Hung, Stuck, Suspicion

# A hop's answer takes a round trip, and its process a moment to come to it beside others on a machine under load.
ANSWER_S = 0.5
# Who has not answered after this long breaks a promise: nothing that works is so slow to say so.
SILENT_S = 4.0
# A step of 128 positions on a slow machine takes a minute; longer than this no honest hop computes.
STEP_DEADLINE_S = 180.0


class Keeper(Protocol):
    """What a watch asks of the chain's keeper."""

    changed: trio.lowlevel.ParkingLot
    pace: Pace
    working_since: float
    replaying: int

    @property
    def chain(self) -> LiveChain: ...

    @property
    def is_working(self) -> bool: ...

    def overtake(self, control: ControlStream) -> None: ...

    def bridge(self, control: ControlStream) -> None: ...

    def no_answer(self, seconds: float) -> None: ...


class Blames(Protocol):
    """Hears who broke a promise."""

    def failed(self, peer: PeerId) -> None: ...


class PaceWatch:
    """The watch of one session; `run` is its task."""

    def __init__(self, keeper: Keeper, log: StepLog, opener: ChainOpener, finder: Blames) -> None:
        self._keeper = keeper
        self._log = log
        self._opener = opener
        self._finder = finder

    async def run(self) -> None:
        """Watch until cancelled."""
        async with trio.open_nursery() as nursery:
            self._questions = nursery
            while True:
                if not self._keeper.is_working:
                    await self._keeper.changed.park()
                    continue
                with trio.move_on_at(self._keeper.working_since + self._late_after_s()):
                    await self._keeper.changed.park()
                    continue
                await self._look_into()

    def _late_after_s(self) -> float:
        return self._keeper.pace.late_after_s(self._oldest_positions)

    @property
    def _oldest_positions(self) -> int:
        pending = next(iter(self._log.pending.values()))
        return pending.step.positions + self._keeper.replaying

    def _is_same(self, seq: int, chain: LiveChain) -> bool:
        """Whether we still wait for that step, of the same hops."""
        keeper = self._keeper
        return keeper.is_working and next(iter(self._log.pending)) == seq and keeper.chain is chain

    async def _look_into(self) -> None:
        """Look at a late step again and again, until it is answered or somebody was found to do something about."""
        keeper, chain = self._keeper, self._keeper.chain
        seq, since = next(iter(self._log.pending)), keeper.working_since
        suspicion = Suspicion(seq, since)
        while self._is_same(seq, chain) and keeper.working_since == since:
            controls = chain.controls
            reports = await self._ask(chain, controls)
            if not self._is_same(seq, chain) or keeper.working_since != since or chain.controls != controls:
                return
            expected_s = keeper.pace.expected_s(self._oldest_positions)
            if expected_s is not None:
                expected_s = max(expected_s, FLOOR_S)
            now = trio.current_time()
            found = suspicion.look(reports, now, expected_s)
            if isinstance(found, Hung):
                for index in found.hops:
                    keeper.overtake(controls[index])
            elif isinstance(found, Stuck):
                keeper.bridge(controls[found.upstream])
            elif now - since >= STEP_DEADLINE_S:
                keeper.no_answer(STEP_DEADLINE_S)
            pause_s = ANSWER_S if found is None else self._late_after_s()
            with trio.move_on_after(pause_s):
                await keeper.changed.park()

    async def _ask(self, chain: LiveChain, controls: Sequence[ControlStream]) -> list[Progress | None]:
        """What each hop says, within a moment; None where it says nothing."""
        said: dict[int, Progress] = {}
        done = trio.Event()

        async def ask(index: int) -> None:
            control = controls[index]
            with trio.move_on_after(SILENT_S):
                try:
                    said[index] = await self._opener.ask(chain, control)
                except (PeerdError, trio.ClosedResourceError):
                    # Whatever ends its control stream too, its reader hears; and it is not silent.
                    said[index] = _UNKNOWN
                if len(said) == len(controls):
                    done.set()
                return
            self._finder.failed(control.hop.peer_id)

        for index in range(len(controls)):
            self._questions.start_soon(partial(ask, index))
        with trio.move_on_after(ANSWER_S):
            await done.wait()
        return [said.get(index) for index in range(len(controls))]


# Of a hop that does not say: as if it had done its part.
_UNKNOWN = Progress(taken=2**32 - 1, done=2**32 - 1, turns=0)
