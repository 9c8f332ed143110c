"""One stream of a connection: its state, and which frames may come next in it (spec/connection/connection.md).

What waits to be sent and to be read is in `stream_queues`. Encryption and the order of streams are decided elsewhere
(`connection`, `multiplexer`, `schedule`).
"""

from __future__ import annotations

from enum import Enum, auto
from typing import Final

from peerd.protocol.connection.budget import BufferBudget, Buffers
from peerd.protocol.connection.frames import DataFrame, Priority
from peerd.protocol.connection.stream_queues import StreamInbox, StreamOutbox
from peerd.protocol.errors import LocalProtocolError, RemoteProtocolError


class State(Enum):
    """A stream's state. `FINISHED`: our side sends no more; `PEER_FINISHED`: the peer sends no more."""

    OPEN = auto()
    FINISHED = auto()
    PEER_FINISHED = auto()
    CLOSED = auto()


class Transition(Enum):
    """An event in a stream's life on the wire, after OPEN."""

    SEND_DATA = auto()
    SEND_FIN = auto()
    SEND_RESET = auto()
    DATA = auto()
    FIN = auto()
    CREDIT = auto()
    RESET = auto()


# A transition that is missing here is an error of the side that made it. Frames for a stream that is CLOSED and
# forgotten are ignored: they may have crossed our RESET (spec/connection/connection.md).
TRANSITIONS: Final[dict[State, dict[Transition, State]]] = {
    State.OPEN: {
        Transition.SEND_DATA: State.OPEN,
        Transition.SEND_FIN: State.FINISHED,
        Transition.SEND_RESET: State.CLOSED,
        Transition.DATA: State.OPEN,
        Transition.FIN: State.PEER_FINISHED,
        Transition.CREDIT: State.OPEN,
        Transition.RESET: State.CLOSED,
    },
    State.FINISHED: {
        Transition.SEND_RESET: State.CLOSED,
        Transition.DATA: State.FINISHED,
        Transition.FIN: State.CLOSED,
        Transition.CREDIT: State.FINISHED,
        Transition.RESET: State.CLOSED,
    },
    State.PEER_FINISHED: {
        Transition.SEND_DATA: State.PEER_FINISHED,
        Transition.SEND_FIN: State.CLOSED,
        Transition.SEND_RESET: State.CLOSED,
        Transition.CREDIT: State.PEER_FINISHED,
        Transition.RESET: State.CLOSED,
    },
    State.CLOSED: {},
}
_FROM_PEER: Final = frozenset((Transition.DATA, Transition.FIN, Transition.CREDIT, Transition.RESET))


class StreamMachine:
    """Both directions of one stream, and its state. Made by `StreamTable`."""

    __slots__ = ("closing", "id", "incoming", "outgoing", "priority", "protocol", "reset_code", "state")

    def __init__(
        self, stream_id: int, protocol: str, priority: Priority, credit: int, buffers: Buffers | None = None
    ) -> None:
        buffers = buffers or BufferBudget().open()
        self.id = stream_id
        self.protocol = protocol
        self.priority = priority
        self.state = State.OPEN
        self.outgoing = StreamOutbox(credit, buffers)
        self.incoming = StreamInbox(buffers)
        self.closing = False
        """We read no more; the rest of our queue is still sent."""
        self.reset_code: str | None = None
        """The code with which the peer reset the stream."""

    def __repr__(self) -> str:
        return (
            f"<Stream {self.id} {self.protocol} {self.state.name} unsent={self.outgoing.unsent_bytes}"
            f" credit={self.outgoing.credit} unread={self.incoming.buffered}>"
        )

    def step(self, step: Transition) -> None:
        """Move to the next state. Raises RemoteProtocolError or LocalProtocolError if the table has no such
        transition.
        """
        after = TRANSITIONS[self.state].get(step)
        if after is None:
            what = f"{step.name} on stream {self.id} in state {self.state.name}"
            raise RemoteProtocolError(what) if step in _FROM_PEER else LocalProtocolError(what)
        self.state = after

    def accept(self, frame: DataFrame) -> None:
        """Take a DATA frame. Raises RemoteProtocolError."""
        if frame.payload:
            self.step(Transition.DATA)
        if frame.fin:
            self.step(Transition.FIN)
        self.incoming.accept(frame.payload)
        self.incoming.finished = self.incoming.finished or frame.fin
        if self.closing:
            self.incoming.drop()

    def note_sent(self, *, data: bool, fin: bool) -> None:
        """Note that a DATA frame of ours is sent."""
        if data:
            self.step(Transition.SEND_DATA)
        if fin:
            self.step(Transition.SEND_FIN)
