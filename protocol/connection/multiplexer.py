"""Many streams over one connection: what a caller reads and writes on them, and the frames that carry it.

Knows neither encryption nor time. The connection gives it the peer's frames and asks it for the next frame only when
one can be sent, so that the most urgent message goes first. A peer that sends and does not read, or opens streams and
does not wait for them, can make us hold and answer only so much (`Limits`, `budget`).
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from typing import Any, Final

from peerd.protocol.connection.budget import Buffers
from peerd.protocol.connection.events import Event, MessageSent, StreamEnded, StreamOpened, StreamReadable
from peerd.protocol.connection.frames import (
    MAX_CREDIT,
    CreditFrame,
    DataFrame,
    Frame,
    OpenFrame,
    Priority,
    ResetFrame,
    encode_data,
    encode_frame,
)
from peerd.protocol.connection.schedule import Schedule
from peerd.protocol.connection.stream_queues import INITIAL_CREDIT_BYTES
from peerd.protocol.connection.stream_table import Limits, StreamTable
from peerd.protocol.connection.streams import State, StreamMachine, Transition
from peerd.protocol.connection.unasked import CreditRate
from peerd.protocol.encoding.wire import Buffer, RawMessage
from peerd.protocol.errors import LocalProtocolError, Overloaded, RemoteProtocolError

# Small frames let urgent frames go between them: 16 KiB of bulk delay a decode by 1.3 ms at 100 Mbit/s. A decode step
# need not be interrupted, and 31 KiB still fit into a frame of a relayed connection.
_FRAME_BYTES: Final = {
    Priority.CONTROL: 31 * 1024,
    Priority.DECODE: 31 * 1024,
    Priority.PREFILL: 16 * 1024,
    Priority.BULK: 16 * 1024,
}
# The fastest line for which windows are sized: this rate times the round trip is the number of bytes on their way. On a
# short line that is little, and should be: bytes that the reader cannot keep up with would wait in the operating
# system's buffers, where our priorities do not apply.
_LINE_BYTES_A_SECOND = 125_000_000
_MIN_USEFUL_BYTES = 256 * 1024
# How many RESETs may wait for a peer that opens streams but does not read.
_MAX_WAITING_CONTROL = 4096


class Multiplexer:
    """The streams of one connection. They can be opened once the connection is `established`.

    initiator: whether we dialled, which decides the numbers of our streams.
    payload_bytes: the most payload of our frames.
    events: where it appends what happens to streams.
    """

    def __init__(
        self,
        limits: Limits,
        buffers: Buffers,
        events: deque[Event],
        *,
        initiator: bool,
        payload_bytes: int,
        now: float,
    ) -> None:
        self.established = False
        """Whether streams can be used: from the end of the handshake to the end of the connection."""
        self.best_rtt_s: float | None = None
        """The shortest round trip that the connection has measured, for the size of windows; None before the first."""
        self._payload_bytes = payload_bytes
        self._events = events
        self._table = StreamTable(limits, buffers, initiator=initiator, now=now)
        self._schedule = Schedule()
        self._control: deque[Frame] = deque()
        self._refunds: OrderedDict[int, int] = OrderedDict()
        self._credits = CreditRate()

    def __len__(self) -> int:
        return len(self._table)

    @property
    def ready(self) -> int:
        """How many streams have something that may be sent now."""
        return len(self._schedule)

    # For callers.

    def open(self, protocol: str, priority: Priority) -> StreamMachine:
        """Open a stream; the peer learns of it with the next message.

        priority: the default priority of the peer's answers. Raises Overloaded beyond 256 streams,
        LocalProtocolError before the handshake is complete or after the end.
        """
        if not self.established:
            raise LocalProtocolError("streams can be opened only on a connection that is open")
        stream = self._table.open(protocol, priority)
        self._control.append(OpenFrame(stream.id, protocol, priority, INITIAL_CREDIT_BYTES))
        return stream

    def send(
        self, stream: StreamMachine, header: Mapping[str, Any], body: Sequence[Buffer], priority: Priority
    ) -> None:
        """Queue one message. `body` must not change until it was sent. Raises LocalProtocolError on a finished
        stream.
        """
        if stream.outgoing.finishing or stream.state is State.CLOSED:
            raise LocalProtocolError(f"{stream!r} is finished")
        stream.outgoing.push(header, body, priority)
        self._schedule_if_ready(stream)

    def read(self, stream: StreamMachine, max_body: int) -> RawMessage | None:
        """The stream's next message if all of it has arrived, else None. The peer gets credit for the consumed bytes.

        max_body: how many bytes of body the caller is ready to hold; as much credit may be given at once. Raises
        RemoteProtocolError for bytes that are not a message, and Overloaded if too many bytes of the peer wait here
        already, after resetting the stream.
        """
        try:
            message, consumed = stream.incoming.read(max_body)
        except (RemoteProtocolError, Overloaded) as error:
            self.reset(stream, error.code)
            raise
        if consumed:
            self._refund(stream)
        return message

    def finish(self, stream: StreamMachine) -> None:
        """Send nothing more on the stream after what is queued. A second call changes nothing."""
        if stream.state is not State.CLOSED and not stream.outgoing.finishing:
            stream.outgoing.finishing = True
            self._schedule_if_ready(stream)

    def close(self, stream: StreamMachine) -> None:
        """Finish the stream and stop reading it. If the peer still sends, it gets a RESET once our queue is sent."""
        stream.closing = True
        stream.incoming.drop()
        if stream.state is State.FINISHED:
            self.reset(stream, "closed")
        else:
            self.finish(stream)

    def reset(self, stream: StreamMachine, code: str) -> None:
        """End the stream at once, in both directions. Does nothing to a stream that has ended."""
        stream.incoming.drop()
        if stream.state is State.CLOSED:
            return
        stream.step(Transition.SEND_RESET)
        self._forget(stream)
        if self.established:
            self._control.append(ResetFrame(stream.id, code))

    # For the connection.

    def take(self, frame: DataFrame | CreditFrame | OpenFrame | ResetFrame, now: float) -> None:
        """Take a frame of the peer. Raises RemoteProtocolError for one that the stream's state does not allow,
        Overloaded if too many bytes of the peer wait here already.
        """
        if isinstance(frame, OpenFrame):
            self._take_open(frame, now)
            return
        if isinstance(frame, CreditFrame):
            self._credits.note()
        stream = self._table.known(frame.stream)
        if stream is None:
            return
        match frame:
            case DataFrame():
                stream.accept(frame)
                self._events.append(StreamReadable(stream))
                self._forget_if_closed(stream)
            case CreditFrame():
                stream.step(Transition.CREDIT)
                stream.outgoing.add_credit(frame.amount)
                self._schedule_if_ready(stream)
            case ResetFrame():
                self._take_reset(stream, frame.code)

    def next_frame(self) -> bytes | None:
        """The most urgent frame that may be sent now; None if there is none."""
        if self._control:
            return encode_frame(self._control.popleft())
        if self._refunds:
            return encode_frame(CreditFrame(*self._refunds.popitem(last=False)))
        stream_id = self._schedule.take()
        return None if stream_id is None else self._next_data(self._table[stream_id])

    def end(self) -> None:
        """Close all streams, and forget what was not sent."""
        self.established = False
        self._control.clear()
        for stream in self._table:
            stream.state = State.CLOSED
            self._forget(stream)

    # Inside.

    def _take_open(self, frame: OpenFrame, now: float) -> None:
        if len(self._control) >= _MAX_WAITING_CONTROL:
            raise RemoteProtocolError("the peer opens streams and does not read what becomes of them")
        stream = self._table.accept(frame, now)
        if stream is None:
            self._control.append(ResetFrame(frame.stream, Overloaded.code))
        else:
            self._events.append(StreamOpened(stream))

    def _take_reset(self, stream: StreamMachine, code: str) -> None:
        stream.step(Transition.RESET)
        stream.reset_code = code
        if not stream.incoming.finished:
            stream.incoming.drop()
        self._forget(stream)

    def _schedule_if_ready(self, stream: StreamMachine) -> None:
        if stream.outgoing.ready:
            self._schedule.put(stream.id, stream.outgoing.priority(stream.priority))

    def _forget(self, stream: StreamMachine) -> None:
        if self._table.forget(stream):
            stream.outgoing.drop()
            self._schedule.remove(stream.id)
            self._refunds.pop(stream.id, None)
            self._events.append(StreamEnded(stream))

    def _forget_if_closed(self, stream: StreamMachine) -> None:
        if stream.state is State.CLOSED:
            self._forget(stream)

    def _refund(self, stream: StreamMachine) -> None:
        if stream.state is State.CLOSED:
            return
        incoming = stream.incoming
        amount = self._table.affordable(stream, incoming.wanted_credit(self._useful_credit()))
        if amount:
            incoming.outstanding += amount
            self._refunds[stream.id] = self._refunds.get(stream.id, 0) + amount

    def _useful_credit(self) -> int:
        if self.best_rtt_s is None:
            return MAX_CREDIT
        return min(MAX_CREDIT, max(_MIN_USEFUL_BYTES, int(self.best_rtt_s * _LINE_BYTES_A_SECOND)))

    def _next_data(self, stream: StreamMachine) -> bytes:
        outgoing = stream.outgoing
        frame_bytes = min(_FRAME_BYTES[outgoing.priority(stream.priority)], self._payload_bytes)
        pieces, fin, ended = outgoing.cut(frame_bytes)
        frame = encode_data(stream.id, pieces, fin=fin)
        self._credits.sent_data()
        stream.note_sent(data=bool(pieces), fin=fin)
        if ended:
            self._events.append(MessageSent(stream))
        if fin and stream.closing:
            self.reset(stream, "closed")
        self._schedule_if_ready(stream)
        self._forget_if_closed(stream)
        return frame
