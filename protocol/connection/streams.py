"""One stream of a connection: its state, what waits to be sent, and what waits to be read.

The peer decides how much arrives and in how small pieces, and our application decides when it reads. So credit is
given back only for bytes that were consumed, and small pieces are merged while they wait. Encryption and the order
of streams are decided elsewhere (`connection`, `schedule`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from enum import Enum, auto
from typing import Any, Final

from peerd.protocol.connection.budget import BufferBudget, Buffers
from peerd.protocol.connection.frames import MAX_CREDIT, DataFrame, Priority
from peerd.protocol.encoding.wire import Buffer, MessageReader, RawMessage, encode_message
from peerd.protocol.errors import LocalProtocolError, RemoteProtocolError

# What either side may send on a new stream at once; more comes with CREDIT. For the stream's opener the number is part
# of the protocol, and we grant it in OPEN. 256 such streams bound what a peer can make us hold.
INITIAL_CREDIT_BYTES = 64 * 1024
# A stream that carries big messages gets a window of their size, so that the next message does not stall for a round
# trip; 4 MiB keep 300 Mbit/s busy over 100 ms.
MAX_WINDOW_BYTES = 4 * 1024 * 1024
# Smaller pieces are merged while they wait; otherwise the objects would take more memory than the bytes.
_SMALL_PIECE_BYTES = 512
_MERGED_PIECE_BYTES = 16 * 1024


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
# forgotten are ignored: they may have crossed our RESET (spec/connection.md).
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


class _Unsent:
    """A queued message, and how much of it was sent."""

    __slots__ = ("index", "left", "offset", "parts", "priority")

    def __init__(self, parts: Sequence[Buffer], priority: Priority) -> None:
        self.parts = [memoryview(part) for part in parts]
        self.priority = priority
        self.index = 0
        self.offset = 0
        self.left = sum(map(len, self.parts))

    def cut(self, count: int) -> list[memoryview]:
        """The next `count` bytes, as views."""
        self.left -= count
        pieces = []
        while count:
            piece = self.parts[self.index][self.offset : self.offset + count]
            pieces.append(piece)
            count -= len(piece)
            self.offset += len(piece)
            if self.offset == len(self.parts[self.index]):
                self.index += 1
                self.offset = 0
        return pieces


class Outgoing:
    """The messages that we still have to send on a stream, and how many bytes the peer accepts now."""

    __slots__ = ("_buffers", "_queue", "credit", "fin_sent", "finishing", "unsent_bytes")

    def __init__(self, credit: int, buffers: Buffers | None = None) -> None:
        self._buffers = buffers or BufferBudget().open()
        self._queue: deque[_Unsent] = deque()
        self.credit = credit
        self.unsent_bytes = 0
        self.finishing = False
        self.fin_sent = False

    @property
    def unsent_messages(self) -> int:
        """How many messages are not completely sent."""
        return len(self._queue)

    @property
    def ready(self) -> bool:
        """Whether a frame could be sent now."""
        if self._queue:
            return self.credit > 0
        return self.finishing and not self.fin_sent

    def priority(self, otherwise: Priority) -> Priority:
        """The priority of the message at the head, so that no later message of the stream overtakes it.

        otherwise: the result when nothing is queued.
        """
        return self._queue[0].priority if self._queue else otherwise

    def push(self, header: Mapping[str, Any], body: Sequence[Buffer], priority: Priority) -> None:
        message = _Unsent(encode_message(header, body), priority)
        self._queue.append(message)
        self.unsent_bytes += message.left
        self._buffers.hold(message.left)

    def cut(self, max_bytes: int) -> tuple[list[memoryview], bool, bool]:
        """The pieces of the next DATA frame, whether it finishes the stream, and whether it ends a message."""
        if not self._queue:
            self.fin_sent = True
            return [], True, False
        head = self._queue[0]
        count = min(head.left, self.credit, max_bytes)
        pieces = head.cut(count)
        self.credit -= count
        self.unsent_bytes -= count
        self._buffers.give(count)
        ended = not head.left
        if ended:
            self._queue.popleft()
            self.fin_sent = self.finishing and not self._queue
        return pieces, self.fin_sent, ended

    def add_credit(self, amount: int) -> None:
        """Add credit. Raises RemoteProtocolError if the sum exceeds what a stream may have."""
        if self.credit + amount > MAX_CREDIT:
            raise RemoteProtocolError(f"more than {MAX_CREDIT} bytes of credit on one stream")
        self.credit += amount

    def drop(self) -> None:
        """Forget what was not sent."""
        self._queue.clear()
        self._buffers.give(self.unsent_bytes)
        self.unsent_bytes = 0


class StreamInbox:
    """The bytes that the peer sent on a stream and that the application has not read yet.

    `outstanding` is the peer's credit that was not given back: what it may still send plus what waits here.
    """

    __slots__ = ("_buffers", "_pieces", "_reader", "_window", "buffered", "finished", "outstanding")

    def __init__(self, buffers: Buffers | None = None) -> None:
        self._buffers = buffers or BufferBudget().open()
        self._pieces: deque[memoryview | bytearray] = deque()
        self._reader = MessageReader(0, self._buffers)
        self._window = INITIAL_CREDIT_BYTES
        self.buffered = 0
        self.outstanding = INITIAL_CREDIT_BYTES
        self.finished = False

    @property
    def ended(self) -> bool:
        """Whether the peer finished the stream and everything was read."""
        return self.finished and not self._pieces

    def accept(self, payload: memoryview) -> None:
        """Keep bytes until they are read.

        Raises RemoteProtocolError if the peer had no credit for them, Overloaded if too many of its bytes wait here.
        """
        if self.buffered + len(payload) > self.outstanding:
            raise RemoteProtocolError("a stream was sent more than its credit")
        self._buffers.take(len(payload))
        self.buffered += len(payload)
        if len(payload) >= _SMALL_PIECE_BYTES or not self._pieces:
            if payload:
                self._pieces.append(payload)
            return
        last = self._pieces[-1]
        if type(last) is bytearray and len(last) < _MERGED_PIECE_BYTES:
            last += payload
        else:
            self._pieces.append(bytearray(payload))

    def read(self, max_body: int) -> tuple[RawMessage | None, int]:
        """The next message if all of it has arrived, and how many bytes were consumed.

        Raises RemoteProtocolError for bytes that are not a message, and for a stream that ends within one; Overloaded
        if there is no memory left for the peer.
        """
        reader = self._reader
        reader.max_body = max_body
        consumed = 0
        message = None
        while message is None and self._pieces:
            consumed += self._feed_piece(reader)
            message = reader.take()
        self.buffered -= consumed
        self.outstanding -= consumed
        self._buffers.give(consumed)
        if message is not None:
            self._window = max(self._window, min(len(message.body), MAX_WINDOW_BYTES))
        elif self.finished and reader.in_message:
            raise RemoteProtocolError("a stream ended within a message")
        return message, consumed

    def wanted_credit(self, useful_bytes: int) -> int:
        """How much more credit the peer should get: up to the window, or the rest of the body that is being read.

        useful_bytes: what the line can hold; more would only wait in buffers, ahead of urgent messages.
        """
        if self.finished:
            return 0
        target = min(max(self._window, self._reader.missing_body_bytes), max(useful_bytes, INITIAL_CREDIT_BYTES))
        missing = target - self.outstanding
        # A small CREDIT would cost a frame; the peer keeps sending as long as it has half of the target.
        return missing if 2 * missing >= target else 0

    def drop(self) -> None:
        """Forget what was not read. Its credit is not given back."""
        self._pieces.clear()
        self._reader.drop()
        self.outstanding -= self.buffered
        self._buffers.give(self.buffered)
        self.buffered = 0

    def _feed_piece(self, reader: MessageReader) -> int:
        # A view also stops a merged piece from growing under the message that is cut from it.
        piece = memoryview(self._pieces[0])
        used = reader.feed(piece)
        if used == len(piece):
            self._pieces.popleft()
        else:
            self._pieces[0] = piece[used:]
        return used


class StreamMachine:
    """Both directions of one stream, and its state. Made by `Connection`."""

    __slots__ = ("closing", "id", "incoming", "outgoing", "priority", "protocol", "reset_code", "state")

    def __init__(
        self, stream_id: int, protocol: str, priority: Priority, credit: int, buffers: Buffers | None = None
    ) -> None:
        buffers = buffers or BufferBudget().open()
        self.id = stream_id
        self.protocol = protocol
        self.priority = priority
        self.state = State.OPEN
        self.outgoing = Outgoing(credit, buffers)
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
