"""Counts what a relay has granted, and decides whether it may grant more: slots, circuits, attempts.

It works on PeerIds, addresses and a given time, and opens nothing. A peer can make any number of PeerIds at no cost. So
every limit for one peer has a companion: a limit of a few times as much for one public network.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from peerd.net.limits.owners import count, network_of
from peerd.net.limits.rates import NamedRates
from peerd.protocol.addresses import IpAddress
from peerd.protocol.errors import Overloaded
from peerd.protocol.identity import PeerId

# A household or an office has several peers in one network, but one network should not take a whole relay.
SHARE_OF_A_NETWORK = 4
CIRCUITS_OF_A_NETWORK = 2
# How often a caller may ask. It is more than a client needs that measures the servers which it may use (24 at once), or
# that dials them again after another relay died. It is less than what harms the called peer: a peer takes 512 streams a
# second before it ends the connection.
CALLS_BURST, CALLS_A_SECOND = 48, 4.0
CALLED_BURST, CALLED_A_SECOND = 50, 10.0


@dataclass(frozen=True, slots=True)
class RelayLimits:
    """What an operator allows a relay to grant.

    slots: reservations.
    circuits: of all peers. circuits_a_peer: to one reserved peer. circuits_a_caller: from one caller.
    bytes_a_second: in each direction of a circuit.
    total_bytes_a_second: of all circuits, both directions.
    expiry_s: how long a reservation lives that is not renewed. circuit_s: how long a circuit may live.
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
    """The counts of one relay. Everything that is counted in is counted out again, once."""

    def __init__(self, limits: RelayLimits) -> None:
        self.limits = limits
        self.circuits = 0
        self._slots: dict[PeerId, str] = {}
        self._slots_by_network: Counter[str] = Counter()
        self._by_caller: Counter[str] = Counter()
        self._by_caller_network: Counter[str] = Counter()
        self._by_reserved: Counter[str] = Counter()
        self._calls = NamedRates(CALLS_A_SECOND, CALLS_BURST)
        self._called = NamedRates(CALLED_A_SECOND, CALLED_BURST)

    def __repr__(self) -> str:
        return f"<RelayLedger slots={self.slots}/{self.limits.slots} circuits={self.circuits}/{self.limits.circuits}>"

    @property
    def slots(self) -> int:
        """How many reservations are granted."""
        return len(self._slots)

    def reserve(self, peer: PeerId, ip: IpAddress | None) -> None:
        """Give a peer a slot; a peer that has one keeps it. Raises Overloaded."""
        network, before = network_of(ip), self._slots.get(peer)
        if len(self._slots) - (before is not None) >= self.limits.slots:
            raise Overloaded(f"no slot free: this relay has {self.limits.slots}")
        share = max(1, self.limits.slots // SHARE_OF_A_NETWORK)
        if network and self._slots_by_network[network] - (before == network) >= share:
            raise Overloaded(f"no slot free: {network} has {share}, the limit for one network")
        if before is not None:
            self.release(peer)
        self._slots[peer] = network
        count(self._slots_by_network, network, 1)

    def release(self, peer: PeerId) -> None:
        """Take back the peer's slot."""
        count(self._slots_by_network, self._slots.pop(peer), -1)

    @contextmanager
    def circuit(self, caller: PeerId, ip: IpAddress | None, reserved: PeerId, now: float) -> Iterator[None]:
        """Inside this context, count one circuit that is open or being opened. Raises Overloaded."""
        limits, network = self.limits, network_of(ip)
        if self.circuits >= limits.circuits:
            raise Overloaded(f"no circuit free: this relay has {limits.circuits}")
        if self._by_reserved[reserved] >= limits.circuits_a_peer:
            raise Overloaded(f"{reserved} has {limits.circuits_a_peer} circuits, the limit for one peer")
        # A caller outside the public networks has the network "", which is never counted.
        of_all = self._by_caller_network[network] // CIRCUITS_OF_A_NETWORK
        if max(self._by_caller[caller], of_all) >= limits.circuits_a_caller:
            raise Overloaded(f"you have {limits.circuits_a_caller} circuits or more, the limit for one caller")
        if not (self._calls.may(network or caller, now) and self._called.may(reserved, now)):
            raise Overloaded("too many calls in a short time")
        self._add(caller, network, reserved, 1)
        try:
            yield
        finally:
            self._add(caller, network, reserved, -1)

    def _add(self, caller: PeerId, network: str, reserved: PeerId, change: int) -> None:
        self.circuits += change
        count(self._by_caller, caller, change)
        count(self._by_caller_network, network, change)
        count(self._by_reserved, reserved, change)
