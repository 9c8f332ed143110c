"""The last hop of a session that has it draw tokens: waits for what the client says of each step, draws, and answers.

A step comes along the chain, and how to draw from it comes from the client directly, so either may be first. Answers
keep the order of the steps. The client says nothing about steps that it no longer waits for: a new last hop gets some
again that were answered before. So a step is passed over as soon as the client speaks of a later one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import torch
import trio

from peerd.exchange.step_tensors import wanted_part, wanted_rows
from peerd.protocol.encoding.tensors import DTYPES
from peerd.protocol.errors import BadResult, InvalidRequest, PeerdError, RemoteProtocolError
from peerd.protocol.messages.drawing import MAX_DRAWN, Draw, Sampling, unpack_ids
from peerd.protocol.messages.session import Failure, OpenSession, Step
from peerd.server.served_head import Place, ServedHead, TokenSource
from peerd.server.sessions.answering import Answering

# What a client may say ahead of its steps: several times the unanswered steps that it may have.
MAX_UNUSED_DRAWS = 128


class Drawing:
    """Draws for one session by `head`, and answers through `answering`. `run` owns the order."""

    def __init__(self, head: ServedHead, opening: OpenSession, answering: Answering) -> None:
        self._head = head
        self._answering = answering
        self._dtype = DTYPES[opening.dtype]
        self._most_context = opening.size.positions
        self._steps: deque[tuple[Step, torch.Tensor]] = deque()
        self._asked: deque[Sampling | tuple[Draw, list[list[int]]]] = deque()
        # How many tokens of contexts wait in `_asked`.
        self._waiting_ids = 0
        self._source: TokenSource | None = None
        self._context: dict[int, list[int]] = {}
        #: Whether a step is being drawn from at this moment, and does not wait for its client.
        self.is_working = False
        self._changed = trio.lowlevel.ParkingLot()

    def __repr__(self) -> str:
        return f"<Drawing steps={len(self._steps)} asked={len(self._asked)}>"

    # What comes from the client.

    def take(self, message: Sampling | Draw, body: memoryview) -> None:
        """Take how tokens are drawn from now on; or that some are drawn for a step, which may have come or not.

        Raises RemoteProtocolError.
        """
        if len(self._asked) >= MAX_UNUSED_DRAWS:
            raise RemoteProtocolError(f"more than {MAX_UNUSED_DRAWS} draws for steps that did not come")
        if isinstance(message, Sampling):
            self._asked.append(message)
        else:
            self._waiting_ids += sum(piece.count for piece in message.context)
            if self._waiting_ids > 2 * self._most_context:
                raise RemoteProtocolError("draws with more context than the session has positions, for later steps")
            self._asked.append((message, unpack_ids(message, body)))
        self._changed.unpark_all()

    # What comes from the engine.

    def answer(self, step: Step, hidden: torch.Tensor) -> None:
        """Take a step's result, `[positions, width]`. Raises BadResult if the wire's dtype cannot hold it."""
        wanted = wanted_part(step, hidden).to(self._dtype)
        if not wanted.isfinite().all():
            raise BadResult(f"a result that {self._dtype} cannot hold")
        # A step of a prompt may be long, and only its last position is kept.
        self._steps.append((step, wanted.clone() if len(wanted) < len(hidden) else wanted))
        self._changed.unpark_all()

    @property
    def unanswered(self) -> int | None:
        """The number of the oldest step that is not answered; None if there is none."""
        return self._steps[0][0].seq if self._steps else None

    @property
    def unsent(self) -> int:
        """How many answers are not yet on the wire."""
        return len(self._steps) + self._answering.unsent

    async def wait_unsent_at_most(self, count: int) -> None:
        """Wait until at most `count` answers are unsent. Returns early if the stream ends or the client is away."""
        while len(self._steps) > count:
            await self._changed.park()
        await self._answering.wait_unsent_at_most(count)

    async def run(self) -> None:
        """Answer one step after the other until cancelled."""
        while True:
            while not self._steps:
                await self._changed.park()
            step, wanted = self._steps[0]
            try:
                await self._answer(step, wanted)
            except PeerdError as error:
                self._answering.tell(Failure.of(error, step.seq))
            self._steps.popleft()
            self._changed.unpark_all()

    async def _answer(self, step: Step, wanted: torch.Tensor) -> None:
        if not wanted_rows(step):
            self._answering.answer(step, wanted)
            return
        draw = await self._draw_for(step.seq)
        if draw is None:
            return
        places = list(self._places(step, draw))
        if draw.rows:
            wanted = wanted.expand(len(places), -1)
        if self._source is None:
            raise InvalidRequest("a draw without parameters: send `sampling` first")
        self.is_working = True
        try:
            drawn = await self._head.draw(wanted, self._source, places)
        finally:
            self.is_working = False
        self._answering.answer_drawn(step, drawn)

    async def _draw_for(self, seq: int) -> Draw | None:
        """What the client says of a step; None if it no longer waits for it. Raises InvalidRequest."""
        while True:
            while self._asked:
                asked = self._asked[0]
                if isinstance(asked, Sampling):
                    self._asked.popleft()
                    self._source = TokenSource(asked)
                    continue
                if asked[0].seq > seq:
                    return None
                self._asked.popleft()
                self._waiting_ids -= sum(piece.count for piece in asked[0].context)
                self._note_context(*asked)
                if asked[0].seq == seq:
                    return asked[0]
            await self._changed.park()

    def _note_context(self, draw: Draw, parts: list[list[int]]) -> None:
        """Take the tokens of a draw's rows. Raises InvalidRequest, and then rows before the fault are changed."""
        for piece, ids in zip(draw.context, parts, strict=True):
            known = self._context.setdefault(piece.row, [])
            if piece.start > len(known):
                raise InvalidRequest(f"the context of row {piece.row} has {len(known)} tokens, not {piece.start}")
            others = sum(len(context) for row, context in self._context.items() if row != piece.row)
            if others + piece.end > self._most_context:
                raise InvalidRequest(f"contexts of more than the {self._most_context} positions of the session")
            known[piece.start :] = ids

    def _places(self, step: Step, draw: Draw) -> Iterator[Place]:
        """Where to draw, in the order of the answer. Raises InvalidRequest."""
        wanted = wanted_rows(step)
        positions = [(piece.row, piece.start + offset + 1) for piece in wanted for offset in range(piece.count)]
        if draw.rows:
            if len(positions) != 1:
                raise InvalidRequest(f"{len(positions)} positions are wanted where one is to be drawn for many rows")
            positions *= len(draw.rows)
        if len(positions) > MAX_DRAWN:
            raise InvalidRequest(f"{len(positions)} tokens wanted of one step, at most {MAX_DRAWN} are drawn")
        rows = draw.rows or tuple(row for row, _ in positions)
        for row, (own, position) in zip(rows, positions, strict=True):
            yield Place(row, position, self._before(own, position))

    def _before(self, row: int, position: int) -> list[int] | range:
        if self._source is None or not self._source.params.reads_context:
            return range(position)
        known = self._context.get(row, [])
        if len(known) < position:
            raise InvalidRequest(f"the context of row {row} has {len(known)} tokens, not {position}")
        return known[:position]
