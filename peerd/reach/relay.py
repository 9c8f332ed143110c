"""A relay: carries circuits to peers that nobody can dial, over the connections that they keep to it.

It holds the reservations and the open circuits; `relay_ledger.py` decides what is allowed (spec/discovery/relay.md).
The bytes inside a circuit are encrypted for its ends, and the relay does not look at them. Both ends are strangers that
may be slow, silent or greedy, and must delay only their own circuits. So a circuit reads a message only when the one
before has been sent, and waits first for its own rate limit, then for that of the whole relay.
"""

from __future__ import annotations

import logging

import trio

from peerd.net.dialling.circuits import CIRCUIT_PRIORITY
from peerd.net.limits.rates import TokenBucket
from peerd.net.stream import Carrier, Stream
from peerd.protocol.addresses import IpAddress
from peerd.protocol.connection.frames import Priority
from peerd.protocol.encoding.schema import parse
from peerd.protocol.errors import (
    ConnectFailed,
    ConnectionLost,
    Draining,
    InvalidRequest,
    PeerdError,
    PeerFault,
    RemoteProtocolError,
    StreamReset,
    Unresponsive,
)
from peerd.protocol.identity import PeerId
from peerd.protocol.messages.relay import (
    CIRCUIT_PROTOCOL,
    FROM_ACCEPTOR,
    MAX_INNER_BYTES,
    TO_RELAY,
    Connect,
    Connected,
    IncomingCall,
    Reserve,
    Reserved,
    inner_message,
)
from peerd.protocol.messages.session import Failure
from peerd.reach.relay_ledger import RelayLedger, RelayLimits

log = logging.getLogger(__name__)

# For the first message of a stream, and for the reserved peer's answer to a call.
ASK_S = 10.0
ANSWER_S = 5.0
# How long one end may still send after the other has finished.
LINGER_S = 2.0
# A small message costs as much work as this many bytes of a large one (50 us a frame).
MIN_CHARGED_BYTES = 1024
# The share of a second's rate that a circuit may use at once after a pause, so that a token's activations need not
# wait.
BURST_S = 0.25
_EXPIRED, _REPLACED = "expired", "replaced"


class Relay:
    """Handles the streams of `/peerd/relay/1`. If `draining`, it grants no more reservations and circuits."""

    def __init__(self, peer_id: PeerId, limits: RelayLimits) -> None:
        self.draining = False
        self.passed_bytes = 0
        """Bytes of all circuits' messages since the start."""
        self.ledger = RelayLedger(limits)
        self._peer_id = peer_id
        self._limits = limits
        self._reservations: dict[PeerId, _Reservation] = {}
        rate = limits.total_bytes_a_second
        self._line = TokenBucket(rate, rate * BURST_S, trio.current_time())

    def __repr__(self) -> str:
        return f"<Relay {self.ledger!r}>"

    async def answer(self, stream: Stream) -> None:
        """Handle one stream: a reservation for as long as it lasts, or a circuit."""
        try:
            with trio.fail_after(ASK_S):
                asked = parse((await stream.receive()).header, TO_RELAY)
        except trio.TooSlowError:
            stream.reset(Unresponsive.code)
            return
        try:
            self._check(stream)
            if isinstance(asked, Connect):
                await self._call(stream, asked)
            else:
                assert isinstance(asked, Reserve)
                await self._reserve(stream, shows_ip=asked.shows_ip)
        except _Refused as refused:
            log.debug("refused %s: %s", stream.peer, refused.error)
            await stream.send(Failure.of(refused.error).to_header(), priority=Priority.CONTROL)

    def _check(self, stream: Stream) -> None:
        if stream.connection.relay is not None:
            raise _Refused(InvalidRequest("a relay is asked directly, not through another"))
        if self.draining:
            raise _Refused(Draining("this relay is leaving"))

    # Reservations.

    async def _reserve(self, stream: Stream, *, shows_ip: bool) -> None:
        peer = stream.peer
        try:
            self.ledger.reserve(peer, stream.connection.accountable_ip)
        except PeerdError as error:
            raise _Refused(error) from error
        if (old := self._reservations.get(peer)) is not None:
            old.replaced.cancel()
        reservation = self._reservations[peer] = _Reservation(stream.connection, shows_ip=shows_ip)
        log.info("reserved a slot for %s: %d of %d taken", peer, self.ledger.slots, self._limits.slots)
        try:
            with reservation.replaced:
                await self._hold(stream)
        finally:
            if self._reservations.get(peer) is reservation:
                del self._reservations[peer]
                self.ledger.release(peer)
                log.info("%s gave its slot back: %d of %d taken", peer, self.ledger.slots, self._limits.slots)
        if reservation.replaced.cancelled_caught:
            stream.reset(_REPLACED)

    async def _hold(self, stream: Stream) -> None:
        limits = self._limits
        granted = Reserved(
            expires_s=limits.expiry_s,
            circuits=limits.circuits_a_peer,
            bytes_a_second=limits.bytes_a_second,
            circuit_s=limits.circuit_s,
        )
        try:
            while True:
                await stream.send(granted.to_header(), priority=Priority.CONTROL)
                with trio.fail_after(limits.expiry_s):
                    parse((await stream.receive()).header, (Reserve,))
                self._check(stream)
        except trio.TooSlowError:
            stream.reset(_EXPIRED)
        except trio.EndOfChannel:
            return

    # Circuits.

    async def _call(self, stream: Stream, asked: Connect) -> None:
        peer = asked.peer
        if peer in (stream.peer, self._peer_id):
            raise _Refused(InvalidRequest("a circuit leads to a third peer"))
        reservation = self._reservations.get(peer)
        if reservation is None:
            raise _Refused(ConnectFailed(f"{peer} has no reservation here"))
        try:
            with self.ledger.circuit(stream.peer, stream.connection.accountable_ip, peer, trio.current_time()):
                # A peer is told the other's address only if it shows its own.
                show = asked.shows_ip and reservation.shows_ip
                caller = IncomingCall(stream.peer, stream.connection.remote_ip if show else None)
                far = await _opened(reservation.connection, caller)
                await self._stand(stream, far, reservation.connection.remote_ip if show else None)
        except PeerdError as error:
            raise _Refused(error) from error

    async def _stand(self, near: Stream, far: Stream, far_ip: IpAddress | None) -> None:
        limits = self._limits
        circuit = _Circuit(near, far, limits, self)
        log.debug("%s has a circuit to %s", near.peer, far.peer)
        answer = Connected(bytes_a_second=limits.bytes_a_second, circuit_s=limits.circuit_s, ip=far_ip)
        try:
            near.send_nowait(answer.to_header(), priority=Priority.CONTROL)
            await circuit.run()
        except (PeerFault, trio.ClosedResourceError):
            # The circuit ended before it began.
            circuit.end(ConnectionLost.code)
        except BaseException:
            circuit.end(ConnectionLost.code)
            raise
        log.debug("the circuit of %s to %s carried %d bytes", near.peer, far.peer, circuit.passed_bytes)

    async def wait_turn(self, count: int) -> None:
        """Wait until the rate limit of the whole relay allows `count` more bytes."""
        self.passed_bytes += count
        await trio.sleep(self._line.take(max(count, MIN_CHARGED_BYTES), trio.current_time()))


