"""Decides about the streams that one peer opens: which handler runs for a stream, or why it is refused."""

from __future__ import annotations

from collections.abc import Mapping

from peerd.net.handlers import StreamHandler
from peerd.net.limits.entry_rates import EntryRates, RefusedOpens
from peerd.net.limits.owners import Owner
from peerd.protocol.connection.stream_table import MAX_STREAMS
from peerd.protocol.errors import Overloaded, UnsupportedFeature


class IncomingStreams:
    """The streams that the peer of one connection opens.

    handlers: protocol id -> its handler; it may change. rates: what peers and networks may open over all connections.
    now: the time in seconds, on the clock that all later calls use too.
    """

    def __init__(self, handlers: Mapping[str, StreamHandler], rates: EntryRates, now: float) -> None:
        self.is_flood = False
        """Whether so many streams were refused that the connection must end."""
        self._handlers = handlers
        self._rates = rates
        self._refused = RefusedOpens(now)

    def handler_of(self, protocol: str, owner: Owner, running: int, now: float) -> StreamHandler:
        """The handler for a stream of `protocol` that `owner` opens now, while `running` handlers run.

        Raises Overloaded if the peer, or its network, opens streams too fast, or too many handlers run;
        UnsupportedFeature if there is no handler. The stream is then to be reset with the error's code.
        """
        self._refused.opened(now)
        if not self._rates.may_open(owner, now):
            self.is_flood = self._refused.refused()
            raise Overloaded("you, or your network, open streams too fast")
        handler = self._handlers.get(protocol)
        if handler is None:
            raise UnsupportedFeature(f"this peer does not speak {protocol}")
        if running >= MAX_STREAMS:
            raise Overloaded(f"{MAX_STREAMS} of your streams are open here already")
        return handler
