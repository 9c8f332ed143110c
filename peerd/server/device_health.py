"""Decides whether the device under a span still computes, from the batches that failed on it.

A session can make its own batches fail again and again, and must not cost the other sessions the span. So a span is
given up only if its device is lost, if three failed batches in a row came from three different networks, or if the
device fails on the server's own test. A result that is not finite is the model's fault or the dtype's, and the
operator hears of it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import trio

from peerd.compute.errors import NonFiniteError
from peerd.compute.steps import BatchOutput

log = logging.getLogger(__name__)

FAILURES_IN_A_ROW = 3
# A client that makes the same batch fail again and again must not fill the disk.
STACK_EVERY_S = 10.0
# A client that causes overflows again and again must not fill the log.
BAD_RESULT_EVERY_S = 60.0


class DeviceHealth:
    """Counts failed batches of one engine, and decides whether its device still works."""

    def __init__(self) -> None:
        #: How many batches failed in part or completely.
        self.failed_batches = 0
        #: The reason for giving the device up; "" while it works.
        self.broken = ""
        # The owners of the steps of each of the last batches that failed completely.
        self._in_a_row: list[frozenset[str]] = []
        self._quiet_until = -math.inf
        self._no_bad_result_until = -math.inf

    def __repr__(self) -> str:
        return f"<DeviceHealth {self.broken or 'works'} failed={self.failed_batches}>"

    def note(self, output: BatchOutput, owners: Collection[str]) -> bool:
        """Note the end of a batch with these owners' steps. Returns whether the device should be tested now."""
        if not output.failures:
            self._in_a_row.clear()
            return False
        self.failed_batches += 1
        self._log(output, len(owners))
        if output.is_device_lost:
            self.broken = "its device computes nothing more for this process"
        if any(hidden is not None for hidden in output.hidden):
            self._in_a_row.clear()
            return False
        self._in_a_row.append(frozenset(owners))
        if len(self._in_a_row) < FAILURES_IN_A_ROW:
            return False
        if len(frozenset().union(*self._in_a_row)) >= FAILURES_IN_A_ROW:
            self.broken = f"{len(self._in_a_row)} batches of different clients failed in a row"
        return not self.broken

    def tested(self, works: bool) -> None:
        """Note the result of the test for which `note` asked."""
        if not works:
            self.broken = f"{len(self._in_a_row)} batches failed in a row, and so did a test"
        self._in_a_row.clear()

    @contextmanager
    def noting_bad_results(self) -> Iterator[None]:
        """Inside this context, a result that is not finite is also reported to the operator."""
        try:
            yield
        except NonFiniteError as error:
            self.note_bad_result(error)
            raise

    def note_bad_result(self, error: NonFiniteError) -> None:
        """Log the error for the operator, who can serve the blocks in another dtype; at most once a minute."""
        now = trio.current_time()
        if now >= self._no_bad_result_until:
            self._no_bad_result_until = now + BAD_RESULT_EVERY_S
            log.warning("%s", error)

    def _log(self, output: BatchOutput, owners: int) -> None:
        now = trio.current_time()
        if now < self._quiet_until:
            return
        self._quiet_until = now + STACK_EVERY_S
        lost = sum(hidden is None for hidden in output.hidden)
        log.error(
            "a batch of %d clients failed; %d of its %d parts could not be computed (%d batches so far):\n%s",
            owners,
            lost,
            len(output.hidden),
            self.failed_batches,
            output.failures[0],
        )
