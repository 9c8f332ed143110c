"""Runs a batch so that a failure costs only the sessions that cause it.

A batch that fails is run again in halves, until the failure is in a batch of one session, which fails alone: memory
for half of a batch is often there, and a step that the model cannot compute is found. What a failed run wrote to the
KV cache lies beyond the ends of rows, or in rows that fail; so nothing has to be undone but copies of pages, which are
made again until a run has succeeded.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence

import torch

from peerd.compute.device.failures import is_device_lost, is_out_of_memory
from peerd.compute.steps import Batch, BatchOutput, Piece

# To find one session among 256 takes 17 runs. Where more fail, something else is wrong, and time is short.
MAX_RUNS = 32


def run_in_parts(
    run: Callable[[Batch], BatchOutput],
    batch: Batch,
    give_back: Callable[[], None],
    contains: Callable[[Exception], bool] = lambda error: True,
) -> BatchOutput:
    """Run a batch whole or, where that fails, in parts; pieces that fail have no hidden states. Device thread.

    give_back: returns unused memory to the device. contains: whether a failure is to be survived; others are raised.
    """
    parts = _Parts(batch)
    waiting = [parts.sessions()]
    runs = 0
    while waiting:
        sessions = waiting.pop()
        runs += 1
        try:
            output = run(parts.batch(sessions))
        except Exception as error:
            if not contains(error):
                raise
            parts.is_device_lost, full = is_device_lost(error), is_out_of_memory(error)
            # As text: the error itself would hold on to the tensors of the run.
            parts.failures.append("".join(traceback.format_exception(error)))
        else:
            if not parts.failures:
                return output
            parts.succeed(sessions, output)
            continue
        if full:
            give_back()
        if parts.is_device_lost or runs >= MAX_RUNS:
            # Whatever is left fails.
            break
        if len(sessions) > 1:
            half = len(sessions) // 2
            waiting += [sessions[half:], sessions[:half]]
    return parts.output()


class _Parts:
    """A batch by its sessions, whose pieces stay together and in order, and what became of each piece."""

    def __init__(self, batch: Batch) -> None:
        self.failures: list[str] = []
        self.is_device_lost = False
        self._batch = batch
        self._copied = False
        self._hidden: dict[int, tuple[torch.Tensor | None, bool]] = {}
        self._by_session: dict[object, list[int]] = {}
        for index, piece in enumerate(batch.pieces):
            self._by_session.setdefault(piece.step.session, []).append(index)

    def sessions(self) -> list[object]:
        return list(self._by_session)

    def batch(self, sessions: Sequence[object]) -> Batch:
        pieces: list[Piece] = [self._batch.pieces[index] for index in self._indexes(sessions)]
        return Batch(self._batch.blocks, tuple(pieces), () if self._copied else self._batch.copies)

    def succeed(self, sessions: Sequence[object], output: BatchOutput) -> None:
        # Now the copies have been written to: they must not be made again.
        self._copied = True
        results = zip(output.hidden, output.finite, strict=True)
        self._hidden.update(zip(self._indexes(sessions), results, strict=True))

    def output(self) -> BatchOutput:
        results = [self._hidden.get(index, (None, False)) for index in range(len(self._batch.pieces))]
        hidden, finite = [part for part, _ in results], [is_finite for _, is_finite in results]
        return BatchOutput(tuple(hidden), tuple(finite), tuple(self.failures), self.is_device_lost)

    def _indexes(self, sessions: Sequence[object]) -> list[int]:
        return sorted(index for session in sessions for index in self._by_session[session])
