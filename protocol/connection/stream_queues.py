"""What waits on one stream: the messages that we still have to send, and the bytes that nobody has read yet.

The peer decides how much arrives and in how small pieces, and our application decides when it reads. So credit is
given back only for bytes that were consumed, and small pieces are merged while they wait.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from peerd.protocol.connection.budget import BufferBudget, Buffers
from peerd.protocol.connection.frames import MAX_CREDIT, Priority
from peerd.protocol.encoding.wire import Buffer, MessageReader, RawMessage, encode_message
from peerd.protocol.errors import RemoteProtocolError

# What either side may send on a new stream at once; more comes with CREDIT. For the stream's opener the number is part
# of the protocol, and we grant it in OPEN. 256 such streams bound what a peer can make us hold.
INITIAL_CREDIT_BYTES = 64 * 1024
# A stream that carries big messages gets a window of their size, so that the next message does not stall for a round
# trip; 4 MiB keep 300 Mbit/s busy over 100 ms.
MAX_WINDOW_BYTES = 4 * 1024 * 1024
# Smaller pieces are merged while they wait; otherwise the objects would take more memory than the bytes.
_SMALL_PIECE_BYTES = 512
_MERGED_PIECE_BYTES = 16 * 1024


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


class StreamOutbox:
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
