"""Dials back the peers that ask for it, and asks others to dial us (spec/discovery/reachability.md).

Here are the question, its limits and the probe; `routing/reach/verdict.py` decides what answers mean. The question
comes from strangers. So it names only ports, we dial only the address from which it came, and only once a minute for
each address. The probe uses an identity made for it, and stops when the other side has proved its PeerId, so that it
never becomes a second connection to the asking peer.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from ipaddress import IPv6Address, IPv6Network

import trio

from peerd.net.connection.peer_connection import PeerConnection
from peerd.net.dialling.prove import CONNECT_S, prove
from peerd.net.stream import Stream
from peerd.net.transport import Transport
from peerd.protocol.addresses import IpAddress, Multiaddr
from peerd.protocol.encoding.schema import parse
from peerd.protocol.errors import (
    InvalidRequest,
    Overloaded,
    RemoteProtocolError,
    Unresponsive,
    UnsupportedFeature,
)
from peerd.protocol.identity import PeerId
from peerd.protocol.messages.dialback import (
    ANSWER_DEADLINE_S,
    DIALBACK_PROTOCOL,
    Dialled,
    DialMe,
    Outcome,
    dial_address,
    may_dial,
)
from peerd.protocol.messages.session import Failure
from peerd.trio_tools import at_once, open_tasks

log = logging.getLogger(__name__)

# The least time between two dial-backs to one address.
PAUSE_S = 60.0
# Dial-backs at a time, and addresses to remember. More are refused, so that many askers cost no more than this.
MAX_AT_ONCE = 8
MAX_REMEMBERED = 4096
# The network that one host gets (RFC 4291); it may come from any address in it.
_HOST_PREFIX = 64


class DialbackAnswerer:
    """Answers streams of the dial-back protocol. `announced` returns the addresses at which we ourselves are
    announced.
    """

    def __init__(
        self, transport: Transport, announced: Callable[[], Sequence[Multiaddr]], swarm_key: bytes | None = None
    ) -> None:
        self._transport = transport
        self._announced = announced
        self._swarm_key = swarm_key
        self._running = 0
        self._last: OrderedDict[str, float] = OrderedDict()

    def __repr__(self) -> str:
        return f"<DialbackAnswerer running={self._running} remembered={len(self._last)}>"

    async def answer(self, stream: Stream) -> None:
        """Handle one stream: read a question, answer it, and end the stream."""
        with trio.move_on_after(ANSWER_DEADLINE_S):
            async with stream:
                # If the bytes are no message, this resets the stream, so there is no way to answer.
                question = await stream.receive()
                try:
                    try:
                        asked = parse(question.header, (DialMe,))
                    except RemoteProtocolError as error:
                        raise InvalidRequest(str(error)) from None
                    answer = (await self._dial_back(stream, asked)).to_header()
                except (InvalidRequest, UnsupportedFeature, Overloaded) as error:
                    answer = Failure.of(error).to_header()
                await stream.send(answer)
                stream.finish()
                await stream.wait_drained()

    async def _dial_back(self, stream: Stream, asked: DialMe) -> Dialled:
        ip = stream.connection.remote_ip
        if ip is None or not may_dial(ip, self._announced()):
            raise UnsupportedFeature(f"we dial nobody at {ip or 'an address that we cannot see'} for a stranger")
        self._admit(ip)
        self._running += 1
        try:
            probes = [partial(self._probe, dial_address(ip, port), stream.peer) for port in asked.ports]
            outcomes = tuple(await at_once(probes))
        finally:
            self._running -= 1
        log.debug("dialled %s back at %s: %s", stream.peer, ip, dict(zip(asked.ports, outcomes, strict=True)))
        return Dialled(ip, outcomes)

    def _admit(self, ip: IpAddress) -> None:
        """Count one dial-back to a host. Raises Overloaded if it is too soon or too many are running."""
        now = trio.current_time()
        while self._last and next(iter(self._last.values())) <= now - PAUSE_S:
            self._last.popitem(last=False)
        host = str(IPv6Network((ip, _HOST_PREFIX), strict=False)) if isinstance(ip, IPv6Address) else str(ip)
        if host in self._last:
            raise Overloaded(f"dialled {ip} less than {PAUSE_S:g} s ago: ask later, or ask another peer")
        if self._running >= MAX_AT_ONCE or len(self._last) >= MAX_REMEMBERED:
            raise Overloaded("dialling too many back already: ask later, or ask another peer")
        self._last[host] = now

    async def _probe(self, address: Multiaddr, peer_id: PeerId) -> Outcome:
        async with open_tasks() as tasks:
            return await prove(self._transport, address, peer_id, self._swarm_key, tasks)
        raise AssertionError("unreachable")


async def ask_to_be_dialled(connection: PeerConnection, ports: Sequence[int]) -> Dialled:
    """Ask a peer to dial our ports. Returns its results. Raises the error with which it refuses, or a PeerFault."""
    try:
        with trio.fail_after(ANSWER_DEADLINE_S + CONNECT_S):
            async with connection.open_stream(DIALBACK_PROTOCOL) as stream:
                await stream.send(DialMe(tuple(ports)).to_header())
                stream.finish()
                answer = parse((await stream.receive()).header, (Dialled, Failure))
    except trio.TooSlowError:
        raise Unresponsive(f"{connection.peer_id} did not say whether it could dial us") from None
    except trio.EndOfChannel:
        raise RemoteProtocolError(f"{connection.peer_id} finished without an answer") from None
    if isinstance(answer, Failure):
        raise answer.error
    assert isinstance(answer, Dialled)
    if len(answer.outcomes) != len(ports):
        raise RemoteProtocolError(f"{connection.peer_id} answered for {len(answer.outcomes)} ports, not {len(ports)}")
    return answer
