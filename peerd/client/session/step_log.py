"""Records what a client has sent in a session and what was answered: enough to start again on any new hop.

It keeps two states apart: the rows after all answered steps, which every hop has; and the later steps in order, which
some hops have and others do not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import trio

from peerd.client.session.hops.draw_sender import DrawRequest
from peerd.exchange.replay_log import ReplayLog
from peerd.exchange.step_tensors import wanted_rows
from peerd.protocol.encoding.tensors import TensorHeader, decode_tensor
from peerd.protocol.errors import BadResult, ContextTooLong, InternalError, InvalidRequest, RemoteProtocolError
from peerd.protocol.messages.drawing import DRAWN, TokenPairs, unpack_drawn
from peerd.protocol.messages.session import Output, Step, Want
from peerd.protocol.rows import Fork, Op, RowSlice, SessionSize


@dataclass(slots=True, eq=False)
class Pending:
    """A step without an answer. `done` is set when `result` or `error` is there."""

    step: Step
    hidden: torch.Tensor
    rolls_back: bool
    #: What the last hop draws from the results, if it offers that.
    draw: DrawRequest | None = None
    done: trio.Event = field(default_factory=trio.Event)
    result: torch.Tensor | None = None
    #: The tokens, where they came instead of a result.
    drawn: tuple[TokenPairs, ...] | None = None
    error: Exception | None = None

    def fail(self, error: Exception) -> None:
        self.error = error
        self.done.set()

    def outcome(self) -> torch.Tensor:
        """The answer of a step that is `done`. Raises the error with which it ended."""
        if self.result is None:
            raise self.error or InternalError("a step ended without result or error")
        return self.result

    def drawn_or_result(self) -> tuple[TokenPairs, ...] | torch.Tensor:
        """The tokens that the last hop drew, or the results from which the caller draws. Raises as `outcome`."""
        return self.outcome() if self.drawn is None else self.drawn


OnAnswer = Callable[[Step, torch.Tensor], None]
"""Takes a step that was answered, and its result."""


class StepLog:
    """The rows of one session, and what was sent of them.

    on_received: called with the codec and the body of each tensor that was decoded.
    """

    def __init__(
        self, size: SessionSize, *, on_received: Callable[[str, memoryview], None] = lambda codec, body: None
    ) -> None:
        # All that was sent and not given up, for a first hop that has none of it.
        self.kept = ReplayLog(size.max_length)
        self.pending: dict[int, Pending] = {}
        # The last answered step; and whether steps were given up whose effects hops cannot undo.
        self.answered = 0
        self.is_forked = False
        self._on_answer: OnAnswer | None = None
        self._on_received = on_received
        self._size = size
        self._lengths: dict[int, int] = {}
        self._answered_lengths: dict[int, int] = {}
        self._next_seq = 1

    def __repr__(self) -> str:
        return f"<StepLog {self._lengths} pending={list(self.pending)}>"

    @property
    def asked(self) -> int:
        """How many steps were submitted so far."""
        return self._next_seq - 1

    def slices(
        self, hidden: torch.Tensor, row: int, start: int | None, rows: Sequence[RowSlice] | None
    ) -> tuple[RowSlice, ...]:
        """The slices of a step over `hidden`, `[positions, width]`: `rows`, or else one `row` from `start` (None: from
        its end). None for a step without positions.
        """
        if rows is not None:
            return tuple(rows)
        if not len(hidden):
            return ()
        return (RowSlice(row, self.length(row) if start is None else start, len(hidden)),)

    def length(self, row: int) -> int:
        """The positions of the row once all pending steps are answered."""
        return self._lengths.get(row, 0)

    @property
    def lengths(self) -> dict[int, int]:
        """For every row, its positions once all pending steps are answered; rows without positions are left out."""
        return dict(self._lengths)

    def sent(self, row: int, end: int) -> torch.Tensor:
        """A copy of the row's first `end` hidden states as they were sent, `[end, width]`.

        Only positions whose steps were answered are available; if they are fewer, that many are returned.
        """
        end = min(end, self.kept.row_buffers.lengths.get(row, 0))
        return self.kept.row_buffers.copy(row, 0, end) if end else torch.empty((0, 0))

    @property
    def positions(self) -> int:
        """The answered positions of all rows together: what a new hop must compute again."""
        return sum(self._answered_lengths.values())

    def check(self, hidden: torch.Tensor, rows: Sequence[RowSlice], ops: Sequence[Op]) -> dict[int, int]:
        """The lengths of all rows after these operations. Raises InvalidRequest or ContextTooLong."""
        positions = sum(piece.count for piece in rows)
        if hidden.shape[0] != positions or len({piece.row for piece in rows}) != len(rows):
            raise InvalidRequest(f"{hidden.shape[0]} positions given for {positions} in rows that must differ: {rows}")
        lengths = dict(self._lengths)
        self._apply(lengths, ops)
        for piece in rows:
            self._check(piece, lengths.get(piece.row, 0))
            lengths[piece.row] = piece.end
        return lengths

    def add(
        self,
        hidden: torch.Tensor,
        rows: Sequence[RowSlice],
        ops: Sequence[Op],
        want: Want,
        epoch: int,
        draw: DrawRequest | None = None,
    ) -> Pending:
        """Add a new step to the log. Raises like `check`, and then changes nothing."""
        lengths = self.check(hidden, rows, ops)
        rolls_back = any(piece.start < self.length(piece.row) for piece in rows)
        self._lengths = lengths
        step = Step(epoch=epoch, seq=self._next_seq, rows=tuple(rows), ops=tuple(ops), want=want)
        self._next_seq += 1
        pending = Pending(step, hidden, rolls_back, draw)
        self.pending[step.seq] = pending
        self.kept.add(step, hidden)
        return pending

    def observe(self, on_answer: OnAnswer | None) -> None:
        """Call `on_answer` with each step that is answered from now on and its result, before `sent` knows the step's
        rows; None ends that.
        """
        self._on_answer = on_answer

    @property
    def draws(self) -> list[tuple[int, DrawRequest]]:
        """What is to be drawn from pending steps, with their numbers, in order."""
        return [(seq, pending.draw) for seq, pending in self.pending.items() if pending.draw is not None]

    def answer(self, output: Output, body: memoryview, width: int, *, drawn: bool = False) -> None:
        """Take the answer to the oldest pending step; `drawn`: of a hop that draws. Raises BadResult or
        RemoteProtocolError.
        """
        oldest = next(iter(self.pending))
        if output.seq != oldest:
            raise RemoteProtocolError(f"step {output.seq} was answered before {oldest}")
        pending = self.pending[oldest]
        rows = wanted_rows(pending.step)
        if output.rows != rows:
            raise BadResult(f"asked for {rows}, answered {output.rows}")
        if rows and drawn:
            pending.drawn, pending.result = _decode_drawn(pending, output, body), pending.hidden[:0]
            self._on_received(DRAWN, body)
        elif rows:
            pending.result = decode_result(output.tensor, body, (sum(piece.count for piece in rows), width))
            assert output.tensor is not None
            self._on_received(str(output.tensor["codec"]), body)
        else:
            pending.result = pending.hidden[:0]
        del self.pending[oldest]
        self.answered = oldest
        self._apply(self._answered_lengths, pending.step.ops)
        self._answered_lengths.update({piece.row: piece.end for piece in pending.step.rows})
        if self._on_answer is not None:
            self._on_answer(pending.step, pending.result)
        self.kept.fold(oldest)
        pending.done.set()

    def fail(self, error: Exception) -> None:
        """Give up all pending steps: the rows go back to their state after the last answer.

        Hops that ran those steps are ahead of that. If rows only grew there, the next step cuts them. If rows were
        forked, dropped or cut there, the hops cannot go back: then `is_forked` is set until `start_anew`.
        """
        for pending in self.pending.values():
            self.is_forked = self.is_forked or bool(pending.step.ops) or pending.rolls_back
            pending.fail(error)
        self.pending.clear()
        self.kept.forget_after(self.answered)
        self._lengths = dict(self._answered_lengths)

    def start_anew(self) -> None:
        """Note that all hops which ran anything are closed; new ones start from the answered state."""
        self.is_forked = False

    def _check(self, piece: RowSlice, length: int) -> None:
        if not 0 <= piece.row < self._size.max_rows:
            raise InvalidRequest(f"row {piece.row}: the session was opened for {self._size.max_rows}")
        if piece.count < 1 or not 0 <= piece.start <= length:
            raise InvalidRequest(f"{piece} does not continue a row of {length} positions")
        cut, allowed = length - piece.start, self._size.max_rollback
        if cut > allowed:
            raise InvalidRequest(f"{piece} cuts {cut} positions, max_rollback is {allowed}")
        if piece.end > self._size.max_length:
            raise ContextTooLong(f"{piece.end} positions in a session of max_length {self._size.max_length}")

    @staticmethod
    def _apply(lengths: dict[int, int], ops: Sequence[Op]) -> None:
        for op in ops:
            if isinstance(op, Fork):
                if not 0 <= op.length <= lengths.get(op.source, 0):
                    raise InvalidRequest(f"{op}: row {op.source} has {lengths.get(op.source, 0)} positions")
                lengths[op.target] = op.length
            else:
                lengths.pop(op.row, None)


def _decode_drawn(pending: Pending, output: Output, body: memoryview) -> tuple[TokenPairs, ...]:
    """The tokens that a hop has drawn from a step. Raises BadResult."""
    request = pending.draw
    if request is None or not output.drawn:
        raise BadResult("an answer without the tokens that were to be drawn")
    count = len(request.rows) or sum(piece.count for piece in output.rows)
    return unpack_drawn(body, count, request.sampling.logprobs, request.vocab_size)


def decode_result(tensor: Mapping[str, Any] | None, body: memoryview, shape: tuple[int, int]) -> torch.Tensor:
    """Decode hidden states of this shape from a hop's message. Raises BadResult, RemoteProtocolError."""
    if tensor is None:
        raise BadResult("an answer without its tensor")
    header = TensorHeader.from_fields(tensor, max_elements=shape[0] * shape[1])
    if header.shape != shape:
        raise BadResult(f"an answer of shape {header.shape}, not {shape}")
    return decode_tensor(header, body)
