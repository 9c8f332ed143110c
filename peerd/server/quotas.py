"""Limits the memory that clients may use on this server for their adapters and their training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from peerd.net.limits.owners import Owner, Tally
from peerd.protocol.errors import (
    NoRoom,
    Overloaded,
    UnsupportedFeature,
)

# There is memory for this many sessions with an adapter of full size.
SESSIONS_AT_ONCE = 4


class AdapterRoom:
    """The memory that one span has for its clients' own adapters.

    session_bytes: the most that one session may bring; 0 refuses all adapters. One peer, or one network, may hold at
        most half of the whole.
    value_bytes: the size of a value on the device, whatever its wire dtype.
    """

    def __init__(self, session_bytes: int = 0, *, value_bytes: int = 4) -> None:
        self.session_bytes = session_bytes
        self.value_bytes = value_bytes
        self.total_bytes = SESSIONS_AT_ONCE * session_bytes
        self._held = Tally()

    def __repr__(self) -> str:
        return f"<AdapterRoom {self.held_bytes} of {self.total_bytes} bytes>"

    @property
    def held_bytes(self) -> int:
        """How many bytes are reserved now."""
        return self._held.total

    def reserve(self, owner: Owner, values: int) -> int:
        """Reserve the memory for `values` values. Returns the bytes. Raises UnsupportedFeature or Overloaded."""
        wanted = values * self.value_bytes
        if wanted > self.session_bytes:
            raise UnsupportedFeature(f"the adapter takes {wanted} bytes here, a session may bring {self.session_bytes}")
        half = self.total_bytes // 2
        has_share = self._held.has_room(owner, wanted, a_peer=half, a_network=half)
        if self.held_bytes + wanted > self.total_bytes or not has_share:
            raise Overloaded(f"no room for an adapter of {wanted} bytes now: {self.held_bytes} are in use")
        self._held.add(owner, wanted)
        return wanted

    def release(self, owner: Owner, n_bytes: int) -> None:
        """Give back reserved bytes."""
        self._held.add(owner, -n_bytes)

    @contextmanager
    def reserved(self, owner: Owner, values: int) -> Iterator[int]:
        """Reserve memory; give it back if the block fails, otherwise keep it reserved."""
        n_bytes = self.reserve(owner, values)
        try:
            yield n_bytes
        except BaseException:
            self.release(owner, n_bytes)
            raise


# How much all lanes together may hold in parameters and requests, on the host; one peer at most half of it.
HOST_BYTES = 2**30


class HostQuota:
    """The bytes that lanes hold, in total and by owner: a peer, or a network, may have half of them."""

    def __init__(self, total_bytes: int) -> None:
        self._total = total_bytes
        self._held = Tally()

    @property
    def held_bytes(self) -> int:
        """The bytes that all lanes hold."""
        return self._held.total

    def take(self, owner: Owner, size_bytes: int) -> None:
        """Reserve bytes. Raises NoRoom for more than one owner can ever have, and Overloaded."""
        if size_bytes > self._total // 2:
            raise NoRoom(f"a request of {size_bytes} bytes: training has {self._total // 2} here for one peer")
        left = min(self._total - self._held.total, self._total // 2 - self._held.most(owner))
        if size_bytes > left:
            raise Overloaded(f"a request of {size_bytes} bytes: training has {left} left here for you now")
        self._held.add(owner, size_bytes)

    def give(self, owner: Owner, size_bytes: int) -> None:
        """Give back reserved bytes."""
        self._held.add(owner, -size_bytes)
