"""One side of a connection between two peers: turns encrypted messages into events and back.

Joins the handshake, frames, streams, their schedule and liveness, without sockets and without a clock: time is an
argument, the next deadline a result (spec/connection/connection.md). The next message is made only when it can be sent,
so that the most urgent one goes first. A hostile peer can cost us only a bounded amount of memory and of answers, and
the first byte that breaks a rule ends the connection.
"""

from __future__ import annotations

import os
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from peerd.protocol.connection.budget import BufferBudget, Buffers
from peerd.protocol.connection.events import (
    Event,
    GoneAway,
    HandshakeDone,
    MessageSent,
    StreamEnded,
    StreamOpened,
    StreamReadable,
)
from peerd.protocol.connection.frames import (
    MAX_CREDIT,
    MAX_PAYLOAD_BYTES,
    CreditFrame,
    DataFrame,
    Frame,
    GoAwayFrame,
    OpenFrame,
    PingFrame,
    PongFrame,
    Priority,
    ResetFrame,
    decode_frame,
    encode_data,
    encode_frame,
)
from peerd.protocol.connection.liveness import Delivery, Liveness
from peerd.protocol.connection.noise import CipherState, Handshake
from peerd.protocol.connection.schedule import Schedule
from peerd.protocol.connection.stream_queues import INITIAL_CREDIT_BYTES
from peerd.protocol.connection.stream_table import Limits, StreamTable
from peerd.protocol.connection.streams import State, StreamMachine, Transition
from peerd.protocol.encoding.wire import Buffer, RawMessage
from peerd.protocol.errors import (
    HandshakeFailed,
    LocalProtocolError,
    Overloaded,
    PeerdError,
    RemoteProtocolError,
)
from peerd.protocol.identity import Identity, PeerId

__all__ = ["ConnectionMachine", "Limits"]

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


