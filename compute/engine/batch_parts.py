"""Runs a batch so that a failure costs only the sessions that cause it.

If a batch fails, it is run again in halves, until the failure is in a batch of one session, which fails alone. Often
there is memory for half of a batch, and the search finds a step that the model cannot compute. A failed run writes to
the KV cache only beyond the ends of rows, or in rows that fail. So nothing needs to be undone, but page copies are made
again until a run has succeeded.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence

import torch

from peerd.compute.device.failures import is_device_lost, is_out_of_memory
from peerd.compute.steps import Batch, BatchOutput, Piece

# To find one session among 256 takes 17 runs. If more sessions fail, the cause is elsewhere, and more runs would only
# take time.
MAX_RUNS = 32


def run_in_parts(
    run: Callable[[Batch], BatchOutput],
    batch: Batch,
    give_back: Callable[[], None],
    contains: Callable[[Exception], bool] = lambda error: True,
) -> BatchOutput:
    """Run a batch whole or, if that fails, in parts. Pieces that fail have no hidden states. Device thread.

    give_back: returns unused memory to the device. contains: whether to survive a failure; other failures are raised.
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
            # Kept as text, because the exception would keep the run's tensors in memory.
            parts.failures.append("".join(traceback.format_exception(error)))
        else:
            if not parts.failures:
                return output
            parts.succeed(sessions, output)
            continue
        if full:
            give_back()
        if parts.is_device_lost or runs >= MAX_RUNS:
            # All remaining sessions fail.
            break
        if len(sessions) > 1:
            half = len(sessions) // 2
            waiting += [sessions[half:], sessions[:half]]
    return parts.output()


class _Parts:
    """A batch cut by sessions, whose pieces stay together and in order, and the result of each piece."""

    def __init__(self, batch: Batch) -> None:
        self.failures: list[str] = []
        self.is_device_lost = False
        self._batch = batch
        self._copied = False
        self._results: dict[int, tuple[torch.Tensor | None, bool, int]] = {}
        self._by_session: dict[object, list[int]] = {}
        for index, piece in enumerate(batch.pieces):
            self._by_session.setdefault(piece.step.session, []).append(index)

    def sessions(self) -> list[object]:
        return list(self._by_session)

    def batch(self, sessions: Sequence[object]) -> Batch:
        pieces: list[Piece] = [self._batch.pieces[index] for index in self._indexes(sessions)]
        copies = () if self._copied else self._batch.copies
        return Batch(self._batch.blocks, tuple(pieces), copies)

    def succeed(self, sessions: Sequence[object], output: BatchOutput) -> None:
        # The copied pages have been written to, so they must not be copied again.
        self._copied = True
        replayed = output.replayed or (0,) * len(output.hidden)
        results = zip(output.hidden, output.finite, replayed, strict=True)
        self._results.update(zip(self._indexes(sessions), results, strict=True))

    def output(self) -> BatchOutput:
        results = [self._results.get(index, (None, False, 0)) for index in range(len(self._batch.pieces))]
        hidden, finite, replayed = zip(*results, strict=True)
        return BatchOutput(hidden, finite, tuple(self.failures), self.is_device_lost, replayed)

    def _indexes(self, sessions: Sequence[object]) -> list[int]:
        return sorted(index for session in sessions for index in self._by_session[session])
