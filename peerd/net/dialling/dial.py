"""One attempt to reach a peer: tries its addresses one after the other, without waiting for each to fail.

The caller's function tries one address. Several callers share a dial: it goes on as long as one of them waits, and ends
for all of them as soon as there is a connection, whichever side dialled it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING

import trio

from peerd.net.dial_policy import ANYWHERE, DialPolicy
from peerd.protocol.addresses import Multiaddr
from peerd.protocol.errors import ConnectFailed, PeerFault, WrongPeer

if TYPE_CHECKING:
    from peerd.net.connection.peer_connection import PeerConnection

# RFC 8305 (happy eyeballs), section 5: the delay before the next address is tried beside one that has not answered.
STAGGER_S = 0.25
# TCP alone would try for minutes. This is time for its first three attempts (RFC 6298: at 0, 1 and 3 s), and for TLS
# and the upgrade after one of them, or for a relay, which gives its peer 5 s. The handshake has its own deadline.
ADDRESS_TIMEOUT_S = 6.0

Attempt = Callable[[Multiaddr, "Dial"], Awaitable[PeerFault]]
"""Tries one address, and calls `Dial.succeed` or returns the reason why there is no connection."""


class Dial:
    """Tries `addresses`, as far as `policy` permits. Any number of tasks may `wait`; one must `run`."""

    def __init__(self, addresses: Sequence[Multiaddr], policy: DialPolicy = ANYWHERE) -> None:
        self.addresses = tuple(addresses)
        self.policy = policy
        self.failures: dict[Multiaddr, PeerFault] = {}
        self.connection: PeerConnection | None = None
        self._waiting = 0
        self._done = trio.Event()
        self._trying = trio.CancelScope()
        self._one_failed = trio.Event()
        self._scopes: dict[Multiaddr, trio.CancelScope] = {}

    def __repr__(self) -> str:
        return f"<Dial failed={len(self.failures)}/{len(self.addresses)} waiting={self._waiting}>"

    @property
    def over(self) -> bool:
        """Whether the dial has ended, with or without success."""
        return self._done.is_set()

    async def wait(self) -> None:
        """Wait until there is a connection or no address is left. If the last waiter is cancelled, the dial ends."""
        self._waiting += 1
        try:
            await self._done.wait()
        finally:
            self._waiting -= 1
            if not self._waiting and not self._done.is_set():
                self.abandon()

    def abandon(self) -> None:
        """Stop trying, because no caller waits or there is a connection."""
        self._done.set()
        self._trying.cancel()
        for scope in self._scopes.values():
            scope.cancel()

    def succeed(self, connection: PeerConnection, address: Multiaddr | None = None) -> None:
        """Note a connection: the attempt at `address` goes on, the others end."""
        if address is not None:
            self._scopes.pop(address, None)
        if self.connection is None:
            self.connection = connection
            self.abandon()

    async def run(self, nursery: trio.Nursery, attempt: Attempt) -> None:
        """Try all addresses. The attempts run in `nursery`, because one of them becomes a connection."""
        with self._trying:
            for address in self.addresses:
                self._one_failed = trio.Event()
                self._scopes[address] = trio.CancelScope()
                nursery.start_soon(self._try, address, attempt)
                with trio.move_on_after(STAGGER_S):
                    await self._one_failed.wait()
            while len(self.failures) < len(self.addresses):
                self._one_failed = trio.Event()
                await self._one_failed.wait()
        self._done.set()

    async def _try(self, address: Multiaddr, attempt: Attempt) -> None:
        with self._scopes[address]:
            self.failures[address] = await attempt(address, self)
            self._scopes.pop(address, None)
            self._one_failed.set()

    def error(self, name: str) -> PeerFault:
        """The error with each address's reason; WrongPeer if that was the only kind of failure."""
        reasons = "; ".join(f"{address}: {failure}" for address, failure in self.failures.items())
        message = f"{name} cannot be reached: {reasons or 'no address'}"
        kinds = {type(failure) for failure in self.failures.values()}
        if kinds == {WrongPeer}:
            return WrongPeer(message)
        return ConnectFailed(message)