class ConnectionMachine:
    """One side of a connection, from the first byte of the handshake.

    identity, expected, swarm_key, random_bytes: see `Handshake`.
    initiator: whether we dialled.
    payload_bytes: the most payload of our frames; less than usual if they travel inside others (a relayed connection).
    buffers: the memory from which everything that we hold for the peer is taken; None makes a budget for this
        connection alone.
    now: the time in seconds, on the clock that all later calls use too.

    Feed received messages to `receive`, then drain `next_event`; when the transport can send, send `next_message`;
    call `check` at `deadline`. Each of these may raise a PeerdError, after which the connection is over;
    `next_message` then returns one last message that tells the peer why.
    """

    def __init__(
        self,
        identity: Identity,
        *,
        initiator: bool,
        now: float,
        expected: PeerId | None = None,
        swarm_key: bytes | None = None,
        limits: Limits | None = None,
        payload_bytes: int = MAX_PAYLOAD_BYTES,
        buffers: Buffers | None = None,
        random_bytes: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self.initiator = initiator
        self._payload_bytes = payload_bytes
        self._limits = limits or Limits()
        self._handshake = Handshake(
            identity, initiator=initiator, expected=expected, swarm_key=swarm_key, random_bytes=random_bytes
        )
        self._handshake_deadline = now + self._limits.timeouts.handshake_s
        self._ciphers: tuple[CipherState, CipherState] | None = None
        self._liveness: Liveness | None = None
        self._over = False
        self._farewell: GoAwayFrame | None = None
        self._events: deque[Event] = deque()
        self._buffers = buffers or BufferBudget().open()
        self._streams = StreamTable(self._limits, self._buffers, initiator=initiator, now=now)
        self._schedule = Schedule()
        self._control: deque[Frame] = deque()
        self._pong: PongFrame | None = None
        self._refunds: OrderedDict[int, int] = OrderedDict()

    def __repr__(self) -> str:
        state = "over" if self._over else "open" if self._ciphers else "handshake"
        return f"<Connection {state} streams={len(self._streams)} ready={len(self._schedule)}>"

    # Identity and time.

    @property
    def peer_id(self) -> PeerId:
        """The PeerId that the peer proved. Raises LocalProtocolError before the handshake is complete."""
        return self._handshake.peer_id

    @property
    def over(self) -> bool:
        """Whether either side has ended the connection; its streams can no longer be used."""
        return self._over

    @property
    def rtt_s(self) -> float | None:
        """The last measured round trip; None before the first."""
        return self._liveness.rtt_s if self._liveness else None

    @property
    def answers(self) -> int:
        """How many of our PINGs were answered. If it grew, `rtt_s` is a new measurement."""
        return self._liveness.answers if self._liveness else 0

    def ask(self, now: float) -> None:
        """Send a PING as soon as possible, even if the peer was not silent."""
        if self._liveness is not None:
            self._liveness.ask(now)

    @property
    def deadline(self) -> float:
        """When `check` must be called. It moves to an earlier time only at HandshakeDone and when the first stream
        opens.
        """
        return self._liveness.deadline(in_use=len(self._streams) > 0) if self._liveness else self._handshake_deadline

    def check(self, now: float, delivery: Delivery | None = None) -> None:
        """Ask a silent peer whether it lives, or end the connection, as the time demands.

        delivery: what the transport knows of the bytes that we sent; None if it knows nothing. Raises
        HandshakeFailed or ConnectionLost for a silent peer, Unresponsive for one that never reads.
        """
        if self._over or now < self.deadline:
            return
        try:
            if self._liveness is None:
                raise HandshakeFailed(f"no handshake within {self._limits.timeouts.handshake_s:g} s")
            self._liveness.check(now, in_use=len(self._streams) > 0, delivery=delivery)
        except PeerdError as error:
            self._fail(error)
            raise

    # Bytes in, events out.

    def receive(self, data: bytes, now: float) -> None:
        """Take one message of the transport.

        Raises PeerFault if the protocol does not allow it, Overloaded if too many bytes of the peer wait here already.
        """
        if self._over:
            return
        try:
            if self._ciphers is None:
                if self._handshake.must_write:
                    raise RemoteProtocolError("the peer sent a handshake message out of turn")
                self._handshake.read(data)
                self._establish(now)
            else:
                frame = decode_frame(self._ciphers[1].decrypt(data))
                self._take_frame(frame, now)
        except PeerdError as error:
            self._fail(error)
            raise

    def next_event(self) -> Event | None:
        """The next event in order; None if there is none."""
        return self._events.popleft() if self._events else None

    # Bytes out.

    def next_message(self, now: float) -> bytes | None:
        """The most urgent message to send now; None if there is none. Raises HandshakeFailed."""
        if self._ciphers is not None:
            frame = self._next_frame(now)
            return None if frame is None else self._ciphers[0].encrypt(frame)
        if self._over or not self._handshake.must_write:
            return None
        try:
            message = self._handshake.write()
        except PeerdError as error:
            self._fail(error)
            raise
        self._establish(now)
        return message

    def go_away(self, code: str, reason: str = "") -> None:
        """End the connection: one last message carries `code` and `reason`, everything unsent is dropped."""
        if not self._over:
            self._end()
            if self._ciphers is not None:
                self._farewell = GoAwayFrame(code, reason)

    def release(self) -> None:
        """Nobody will read what is left: give back all that was held."""
        self._buffers.close()

    # Streams.

    def open_stream(self, protocol: str, priority: Priority) -> StreamMachine:
        """Open a stream; the peer learns of it with the next message.

        priority: the default priority of the peer's answers. Raises Overloaded beyond 256 streams,
        LocalProtocolError before the handshake is complete or after the end.
        """
        if self._ciphers is None or self._over:
            raise LocalProtocolError("streams can be opened only on a connection that is open")
        stream = self._streams.open(protocol, priority)
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
        if not self._over:
            self._control.append(ResetFrame(stream.id, code))

    # Inside.

    def _establish(self, now: float) -> None:
        if self._handshake.complete:
            self._ciphers = self._handshake.split()
            self._liveness = Liveness(self._limits.timeouts, now)
            self._events.append(HandshakeDone(self._handshake.peer_id))

    def _fail(self, error: PeerdError) -> None:
        self.go_away(error.code, str(error))

    def _end(self) -> None:
        self._over = True
        self._pong = None
        self._control.clear()
        for stream in self._streams:
            stream.state = State.CLOSED
            self._forget(stream)

    def _take_frame(self, frame: Frame, now: float) -> None:
        assert self._liveness is not None
        self._liveness.heard(now)
        match frame:
            case DataFrame(stream_id):
                if (stream := self._streams.known(stream_id)) is not None:
                    stream.accept(frame)
                    self._events.append(StreamReadable(stream))
                    self._forget_if_closed(stream)
            case CreditFrame(stream_id, amount):
                if (stream := self._streams.known(stream_id)) is not None:
                    stream.step(Transition.CREDIT)
                    stream.outgoing.add_credit(amount)
                    self._schedule_if_ready(stream)
            case OpenFrame():
                self._take_open(frame, now)
            case ResetFrame(stream_id, code):
                if (stream := self._streams.known(stream_id)) is not None:
                    self._take_reset(stream, code)
            case PingFrame(token):
                # A newer PING replaces one that is not answered yet, so a flood of PINGs costs one answer.
                self._pong = PongFrame(token)
            case PongFrame():
                self._liveness.pong(frame, now)
            case GoAwayFrame(code, reason):
                self._end()
                self._events.append(GoneAway(code, reason))

    def _take_open(self, frame: OpenFrame, now: float) -> None:
        if len(self._control) >= _MAX_WAITING_CONTROL:
            raise RemoteProtocolError("the peer opens streams and does not read what becomes of them")
        stream = self._streams.accept(frame, now)
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
        if self._streams.forget(stream):
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
        amount = self._streams.affordable(stream, incoming.wanted_credit(self._useful_credit()))
        if amount:
            incoming.outstanding += amount
            self._refunds[stream.id] = self._refunds.get(stream.id, 0) + amount

    def _useful_credit(self) -> int:
        best_rtt_s = self._liveness.best_rtt_s if self._liveness else None
        if best_rtt_s is None:
            return MAX_CREDIT
        return min(MAX_CREDIT, max(_MIN_USEFUL_BYTES, int(best_rtt_s * _LINE_BYTES_A_SECOND)))

    def _next_frame(self, now: float) -> bytes | None:
        if self._over:
            last, self._farewell = self._farewell, None
            return None if last is None else encode_frame(last)
        assert self._liveness is not None
        if self._pong is not None:
            pong, self._pong = self._pong, None
            return encode_frame(pong)
        if self._liveness.ping_due:
            return encode_frame(PingFrame(self._liveness.ping(now)))
        if self._control:
            return encode_frame(self._control.popleft())
        if self._refunds:
            return encode_frame(CreditFrame(*self._refunds.popitem(last=False)))
        stream_id = self._schedule.take()
        return None if stream_id is None else self._next_data(self._streams[stream_id])

    def _next_data(self, stream: StreamMachine) -> bytes:
        outgoing = stream.outgoing
        frame_bytes = min(_FRAME_BYTES[outgoing.priority(stream.priority)], self._payload_bytes)
        pieces, fin, ended = outgoing.cut(frame_bytes)
        frame = encode_data(stream.id, pieces, fin=fin)
        stream.note_sent(data=bool(pieces), fin=fin)
        if ended:
            self._events.append(MessageSent(stream))
        if fin and stream.closing:
            self.reset(stream, "closed")
        self._schedule_if_ready(stream)
        self._forget_if_closed(stream)
        return frame
