"""The streams of one connection by number, with limits on how many there are and what they hold together.

A stream that has ended, whose last frames may still arrive, must be told from one that never was opened, without
remembering all old streams. Numbers only grow, so the highest number of each side is enough.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from peerd.protocol.connection.budget import Buffers
from peerd.protocol.connection.frames import MAX_STREAM_ID, OpenFrame, Priority
from peerd.protocol.connection.liveness import Timeouts
from peerd.protocol.connection.stream_queues import INITIAL_CREDIT_BYTES
from peerd.protocol.connection.streams import StreamMachine
from peerd.protocol.errors import ConnectionLost, Overloaded, RemoteProtocolError

# Streams that each side may have opened at a time. Both sides count, so the limit is part of the protocol.
MAX_STREAMS = 256


@dataclass(frozen=True, slots=True)
class Limits:
    """How much one peer may make us hold or do over one connection.

    opens_burst, opens_a_second: how fast it may open streams.
    shared_credit_bytes: credit beyond each stream's initial one, over all streams together.
    """

    opens_burst: int = 1024
    opens_a_second: float = 512.0
    shared_credit_bytes: int = 64 * 1024 * 1024
    timeouts: Timeouts = field(default_factory=Timeouts)


class StreamTable:
    """The open streams by number. The initiator's numbers are odd, so both sides can open streams without asking."""

    def __init__(self, limits: Limits, buffers: Buffers, *, initiator: bool, now: float) -> None:
        self._limits = limits
        self._buffers = buffers
        self._streams: dict[int, StreamMachine] = {}
        # How many of them the peer opened: a flood of OPENs must not count them each time.
        self._theirs = 0
        self._next_id = 1 if initiator else 2
        self._last_peer_id = 0
        self._allowance = float(limits.opens_burst)
        self._allowed_at = now

    def __len__(self) -> int:
        return len(self._streams)

    def __iter__(self) -> Iterator[StreamMachine]:
        return iter(tuple(self._streams.values()))

    def __getitem__(self, stream_id: int) -> StreamMachine:
        return self._streams[stream_id]

    def open(self, protocol: str, priority: Priority) -> StreamMachine:
        """Open a new stream of ours. Raises Overloaded beyond 256, ConnectionLost when all numbers are used."""
        if len(self._streams) - self._theirs >= MAX_STREAMS:
            raise Overloaded(f"{MAX_STREAMS} streams to this peer are open already")
        if self._next_id > MAX_STREAM_ID:
            raise ConnectionLost("all stream numbers of this connection are used")
        stream = StreamMachine(self._next_id, protocol, priority, INITIAL_CREDIT_BYTES, self._buffers)
        self._next_id += 2
        self._streams[stream.id] = stream
        return stream

    def accept(self, frame: OpenFrame, now: float) -> StreamMachine | None:
        """Add a stream that the peer opened. Returns None if it has too many; the caller then sends a RESET.

        Raises RemoteProtocolError for a number that the peer must not use, and for opening too fast.
        """
        if self._is_ours(frame.stream) or frame.stream <= self._last_peer_id:
            raise RemoteProtocolError(f"OPEN of stream {frame.stream}, which is ours or was used before")
        earned = (now - self._allowed_at) * self._limits.opens_a_second
        self._allowance = min(self._allowance + earned, self._limits.opens_burst) - 1
        self._allowed_at = now
        if self._allowance < 0:
            raise RemoteProtocolError("the peer opens streams too fast")
        self._last_peer_id = frame.stream
        if self._theirs >= MAX_STREAMS:
            return None
        stream = StreamMachine(frame.stream, frame.protocol, frame.priority, frame.credit, self._buffers)
        self._streams[stream.id] = stream
        self._theirs += 1
        return stream

    def known(self, stream_id: int) -> StreamMachine | None:
        """The stream, or None for one that has ended: its last frames may still be on their way.

        Raises RemoteProtocolError for a stream that was never opened.
        """
        stream = self._streams.get(stream_id)
        if stream is None:
            never = stream_id >= self._next_id if self._is_ours(stream_id) else stream_id > self._last_peer_id
            if never:
                raise RemoteProtocolError(f"a frame for stream {stream_id}, which was never opened")
        return stream

    def forget(self, stream: StreamMachine) -> bool:
        """Remove a stream that has ended. Returns whether it was still in the table."""
        if self._streams.pop(stream.id, None) is None:
            return False
        self._theirs -= not self._is_ours(stream.id)
        return True

    def affordable(self, stream: StreamMachine, credit: int) -> int:
        """How much of `credit` the stream may be given within the limit that all streams share."""
        own = INITIAL_CREDIT_BYTES - stream.incoming.outstanding
        if credit <= own:
            return credit
        others = sum(
            max(0, other.incoming.outstanding - INITIAL_CREDIT_BYTES)
            for other in self._streams.values()
            if other is not stream
        )
        return max(0, min(credit, own + max(0, self._limits.shared_credit_bytes - others)))

    def _is_ours(self, stream_id: int) -> bool:
        return stream_id % 2 == self._next_id % 2
