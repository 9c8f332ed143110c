"""Takes what the hops of a session say: answers, refusals, and news about their routes.

An answer goes to the log, and what a bridge carries to the next hop. All else that changes the chain is reported as a
value (`troubles.py`). A hop may lie: so a refusal is noted against the hop and the hops beside it, and becomes the
answer only if peers that have nothing in common agree.
"""

from __future__ import annotations

from collections.abc import Callable

import trio

from peerd.client.session.bridges import Bridges
from peerd.client.session.hops.control_stream import ControlStream
from peerd.client.session.mender import ChainMender
from peerd.client.session.progress import StepProgress
from peerd.client.session.step_log import StepLog
from peerd.client.session.troubles import Disagrees, Fatal, HopLost, HopRefuses, News
from peerd.protocol.encoding.schema import Message
from peerd.protocol.encoding.tensors import MAX_EXACT_VALUE_BYTES
from peerd.protocol.errors import BadResult, CallerError, Evicted, PeerdError, RemoteProtocolError
from peerd.protocol.identity import PeerId
from peerd.protocol.messages.audits import MAX_SKETCH_BYTES, Sketch
from peerd.protocol.messages.session import MAX_STEP_POSITIONS, Failure, Gap, LinkDown, Output, Routed, Step


class HopMessages:
    """Handles the messages of all hops of one session. `answered` is called for each answer to a pending step, with
    the step's positions.
    """

    def __init__(
        self,
        progress: StepProgress,
        log: StepLog,
        width: int,
        mender: ChainMender,
        bridges: Bridges,
        report: Callable[[News | Fatal], None],
        answered: Callable[[ControlStream, int], None],
    ) -> None:
        self._progress = progress
        self._log = log
        self._width = width
        self._mender = mender
        self._bridges = bridges
        self._report = report
        self._answered = answered

    def __repr__(self) -> str:
        return f"<HopMessages of {self._progress.chain}>"

    async def read(self, control: ControlStream) -> None:
        """Read a hop's messages until its stream ends, and report how it ended."""
        longest = max(MAX_STEP_POSITIONS * self._width * MAX_EXACT_VALUE_BYTES, MAX_SKETCH_BYTES)
        try:
            await control.read(self._on_message, longest)
        except trio.ClosedResourceError:
            return
        except PeerdError as error:
            self._report(HopLost(control, error))

    def _on_message(self, control: ControlStream, message: Message, body: memoryview) -> None:
        chain = self._progress.chain
        if control not in chain:
            return
        match message:
            case Output():
                self._on_output(control, message, body)
            case Failure():
                self._on_failure(control, message)
            case Routed():
                self._progress.replayed_by_hops += message.replayed
                self._bridges.routed(chain, control, message)
            case LinkDown():
                self._bridges.link_down(chain, control, message)
            case Step():
                self._bridges.pass_on(chain, control, message, body)
            case Sketch():
                control.sketches.take(message, body)
            case Gap():
                self._disagrees(control, Evicted(f"{control.hop.peer_id} has only {message.have}"))
            case _:
                raise RemoteProtocolError(f"{message.TYPE} in the middle of a session")

    def _on_output(self, control: ControlStream, output: Output, body: memoryview) -> None:
        if output.seq not in self._log.pending:
            # Another hop answered it before this one replaced that hop; or the step was given up.
            return
        positions = self._log.pending[output.seq].step.positions
        self._log.answer(output, body, self._width, drawn=control.draws)
        self._answered(control, positions)
        self._progress.answered(positions)

    def _on_failure(self, control: ControlStream, failure: Failure) -> None:
        error = failure.error
        is_of_step = failure.seq is not None
        if isinstance(error, CallerError) or (is_of_step and isinstance(error, BadResult)):
            if not is_of_step or failure.seq in self._log.pending:
                self._refused(control, error)
            return
        if isinstance(error, Evicted) and self._log.pending:
            # A session with pending steps is in use, so the hop should not have evicted it.
            self._mender.lapses.note(error, control.hop.peer_id)
        self._report(HopLost(control, error))

    def _refused(self, control: ControlStream, error: PeerdError) -> None:
        """Handle a hop's refusal of a step. If peers that have nothing in common agree, it becomes the answer."""
        refusals = self._mender.refusals
        refusals.note(error, control.hop.peer_id, self._before(control))
        self._report(HopRefuses(control, error))
        if refusals.are_believed:
            self._report(Fatal(error))
            return
        for other in self._progress.chain.controls:
            if other.hop.peer_id in refusals.left_out():
                self._report(HopRefuses(other, error))

    def _disagrees(self, control: ControlStream, error: PeerdError) -> None:
        """Handle a hop's report that its cache differs. The hop may lie, or the hop before it, or the next hop of which
        it speaks.
        """
        after = self._progress.chain.after(control.hop.span.end)
        beside = [*self._before(control), *([after.hop.peer_id] if after is not None else [])]
        self._mender.lapses.note(error, control.hop.peer_id, beside)
        self._report(Disagrees(control, error))

    def _before(self, control: ControlStream) -> list[PeerId]:
        """The peer whose results this hop gets; none for the first hop, which gets the client's input."""
        before = self._progress.chain.before(control.hop.span.start)
        return [before.hop.peer_id] if before is not None else []
