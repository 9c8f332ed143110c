"""Limits how often something may happen: token buckets, single, by name, and by owner.

A bucket is paid before it is used. So callers that wait for one pass in the order in which they came, and none of them
starves (the virtual scheduling algorithm, ITU-T I.371, annex A).
"""

from __future__ import annotations

from collections import OrderedDict

from peerd.net.limits.owners import Owner

# How many names are remembered; a forgotten one starts with a full burst.
MAX_REMEMBERED = 4096


class TokenBucket:
    """Allows `rate` a second, and up to `burst` at once after a pause."""

    __slots__ = ("_burst_s", "_paid_until", "_rate")

    def __init__(self, rate: float, burst: float, now: float) -> None:
        self._rate = rate
        self._burst_s = burst / rate
        self._paid_until = now - self._burst_s

    def take(self, count: float, now: float) -> float:
        """Pay for `count`. Returns how many seconds to wait before using it."""
        self._paid_until = max(self._paid_until, now - self._burst_s) + count / self._rate
        return max(0.0, self._paid_until - now)

    def try_take(self, count: float, now: float) -> bool:
        """Pay for `count` only if it may be used at once. Returns whether it may."""
        paid_until = max(self._paid_until, now - self._burst_s) + count / self._rate
        if paid_until > now:
            return False
        self._paid_until = paid_until
        return True


class Rates:
    """How often each owner may do something: `rate` a second after a burst, for its PeerId and for its network."""

    def __init__(self, rate: float, burst: float, *, network_factor: float = 1.0) -> None:
        self._peers = NamedRates(rate, burst)
        self._networks = NamedRates(rate * network_factor, burst * network_factor)

    def may(self, owner: Owner, now: float, amount: float = 1) -> bool:
        """Whether the owner may do it now. If so, it is counted."""
        # The peer first: one that is beyond its own rate must not use up its network's.
        if not self._peers.may(owner.peer_id, now, amount):
            return False
        return not owner.network or self._networks.may(owner.network, now, amount)


class NamedRates:
    """A rate for each of many names. The names that were used longest ago are forgotten."""

    def __init__(self, rate: float, burst: float) -> None:
        self._rate = rate
        self._burst = burst
        self._buckets: OrderedDict[str, TokenBucket] = OrderedDict()

    def may(self, name: str, now: float, amount: float = 1) -> bool:
        """Whether it may happen under this name now. If so, it is counted."""
        bucket = self._buckets.get(name)
        if bucket is None:
            bucket = self._buckets[name] = TokenBucket(self._rate, self._burst, now)
            if len(self._buckets) > MAX_REMEMBERED:
                self._buckets.popitem(last=False)
        self._buckets.move_to_end(name)
        return bucket.try_take(amount, now)
