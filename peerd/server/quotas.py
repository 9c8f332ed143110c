"""How much memory clients may take here for their adapters and training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from peerd.net.owners import Owner, Tally
from peerd.protocol.errors import (
    NoRoom,
    Overloaded,
    UnsupportedFeature,
)

# So many sessions of full size bring adapters at once.
SESSIONS_AT_ONCE = 4


class AdapterRoom:
    """The memory that one span has for its clients' own adapters.

    `session_bytes`: what one session may bring; 0 refuses all. One peer, or one network, never holds more than half of
    the whole.
    `value_bytes`: what a value takes here, whatever it was sent as.
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
        """What is reserved now."""
        return self._held.total

    def reserve(self, owner: Owner, values: int) -> int:
        """Set aside what so many values take; returns the bytes. Raises UnsupportedFeature, Overloaded."""
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
        """Give back what was reserved."""
        self._held.add(owner, -n_bytes)

    @contextmanager
    def reserved(self, owner: Owner, values: int) -> Iterator[int]:
        """Reserve, and give back if the block fails; else it stays reserved."""
        n_bytes = self.reserve(owner, values)
        try:
            yield n_bytes
        except BaseException:
            self.release(owner, n_bytes)
            raise


# What all lanes together may hold in parameters and requests, on the host; one peer at most half of it.
HOST_BYTES = 2**30


class HostQuota:
    """Bytes that lanes hold, in all and by owner: a peer, or a network, has half of them at most."""

    def __init__(self, total_bytes: int) -> None:
        self._total = total_bytes
        self._held = Tally()

    @property
    def held_bytes(self) -> int:
        """What all hold."""
        return self._held.total

    def take(self, owner: Owner, size_bytes: int) -> None:
        """Reserve bytes. Raises NoRoom for more than there can ever be, Overloaded."""
        if size_bytes > self._total // 2:
            raise NoRoom(f"a request of {size_bytes} bytes: training has {self._total // 2} here for one peer")
        left = min(self._total - self._held.total, self._total // 2 - self._held.most(owner))
        if size_bytes > left:
            raise Overloaded(f"a request of {size_bytes} bytes: training has {left} left here for you now")
        self._held.add(owner, size_bytes)

    def give(self, owner: Owner, size_bytes: int) -> None:
        """Give back what was reserved."""
        self._held.add(owner, -size_bytes)
