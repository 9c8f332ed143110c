"""One side of a connection between two peers: turns encrypted messages into events and back.

Joins the handshake, encryption, liveness, the streams and the end, without sockets and without a clock: time is an
argument, the next deadline a result (spec/connection/connection.md). The next message is made only when it can be sent,
so that the most urgent one goes first. A hostile peer can cost us only a bounded amount of memory and of answers, and
the first byte that breaks a rule ends the connection.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable

from peerd.protocol.connection.budget import BufferBudget, Buffers
from peerd.protocol.connection.events import Event, GoneAway, HandshakeDone
from peerd.protocol.connection.frames import (
    MAX_PAYLOAD_BYTES,
    Frame,
    GoAwayFrame,
    PingFrame,
    PongFrame,
    decode_frame,
    encode_frame,
)
from peerd.protocol.connection.liveness import Delivery, Liveness
from peerd.protocol.connection.multiplexer import Multiplexer
from peerd.protocol.connection.noise import CipherState, Handshake
from peerd.protocol.connection.stream_table import Limits
from peerd.protocol.connection.unasked import PingRate
from peerd.protocol.errors import HandshakeFailed, PeerdError, RemoteProtocolError
from peerd.protocol.identity import Identity, PeerId

__all__ = ["ConnectionMachine", "Limits"]


class ConnectionMachine:
    """One side of a connection, from the first byte of the handshake.

    identity, expected, swarm_key, random_bytes: see `Handshake`.
    initiator: whether we dialled.
    payload_bytes: the most payload of our frames; less than usual if they travel inside others (a relayed connection).
    buffers: the memory from which everything that we hold for the peer is taken; None makes a budget for this
        connection alone.
    now: the time in seconds, on the clock that all later calls use too.

    Feed received messages to `receive`, then drain `next_event`; when the transport can send, send `next_message`;
    call `check` at `deadline`. Each of these may raise a PeerdError, after which the connection is over; `next_message`
    then returns one last message that tells the peer why. `streams` opens, reads and writes streams.
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
        self.streams = Multiplexer(
            self._limits, self._buffers, self._events, initiator=initiator, payload_bytes=payload_bytes, now=now
        )
        """The streams, which can be used from HandshakeDone to the end."""
        self._pong: PongFrame | None = None
        self._pings = PingRate(now)

    def __repr__(self) -> str:
        state = "over" if self._over else "open" if self._ciphers else "handshake"
        return f"<Connection {state} streams={len(self.streams)} ready={self.streams.ready}>"

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
        return self._liveness.deadline(in_use=len(self.streams) > 0) if self._liveness else self._handshake_deadline

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
            self._liveness.check(now, in_use=len(self.streams) > 0, delivery=delivery)
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

    # Inside.

    def _establish(self, now: float) -> None:
        if self._handshake.complete:
            self._ciphers = self._handshake.split()
            self._liveness = Liveness(self._limits.timeouts, now)
            self.streams.established = True
            self._events.append(HandshakeDone(self._handshake.peer_id))

    def _fail(self, error: PeerdError) -> None:
        self.go_away(error.code, str(error))

    def _end(self) -> None:
        self._over = True
        self._pong = None
        self.streams.end()

    def _take_frame(self, frame: Frame, now: float) -> None:
        assert self._liveness is not None
        self._liveness.heard(now)
        match frame:
            case PingFrame(token):
                self._pings.note(now)
                # A newer PING replaces one that is not answered yet, so a flood of PINGs costs one answer.
                self._pong = PongFrame(token)
            case PongFrame():
                self._liveness.pong(frame, now)
                self.streams.best_rtt_s = self._liveness.best_rtt_s
            case GoAwayFrame(code, reason):
                self._end()
                self._events.append(GoneAway(code, reason))
            case _:
                self.streams.take(frame, now)

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
        return self.streams.next_frame()
