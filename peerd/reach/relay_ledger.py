"""What a relay has given away, and whether it may give more: slots, circuits, attempts.

Knows peers by name and address and the time it is given; opens nothing. The difficulty is that PeerIds cost
nothing: so whatever one peer may have, one public address may have only a few times as much of.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from peerd.net.gate import host_of
from peerd.protocol.addresses import IpAddress
from peerd.protocol.errors import Overloaded
from peerd.protocol.identity import PeerId

Name = TypeVar("Name", bound=str)

# A household, or an office, has several peers behind one address; but nobody should take a relay for himself.
SHARE_OF_AN_ADDRESS = 4
CIRCUITS_OF_AN_ADDRESS = 2
# How often one may ask. Above what a client needs that measures the servers which it may use (24 at once), or dials
# them again after another relay's death; below what troubles whoever is called: a peer takes 512 streams a second
# before it ends the connection.
CALLS_BURST, CALLS_A_SECOND = 48, 4.0
CALLED_BURST, CALLED_A_SECOND = 50, 10.0
# Peers whose attempts are remembered; a forgotten one starts with a full burst.
MAX_REMEMBERED = 4096


@dataclass(frozen=True, slots=True)
class RelayLimits:
    """What an operator gives away.

    slots: reservations. circuits: of all peers. circuits_a_peer: to one reserved peer. circuits_a_caller: from one.
    bytes_a_second: in each direction of a circuit; total_bytes_a_second: of all circuits, both directions.
    expiry_s, circuit_s: how long a reservation that is not renewed, and a circuit, may live.
    """

    slots: int = 128
    circuits: int = 512
    circuits_a_peer: int = 32
    circuits_a_caller: int = 32
    bytes_a_second: int = 2 * 2**20
    total_bytes_a_second: int = 32 * 2**20
    expiry_s: int = 3600
    circuit_s: int = 12 * 3600


class RelayLedger:
    """Counts for one relay. What enters leaves again, once."""

    def __init__(self, limits: RelayLimits) -> None:
        self.limits = limits
        self.circuits = 0
        self._slots: dict[PeerId, str] = {}
        self._slots_by_host: Counter[str] = Counter()
        self._by_caller: Counter[PeerId] = Counter()
        self._by_caller_host: Counter[str] = Counter()
        self._by_reserved: Counter[PeerId] = Counter()
        self._calls = _Attempts(CALLS_A_SECOND, CALLS_BURST)
        self._called = _Attempts(CALLED_A_SECOND, CALLED_BURST)

    def __repr__(self) -> str:
        return f"<RelayLedger slots={self.slots}/{self.limits.slots} circuits={self.circuits}/{self.limits.circuits}>"

    @property
    def slots(self) -> int:
        """Reservations given away."""
        return len(self._slots)

    def reserve(self, peer: PeerId, ip: IpAddress | None) -> None:
        """Give a peer a slot; one that has one keeps it. Raises Overloaded."""
        host, before = host_of(ip), self._slots.get(peer)
        if len(self._slots) - (before is not None) >= self.limits.slots:
            raise Overloaded(f"no slot free: this relay has {self.limits.slots}")
        share = max(1, self.limits.slots // SHARE_OF_AN_ADDRESS)
        if host and self._slots_by_host[host] - (before == host) >= share:
            raise Overloaded(f"no slot free: {host} has {share}, as many as one address gets here")
        if before is not None:
            self.release(peer)
        self._slots[peer] = host
        _count(self._slots_by_host, host, 1)

    def release(self, peer: PeerId) -> None:
        """The peer gives its slot back."""
        _count(self._slots_by_host, self._slots.pop(peer), -1)

    @contextmanager
    def circuit(self, caller: PeerId, ip: IpAddress | None, reserved: PeerId, now: float) -> Iterator[None]:
        """Count a circuit as long as it stands, and while it is being asked for. Raises Overloaded."""
        limits, host = self.limits, host_of(ip)
        if self.circuits >= limits.circuits:
            raise Overloaded(f"no circuit free: this relay has {limits.circuits}")
        if self._by_reserved[reserved] >= limits.circuits_a_peer:
            raise Overloaded(f"{reserved} has {limits.circuits_a_peer} circuits, as many as one peer gets here")
        of_host = CIRCUITS_OF_AN_ADDRESS * limits.circuits_a_caller
        if self._by_caller[caller] >= limits.circuits_a_caller or (host and self._by_caller_host[host] >= of_host):
            raise Overloaded(f"you have {limits.circuits_a_caller} circuits or more, as many as one caller gets here")
        if not (self._calls.may(host or caller, now) and self._called.may(reserved, now)):
            raise Overloaded("too many calls in a short time")
        self._add(caller, host, reserved, 1)
        try:
            yield
        finally:
            self._add(caller, host, reserved, -1)

    def _add(self, caller: PeerId, host: str, reserved: PeerId, change: int) -> None:
        self.circuits += change
        _count(self._by_caller, caller, change)
        _count(self._by_caller_host, host, change)
        _count(self._by_reserved, reserved, change)


class _Attempts:
    """How often each one tries; of those that tried longest ago nothing is remembered."""

    def __init__(self, rate: float, burst: float) -> None:
        self._rate = rate
        self._burst = burst
        self._buckets: OrderedDict[str, TokenBucket] = OrderedDict()

    def may(self, who: str, now: float) -> bool:
        bucket = self._buckets.get(who)
        if bucket is None:
            bucket = self._buckets[who] = TokenBucket(self._rate, self._burst, now)
            if len(self._buckets) > MAX_REMEMBERED:
                self._buckets.popitem(last=False)
        self._buckets.move_to_end(who)
        return bucket.try_take(1, now)


def _count(counter: Counter[Name], key: Name, change: int) -> None:
    """Change a count, and forget it at 0. The nameless, "", are not counted."""
    if not key:
        return
    counter[key] += change
    if not counter[key]:
        del counter[key]


class TokenBucket:
    """`rate` a second, and up to `burst` at once after a rest."""

    __slots__ = ("_burst_s", "_paid_until", "_rate")

    def __init__(self, rate: float, burst: float, now: float) -> None:
        self._rate = rate
        self._burst_s = burst / rate
        self._paid_until = now - self._burst_s

    def take(self, count: float, now: float) -> float:
        """Pay for `count`. Returns for how many seconds to wait before using it."""
        self._paid_until = max(self._paid_until, now - self._burst_s) + count / self._rate
        return max(0.0, self._paid_until - now)

    def try_take(self, count: float, now: float) -> bool:
        """Pay for `count` if it can be used at once."""
        paid_until = max(self._paid_until, now - self._burst_s) + count / self._rate
        if paid_until > now:
            return False
        self._paid_until = paid_until
        return True
