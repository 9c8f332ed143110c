"""Both ends of a circuit, which carries a connection to a peer through a relay (spec/discovery/relay.md).

This file requests and accepts circuits; `dialler.py` and `reach/reservations.py` decide which peers may use one.
Messages that wait in the outer stream cannot be overtaken by more urgent ones, so a message is handed over only when
the one before it has been sent.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address

import trio

from peerd.net.stream import Carrier, Stream, code_of
from peerd.protocol.addresses import IpAddress
from peerd.protocol.connection.frames import Priority
from peerd.protocol.connection.liveness import Delivery
from peerd.protocol.encoding.schema import parse
from peerd.protocol.errors import ConnectFailed, ConnectionLost, PeerdError, PeerFault, RelayLost, StreamReset
from peerd.protocol.identity import PeerId
from peerd.protocol.messages.relay import (
    MAX_INNER_BYTES,
    RELAY_PROTOCOL,
    TO_CALLER,
    Accepted,
    Connect,
    Connected,
    IncomingCall,
    inner_message,
)
from peerd.protocol.messages.session import Failure

# After urgent messages between us and the relay itself, and before bulk.
CIRCUIT_PRIORITY = Priority.PREFILL


class CircuitChannel:
    """A MessageChannel over one stream to a relay, once both ends have agreed.

    far_ip: the address at which the relay says that it sees the other end; None if the relay does not say.
    """

    def __init__(self, stream: Stream, far_ip: IpAddress | None = None) -> None:
        self.far_ip = far_ip
        self._stream = stream

    def __repr__(self) -> str:
        return f"<CircuitChannel by {self._stream.peer}>"

    @property
    def relay(self) -> Carrier:
        """The connection to the relay."""
        return self._stream.connection

    @property
    def remote_ip(self) -> IPv4Address | IPv6Address | None:
        """Unknown: the relay's address is not the peer's."""
        return None

    @property
    def remote_port(self) -> int:
        """Unknown, as `remote_ip` is."""
        return 0

    def delivery(self) -> Delivery | None:
        """Unknown: our system sees only the way to the relay."""
        return None

    async def send(self, message: bytes) -> None:
        try:
            self._stream.send_nowait({}, [message])
            await self._stream.wait_unsent_below(1)
        except (PeerFault, trio.ClosedResourceError) as error:
            raise _lost(error) from None

    async def receive(self) -> bytes:
        try:
            message = await self._stream.receive(max_body=MAX_INNER_BYTES)
        except (ConnectionLost, StreamReset, trio.EndOfChannel, trio.ClosedResourceError) as error:
            raise _lost(error) from None
        return bytes(inner_message(message))

    async def aclose(self) -> None:
        await self._stream.aclose()


async def open_circuit(relay: Carrier, peer_id: PeerId, *, shows_ip: bool = False) -> CircuitChannel:
    """Ask a relay for a circuit to a peer; sets no time-out. Raises ConnectFailed with the reason.

    shows_ip: whether the relay may tell the peer our IP address.
    """
    try:
        stream = relay.open_stream(RELAY_PROTOCOL, priority=CIRCUIT_PRIORITY)
    except PeerdError as error:
        raise ConnectFailed(str(error)) from error
    try:
        await stream.send(Connect(peer_id, shows_ip).to_header(), priority=Priority.CONTROL)
        reply = parse((await stream.receive()).header, TO_CALLER)
    except BaseException as error:
        stream.reset(code_of(error))
        if isinstance(error, PeerdError | trio.EndOfChannel):
            raise ConnectFailed(f"the relay {relay.peer_id} does not answer: {error!r}") from error
        raise
    if isinstance(reply, Failure):
        stream.close()
        raise ConnectFailed(f"the relay {relay.peer_id} says: {reply.error}")
    assert isinstance(reply, Connected)
    return CircuitChannel(stream, reply.ip)


async def hear_caller(stream: Stream) -> IncomingCall:
    """The call that the relay announces on a stream which it opened. Raises RemoteProtocolError, trio.EndOfChannel."""
    return IncomingCall.from_header((await stream.receive()).header)


def take_circuit(stream: Stream, call: IncomingCall) -> CircuitChannel:
    """Accept the call: the caller may now send."""
    stream.send_nowait(Accepted().to_header(), priority=Priority.CONTROL)
    return CircuitChannel(stream, call.ip)


def _lost(error: Exception) -> ConnectionLost:
    if isinstance(error, StreamReset):
        return RelayLost(f"the circuit was ended: {error.reason}")
    if isinstance(error, PeerFault):
        return RelayLost(f"the relay is gone: {error}")
    return ConnectionLost("the circuit was closed")
