"""Decides which sessions get KV tokens: first come, first served, and no client may hold most of the pool.

Tokens are what sessions are expected to need (`compute/kv/reserve.py`), so they change while a session grows.

Requests wait here in order; the engine does the accounting and raises NoRoom. Two clients may each hold half of a chain
and wait for the other half. This resolves itself: the wait here is bounded, and a client that fails closes everything
and tries again after a random delay (spec/sessions/session.md). Keys cost nothing, so what one peer may hold, and how
many of its requests may wait, is limited for its network too (`net/limits/owners.py`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from peerd.net.limits.owners import Owner, Tally
from peerd.protocol.errors import NoRoom, PeerdError
from peerd.trio_tools import tell

# The request at the head of the queue blocks those behind it for this long, so that a big request is not always
# overtaken. It is no longer because a stranger who asks for more than is free would block all others. It is below the 2
# s that clients wait.
HOLD_UP_S = 1.0
# With more waiting requests, the last would not be served before its client gives up, and each costs a stream and a
# task.
MAX_WAITING = 256
# How many of those one peer and one network may have. A client waits with one request for each chain that it opens.
MAX_WAITING_A_PEER = 8
MAX_WAITING_A_NETWORK = 16
# A client waits no longer than this in a queue (`busy_peers.QUEUE_S`); a longer wait would only fill the queue.
MAX_WAIT_S = 30.0
# A pool that was full counts as full until this share of it is free. Announcing every token that comes and goes would
# help nobody, and each announcement travels to a dozen peers.
ROOM_SHARE = 1 / 8
# The weight of the newest gap in the mean time between two sessions that end.
PACE_GAIN = 0.2
# The limits of the hint when a refused client should ask again.
MIN_RETRY_S = 1.0
MAX_RETRY_S = 60.0


@dataclass(slots=True, eq=False)
class _Waiter:
    owner: Owner
    tokens: int
    attempt: Callable[[], None]
    since: float = field(default_factory=trio.current_time)
    done: trio.Event = field(default_factory=trio.Event)
    granted: bool = False
    # Why the last attempt failed.
    refusal: str = ""
    error: PeerdError | None = None


class Admission:
    """Grants tokens of one pool. `attempt` callbacks commit them, and raise NoRoom if there are too few.

    is_full: a request has waited a second in vain, and little has become free since.
    on_change: functions to call when `is_full` has changed.
    on_wanted: functions to call when a request has waited a second in vain.
    """

    def __init__(self, total_tokens: int, free_tokens: Callable[[], int]) -> None:
        self.is_full = False
        self.on_change: list[Callable[[], None]] = []
        self.on_wanted: list[Callable[[], None]] = []
        # The mean seconds between two sessions that end, and when the last one ended.
        self._pace_s: float | None = None
        self._released_at: float | None = None
        self._total = total_tokens
        self._free = free_tokens
        self._held = Tally()
        self._waiters: deque[_Waiter] = deque()
        self._waiting = Tally()

    async def admit(
        self,
        owner: Owner,
        tokens: int,
        attempt: Callable[[], None],
        timeout_s: float,
        undo: Callable[[], None] = lambda: None,
    ) -> None:
        """Run `attempt` once it succeeds, in order of arrival. Raises NoRoom after `timeout_s`, and the errors of
        `attempt`.

        Raises NoRoom at once if too many requests wait, or too many of the owner's. If the queue is full and an owner
        has few requests in it, the last request of the owner with most is refused instead. A request that has waited a
        second in vain may be overtaken. While others wait, an owner that would hold more than half of the pool is
        passed over. If the caller is cancelled after the grant, `undo` takes back what was committed.
        """
        timeout_s = min(timeout_s, MAX_WAIT_S)
        self._check_place(owner)
        waiter = _Waiter(owner, tokens, attempt)
        self._waiters.append(waiter)
        self._waiting.add(owner, 1)
        try:
            self._grant_in_order()
            if not waiter.done.is_set():
                with trio.move_on_after(timeout_s):
                    with trio.move_on_after(HOLD_UP_S):
                        await waiter.done.wait()
                    self._grant_in_order()
                    if not waiter.done.is_set():
                        self._note_full(True)
                        tell(self.on_wanted)
                    await waiter.done.wait()
            if waiter.error is not None:
                raise waiter.error
            if not waiter.granted:
                free = self._free()
                refusal = waiter.refusal or f"{tokens} KV tokens wanted, {free} free, and others wait"
                raise NoRoom(f"{refusal} after {timeout_s:g} s of waiting", free, self.retry_after_s)
        except trio.Cancelled:
            # The caller was cancelled and then granted before it could run, so it does not know of the grant.
            if waiter.granted:
                undo()
                self.release(owner, tokens)
            raise
        finally:
            if not waiter.done.is_set():
                self._leave(waiter)
                # A request behind this one may fit although this one did not.
                self._grant_in_order()
                self._note_room()

    def recount(self, owner: Owner, tokens: int) -> None:
        """Note that a session of `owner` is expected to need so many tokens more, or less."""
        self._held.add(owner, tokens)

    def release(self, owner: Owner, tokens: int) -> None:
        """Note that tokens of `owner` were freed, and grant waiting requests that fit now."""
        self._held.add(owner, -tokens)
        self._note_pace()
        self.retry()
        self._note_room()

    @property
    def wanted_tokens(self) -> int:
        """How many tokens are missing for the requests that have waited for a while."""
        since = trio.current_time() - HOLD_UP_S / 2
        return max(0, sum(waiter.tokens for waiter in self._waiters if waiter.since <= since) - self._free())

    @property
    def retry_after_s(self) -> float:
        """When a client that is refused now may find room: after all waiting requests, if sessions keep ending at the
        recent rate. 0 if no session has ended yet.
        """
        if self._pace_s is None or self._released_at is None:
            return 0.0
        # If nothing has ended for longer than the mean gap, the mean is out of date: use the time since the last end.
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
            tell(self.on_change)

    def _grant_in_order(self) -> None:
        # Each grant may make it possible to grant a request that was passed over, so start again after it.
        while (waiter := self._first_that_fits()) is not None:
            self._leave(waiter)
            if waiter.error is None:
                waiter.granted = True
                self._held.add(waiter.owner, waiter.tokens)
            waiter.done.set()

    def _leave(self, waiter: _Waiter) -> None:
        self._waiters.remove(waiter)
        self._waiting.add(waiter.owner, -1)

    def _check_place(self, owner: Owner) -> None:
        """Raise NoRoom if the queue has no place for one more request of this owner."""
        limits = {"a_peer": MAX_WAITING_A_PEER, "a_network": MAX_WAITING_A_NETWORK}
        if not self._waiting.has_room(owner, 1, **limits):
            refusal = f"{self._waiting.most(owner)} sessions of yours, or of your network, wait here already"
            raise NoRoom(refusal, self._free(), self.retry_after_s)
        if len(self._waiters) >= MAX_WAITING:
            greedy = max(self._waiters, key=lambda waiter: self._waiting.most(waiter.owner))
            if self._waiting.most(greedy.owner) <= self._waiting.most(owner) + 1:
                raise NoRoom(f"{len(self._waiters)} sessions wait here already", self._free(), self.retry_after_s)
            last = next(waiter for waiter in reversed(self._waiters) if waiter.owner == greedy.owner)
            self._leave(last)
            last.error = NoRoom(
                "the queue is full, and others have fewer requests in it", self._free(), self.retry_after_s
            )
            last.done.set()

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
                # The error concerns only this request: the session that freed the tokens must not get it.
                waiter.error = error
            return waiter
        return None

    def _hogs(self, waiter: _Waiter) -> bool:
        owner, half = waiter.owner, self._total // 2
        if self._held.of_peer(owner) and self._held.of_peer(owner) + waiter.tokens > half:
            return any(other.owner != owner for other in self._waiters)
        if self._held.of_network(owner) and self._held.of_network(owner) + waiter.tokens > half:
            return any(other.owner.share != owner.share for other in self._waiters)
        return False
