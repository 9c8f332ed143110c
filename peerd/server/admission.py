"""Who gets the KV tokens that several sessions want: first come, first served, nobody hogging.

Knows waiting and fairness; the accounting itself is the engine's, which says NoRoom. The difficulty
is two clients that each hold half a chain and wait for the other half: the bounded wait here, and the
client that then closes everything and tries again after a random delay, resolve it (spec/session.md).
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

import trio

from peerd.protocol.errors import NoRoom, PeerdError

# The first who waits keeps those behind it waiting for so long, so that a big request is not always overtaken; but no
# longer, or one stranger who asks for more than is free would shut everybody out. Below the 2 s that clients wait.
HOLD_UP_S = 1.0
# More who wait would not be served within anybody's patience, and each costs a stream and a task.
MAX_WAITING = 256
# A pool that was full counts as full until this share of it is free: who is told of every token that comes and goes
# learns nothing, and each announcement travels to a dozen peers.
ROOM_SHARE = 1 / 8
# Weight of the newest in the mean time between two sessions that end.
PACE_GAIN = 0.2
# What may be told to somebody who asks when to come again.
MIN_RETRY_S = 1.0
MAX_RETRY_S = 60.0


@dataclass(slots=True, eq=False)
class _Waiter:
    owner: Hashable
    tokens: int
    attempt: Callable[[], None]
    since: float = field(default_factory=trio.current_time)
    done: trio.Event = field(default_factory=trio.Event)
    granted: bool = False
    # Why the last attempt failed.
    refusal: str = ""
    error: PeerdError | None = None


class Admission:
    """Grants tokens of one pool. `attempt` callbacks commit them and raise NoRoom where there are too few.

    is_full: somebody has waited for a second in vain, and there is hardly more room since. on_change: called when that
    has changed.
    """

    def __init__(self, total_tokens: int, free_tokens: Callable[[], int]) -> None:
        self.is_full = False
        self.on_change: Callable[[], None] = lambda: None
        # Mean seconds between two sessions that end, and when the last one did.
        self._pace_s: float | None = None
        self._released_at: float | None = None
        self._total = total_tokens
        self._free = free_tokens
        self._held: Counter[Hashable] = Counter()
        self._waiters: deque[_Waiter] = deque()

    async def admit(
        self,
        owner: Hashable,
        tokens: int,
        attempt: Callable[[], None],
        timeout_s: float,
        undo: Callable[[], None] = lambda: None,
    ) -> None:
        """Run `attempt` once it succeeds, in order of arrival. Raises NoRoom after `timeout_s`, and what it raises.

        At once where too many wait already.

        Who has waited for a second in vain may be overtaken. While others wait, an owner whose holdings would exceed
        half of the pool is passed over. `undo` takes back what was committed for a caller that is cancelled then.
        """
        if len(self._waiters) >= MAX_WAITING:
            raise NoRoom(f"{len(self._waiters)} sessions wait here already", self._free(), self.retry_after_s)
        waiter = _Waiter(owner, tokens, attempt)
        self._waiters.append(waiter)
        try:
            self._grant_in_order()
            if not waiter.done.is_set():
                with trio.move_on_after(timeout_s):
                    with trio.move_on_after(HOLD_UP_S):
                        await waiter.done.wait()
                    self._grant_in_order()
                    if not waiter.done.is_set():
                        self._note_full(True)
                    await waiter.done.wait()
            if waiter.error is not None:
                raise waiter.error
            if not waiter.granted:
                free = self._free()
                refusal = waiter.refusal or f"{tokens} KV tokens wanted, {free} free, and others wait"
                raise NoRoom(f"{refusal} after {timeout_s:g} s of waiting", free, self.retry_after_s)
        except trio.Cancelled:
            # Cancelled first and granted before it could run: nobody else knows of it.
            if waiter.granted:
                undo()
                self.release(owner, tokens)
            raise
        finally:
            if not waiter.done.is_set():
                self._waiters.remove(waiter)
                # Whoever stood behind us may fit where we did not.
                self._grant_in_order()
                self._note_room()

    def release(self, owner: Hashable, tokens: int) -> None:
        """Tokens of `owner` were freed: wake whoever waits for them."""
        self._held[owner] -= tokens
        if self._held[owner] <= 0:
            del self._held[owner]
        self._note_pace()
        self.retry()
        self._note_room()

    @property
    def retry_after_s(self) -> float:
        """When somebody who is refused now may find room: once all who wait have had theirs, if sessions go on ending
        as they did lately. 0 while none has.
        """
        if self._pace_s is None or self._released_at is None:
            return 0.0
        # Where none has ended for longer than usual, the usual is over.
        pace_s = max(self._pace_s, trio.current_time() - self._released_at)
        return min(MAX_RETRY_S, max(MIN_RETRY_S, pace_s * (len(self._waiters) + 1)))

    def retry(self) -> None:
        """Grant what can be granted now."""
        if self._waiters:
            self._grant_in_order()

    def _note_pace(self) -> None:
        now = trio.current_time()
        if self._released_at is not None:
            gap_s = now - self._released_at
            self._pace_s = gap_s if self._pace_s is None else self._pace_s + PACE_GAIN * (gap_s - self._pace_s)
        self._released_at = now

    def _note_room(self) -> None:
        if self.is_full and not self._waiters and self._free() >= self._total * ROOM_SHARE:
            self._note_full(False)

    def _note_full(self, is_full: bool) -> None:
        if is_full != self.is_full:
            self.is_full = is_full
            self.on_change()

    def _grant_in_order(self) -> None:
        # Each grant may make room for somebody who was passed over, so start again after it.
        while (waiter := self._first_that_fits()) is not None:
            self._waiters.remove(waiter)
            if waiter.error is None:
                self._record(waiter)
            waiter.done.set()

    def _first_that_fits(self) -> _Waiter | None:
        for waiter in self._waiters:
            if self._hogs(waiter):
                continue
            try:
                waiter.attempt()
            except NoRoom as refusal:
                waiter.refusal = str(refusal)
                if trio.current_time() - waiter.since < HOLD_UP_S:
                    return None
                continue
            except PeerdError as error:
                # Its own fault, and nobody else's: whoever freed the tokens must not hear of it.
                waiter.error = error
            return waiter
        return None

    def _record(self, waiter: _Waiter) -> None:
        waiter.granted = True
        self._held[waiter.owner] += waiter.tokens

    def _hogs(self, waiter: _Waiter) -> bool:
        held = self._held[waiter.owner]
        others_wait = any(other.owner != waiter.owner for other in self._waiters)
        return held > 0 and others_wait and held + waiter.tokens > self._total // 2
