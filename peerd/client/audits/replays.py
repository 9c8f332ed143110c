"""Has other servers compute what one hop of an open session was sent, and learns from sketches what came out.

The hop before sends its rows to the other server itself, as it would to one that replaces a dead hop, so they do not
pass through the client, and the other server gets the very same values.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import torch
import trio

from peerd.client.audits.others import InUse
from peerd.client.audits.prefills import LOOK_S, PREFILL_S, Unfinished
from peerd.client.session.hops.control_stream import ControlStream
from peerd.client.session.live_chain import LiveChain
from peerd.client.session.mender import OPEN_MARGIN_S
from peerd.client.session.opener import ChainOpener, Terms
from peerd.exchange.step_tensors import encoded, priority_of
from peerd.protocol.encoding.tensors import DTYPES
from peerd.protocol.errors import Evicted, PeerdError
from peerd.protocol.identity import PeerId
from peerd.protocol.messages.audits import MAX_SKETCH_BYTES, SKETCH_SIZE, Sketch
from peerd.protocol.messages.session import MAX_STEP_POSITIONS, REPLAY_SEQ, Failure, Gap, Step
from peerd.protocol.rows import PREFILL_POSITIONS, RowSlice
from peerd.routing.chains.chain import Hop
from peerd.trio_tools import open_tasks

# What a session sent last comes again as it was sent, guesses that were cut later included, one step behind the other.
SETTLE_S = 2.0


@dataclass(frozen=True, slots=True, eq=False)
class Boundaries:
    """What entered and left some blocks, as sketches `[positions, SKETCH_SIZE]`.

    received: what entered, under the seed of the hop that is checked. entered, left: both
    under the seed of the hop behind it.
    """

    received: torch.Tensor
    entered: torch.Tensor
    left: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """What a hop of `chain` was sent: by the hop `before`, or by the client itself as `inputs`, `[length, width]`.

    seeds: the hop's own, and that of the hop behind it. length: how many positions are wanted.
    """

    chain: LiveChain
    before: ControlStream | None
    inputs: torch.Tensor
    seeds: tuple[bytes, bytes]
    length: int
    terms: Terms


class Replays:
    """Replays what hops were sent to other hops. `in_use` says which servers the user's own sessions need."""

    def __init__(self, opener: ChainOpener, width: int, in_use: InUse) -> None:
        #: How many positions servers computed for this, times blocks.
        self.computed = 0
        self._opener = opener
        self._width = width
        self._in_use = in_use

    def __repr__(self) -> str:
        return f"<Replays computed={self.computed}>"

    async def compute(self, source: Source, hop: Hop, *, gives_way: bool = True) -> Boundaries:
        """What `hop` makes of what the source gives it. Raises Unfinished.

        gives_way: stop as soon as the user needs the server.
        """
        found: Boundaries | None = None
        try:
            with trio.fail_after(PREFILL_S):
                async with open_tasks() as tasks:
                    if gives_way:
                        tasks.start_soon(self._give_way, hop.peer_id, tasks.cancel_scope)
                    found = await self._replay(source, hop)
                    tasks.cancel_scope.cancel()
        except (PeerdError, trio.ClosedResourceError, trio.TooSlowError) as error:
            raise Unfinished(str(error) or f"no answer within {PREFILL_S:g} s") from error
        if found is None:
            raise Unfinished("the user's own sessions needed the server")
        self.computed += source.length * len(hop.span)
        return found

    async def _replay(self, source: Source, hop: Hop) -> Boundaries:
        async with self._opened(source, hop) as control:
            if source.before is not None:
                await self._opener.copy(source.chain, source.before, control)
            else:
                await self._send(source, control)
            await self._hear(control, source.length)
        inputs, outputs = (log[: source.length].clone() for log in (control.sketches.inputs, control.sketches.outputs))
        return Boundaries(inputs[:, :SKETCH_SIZE], inputs[:, SKETCH_SIZE:], outputs)

    @asynccontextmanager
    async def _opened(self, source: Source, hop: Hop) -> AsyncIterator[ControlStream]:
        if not source.chain.has_numbers(1):
            raise Unfinished("the session has no numbers left for more hops")
        # Of the same size: the ropes of some models depend on its lengths, and what is sent again may cut the row.
        terms = replace(source.terms, are_sketched=False)
        control = await self._opener.open_beside(source.chain, hop, terms, source.seeds, OPEN_MARGIN_S)
        try:
            yield control
        finally:
            control.close()

    async def _send(self, source: Source, control: ControlStream) -> None:
        """Send what the client itself has sent, in pieces, as a replay."""
        dtype = DTYPES[source.terms.dtype]
        pieces = math.ceil(len(source.inputs) / PREFILL_POSITIONS)
        for number in range(pieces):
            start = number * PREFILL_POSITIONS
            part = source.inputs[start : start + PREFILL_POSITIONS]
            rows = (RowSlice(0, start, len(part)),)
            step = Step(epoch=control.epoch, seq=REPLAY_SEQ, rows=rows, want="none")
            header, body = encoded(step, part, source.terms.codec, dtype)
            await control.stream.send(header, body, priority=priority_of(len(part)))

    async def _hear(self, control: ControlStream, length: int) -> None:
        """Read until the hop has told what it made of so many positions, and for a while told nothing else."""
        longest = max(MAX_SKETCH_BYTES, MAX_STEP_POSITIONS * self._width * 4)
        with trio.CancelScope() as heard:

            def note(hop: ControlStream, message: object, body: memoryview) -> None:
                if isinstance(message, Sketch):
                    hop.sketches.take(message, body)
                elif isinstance(message, Failure):
                    raise message.error
                elif isinstance(message, Gap):
                    raise Evicted(f"{hop.hop.peer_id} lacks the beginning of what it was sent")
                if min(len(hop.sketches.inputs), len(hop.sketches.outputs)) >= length:
                    # A guessed position may have reached so far, and a later step cuts it.
                    heard.deadline = trio.current_time() + SETTLE_S
                else:
                    heard.deadline = math.inf

            await control.read(note, longest)

    async def _give_way(self, peer: PeerId, scope: trio.CancelScope) -> None:
        while peer not in self._in_use():  # noqa: ASYNC110 - sessions do not tell when their chains change
            await trio.sleep(LOOK_S)
        scope.cancel()
