"""A session in use of which one hop is to be checked: what the client knows of what entered and left that hop."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import torch

from peerd.client.audits.prefills import Unfinished
from peerd.client.audits.replays import Source
from peerd.client.audits.transcript import Transcript
from peerd.client.session.hops.control_stream import ControlStream
from peerd.client.session.live_chain import LiveChain
from peerd.client.session.opener import Terms
from peerd.client.session.session import Session
from peerd.compute.audits.distance import FIRST_POSITION, MIN_POSITIONS
from peerd.compute.audits.sketches import Sketcher
from peerd.protocol.messages.session import Step

# Hops tell the client on streams of their own, so what they say of the last steps may come after the answers.
_STEPS_UNDER_WAY = 8


@dataclass(frozen=True, slots=True, eq=False)
class Claims:
    """What is to be checked of the hop `suspect`, and who says so.

    received: sketches of what it received, as it says itself; None at the first hop, whose input the client knows.
    left: sketches of what it sent, at `positions`, as the next hop `witness` says, or as the client got it (None).
    """

    source: Source
    suspect: ControlStream
    witness: ControlStream | None
    received: torch.Tensor | None
    positions: torch.Tensor
    left: torch.Tensor


class OpenCase:
    """The first row of a session, while the session goes on. `note` takes its answered steps."""

    def __init__(self, session: Session, terms: Terms, transcript: Transcript, width: int) -> None:
        self.session = session
        self._terms = terms
        self._transcript = transcript
        self._width = width
        self._starts: deque[float] = deque(maxlen=_STEPS_UNDER_WAY)
        self._least = math.inf
        self._losses = session.failovers + session.reopened

    def __repr__(self) -> str:
        return f"<OpenCase of {self.session!r}>"

    def note(self, step: Step, result: torch.Tensor) -> None:
        """Note the answer to a step."""
        self._transcript.note(step, result)
        start = min((piece.start for piece in step.rows), default=math.inf)
        self._starts.append(start)
        self._least = min(self._least, start)

    def is_ripe(self, at: int) -> bool:
        """Whether enough is known of what left the hop number `at`: of the last one, the results that came back."""
        settled = self._settled()
        if at + 1 < len(self.session.chain):
            return settled >= FIRST_POSITION + MIN_POSITIONS
        return sum(position < settled for position in self._transcript.positions) >= MIN_POSITIONS

    def chain(self) -> LiveChain:
        """The session's chain. Raises Unfinished if it has ended, or has changed since the session began."""
        chain = self.session.live
        if chain is None or not chain.controls:
            raise Unfinished("the session ended")
        if self.session.failovers + self.session.reopened > self._losses:
            raise Unfinished("servers changed")
        return chain

    def claims(self, at: int, seed: bytes) -> Claims:
        """What there is to check of the hop number `at`. `seed` is for sketches that the client makes itself. Raises
        Unfinished.
        """
        chain = self.chain()
        controls = chain.controls
        suspect, before = controls[at], controls[at - 1] if at else None
        witness = controls[at + 1] if at + 1 < len(controls) else None
        if before is not None and not len(before.sketches.inputs):
            # It may be of a version that ends sessions in which it is asked for a copy.
            raise Unfinished("the hop before told nothing of what it received")
        known = [suspect] if before is not None else []
        length = min([*(len(hop.sketches.inputs) for hop in (*known, *filter(None, (witness,)))), self._settled()])
        received = suspect.sketches.inputs[:length].clone() if before is not None else None
        if witness is not None:
            positions, left = torch.arange(length), witness.sketches.inputs[:length].clone()
            seed = witness.sketches.seeds[0]
        else:
            positions, left = self._results(length, seed)
        inputs = self.session.log.sent(0, length) if before is None else torch.empty((0, self._width))
        if not len(positions) or (before is None and len(inputs) < length):
            raise Unfinished("hops told nothing of what they received")
        # A first hop was not asked for a sketch of what the client knows anyway; what it would say is ignored.
        source = Source(chain, before, inputs, (suspect.sketches.seeds[0], seed), length, self._terms)
        self._least = math.inf
        return Claims(source, suspect, witness, received, positions, left)

    def check_unchanged(self, claims: Claims) -> None:
        """Raise Unfinished if the session was changed so that its hops no longer hold what the claims are about."""
        if self.chain() is not claims.source.chain or min(self._least, self._pending()) < claims.source.length:
            raise Unfinished("the session's row was cut meanwhile")

    def _settled(self) -> int:
        """How many positions no step changes that is under way."""
        row = self.session.log.lengths.get(0, 0)
        return int(min(row, self._pending(), *self._starts))

    def _pending(self) -> float:
        steps = [pending.step for pending in self.session.log.pending.values()]
        return min((piece.start for step in steps for piece in step.rows), default=math.inf)

    def _results(self, length: int, seed: bytes) -> tuple[torch.Tensor, torch.Tensor]:
        """The positions of which the client has results, and sketches of them."""
        text = self._transcript.text()
        kept = [] if text is None else [number for number, at in enumerate(text.positions) if at < length]
        if text is None or not kept:
            raise Unfinished("too few results came back")
        positions = torch.tensor([text.positions[number] for number in kept])
        return positions, Sketcher((seed,), self._width).sketch(text.results[kept])
