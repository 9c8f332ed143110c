"""Stops unexpected exceptions at one connection, one handler or one task, so that they never end the daemon.

Strangers choose the input of our code, so a bug of ours must not let them switch a peer off. `Containment` logs such an
exception with its stack, counts it, and adds it to the scores of the peer and address that caused it: a peer that
causes three in a minute is refused for ten minutes. Under PEERD_STRICT=1, which tests and CI set, it raises the
exception instead.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Final

import trio

from peerd.net.limits.scores import BUG, Scores
from peerd.protocol.addresses import IpAddress
from peerd.protocol.identity import PeerId

log = logging.getLogger(__name__)

STRICT_VARIABLE: Final = "PEERD_STRICT"
# A task that fails starts again after this pause, and after twice the pause each time that it fails again soon.
FIRST_PAUSE_S: Final = 1.0
MAX_PAUSE_S: Final = 300.0
# A task that ran for this long before it failed has recovered: its next pause is short again.
STEADY_S: Final = 600.0
# One kind of failure logs its stack at most this often: a stranger that repeats it must not fill the disk.
STACK_EVERY_S: Final = 10.0


class Containment:
    """Counts and logs contained failures. `is_strict`: raise them instead; None takes PEERD_STRICT from the
    environment.
    """

    def __init__(self, is_strict: bool | None = None) -> None:
        self.is_strict = os.environ.get(STRICT_VARIABLE) == "1" if is_strict is None else is_strict
        #: How often each kind of failure was contained, by place and exception type.
        self.counts: Counter[str] = Counter()
        #: What peers and addresses did wrong lately.
        self.scores = Scores()
        self._logged_at: dict[str, float] = {}

    def __repr__(self) -> str:
        return f"<Containment contained={self.counts.total()}>"

    def around(self, what: str, peer_id: PeerId | None = None, ip: IpAddress | None = None) -> _Around:
        """A context that contains every exception except cancellation and those that end the process."""
        return _Around(self, what, peer_id, ip)

    async def contained(self, run: Callable[..., Awaitable[None]], *arguments: object, what: str) -> None:
        """Run a task that may end, and contain its failure."""
        with self.around(what):
            await run(*arguments)

    async def keep_running(self, run: Callable[..., Awaitable[None]], *arguments: object, what: str) -> None:
        """Run a task that a peer needs as long as it lives. If it fails, it starts again after ever longer pauses.

        Returns when the task does. `run` must be able to start again wherever it failed.
        """
        pause_s = FIRST_PAUSE_S
        while True:
            began = trio.current_time()
            with self.around(what):
                await run(*arguments)
                return
            if trio.current_time() - began >= STEADY_S:
                pause_s = FIRST_PAUSE_S
            await trio.sleep(pause_s)
            pause_s = min(2 * pause_s, MAX_PAUSE_S)

    def contain(self, error: Exception, what: str, peer_id: PeerId | None = None, ip: IpAddress | None = None) -> None:
        """Log and count a failure in `what`, and count it against a peer and its address. Raises it if strict."""
        if self.is_strict:
            raise error
        kind = f"{what}: {type(_first_leaf(error)).__name__}"
        self.counts[kind] += 1
        self.scores.note(f"a bug of ours in {what}", BUG, peer_id, ip, trio.current_time())
        self._log(error, kind, peer_id, ip)

    def refuses(self, peer_id: PeerId | None = None, ip: IpAddress | None = None) -> bool:
        """Whether a peer or address did so much wrong lately that we refuse it."""
        return self.scores.is_banned(peer_id, ip, trio.current_time())

    def _log(self, error: Exception, kind: str, peer_id: PeerId | None, ip: IpAddress | None) -> None:
        now = trio.current_time()
        if now - self._logged_at.get(kind, -STACK_EVERY_S) < STACK_EVERY_S:
            return
        self._logged_at[kind] = now
        said_by = f" with {peer_id or 'an unproven peer'} at {ip or 'an unknown address'}" if peer_id or ip else ""
        count = self.counts[kind]
        log.error("contained a bug in %s%s (%d so far); please report it", kind, said_by, count, exc_info=error)


class _Around:
    def __init__(self, containment: Containment, what: str, peer_id: PeerId | None, ip: IpAddress | None) -> None:
        self._containment = containment
        self._where = (what, peer_id, ip)

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
    ) -> bool:
        failure, rest = split(error) if error is not None else (None, None)
        if failure is None:
            return False
        self._containment.contain(failure, *self._where)
        if rest is not None:
            raise rest from None
        return True


def split(error: BaseException) -> tuple[Exception | None, BaseException | None]:
    """Split an exception into failures, and what must be raised on: cancellation, interruption and exit."""
    if isinstance(error, BaseExceptionGroup):
        return error.split(Exception)
    return (error, None) if isinstance(error, Exception) else (None, error)


def _first_leaf(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