async def _opened(connection: Carrier, call: IncomingCall) -> Stream:
    """Open the reserved peer's side of a circuit. Raises the error with which the peer refuses, or a PeerFault."""
    far = connection.open_stream(CIRCUIT_PROTOCOL, priority=CIRCUIT_PRIORITY)
    try:
        with trio.fail_after(ANSWER_S):
            await far.send(call.to_header(), priority=Priority.CONTROL)
            reply = parse((await far.receive()).header, FROM_ACCEPTOR)
    except trio.TooSlowError:
        far.reset(Unresponsive.code)
        raise Unresponsive(f"{far.peer} does not answer") from None
    except trio.EndOfChannel:
        far.reset(ConnectionLost.code)
        raise ConnectFailed(f"{far.peer} does not take the call") from None
    except BaseException:
        far.reset(ConnectionLost.code)
        raise
    if isinstance(reply, Failure):
        far.close()
        raise reply.error
    return far


class _Reservation:
    """The connection over which a peer with a reservation is reached. `replaced` ends it when the peer reserves
    anew. `shows_ip`: callers that show their address may learn that of the peer.
    """

    def __init__(self, connection: Carrier, *, shows_ip: bool) -> None:
        self.connection = connection
        self.shows_ip = shows_ip
        self.replaced = trio.CancelScope()


class _Refused(Exception):
    """Carries the error with which the request is answered before the stream ends."""

    def __init__(self, error: PeerdError) -> None:
        super().__init__(str(error))
        self.error = error


class _Circuit:
    """Passes messages between two streams until either end finishes or fails, or the circuit's time is over."""

    def __init__(self, near: Stream, far: Stream, limits: RelayLimits, relay: Relay) -> None:
        self.passed_bytes = 0
        self._near = near
        self._far = far
        self._limits = limits
        self._relay = relay
        self._why = _EXPIRED
        self._life = trio.CancelScope()

    async def run(self) -> None:
        """Pass messages until the circuit ends. Both streams have ended then."""
        self._life.deadline = trio.current_time() + self._limits.circuit_s
        with self._life:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._pass_on, self._near, self._far)
                nursery.start_soon(self._pass_on, self._far, self._near)
        if self._life.cancelled_caught:
            self.end(self._why)

    def end(self, code: str) -> None:
        """End both streams at once."""
        self._near.reset(code)
        self._far.reset(code)

    async def _pass_on(self, source: Stream, sink: Stream) -> None:
        rate = self._limits.bytes_a_second
        bucket = TokenBucket(rate, rate * BURST_S, trio.current_time())
        try:
            while True:
                body = inner_message(await source.receive(max_body=MAX_INNER_BYTES))
                await trio.sleep(bucket.take(max(len(body), MIN_CHARGED_BYTES), trio.current_time()))
                await self._relay.wait_turn(len(body))
                sink.send_nowait({}, [body])
                self.passed_bytes += len(body)
                await sink.wait_unsent_below(1)
        except trio.EndOfChannel:
            sink.finish()
            # An end that has finished receives nothing more either: a connection cannot be half closed.
            self._end_by(trio.current_time() + LINGER_S, "closed")
        except StreamReset as error:
            self._end_by(trio.current_time(), error.reason)
        except RemoteProtocolError as error:
            self._end_by(trio.current_time(), error.code)
        except (ConnectionLost, trio.ClosedResourceError):
            self._end_by(trio.current_time(), ConnectionLost.code)

    def _end_by(self, deadline: float, why: str) -> None:
        if deadline < self._life.deadline:
            self._why = why
            self._life.deadline = deadline
