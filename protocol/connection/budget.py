"""Limits how many buffered bytes peers may cost this process, by one budget that all networks share.

Everything that a peer can make us hold before our own code has looked at it is first taken from the budget: bytes that
wait in streams, messages that have begun, and answers that the peer does not read. The budget is fair without a fixed
number of owners, because an owner may hold as much as it leaves free for the others. One alone gets half, two get a
third each, and a newcomer finds as much free as each of the earlier owners holds.
"""

from __future__ import annotations

from peerd.protocol.errors import Overloaded

# So much an owner may hold however little is free: a small question is always heard.
FLOOR_BYTES = 128 * 1024
DEFAULT_TOTAL_BYTES = 1024 * 1024 * 1024


class BufferBudget:
    """Bytes that all connections together may hold."""

    def __init__(self, total_bytes: int = DEFAULT_TOTAL_BYTES) -> None:
        self.total_bytes = total_bytes
        self.used_bytes = 0
        self._shares: dict[str, _Share] = {}

    def __repr__(self) -> str:
        return f"<BufferBudget {self.used_bytes}/{self.total_bytes} owners={len(self._shares)}>"

    def open(self, owner: str = "") -> Buffers:
        """The buffers of one more connection of an owner, such as its network; "" is an owner of its own."""
        share = self._shares.get(owner)
        if share is None:
            share = _Share(self, owner)
            if owner:
                self._shares[owner] = share
        return Buffers(share)

    def _forget(self, owner: str) -> None:
        self._shares.pop(owner, None)


class _Share:
    """What the connections of one owner hold."""

    def __init__(self, budget: BufferBudget, owner: str) -> None:
        self.held_bytes = 0
        self.connections = 0
        self._budget = budget
        self._owner = owner

    def take(self, count: int) -> None:
        held = self.held_bytes + count
        left = self._budget.total_bytes - self._budget.used_bytes - count
        if held > left and held > FLOOR_BYTES:
            raise Overloaded(f"{held} bytes of yours would wait here, and only {left} are free for others")
        self.hold(count)

    def hold(self, count: int) -> None:
        self.held_bytes += count
        self._budget.used_bytes += count

    def leave(self) -> None:
        self.connections -= 1
        if not self.connections:
            self._budget._forget(self._owner)


class Buffers:
    """What one connection holds of its owner's share."""

    __slots__ = ("_share", "held_bytes", "is_closed")

    def __init__(self, share: _Share) -> None:
        self.held_bytes = 0
        self.is_closed = False
        self._share = share
        share.connections += 1

    def take(self, count: int) -> None:
        """Reserve bytes that the peer wants us to hold. Raises Overloaded beyond the owner's share."""
        if not self.is_closed:
            self._share.take(count)
            self.held_bytes += count

    def hold(self, count: int) -> None:
        """Count bytes of ours that wait for the peer to read them."""
        if not self.is_closed:
            self._share.hold(count)
            self.held_bytes += count

    def give(self, count: int) -> None:
        """Give back what was taken or held."""
        if not self.is_closed:
            self._share.hold(-count)
            self.held_bytes -= count

    def close(self) -> None:
        """Give back everything: the connection has ended."""
        if not self.is_closed:
            self.give(self.held_bytes)
            self.is_closed = True
            self._share.leave()
